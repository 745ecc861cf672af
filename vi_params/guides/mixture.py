"""Mixtures of elliptical distributions over one flat unconstrained vector.

    q(u) = sum_k w_k t(u; loc_k, C_k C_k', df),   Student's t, or the normal where df is infinite.

What importance sampling wants where one Gaussian cannot follow a posterior's shape.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import constraints

from vi_params._arrays import in_turn, inverse_lower, logsumexp
from vi_params._check import require_count
from vi_params.guide import Draw, Guide, pick_own, sampler
from vi_params.guides.location_scale import positive
from vi_params.guides.starts import model_values, require_whole_plates, start_vector
from vi_params.noise import Noise, iid
from vi_params.params import Param, constrain
from vi_params.target import Target, flat


class Components(NamedTuple):
    """The parts of a mixture, arrays of JAX or on the host.

    Attributes:
        weights: shape (K,), on the simplex.
        locs: shape (K, dim).
        scale_trils: shape (K, dim, dim), lower triangular.
    """

    weights: Any
    locs: Any
    scale_trils: Any


def mixture(
    target: Target,
    num_components: int,
    *,
    df: int | None = None,
    init: Any = None,
    init_scale: float = 0.1,
    name: str = "guide",
) -> Guide:
    """A mixture of multivariate normal or Student-t distributions in unconstrained coordinates.

    Its draws have no gradient with respect to its parameters (which component a draw comes from
    does not change smoothly): what fits it are `vi.solvers.population_monte_carlo`, `vi.merge` and
    objectives that differentiate log q alone.

    Args:
        target: what to approximate.
        num_components: how many, K.
        df: degrees of freedom, a whole number; None for normal components.
        init: where the locations start, as in `vi.guides.mean_field`; each from a key of its own.
        init_scale: where the scales start, a positive number in unconstrained units.
        name: the name of the parameters `{"weights": (K,), "locs": (K, dim),
            "scale_trils": (K, dim, dim)}`.

    Returns:
        A `Guide`.

    Raises:
        ValueError: `num_components` or `df` is not a positive whole number, `init_scale` is not
            positive, or a start lies outside its support.
        KeyError: `init` names an unknown latent.

    Example:
        >>> target = vi.target(lambda v, z, d: -0.5 * jnp.sum(z["z"] ** 2), {"z": vi.Latent((2,))})
        >>> guide = vi.guides.mixture(target, 3, df=7)
        >>> params = vi.init_params(guide.declared, jax.random.key(0))
        >>> guide.sample(params, jax.random.key(1)).latents["z"].shape
        (2,)
    """
    require_whole_plates(target, "vi.guides.mixture")
    require_count(num_components, "num_components", "guides.mixture")
    if df is not None:
        require_count(df, "df", "guides.mixture")
    flat_target = flat(target)
    dim = flat_target.dim
    start = start_vector(target, init)
    scale_trils = positive(init_scale) * np.tile(np.eye(dim), (num_components, 1, 1))
    declared = {
        name: {
            "weights": Param(
                np.full(num_components, 1 / num_components), constraint=constraints.simplex
            ),
            "locs": Param(lambda key: jax.vmap(start)(jax.random.split(key, num_components))),
            "scale_trils": Param(scale_trils, constraint=constraints.lower_cholesky),
        }
    }

    def components(params: Any) -> Components:
        return Components(**constrain(declared, pick_own(params, declared))[name])

    def noise(key: jax.Array, num_particles: int, scheme: Noise | None = None) -> Any:
        return mixture_noise(key, num_particles, dim, df, scheme)

    def jacobian(params: Any, u: jax.Array, data: Any) -> Any:
        return flat_target.constrain_with_log_det(u, model_values(target, params), data)

    def transform(params: Any, one: Any, data: Any = None) -> Draw:
        own = components(params)
        u = jax.lax.stop_gradient(at_noise(own, one, df))
        latents, log_abs_det = jacobian(params, u, data)
        return Draw(latents, log_prob_of(own, u, df) - log_abs_det, u)

    def log_prob(params: Any, latents: Any, data: Any = None) -> jax.Array:
        u = flat_target.unconstrain(latents, model_values(target, params), data)
        return log_prob_of(components(params), u, df) - jacobian(params, u, data)[1]

    def rescore(params: Any, draw: Draw, data: Any = None) -> jax.Array:
        log_q = log_prob_of(components(params), draw.position, df)
        return log_q - jacobian(params, draw.position, data)[1]

    return Guide(
        declared=declared,
        sample=sampler(noise, transform),
        log_prob=log_prob,
        rescore=rescore,
        noise=noise,
        transform=transform,
        is_reparameterised=False,
    )


def mixture_noise(
    key: jax.Array, num_particles: int, dim: int, df: int | None, scheme: Noise | None = None
) -> dict[str, jax.Array]:
    """What draws of a mixture are made at: a uniform number chooses the component, normal ones the
    place within it, a chi-square one stretches it."""
    keys = jax.random.split(key, 3)
    noise = {
        "component": jax.random.uniform(keys[0], (num_particles,)),
        "normal": (scheme or iid()).draw(keys[1], num_particles, dim),
    }
    if df is not None:
        noise["chi_square"] = jnp.sum(jax.random.normal(keys[2], (num_particles, df)) ** 2, axis=1)
    return noise


def at_noise(components: Components, noise: Any, df: int | None) -> jax.Array:
    """The unconstrained vector of one piece of noise."""
    k = component_of(components, noise)
    e = noise["normal"]
    if df is not None:
        e = e * jnp.sqrt(df / noise["chi_square"])
    return components.locs[k] + components.scale_trils[k] @ e


def component_of(components: Components, noise: Any) -> jax.Array:
    """Which component one piece of noise chooses."""
    edges = jnp.cumsum(components.weights)
    return jnp.sum(noise["component"] * edges[-1] >= edges[:-1])


def log_prob_of(components: Components, u: jax.Array, df: int | None) -> jax.Array:
    """log q(u)."""
    return logsumexp(log_terms(components, u, df))


def log_terms(components: Components, u: Any, df: int | None, xp: Any = jnp) -> Any:
    """The components' shares log [w_k q_k(u)], shape (K,), or (K, n) of n rows u."""
    dim = u.shape[-1]

    def one(part: tuple) -> Any:
        loc, scale_tril, inverse = part
        squared = xp.sum(((u - loc) @ inverse.T) ** 2, axis=-1)
        log_det = xp.sum(xp.log(xp.diagonal(scale_tril)))
        return log_elliptical(squared, dim, df, xp) - log_det

    # The inverse once a component: over many u a product is far cheaper than as many solves. One
    # component after the other, so that the draws themselves may be side by side (`over`).
    inverses = in_turn(lambda root: inverse_lower(root, xp), components.scale_trils, xp)
    parts = components.locs, components.scale_trils, inverses
    log_q = jax.vmap(one)(parts) if xp is jnp else in_turn(one, parts, xp)
    return (log_weights(components.weights, xp) + log_q.T).T


def log_elliptical(squared: Any, dim: int, df: int | None, xp: Any = jnp) -> Any:
    """The log density of a standard normal or Student-t vector of squared length `squared`."""
    if df is None:
        return -0.5 * (squared + dim * math.log(2 * math.pi))
    constant = math.lgamma(0.5 * (df + dim)) - math.lgamma(0.5 * df)
    constant -= 0.5 * dim * math.log(df * math.pi)
    return constant - 0.5 * (df + dim) * xp.log1p(squared / df)


def log_weights(weights: Any, xp: Any = jnp) -> Any:
    """Their logarithms; -inf where one is zero."""
    positive = weights > 0
    return xp.where(positive, xp.log(xp.where(positive, weights, 1.0)), -xp.inf)
