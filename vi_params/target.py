"""Targets: what is to be approximated, a log density over named latents."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpyro import distributions as dist

from vi_params._check import explain, require_instance, require_names
from vi_params._tree import fold_in_name, pick, strong
from vi_params.params import Latent, constrain_with_log_det, unconstrain
from vi_params.params.declare import Declared, normalise
from vi_params.sites import Site

EMPTY: Mapping[str, Any] = MappingProxyType({})


class Target(NamedTuple):
    """A log density log p(x, z; theta) over latents z, with learnable theta and data x.

    `values` stands for the constrained model parameters theta (`{}` where there are none),
    `latents` for constrained z, `u` for unconstrained z, both mappings by name.

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
        sites: `(values, latents, data) -> mapping` of the `Site`s of a program; None where the
            density is one function.
        simulate: `(values, key, data) -> (latents, data)`: a draw of both from the model, or None.
        infer_discrete: `(values, latents, key, data) -> mapping` of the discrete latents that were
            summed out: a draw, or the most probable where `key` is None. None where there are none.
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
    sites: Callable[[Any, Any, Any], dict[str, Site]] | None = None
    simulate: Callable[[Any, jax.Array, Any], tuple[Any, Any]] | None = None
    infer_discrete: Callable[[Any, Any, Any, Any], dict[str, jax.Array]] | None = None


def target(
    log_density: Callable[[Any, Any, Any], jax.Array],
    latents: Mapping[str, Latent],
    *,
    declared: Declared = EMPTY,
    data: Any = None,
    deterministic: Callable[[Any, Any, Any], dict[str, jax.Array]] | None = None,
) -> Target:
    """A target from a log density written in plain JAX.

    Args:
        log_density: `(values, latents, data) -> scalar`: pure; `values` the constrained model
            parameters, `latents` the constrained latents by name. It may be unnormalised.
        latents: name -> `Latent(shape, support)`.
        declared: name -> `Param`, learnable parameters of the model (point estimates).
        data: a pytree of arrays, handed to `log_density` as an argument, never baked in.
        deterministic: `(values, latents, data) -> mapping`: quantities to report with the draws.

    Returns:
        A `Target`.

    Raises:
        TypeError: `latents` is not a mapping of `Latent`.
        KeyError: at a call: latents are missing or unknown.
        ValueError: at a call: a latent's shape differs, or the log density is not a scalar.

    Example:
        >>> def log_density(values, latents, data):
        ...     return -0.5 * jnp.sum((latents["z"] - data) ** 2)
        >>> target = vi.target(log_density, {"z": vi.Latent((2,))}, data=jnp.array([1.0, 2.0]))
        >>> target.log_density({}, {"z": jnp.zeros(2)}, target.data)
        Array(-2.5, dtype=float32)
    """
    require_latents(latents, "vi.target")
    if any(latent.is_dynamic for latent in latents.values()):
        raise ValueError(
            explain(
                "A plain target needs supports that are known beforehand.",
                expected="a constraint with a bijector for every latent",
                received="constraints.dependent",
                where="vi.target",
                hint="write the model as a NumPyro program, or reparameterise",
            )
        )
    return build(
        log_density,
        latents,
        declared=normalise(declared),
        data=jax.tree.map(strong, data),
        deterministic=deterministic or (lambda values, latents, data: {}),
        start=lambda strategy, key: _plain_start(latents, strategy, key),
    )


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
    sites: Callable[[Any, Any, Any], dict[str, Site]] | None = None,
    infer_discrete: Callable[..., dict[str, jax.Array]] | None = None,
) -> Target:
    """A `Target` from its parts, with checks at every trace and the maps of fixed supports."""

    def checked(values: Any, latents_: Any, data: Any) -> jax.Array:
        require_draw(latents_, latents, "log_density")
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

    return Target(
        latents=dict(latents),
        log_density=checked,
        declared=declared,
        data=data,
        plates=dict(plates),
        constrain=constrain or (lambda values, u, data: constrain_with_log_det(latents, u)),
        unconstrain=unconstrain or (lambda values, x, data: _unconstrain(latents, x)),
        deterministic=deterministic,
        terms=terms or (lambda values, x, data: {"log_density": checked(values, x, data)}),
        start=start,
        sites=sites,
        infer_discrete=infer_discrete,
    )


class FlatTarget(NamedTuple):
    """A target over one unconstrained vector, the Jacobian included.

    Attributes:
        dim: the length of the vector.
        log_density: `(u, values={}, data=default) -> scalar`: log p at the constrained latents plus
            log |det| of the map to them.
        constrain: `(u, values={}, data=default) -> latents`.
        unconstrain: `(latents, values={}, data=default) -> u`.
        constrain_with_log_det: `(u, values={}, data=default) -> (latents, log_abs_det)`.
    """

    dim: int
    log_density: Callable[..., jax.Array]
    constrain: Callable[..., dict[str, jax.Array]]
    unconstrain: Callable[..., jax.Array]
    constrain_with_log_det: Callable[..., tuple[dict[str, jax.Array], jax.Array]]


