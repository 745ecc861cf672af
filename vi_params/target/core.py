"""Targets: what is to be approximated, a log density over named latents."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vi_params._check import explain, require_names
from vi_params._tree import pick
from vi_params.batches.batch import require_rows, row_scale, split
from vi_params.params import Latent, constrain_with_log_det, unconstrain
from vi_params.params.declare import Declared
from vi_params.sites import Site

EMPTY: Mapping[str, Any] = MappingProxyType({})


class Target(NamedTuple):
    """A log density log p(x, z; theta) over latents z, with learnable theta and data x.

    `values` stands for the constrained model parameters theta (`{}` where there are none),
    `latents` for constrained z, `u` for unconstrained z, both mappings by name. `data` may be a
    `vi.Batch`: densities and Jacobians are then unbiased estimates in which every row of a batch of
    B out of N counts N / B times, and latents with that plate have the batch's rows alone.

    Attributes:
        latents: name -> `Latent`.
        log_density: `(values, latents, data) -> scalar`, in nats.
        declared: name -> `Param`, the model's own learnable parameters.
        data: the default data, a pytree of arrays.
        plates: plate -> size.
        constrain: `(values, u, data) -> (latents, log_abs_det)`, following dynamic supports.
        unconstrain: `(values, latents, data) -> u`.
        deterministic: `(values, latents, data) -> mapping` of quantities computed from the latents.
        terms: `(values, latents, data) -> mapping` of the named terms that sum to the log density.
        start: `(strategy, key) -> u`: a start by one of numpyro's `init_to_*` strategies.
        subsample: plate -> batch size, of the plates whose rows are drawn in every step.
        streamed: plate -> batch size, of the plates whose data come from outside batch by batch:
            `data` then hold the rows of one batch, and a `vi.Batch` of them says which these are.
        see: `data -> data`: the data as the log density sees them, at a batch its rows; None where
            only the model itself knows which arrays have rows.
        sites: `(values, latents, data) -> mapping` of the `Site`s of a program, or of a plain
            density and its terms by row; None where the density is one function.
        simulate: `(values, key, data) -> (latents, data)`: a draw of both from the model, or None.
        infer_discrete: `(values, latents, key, data) -> mapping` of the discrete latents that were
            summed out: a draw, or the most probable where `key` is None. None where there are none.
        recentre: `target -> Target | None`: what `vi.recentred` gives; None where the model is not
            known site by site.
        is_recentred: whether its coordinates have a centring, as `vi.recentred` gives them.
    """

    latents: Mapping[str, Latent]
    log_density: Callable[[Any, Any, Any], jax.Array]
    declared: Declared
    data: Any
    plates: Mapping[str, int]
    constrain: Callable[[Any, Any, Any], tuple[dict[str, jax.Array], jax.Array]]
    unconstrain: Callable[[Any, Any, Any], dict[str, jax.Array]]
    deterministic: Callable[[Any, Any, Any], dict[str, jax.Array]]
    terms: Callable[[Any, Any, Any], dict[str, jax.Array]]
    start: Callable[[Any, jax.Array], dict[str, jax.Array]]
    subsample: Mapping[str, int] = EMPTY
    streamed: Mapping[str, int] = EMPTY
    see: Callable[[Any], Any] | None = None
    sites: Callable[[Any, Any, Any], dict[str, Site]] | None = None
    simulate: Callable[[Any, jax.Array, Any], tuple[Any, Any]] | None = None
    infer_discrete: Callable[[Any, Any, Any, Any], dict[str, jax.Array]] | None = None
    recentre: Callable[["Target"], "Target | None"] | None = None
    is_recentred: bool = False

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Plate -> (size, batch size), of the plates whose rows are drawn in every step."""
        return {plate: (self.plates[plate], batch) for plate, batch in self.subsample.items()}


def whole(target: Target) -> Target:
    """The target with no plate subsampled: for solvers that take full data."""
    return target._replace(subsample=EMPTY) if target.subsample else target


