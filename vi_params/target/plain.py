"""Targets from log densities written in plain JAX."""

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from numpyro import distributions as dist

from vi_params._check import Failure, explain, listed
from vi_params._tree import fold_in_name
from vi_params.params import Latent, unconstrain
from vi_params.params.declare import Declared, normalise
from vi_params.params.rows import plates_of, rows_at
from vi_params.sites import Site, plate_axes
from vi_params.target.core import EMPTY, Target, build, require_latents
from vi_params.target.minibatch import Rows, gather, require_plates, unmark

PerRow = Callable[[Any, Any, Any], jax.Array]


def target(
    log_density: Callable[..., jax.Array],
    latents: Mapping[str, Latent],
    *,
    per_row: PerRow | Mapping[Any, PerRow] | None = None,
    declared: Declared = EMPTY,
    data: Any = None,
    deterministic: Callable[[Any, Any, Any], dict[str, jax.Array]] | None = None,
) -> Target:
    """A target from a log density written in plain JAX.

    Minibatches: parts of `data` marked by `vi.minibatch` are seen a batch of rows at a time, and so
    are latents and parameters declared with that plate. For the density to stay unbiased it is
    either split,

        log p = log_density(...) + (N / B) sum_i per_row(...)_i,

    or it takes a fourth argument `scale`, the mapping plate -> N / B, and applies it itself.

    Args:
        log_density: `(values, latents, data) -> scalar`: pure; `values` the constrained model
            parameters, `latents` the constrained latents by name. It may be unnormalised. One that
            takes four arguments gets `scale` as well.
        latents: name -> `Latent(shape, support, plates=)`, the shape with all rows of its plates.
        per_row: `(values, latents, data) -> array of shape (batch,)`, the terms of the rows; or a
            mapping from plates (tuples of them for shapes of several axes) to such functions.
        declared: name -> `Param`, learnable parameters of the model (point estimates).
        data: a pytree of arrays, handed to `log_density` as an argument, never baked in.
        deterministic: `(values, latents, data) -> mapping`: quantities to report with the draws.

    Returns:
        A `Target`.

    Raises:
        TypeError: `latents` is not a mapping of `Latent`.
        KeyError: `per_row` names an unknown plate; at a call: latents are missing or unknown.
        ValueError: data are seen in batches but nothing says what to scale, or a leading axis is
            not its plate's size; at a call: a latent's shape differs, the log density is not a
            scalar, the terms of the rows are not one a row.

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
    declared = normalise(declared)
    data, rows = unmark(data)
    require_plates({n: (x.plates, x.shape) for n, x in latents.items()}, rows.sizes, "latents")
    require_plates(plates_of(declared), rows.sizes, "declared")
    latents = {name: _of_a_batch(latent, rows.streamed) for name, latent in latents.items()}
    scaled = _takes_scale(log_density)
    parts = _parts(per_row, rows, scaled)

    def sites(values: Any, latents: Any, data: Any) -> dict[str, Site]:
        values = rows_at(declared, values, data)
        seen, scale = gather(rows, data)
        total = log_density(values, latents, seen, *([scale] if scaled else []))
        found = {"log_density": Site(None, total, None, {}, is_observed=True)}
        for plates, f in parts.items():
            each = _one_a_row(f(values, latents, seen), plates, rows, scale)
            axes = plate_axes(plates, len(plates))
            factor = math.prod(scale[plate] for plate in plates)
            found[", ".join(plates)] = Site(None, each, None, axes, factor, is_observed=True)
        return found

    def terms(values: Any, latents: Any, data: Any) -> dict[str, jax.Array]:
        found = sites(values, latents, data)
        return {
            name: site.scale * jnp.sum(site.log_prob) if site.plates else site.log_prob
            for name, site in found.items()
        }

    def joint(values: Any, latents: Any, data: Any) -> jax.Array:
        first, *rest = terms(values, latents, data).values()
        return sum(rest, start=first)

    def report(values: Any, latents: Any, data: Any) -> dict[str, jax.Array]:
        if deterministic is None:
            return {}
        return deterministic(rows_at(declared, values, data), latents, gather(rows, data)[0])

    return build(
        joint,
        latents,
        declared=declared,
        data=data,
        deterministic=report,
        start=lambda strategy, key: _plain_start(latents, strategy, key),
        plates=rows.sizes,
        subsample=rows.subsample,
        streamed=rows.streamed,
        terms=terms,
        see=lambda data: gather(rows, data)[0],
        sites=sites if parts else None,
    )


def _of_a_batch(latent: Latent, streamed: Mapping[str, int]) -> Latent:
    """A latent as the target sees it: of plates fed from outside, a batch's rows."""
    leading = [streamed.get(p or "", n) for p, n in zip(latent.plates, latent.shape, strict=False)]
    shape = (*leading, *latent.shape[len(leading) :])
    if shape == latent.shape:
        return latent
    return dataclasses.replace(latent, shape=shape, unconstrained_shape=None)


def _takes_scale(log_density: Callable[..., Any]) -> bool:
    """Whether a log density has a fourth argument without a default."""
    try:
        parameters = inspect.signature(log_density).parameters.values()
    except ValueError:  # a callable that does not tell
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is p.empty for p in parameters) == 4


def _parts(
    per_row: PerRow | Mapping[Any, PerRow] | None, rows: Rows, scaled: bool
) -> dict[tuple[str, ...], PerRow]:
    """The terms of the rows, by the plates that they have."""
    if per_row is None and {**rows.subsample, **rows.streamed} and not scaled:
        raise ValueError(
            explain(
                "The data are seen in batches, but nothing says what of the log density to scale.",
                expected="per_row=, the terms of the rows, or a log_density of four arguments",
                received="log_density(values, latents, data) alone",
                where=f"vi.target, plate {listed({**rows.subsample, **rows.streamed})}",
                hint="move the likelihood into per_row: it is multiplied by N / B and summed",
            )
        )
    if per_row is None:
        return {}
    if not isinstance(per_row, Mapping):
        if len(rows.sizes) != 1:
            raise ValueError(
                explain(
                    "per_row must say which plate its terms have.",
                    expected="one plate, marked by vi.minibatch, or a mapping plate -> function",
                    received=f"plates {listed(rows.sizes)}",
                    where="vi.target, per_row",
                )
            )
        return {tuple(rows.sizes): per_row}
    parts = {(key,) if isinstance(key, str) else tuple(key): f for key, f in per_row.items()}
    unknown = [plate for plates in parts for plate in plates if plate not in rows.sizes]
    if unknown:
        raise Failure(
            explain(
                "per_row names an unknown plate.",
                expected=listed(rows.sizes),
                received=listed(unknown),
                where="vi.target, per_row",
                hint='mark its data: vi.minibatch(x, 100, plate="...")',
            )
        )
    return parts


def _one_a_row(
    each: Any, plates: tuple[str, ...], rows: Rows, scale: Mapping[str, float]
) -> jax.Array:
    """The terms of the rows, checked to be one for every row of the batch."""
    expected = tuple(round(rows.sizes[plate] / scale[plate]) for plate in plates)
    if jnp.shape(each) != expected:
        raise ValueError(
            explain(
                "per_row must give one term a row.",
                expected=f"an array of shape {expected}",
                received=f"shape {jnp.shape(each)}",
                where=f"vi.target, per_row, plate {listed(plates)}",
                hint="sum over the other axes, and not over the rows",
            )
        )
    return each


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
