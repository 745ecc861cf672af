"""Gaussian families over one flat unconstrained vector.

u = loc + C e with e ~ N(0, I), and z = T(u) the constrained latents, so that

    log q(z) = log N(e; 0, I) - log |det C| - log |det T'(u)|.

One array of noise a draw, one leaf for the optimiser where the covariance allows it.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import constraints

from vi_params._check import explain, require_instance
from vi_params.batches.batch import split, take_axes
from vi_params.guide import Draw, Guide, pick_own, sampler
from vi_params.guides.by_site import sites_of_normals
from vi_params.guides.local import has_local, local_mean_field
from vi_params.guides.starts import model_values, require_whole_plates, start_vector
from vi_params.noise import Noise, iid, whole_rows
from vi_params.params import Param, constrain
from vi_params.params.declare import Declared
from vi_params.target import Target, flat, split_vector


class Scale(NamedTuple):
    """The linear map C of a Gaussian: its action, its inverse's, and its log-determinant."""

    times: Callable[[Any, jax.Array], jax.Array]
    solve: Callable[[Any, jax.Array], jax.Array]
    log_det: Callable[[Any], jax.Array]


_DIAGONAL = Scale(
    times=lambda own, e: own["scale"] * e,
    solve=lambda own, x: x / own["scale"],
    log_det=lambda own: jnp.sum(jnp.log(own["scale"])),
)

_TRIANGULAR = Scale(
    times=lambda own, e: own["scale_tril"] @ e,
    solve=lambda own, x: jax.scipy.linalg.solve_triangular(own["scale_tril"], x, lower=True),
    log_det=lambda own: jnp.sum(jnp.log(jnp.diagonal(own["scale_tril"]))),
)


def mean_field(
    target: Target, *, init: Any = None, init_scale: float = 0.1, name: str = "guide"
) -> Guide:
    """Independent normals in the unconstrained coordinates of the target's latents.

    Kucukelbir, Tran, Ranganath, Gelman and Blei (2017), Automatic differentiation variational
    inference, section 2.4, on numpyro's bijectors.

    Args:
        target: what to approximate.
        init: where `loc` starts: None (uniform on (-2, 2), unconstrained), a mapping from names to
            constrained values, or one of numpyro's `init_to_*` strategies.
        init_scale: where `scale` starts, a positive number in unconstrained units.
        name: the name of the family's parameters, `{"loc": (dim,), "scale": (dim,)}`.

    Latents in a subsampled plate have a location and a scale for every row, and a step on a batch
    moves its rows alone; the parameters are then `{latent: {"loc": ..., "scale": ...}}`, declared
    with their plates.

    Returns:
        A `Guide`.

    Raises:
        ValueError: `init_scale` is not positive, or a start lies outside its support.
        KeyError: `init` names an unknown latent.

    Example:
        >>> target = vi.target(lambda v, z, d: -0.5 * jnp.sum(z["z"] ** 2), {"z": vi.Latent((2,))})
        >>> guide = vi.guides.mean_field(target)
        >>> params = vi.init_params(guide.declared, jax.random.key(0))
        >>> guide.sample(params, jax.random.key(1)).latents["z"].shape
        (2,)
    """
    require_instance(target, Target, "vi.target or vi.from_numpyro", "vi.guides.mean_field, target")
    if has_local(target):
        return local_mean_field(target, init, positive(init_scale), name)
    dim = flat(target).dim
    scale = np.full(dim, positive(init_scale))
    declared = {
        name: {
            "loc": Param(start_vector(target, init)),
            "scale": Param(scale, constraint=constraints.positive),
        }
    }
    return _by_site(target, location_scale(target, declared, name, _DIAGONAL), name)