def flat(target: Target) -> FlatTarget:
    """The target's density over one unconstrained vector of all latents, in order.

    What Gaussian families, solvers and the samplers of other packages use.

    Args:
        target: any target.

    Returns:
        A `FlatTarget`.

    Raises:
        ValueError: a latent is discrete.

    Example:
        >>> from numpyro.distributions import constraints
        >>> latents = {"rate": vi.Latent((), constraints.positive), "z": vi.Latent((2,))}
        >>> flat = vi.flat(vi.target(lambda v, z, d: -z["rate"] - jnp.sum(z["z"] ** 2), latents))
        >>> flat.dim, flat.constrain(jnp.zeros(3))
        (3, {'rate': Array(1., dtype=float32), 'z': Array([0., 0.], dtype=float32)})
    """
    require_instance(target, Target, "vi.target or vi.from_numpyro", "target")
    discrete = [name for name, latent in target.latents.items() if latent.is_discrete]
    if discrete:
        raise ValueError(
            explain(
                "A discrete latent has no unconstrained coordinates.",
                expected="continuous latents",
                received=f"discrete ones: {discrete}",
                where="families of vi.guides, solvers, vi.flat",
                hint="sum it out with vi.from_numpyro(..., enumerate=True); or a guide by hand "
                "with vi.elbo(..., estimator=vi.estimators.mixed()); or obs= if it is data",
            )
        )
    dim = sum(_sizes(target))

    def split(u: jax.Array) -> dict[str, jax.Array]:
        return split_vector(target, u)

    def both(u: jax.Array, values: Any = EMPTY, data: Any = None) -> Any:
        return target.constrain(values, split(u), target.data if data is None else data)

    def log_density(u: jax.Array, values: Any = EMPTY, data: Any = None) -> jax.Array:
        data = target.data if data is None else data
        latents, log_abs_det = both(u, values, data)
        return target.log_density(values, latents, data) + log_abs_det

    def unflatten(latents: Any, values: Any = EMPTY, data: Any = None) -> jax.Array:
        u = target.unconstrain(values, latents, target.data if data is None else data)
        return ravel({name: u[name] for name in target.latents})

    return FlatTarget(
        dim=dim,
        log_density=log_density,
        constrain=lambda u, values=EMPTY, data=None: both(u, values, data)[0],
        unconstrain=unflatten,
        constrain_with_log_det=both,
    )


def split_vector(target: Target, u: jax.Array) -> dict[str, jax.Array]:
    """The unconstrained latents by name, out of one vector."""
    sizes = _sizes(target)
    if jnp.shape(u) != (sum(sizes),):
        raise ValueError(
            explain(
                "The unconstrained vector has the wrong shape.",
                expected=f"shape ({sum(sizes)},)",
                received=f"shape {jnp.shape(u)}",
                where="vi.flat",
                hint="jax.vmap over leading axes",
            )
        )
    parts = lax.split(jnp.asarray(u), sizes) if sizes else []
    shapes = (latent.unconstrained_shape or () for latent in target.latents.values())
    return {
        name: part.reshape(shape)
        for name, part, shape in zip(target.latents, parts, shapes, strict=True)
    }


def _sizes(target: Target) -> list[int]:
    """How many unconstrained numbers each latent takes."""
    shapes = (latent.unconstrained_shape or () for latent in target.latents.values())
    return [int(np.prod(shape, dtype=int)) for shape in shapes]


def ravel(u: Mapping[str, jax.Array]) -> jax.Array:
    """The unconstrained latents as one vector, in the mapping's order."""
    return jnp.concatenate([jnp.zeros(0), *(jnp.ravel(part) for part in u.values())])


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


def require_draw(draw: Any, latents: Mapping[str, Latent], where: str) -> None:
    """Raises unless `draw` holds exactly the declared latents, in their shapes."""
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
        if jnp.shape(draw[name]) != latent.shape:
            raise ValueError(
                explain(
                    "A latent has the wrong shape.",
                    expected=f"shape {latent.shape}",
                    received=f"shape {jnp.shape(draw[name])}",
                    where=f"{where}, latent {name!r}",
                    hint="jax.vmap over leading axes",
                )
            )


def _unconstrain(latents: Mapping[str, Latent], values: Mapping[str, Any]) -> dict[str, jax.Array]:
    require_names(list(values), list(latents), what="latents", where="unconstrain")
    return unconstrain(latents, pick(values, latents))


def _plain_start(
    latents: Mapping[str, Latent], strategy: Callable[[Any], Any], key: jax.Array
) -> dict[str, jax.Array]:
    """A start by a numpyro strategy, each latent shown to it as a site with a flat prior."""
    start = {}
    for name, latent in latents.items():
        event = latent.shape[len(latent.shape) - latent.support.event_dim :]
        batch = latent.shape[: len(latent.shape) - latent.support.event_dim]
        site = {
            "type": "sample",
            "name": name,
            "fn": dist.ImproperUniform(latent.support, batch, event),
            "value": None,
            "is_observed": False,
            "args": (),
            "kwargs": {"rng_key": fold_in_name(key, name), "sample_shape": ()},
            "infer": {},
        }
        start[name] = strategy(site)
    return unconstrain(latents, start)