def build(
    log_density: Callable[[Any, Any, Any], jax.Array],
    latents: Mapping[str, Latent],
    *,
    declared: Declared,
    data: Any,
    deterministic: Callable[[Any, Any, Any], dict[str, jax.Array]],
    start: Callable[[Any, jax.Array], dict[str, jax.Array]],
    plates: Mapping[str, int] = EMPTY,
    terms: Callable[[Any, Any, Any], dict[str, jax.Array]] | None = None,
    constrain: Callable[..., Any] | None = None,
    unconstrain: Callable[..., Any] | None = None,
    subsample: Mapping[str, int] = EMPTY,
    streamed: Mapping[str, int] = EMPTY,
    see: Callable[[Any], Any] | None = None,
    sites: Callable[[Any, Any, Any], dict[str, Site]] | None = None,
    infer_discrete: Callable[..., dict[str, jax.Array]] | None = None,
) -> Target:
    """A `Target` from its parts, with checks at every trace and the maps of fixed supports."""

    def checked(values: Any, latents_: Any, data: Any) -> jax.Array:
        require_rows(data, plates, "log_density, data")
        require_draw(latents_, latents, "log_density", split(data)[1])
        value = log_density(values, latents_, data)
        if jnp.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
            raise ValueError(
                explain(
                    "A log density must be one number.",
                    expected="a floating scalar, shape ()",
                    received=f"{jnp.result_type(value)} of shape {jnp.shape(value)}",
                    where="log_density",
                    hint="sum the terms with jnp.sum",
                )
            )
        return value

    def at_known_rows(f: Callable[..., Any], where: str) -> Callable[..., Any]:
        def at(values: Any, latents_: Any, data: Any) -> Any:
            require_rows(data, plates, f"{where}, data")
            return f(values, latents_, data)

        return at

    constrain = constrain or (lambda values, u, data: _constrain(latents, u, plates))
    unconstrain = unconstrain or (lambda values, x, data: _unconstrain(latents, x))
    return Target(
        latents=dict(latents),
        log_density=checked,
        declared=declared,
        data=data,
        plates=dict(plates),
        constrain=at_known_rows(constrain, "constrain"),
        unconstrain=at_known_rows(unconstrain, "unconstrain"),
        deterministic=at_known_rows(deterministic, "deterministic"),
        terms=terms or (lambda values, x, data: {"log_density": checked(values, x, data)}),
        start=start,
        subsample=dict(subsample),
        streamed=dict(streamed),
        see=see,
        sites=sites,
        infer_discrete=infer_discrete,
    )


def require_latents(latents: Any, where: str) -> None:
    """Raises TypeError unless `latents` is a mapping from names to `Latent`."""
    wrong = not isinstance(latents, Mapping) or [
        f"{name!r}: {type(latent).__name__}"
        for name, latent in latents.items()
        if not isinstance(latent, Latent)
    ]
    if wrong:
        raise TypeError(
            explain(
                "The latents of a target must be declared.",
                expected='a mapping from names to vi.Latent, such as {"z": vi.Latent((2,))}',
                received=type(latents).__name__ if wrong is True else ", ".join(wrong),
                where=where,
            )
        )


def require_draw(
    draw: Any, latents: Mapping[str, Latent], where: str, index: Mapping[str, Any] = EMPTY
) -> None:
    """Raises unless `draw` holds exactly the declared latents, in their shapes at those rows."""
    if not isinstance(draw, Mapping):
        raise TypeError(
            explain(
                "Latents must come as a mapping.",
                expected=f"a mapping with the names {list(latents)}",
                received=type(draw).__name__,
                where=where,
            )
        )
    require_names(list(draw), list(latents), what="latents", where=where)
    for name, latent in latents.items():
        expected = shape_at(latent, index)
        if jnp.shape(draw[name]) != expected:
            local = expected != latent.shape
            raise ValueError(
                explain(
                    "A latent has the wrong shape.",
                    expected=f"shape {expected}" + (", the batch's rows" if local else ""),
                    received=f"shape {jnp.shape(draw[name])}",
                    where=f"{where}, latent {name!r}",
                    hint=f"parameters of its rows are Param(..., plates={latent.plates})"
                    if local
                    else "jax.vmap over leading axes",
                )
            )


def shape_at(latent: Latent, index: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape of a latent whose plates in `index` are reduced to those rows."""
    shape = list(latent.shape)
    for axis, plate in enumerate(latent.plates):
        if plate is not None and plate in index:
            shape[axis] = len(index[plate])
    return tuple(shape)


def _constrain(
    latents: Mapping[str, Latent], u: Mapping[str, Any], plates: Mapping[str, int]
) -> tuple[dict[str, jax.Array], jax.Array]:
    """The constrained latents and the log |det| of the map, of the rows not given estimated."""
    whole = {
        name: latent
        for name, latent in latents.items()
        if name not in u or row_scale(latent.plates, jnp.shape(u[name]), plates) == 1.0
    }
    others = [name for name in latents if name not in whole]
    if not others:
        return constrain_with_log_det(latents, u)
    found, total = constrain_with_log_det(whole, {n: x for n, x in u.items() if n not in others})
    for name in others:
        one, log_det = constrain_with_log_det({name: latents[name]}, {name: u[name]})
        found.update(one)
        total = total + row_scale(latents[name].plates, jnp.shape(u[name]), plates) * log_det
    return {name: found[name] for name in latents}, total


def _unconstrain(latents: Mapping[str, Latent], values: Mapping[str, Any]) -> dict[str, jax.Array]:
    require_names(list(values), list(latents), what="latents", where="unconstrain")
    return unconstrain(latents, pick(values, latents))