def full_rank(
    target: Target, *, init: Any = None, init_scale: float = 0.1, name: str = "guide"
) -> Guide:
    """One multivariate normal in the unconstrained coordinates of all the target's latents.

    Kucukelbir et al. (2017), section 2.4; the Cholesky factor is a unit triangle whose rows are
    scaled, so that a change of units changes the scales alone.

    Args:
        target: what to approximate.
        init: where `loc` starts, as in `mean_field`.
        init_scale: where the marginal scales start, a positive number in unconstrained units.
        name: the name of the family's parameters, `{"loc": (dim,), "scale_tril": (dim, dim)}`.

    Returns:
        A `Guide`.

    Raises:
        ValueError: `init_scale` is not positive, or a start lies outside its support.
        KeyError: `init` names an unknown latent.

    Example:
        >>> target = vi.target(lambda v, z, d: -0.5 * jnp.sum(z["z"] ** 2), {"z": vi.Latent((2,))})
        >>> print(vi.describe(vi.guides.full_rank(target).declared))
        path              shape  dtype    constraint                 plates  size
        guide/loc         (2,)   float32  Real()                                2
        guide/scale_tril  (3,)   float32  ScaledUnitLowerCholesky()             3
    """
    require_whole_plates(target, "vi.guides.full_rank")
    dim = flat(target).dim
    scale_tril = positive(init_scale) * np.eye(dim)
    declared = {
        name: {
            "loc": Param(start_vector(target, init)),
            "scale_tril": Param(scale_tril, constraint=constraints.scaled_unit_lower_cholesky),
        }
    }
    return location_scale(target, declared, name, _TRIANGULAR)


def location_scale(target: Target, declared: Declared, name: str, scale: Scale) -> Guide:
    """The Gaussian family of a location, `own["loc"]`, and a linear map."""
    flat_target = flat(target)
    dim = flat_target.dim
    log_normaliser = 0.5 * dim * math.log(2 * math.pi)

    def own_values(params: Any) -> Any:
        return constrain(declared, pick_own(params, declared))[name]

    def noise(key: jax.Array, num_particles: int, scheme: Noise | None = None) -> jax.Array:
        scheme = scheme or iid()
        # A single draw keeps its whole row, of which `transform` takes the first `dim`.
        width = whole_rows(dim) if scheme.is_iid and num_particles == 1 else dim
        return scheme.draw(key, num_particles, width)

    def jacobian(params: Any, u: jax.Array, data: Any) -> Any:
        return flat_target.constrain_with_log_det(u, model_values(target, params), data)

    def transform(params: Any, e: jax.Array, data: Any = None) -> Draw:
        own, e = own_values(params), e[:dim]
        u = own["loc"] + scale.times(own, e)
        latents, log_abs_det = jacobian(params, u, data)
        log_q = -0.5 * jnp.sum(e**2) - log_normaliser - scale.log_det(own)
        return Draw(latents, log_q - log_abs_det, u)

    def density(params: Any, u: jax.Array) -> jax.Array:
        own = own_values(params)
        e = scale.solve(own, u - own["loc"])
        return -0.5 * jnp.sum(e**2) - log_normaliser - scale.log_det(own)

    def log_prob(params: Any, latents: Any, data: Any = None) -> jax.Array:
        u = flat_target.unconstrain(latents, model_values(target, params), data)
        return density(params, u) - jacobian(params, u, data)[1]

    def rescore(params: Any, draw: Draw, data: Any = None) -> jax.Array:
        return density(params, draw.position) - jacobian(params, draw.position, data)[1]

    def entropy(params: Any, draw: Draw, data: Any = None) -> jax.Array:
        exact = 0.5 * dim + log_normaliser + scale.log_det(own_values(params))
        return exact + jacobian(params, draw.position, data)[1]

    return Guide(
        declared=declared,
        sample=sampler(noise, transform),
        log_prob=log_prob,
        rescore=rescore,
        noise=noise,
        transform=transform,
        entropy=entropy,
    )


def _by_site(target: Target, family: Guide, name: str) -> Guide:
    """A diagonal family that is known latent by latent too."""

    def standardised(params: Any, e: jax.Array, data: Any) -> dict[str, Any]:
        own = constrain(family.declared, pick_own(params, family.declared))[name]
        index = split(data)[1]
        vectors = own["loc"], own["scale"], e[: own["loc"].size]
        loc, scale, e_parts = (split_vector(target, x) for x in vectors)
        return {
            site: tuple(
                take_axes(part[site], latent.plates, index) for part in (loc, scale, e_parts)
            )
            for site, latent in target.latents.items()
        }

    return family._replace(sites=sites_of_normals(target, standardised))


def positive(init_scale: float) -> float:
    """The scale, checked."""
    if not init_scale > 0:
        raise ValueError(
            explain(
                "A scale starts at a positive number.",
                expected="init_scale > 0",
                received=repr(init_scale),
                where="init_scale",
            )
        )
    return init_scale
