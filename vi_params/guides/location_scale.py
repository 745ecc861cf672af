"""Families of a location and a scale over one flat unconstrained vector.

u = loc + C x, x of a fixed distribution p about zero, and z = T(u) the constrained latents, so that

    log q(z) = log p(x) - log |det C| - log |det T'(u)|.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vi_params._check import explain, require_positive
from vi_params.guide import Draw, Guide, pick_own, sampler
from vi_params.guides.starts import model_values
from vi_params.noise import Noise, iid, whole_rows
from vi_params.params import constrain
from vi_params.params.declare import Declared
from vi_params.target import Target, flat


class Scale(NamedTuple):
    """The linear map C of a Gaussian: its action, its inverse's, and its log-determinant."""

    times: Callable[[Any, jax.Array], jax.Array]
    solve: Callable[[Any, jax.Array], jax.Array]
    log_det: Callable[[Any], jax.Array]


DIAGONAL = Scale(
    times=lambda own, e: own["scale"] * e,
    solve=lambda own, x: x / own["scale"],
    log_det=lambda own: jnp.sum(jnp.log(own["scale"])),
)

TRIANGULAR = Scale(
    times=lambda own, e: own["scale_tril"] @ e,
    solve=lambda own, x: jax.scipy.linalg.solve_triangular(own["scale_tril"], x, lower=True),
    log_det=lambda own: jnp.sum(jnp.log(jnp.diagonal(own["scale_tril"]))),
)


class Base(NamedTuple):
    """The distribution of x, in dim dimensions.

    Attributes:
        noise: `(key, num_particles, dim, scheme) -> noise`, leading axis the particles.
        place: `(one piece of noise, dim) -> x`.
        log_density: `x -> log p(x)`.
        entropy: `dim -> -E log p(x)`, where that is known.
    """

    noise: Callable[[jax.Array, int, int, Noise | None], Any]
    place: Callable[[Any, int], jax.Array]
    log_density: Callable[[jax.Array], jax.Array]
    entropy: Callable[[int], float] | None = None


def _normal_noise(
    key: jax.Array, num_particles: int, dim: int, scheme: Noise | None = None
) -> jax.Array:
    scheme = scheme or iid()
    # A single draw keeps its whole row, of which `place` takes the first `dim`.
    width = whole_rows(dim) if scheme.is_iid and num_particles == 1 else dim
    return scheme.draw(key, num_particles, width)


NORMAL = Base(
    noise=_normal_noise,
    place=lambda e, dim: e[:dim],
    log_density=lambda x: -0.5 * (jnp.sum(x**2) + x.size * math.log(2 * math.pi)),
    entropy=lambda dim: 0.5 * dim * (1 + math.log(2 * math.pi)),
)
"""Standard normal."""


def location_scale(
    target: Target, declared: Declared, name: str, scale: Scale, base: Base = NORMAL
) -> Guide:
    """The family of a location, `own["loc"]`, and a linear map."""
    flat_target = flat(target)
    dim = flat_target.dim
    of_base = base.entropy(dim) if base.entropy else math.nan

    def own_values(params: Any) -> Any:
        return constrain(declared, pick_own(params, declared))[name]

    def noise(key: jax.Array, num_particles: int, scheme: Noise | None = None) -> Any:
        return base.noise(key, num_particles, dim, scheme)

    def jacobian(params: Any, u: jax.Array, data: Any) -> Any:
        return flat_target.constrain_with_log_det(u, model_values(target, params), data)

    def transform(params: Any, one: Any, data: Any = None) -> Draw:
        own, x = own_values(params), base.place(one, dim)
        u = own["loc"] + scale.times(own, x)
        latents, log_abs_det = jacobian(params, u, data)
        log_q = base.log_density(x) - scale.log_det(own)
        return Draw(latents, log_q - log_abs_det, u)

    def density(params: Any, u: jax.Array) -> jax.Array:
        own = own_values(params)
        return base.log_density(scale.solve(own, u - own["loc"])) - scale.log_det(own)

    def log_prob(params: Any, latents: Any, data: Any = None) -> jax.Array:
        u = flat_target.unconstrain(latents, model_values(target, params), data)
        return density(params, u) - jacobian(params, u, data)[1]

    def rescore(params: Any, draw: Draw, data: Any = None) -> jax.Array:
        return density(params, draw.position) - jacobian(params, draw.position, data)[1]

    def entropy(params: Any, draw: Draw, data: Any = None) -> jax.Array:
        exact = of_base + scale.log_det(own_values(params))
        return exact + jacobian(params, draw.position, data)[1]

    return Guide(
        declared=declared,
        sample=sampler(noise, transform),
        log_prob=log_prob,
        rescore=rescore,
        noise=noise,
        transform=transform,
        entropy=None if base.entropy is None else entropy,
    )


def positive(init_scale: float) -> float:
    """The scale, checked."""
    require_positive(init_scale, "init_scale", "vi.guides, init_scale")
    return init_scale


def require_gaussian(own: Any, where: str) -> tuple[jax.Array, jax.Array]:
    """The location and a triangle whose square is the covariance, of the constrained parameters of
    `mean_field`, `full_rank` or `low_rank`."""
    names = set(own) if isinstance(own, Mapping) else set()
    if names == {"loc", "scale_tril"}:
        return own["loc"], own["scale_tril"]
    if names == {"loc", "scale"}:
        return own["loc"], jnp.diag(own["scale"])
    if names == {"loc", "scale", "factor"}:
        scale = own["scale"]
        factor = scale[:, None] * own["factor"]
        return own["loc"], jnp.linalg.cholesky(jnp.diag(scale**2) + factor @ factor.T)
    raise ValueError(
        explain(
            "A Gaussian approximation was expected.",
            expected="one by vi.guides.mean_field, full_rank or low_rank, as the solvers return",
            received=f"parameters {sorted(names)}" if names else type(own).__name__,
            where=where,
        )
    )
