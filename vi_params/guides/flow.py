"""Normalising flows by affine couplings, over one flat unconstrained vector.

    u = loc + C f_L(... f_1(e)),   e ~ N(0, I),

with layers that leave a part a of the vector as it is and shift and stretch the rest by it,

    f(h) = (a, b exp(s(a)) + t(a)),   s and t a network of one hidden layer,

so that inverse and log determinant are as cheap as the map itself. Dinh, Sohl-Dickstein and Bengio
(2017), Density estimation using Real NVP, ICLR, section 3. Agrawal and Domke (2024), Disentangling
impact of capacity, objective, batchsize, estimators, and step-size on flow VI, find it to be enough
for most posteriors if every step averages many draws.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpyro.distributions import constraints

from vi_params._check import require_count
from vi_params.guide import Draw, Guide, pick_own, sampler
from vi_params.guides.location_scale import positive
from vi_params.guides.starts import model_values, require_whole_plates, start_vector
from vi_params.noise import Noise, iid
from vi_params.params import Param, constrain
from vi_params.target import Target, flat

STRETCH = 3.0
"""The largest log factor by which one layer stretches a coordinate."""


class Layers(NamedTuple):
    """The networks of all layers, leading axis L.

    Attributes:
        inner: shape (L, dim, hidden).
        inner_bias: shape (L, hidden).
        outer: shape (L, hidden, 2, dim): of log stretches and of shifts.
        outer_bias: shape (L, 2, dim).
    """

    inner: jax.Array
    inner_bias: jax.Array
    outer: jax.Array
    outer_bias: jax.Array


def flow(
    target: Target,
    num_layers: int = 8,
    *,
    hidden: int = 32,
    init: Any = None,
    init_scale: float = 0.1,
    name: str = "guide",
) -> Guide:
    """A normalising flow by affine couplings, beginning as a Gaussian.

    For shapes that no Gaussian has (skew, bends, funnels) and where draws are cheap: fit it with
    tens to hundreds of particles and `vi.estimators.sticking_the_landing()` at a rate near 1e-3. It
    starts as N(loc, C C'); parameters of a full-rank fit make it start there. One coordinate alone
    stays Gaussian: a coupling moves some coordinates as others say.

    Args:
        target: what to approximate.
        num_layers: how many couplings, L; each other one moves what its neighbour left.
        hidden: the width of their networks.
        init: where `loc` starts, as in `vi.guides.mean_field`.
        init_scale: where the marginal scales start, a positive number in unconstrained units.
        name: the name of the parameters `{"loc": (dim,), "scale_tril": (dim, dim), "layers":
            {"inner", "inner_bias", "outer", "outer_bias"}}`.

    Returns:
        A `Guide`.

    Raises:
        ValueError: a number is not a positive whole one, `init_scale` is not positive, or a start
            lies outside its support.
        KeyError: `init` names an unknown latent.

    Example:
        >>> target = vi.target(lambda v, z, d: -0.5 * jnp.sum(z["z"] ** 2), {"z": vi.Latent((3,))})
        >>> guide = vi.guides.flow(target, 2, hidden=8)
        >>> params = vi.init_params(guide.declared, jax.random.key(0))
        >>> guide.sample(params, jax.random.key(1)).latents["z"].shape
        (3,)
    """
    require_whole_plates(target, "vi.guides.flow")
    require_count(num_layers, "num_layers", "guides.flow")
    require_count(hidden, "hidden", "guides.flow")
    flat_target = flat(target)
    dim = flat_target.dim
    masks = coupling_masks(num_layers, dim)
    log_normaliser = 0.5 * dim * math.log(2 * math.pi)

    scale_tril = positive(init_scale) * np.eye(dim)

    def inner(key: jax.Array) -> jax.Array:
        return jax.random.normal(key, (num_layers, dim, hidden)) / math.sqrt(dim)

    declared = {
        name: {
            "loc": Param(start_vector(target, init)),
            "scale_tril": Param(scale_tril, constraint=constraints.scaled_unit_lower_cholesky),
            "layers": {
                "inner": Param(inner),
                "inner_bias": Param(np.zeros((num_layers, hidden))),
                "outer": Param(np.zeros((num_layers, hidden, 2, dim))),
                "outer_bias": Param(np.zeros((num_layers, 2, dim))),
            },
        }
    }

    def read(params: Any) -> tuple[jax.Array, jax.Array, Layers]:
        own = constrain(declared, pick_own(params, declared))[name]
        return own["loc"], own["scale_tril"], Layers(**own["layers"])

    def noise(key: jax.Array, num_particles: int, scheme: Noise | None = None) -> jax.Array:
        return (scheme or iid()).draw(key, num_particles, dim)

    def jacobian(params: Any, u: jax.Array, data: Any) -> Any:
        return flat_target.constrain_with_log_det(u, model_values(target, params), data)

    def log_base(e: jax.Array, scale_tril: jax.Array) -> jax.Array:
        log_det = jnp.sum(jnp.log(jnp.diagonal(scale_tril)))
        return -0.5 * jnp.sum(e**2) - log_normaliser - log_det

    def transform(params: Any, e: jax.Array, data: Any = None) -> Draw:
        loc, scale_tril, layers = read(params)
        h, stretched = coupled(layers, masks, e)
        u = loc + scale_tril @ h
        latents, log_abs_det = jacobian(params, u, data)
        return Draw(latents, log_base(e, scale_tril) - stretched - log_abs_det, u)

    def density(params: Any, u: jax.Array) -> jax.Array:
        loc, scale_tril, layers = read(params)
        # The inverse once: over many draws a product is far cheaper than as many solves.
        identity = jnp.eye(dim, dtype=scale_tril.dtype)
        inverse = jax.scipy.linalg.solve_triangular(scale_tril, identity, lower=True)
        e, stretched = uncoupled(layers, masks, inverse @ (u - loc))
        return log_base(e, scale_tril) - stretched

    def log_prob(params: Any, latents: Any, data: Any = None) -> jax.Array:
        u = flat_target.unconstrain(latents, model_values(target, params), data)
        return density(params, u) - jacobian(params, u, data)[1]

    def rescore(params: Any, draw: Draw, data: Any = None) -> jax.Array:
        return density(params, draw.position) - jacobian(params, draw.position, data)[1]

    return Guide(
        declared=declared,
        sample=sampler(noise, transform),
        log_prob=log_prob,
        rescore=rescore,
        noise=noise,
        transform=transform,
    )


def coupling_masks(num_layers: int, dim: int) -> np.ndarray:
    """What each layer leaves as it is, shape (num_layers, dim): a random half, then the other."""
    halves = [np.random.default_rng(i // 2).permutation(dim) < dim // 2 for i in range(num_layers)]
    return np.stack([half if i % 2 else ~half for i, half in enumerate(halves)])


def _affine(layer: Layers, mask: jax.Array, h: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log stretches and shifts of one layer; zero where the mask leaves h as it is."""
    hidden = jnp.tanh(jnp.where(mask, h, 0.0) @ layer.inner + layer.inner_bias)
    log_stretch, shift = jnp.tensordot(hidden, layer.outer, 1) + layer.outer_bias
    log_stretch = STRETCH * jnp.tanh(log_stretch / STRETCH)
    return jnp.where(mask, 0.0, log_stretch), jnp.where(mask, 0.0, shift)


def coupled(layers: Layers, masks: np.ndarray, e: jax.Array) -> tuple[jax.Array, jax.Array]:
    """f_L(... f_1(e)) and its log determinant."""

    def step(h: jax.Array, one: tuple[Layers, jax.Array]) -> tuple[jax.Array, jax.Array]:
        log_stretch, shift = _affine(one[0], one[1], h)
        return h * jnp.exp(log_stretch) + shift, jnp.sum(log_stretch)

    h, stretched = lax.scan(step, e, (layers, jnp.asarray(masks)))
    return h, jnp.sum(stretched)


def uncoupled(layers: Layers, masks: np.ndarray, h: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The e that `coupled` takes to h, and the log determinant there."""

    def step(h: jax.Array, one: tuple[Layers, jax.Array]) -> tuple[jax.Array, jax.Array]:
        log_stretch, shift = _affine(one[0], one[1], h)  # from what the layer left as it was
        return (h - shift) * jnp.exp(-log_stretch), jnp.sum(log_stretch)

    e, stretched = lax.scan(step, h, (layers, jnp.asarray(masks)), reverse=True)
    return e, jnp.sum(stretched)
