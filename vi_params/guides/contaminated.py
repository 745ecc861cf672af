"""The contaminated normal: a multivariate normal some of whose draws lie farther out.

    x ~ sum_k w_k N(0, s_k^2 I),   u = loc + C x.

A normal has thinner tails than most posteriors, so its importance weights have heavy ones, however
well it fits; a few wider parts about the same location bound them at little cost. Tukey (1960), A
survey of sampling from contaminated distributions; Hesterberg (1995), Weighted average importance
sampling and defensive mixture distributions, Technometrics 37(2).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp
from numpyro.distributions import constraints

from vi_params._check import explain
from vi_params.guide import Guide
from vi_params.guides.location_scale import TRIANGULAR, Base, location_scale, positive
from vi_params.guides.starts import require_whole_plates, start_vector
from vi_params.noise import Noise, iid
from vi_params.params import Param
from vi_params.target import Target, flat

WEIGHTS, SCALES = (0.8, 0.15, 0.05), (1.0, 1.5, 3.0)
"""How likely each stretch is by default, and by how much it stretches."""


def contaminated_normal(
    target: Target,
    *,
    weights: tuple[float, ...] = WEIGHTS,
    scales: tuple[float, ...] = SCALES,
    init: Any = None,
    init_scale: float = 0.1,
    name: str = "guide",
) -> Guide:
    """A full-rank normal whose draws are stretched at random, in unconstrained coordinates.

    Its parameters are those of `vi.guides.full_rank`, so that a normal that was fitted can be
    drawn from with wider tails.

    Args:
        target: what to approximate.
        weights: how likely each stretch is, positive, summing to one.
        scales: by how much it stretches, positive.
        init: where `loc` starts, as in `vi.guides.mean_field`.
        init_scale: where the scales start, a positive number in unconstrained units.
        name: the name of the family's parameters, `{"loc": (dim,), "scale_tril": (dim, dim)}`.

    Returns:
        A `Guide`.

    Raises:
        ValueError: `weights` and `scales` are not positive, not as many, or the weights do not sum
            to one; `init_scale` is not positive, or a start lies outside its support.
        KeyError: `init` names an unknown latent.

    Example:
        >>> target = vi.target(lambda v, z, d: -0.5 * jnp.sum(z["z"] ** 2), {"z": vi.Latent((2,))})
        >>> wide = vi.guides.contaminated_normal(target)
        >>> normal = vi.guides.full_rank(target, init={"z": jnp.zeros(2)}, init_scale=0.9)
        >>> params = vi.init_params(normal.declared, jax.random.key(0))
        >>> bool(vi.diagnose(target, wide, params, jax.random.key(1)).k_hat < 0.2)
        True
    """
    require_whole_plates(target, "vi.guides.contaminated_normal")
    base = stretched(_checked(weights, scales), scales)
    scale_tril = positive(init_scale) * np.eye(flat(target).dim)
    declared = {
        name: {
            "loc": Param(start_vector(target, init)),
            "scale_tril": Param(scale_tril, constraint=constraints.scaled_unit_lower_cholesky),
        }
    }
    return location_scale(target, declared, name, TRIANGULAR, base)


def stretched(weights: tuple[float, ...], scales: tuple[float, ...]) -> Base:
    """Standard normals times one of `scales`."""
    edges, sizes = np.cumsum(weights)[:-1], np.asarray(scales)

    def noise(key: jax.Array, num_particles: int, dim: int, scheme: Noise | None = None) -> Any:
        choose, draw = jax.random.split(key)
        return {
            "part": jax.random.uniform(choose, (num_particles,)),
            "normal": (scheme or iid()).draw(draw, num_particles, dim),
        }

    def place(one: Any, dim: int) -> jax.Array:
        normal = one["normal"]
        size = jnp.asarray(sizes, normal.dtype)[jnp.sum(one["part"] >= edges)]
        return size * normal

    def log_density(x: jax.Array) -> jax.Array:
        squared = jnp.sum(x**2) / sizes**2
        log_parts = np.log(weights) - x.size * np.log(sizes) - 0.5 * squared
        return logsumexp(log_parts.astype(x.dtype)) - 0.5 * x.size * math.log(2 * math.pi)

    return Base(noise, place, log_density)


def _checked(weights: tuple[float, ...], scales: tuple[float, ...]) -> tuple[float, ...]:
    """The weights, if they and the scales can be used."""
    usable = len(weights) == len(scales) and all(part > 0 for part in (*weights, *scales))
    if not usable or abs(sum(weights) - 1) > 1e-6:
        raise ValueError(
            explain(
                "The parts of a contaminated normal need weights and scales.",
                expected="as many positive scales as positive weights, which sum to one",
                received=f"weights={weights!r}, scales={scales!r}",
                where="guides.contaminated_normal",
            )
        )
    return weights
