"""A mean-field normal whose local latents have rows of their own.

Each latent in a subsampled plate has a location and a scale for every row, declared with the plate:
a step on a batch gathers, differentiates and updates the batch's rows alone. With
u = loc + scale e, e standard normal, and z = T(u) the constrained latents,

    log q = sum_global log q(z) + (N / B) sum_{rows of the batch} log q(z_i).
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import constraints

from vi_params._check import explain
from vi_params._tree import fold_in_name
from vi_params.batches.batch import row_scale
from vi_params.guide import Draw, Guide, key_noise, pick_own, sampler
from vi_params.guides.by_site import sites_of_normals
from vi_params.guides.starts import RADIUS, model_values, start_vector
from vi_params.noise import Noise
from vi_params.params import Latent, Param, constrain
from vi_params.params.rows import rows_at
from vi_params.target import Target

LOG_2PI = math.log(2 * math.pi)


def has_local(target: Target) -> bool:
    """Whether some latents have the rows of a subsampled plate."""
    return any(_axes(target, latent) for latent in target.latents.values())


def local_mean_field(target: Target, init: Any, init_scale: float, name: str) -> Guide:
    """`vi.guides.mean_field` of a target with latents in subsampled plates.

    Args:
        target: what to approximate.
        init: where the locations start, as in `mean_field`.
        init_scale: where the scales start.
        name: the name of the parameters, `{latent: {"loc": shape, "scale": shape}}`: the
            unconstrained shape, the axes of subsampled plates in front.
    """
    target = _at_all_rows(target, init)
    declared = {
        name: {
            site: {
                "loc": Param(_start(target, init, site), plates=_plates(target, latent)),
                "scale": Param(
                    jnp.full(_shape(target, latent), init_scale),
                    constraint=constraints.positive,
                    plates=_plates(target, latent),
                ),
            }
            for site, latent in target.latents.items()
        }
    }

    def moments(params: Any, data: Any) -> dict[str, tuple[jax.Array, jax.Array]]:
        """Latent -> (loc, scale) at the rows of the data, axes in the latent's order."""
        own = constrain(declared, rows_at(declared, pick_own(params, declared), data))[name]
        found = {}
        for site, latent in target.latents.items():
            axes = _axes(target, latent)
            back = tuple(range(len(axes)))
            loc, scale = own[site]["loc"], own[site]["scale"]
            found[site] = jnp.moveaxis(loc, back, axes), jnp.moveaxis(scale, back, axes)
        return found

    def weight(site: str, x: jax.Array) -> float:
        return row_scale(target.latents[site].plates, jnp.shape(x), target.plates)

    def jacobian(params: Any, u: Any, data: Any) -> Any:
        data = target.data if data is None else data
        return target.constrain(model_values(target, params), u, data)

    def noise(key: jax.Array, num_particles: int, scheme: Noise | None = None) -> jax.Array:
        if scheme is not None and not scheme.is_iid:
            raise ValueError(
                explain(
                    "The noise of latents with rows is drawn where their batch is known.",
                    expected="vi.noise.iid()",
                    received=f"vi.noise.{scheme.name}()",
                    where="vi.guides.mean_field of a target with latents in a subsampled plate",
                    hint="vi.guides.full_rank or a model without subsample_size take any scheme",
                )
            )
        return key_noise(key, num_particles)

    def standardised(params: Any, key: jax.Array, data: Any) -> dict[str, Any]:
        found = {}
        for site, (loc, scale) in moments(params, data).items():
            e = jax.random.normal(fold_in_name(key, site), loc.shape, loc.dtype)
            found[site] = loc, scale, e
        return found

    def transform(params: Any, key: jax.Array, data: Any = None) -> Draw:
        u, log_q = {}, jnp.zeros(())
        for site, (loc, scale, e) in standardised(params, key, data).items():
            u[site] = loc + scale * e
            log_q += weight(site, e) * jnp.sum(-0.5 * e**2 - 0.5 * LOG_2PI - jnp.log(scale))
        latents, log_abs_det = jacobian(params, u, data)
        return Draw(latents, log_q - log_abs_det, u)

    def density(params: Any, u: Mapping[str, jax.Array], data: Any) -> jax.Array:
        total = jnp.zeros(())
        for site, (loc, scale) in moments(params, data).items():
            e = (u[site] - loc) / scale
            total += weight(site, e) * jnp.sum(-0.5 * e**2 - 0.5 * LOG_2PI - jnp.log(scale))
        return total

    def log_prob(params: Any, latents: Any, data: Any = None) -> jax.Array:
        given = target.data if data is None else data
        u = target.unconstrain(model_values(target, params), latents, given)
        return density(params, u, data) - jacobian(params, u, data)[1]

    def rescore(params: Any, draw: Draw, data: Any = None) -> jax.Array:
        return density(params, draw.position, data) - jacobian(params, draw.position, data)[1]

    def entropy(params: Any, draw: Draw, data: Any = None) -> jax.Array:
        total = jacobian(params, draw.position, data)[1]
        for site, (_, scale) in moments(params, data).items():
            total += weight(site, scale) * jnp.sum(0.5 + 0.5 * LOG_2PI + jnp.log(scale))
        return total

    return Guide(
        declared=declared,
        sample=sampler(noise, transform),
        log_prob=log_prob,
        rescore=rescore,
        noise=noise,
        transform=transform,
        entropy=entropy,
        sites=sites_of_normals(target, standardised),
    )


