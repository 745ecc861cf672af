"""f-divergences from the guide to the posterior, as values.

    D_f(p || q) = E_q f(p(z) / q(z)),   f convex, f(1) = 0,

with p the normalised posterior. f and f + c (t - 1) are one divergence: f is written such that
f'(1) = 0, for steadier gradients, save in KL(q || p). Each value holds f as a function of
s = log(p / q), so that no ratio overflows: `of(s) = f(exp(s))`. Csiszar and Shields (2004),
Information theory and statistics, section 4.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Divergence(NamedTuple):
    """An f-divergence.

    Attributes:
        name: the field's name for it.
        of: `s -> f(exp(s))` of a scalar; finite, with a finite gradient, wherever f is.
        is_smooth: whether f has a second derivative that is not zero almost everywhere, as double
            reparameterisation needs.
    """

    name: str
    of: Callable[[jax.Array], jax.Array]
    is_smooth: bool = True


def reverse_kl() -> Divergence:
    """KL(q || p), f(t) = -log t: what the ELBO minimises; seeks modes.

    Example:
        >>> round(float(vi.divergences.reverse_kl().of(jnp.log(2.0))), 4)
        -0.6931
    """
    return Divergence("KL(q || p)", lambda s: -s)


def forward_kl() -> Divergence:
    """KL(p || q), f(t) = t log t - t + 1: covers the mass.

    Example:
        >>> round(float(vi.divergences.forward_kl().of(jnp.zeros(()))), 4)
        0.0
    """

    def of(s: jax.Array) -> jax.Array:
        inside = s > -jnp.inf
        finite = jnp.where(inside, s, 0.0)
        return jnp.where(inside, finite * jnp.exp(finite), 0.0) - jnp.expm1(s)

    return Divergence("KL(p || q)", of)


def chi_squared() -> Divergence:
    """Pearson's chi^2(p || q), f(t) = (t - 1)^2: the variance of the importance weights.

    Example:
        >>> round(float(vi.divergences.chi_squared().of(jnp.log(3.0))), 4)
        4.0
    """
    return Divergence("chi^2(p || q)", lambda s: jnp.expm1(s) ** 2)


def hellinger() -> Divergence:
    """The squared Hellinger distance, f(t) = (sqrt(t) - 1)^2 / 2; between 0 and 1.

    Example:
        >>> round(float(vi.divergences.hellinger().of(jnp.log(9.0))), 4)
        2.0
    """
    return Divergence("squared Hellinger distance", lambda s: 0.5 * jnp.expm1(0.5 * s) ** 2)


def jensen_shannon() -> Divergence:
    """KL(p || m) / 2 + KL(q || m) / 2 with m = (p + q) / 2; between 0 and log 2.

    f(t) = (t log t - (1 + t) log((1 + t) / 2)) / 2.

    Example:
        >>> round(float(vi.divergences.jensen_shannon().of(jnp.zeros(()))), 4)
        0.0
    """

    def of(s: jax.Array) -> jax.Array:
        from_q = jnp.log(2.0) - jax.nn.softplus(s)  # log of q / m
        inside = s > -jnp.inf
        s = jnp.where(inside, s, 0.0)
        from_p = jnp.log(2.0) - jax.nn.softplus(-s)  # log of p / m
        return 0.5 * (jnp.where(inside, jnp.exp(s) * from_p, 0.0) + from_q)

    return Divergence("Jensen-Shannon divergence", of)


def total_variation() -> Divergence:
    """The total variation distance, f(t) = |t - 1| / 2; between 0 and 1.

    Example:
        >>> round(float(vi.divergences.total_variation().of(jnp.log(3.0))), 4)
        1.0
    """
    return Divergence("total variation", lambda s: 0.5 * jnp.abs(jnp.expm1(s)), is_smooth=False)
