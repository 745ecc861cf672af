"""A target over one unconstrained vector."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vi_params._check import explain, require_instance
from vi_params.batches.batch import split as split_batch
from vi_params.batches.batch import take_axes
from vi_params.target.core import EMPTY, Target


class FlatTarget(NamedTuple):
    """A target over one unconstrained vector, the Jacobian included.

    At a `vi.Batch` the vector is that of all latents still, and all results are those of the
    batch's rows.

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

    def both(u: jax.Array, values: Any = EMPTY, data: Any = None) -> Any:
        data = target.data if data is None else data
        index = split_batch(data)[1]
        parts = {
            name: take_axes(part, target.latents[name].plates, index)
            for name, part in split_vector(target, u).items()
        }
        return target.constrain(values, parts, data)

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