def _axes(target: Target, latent: Latent) -> tuple[int, ...]:
    """The axes of a latent that subsampled plates index."""
    local = {*target.subsample, *target.streamed}
    return tuple(axis for axis, plate in enumerate(latent.plates) if plate in local)


def _at_all_rows(target: Target, init: Any) -> Target:
    """The target with latents of all rows, where it has those of a batch from outside."""
    whole = {}
    for site, latent in target.latents.items():
        n = [target.plates[str(p)] if p in target.streamed else None for p in latent.plates]
        if any(n) and (latent.is_dynamic or callable(init)):
            raise ValueError(
                explain(
                    "Only a batch of this latent's rows can be seen at a time.",
                    expected="init=None or a mapping, and a support that depends on nothing",
                    received="init_to_..." if callable(init) else "a support that depends on more",
                    where=f"vi.guides.mean_field, latent {site!r}",
                )
            )
        shapes = [latent.shape, latent.unconstrained_shape or ()]
        filled = [
            tuple(size or old for size, old in itertools.zip_longest(n, shape)) for shape in shapes
        ]
        whole[site] = dataclasses.replace(latent, shape=filled[0], unconstrained_shape=filled[1])
    return target._replace(latents=whole) if target.streamed else target


def _plates(target: Target, latent: Latent) -> tuple[str, ...]:
    return tuple(str(latent.plates[axis]) for axis in _axes(target, latent))


def _shape(target: Target, latent: Latent) -> tuple[int, ...]:
    """The unconstrained shape with the axes of subsampled plates in front."""
    shape, axes = latent.unconstrained_shape or (), _axes(target, latent)
    rest = [n for axis, n in enumerate(shape) if axis not in axes]
    return (*(shape[axis] for axis in axes), *rest)


def _start(target: Target, init: Any, site: str) -> Callable[[jax.Array], jax.Array]:
    """The start of a latent's location: uniform, or its part of what `init` says."""
    latent = target.latents[site]
    axes, shape = _axes(target, latent), _shape(target, latent)
    if init is None:
        return lambda key: jax.random.uniform(key, shape, minval=-RADIUS, maxval=RADIUS)
    whole = start_vector(target, init)
    sizes = [math.prod(x.unconstrained_shape or ()) for x in target.latents.values()]
    first = int(np.cumsum([0, *sizes])[list(target.latents).index(site)])
    size, own = math.prod(shape), latent.unconstrained_shape or ()

    def start(key: jax.Array) -> jax.Array:
        part = whole(key)[first : first + size].reshape(own)
        return jnp.moveaxis(part, axes, tuple(range(len(axes))))

    return start
