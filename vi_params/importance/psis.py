"""Pareto-smoothed importance sampling, in JAX, so that it can be jitted and vmapped, and in numpy.

Vehtari, Simpson, Gelman, Yao and Gabry (2024), Pareto smoothed importance sampling, JMLR 25(72).
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vi_params._check import explain


class Smoothed(NamedTuple):
    """Smoothed importance weights.

    Attributes:
        log_weights: shape `(num_draws,)`, normalised: their exponentials sum to one.
        k_hat: the estimated shape of the generalised Pareto tail; a scalar.
        ess: the effective sample size 1 / sum of squared weights.
        log_evidence: the log of the mean unnormalised weight, an estimate of log Z.
    """

    log_weights: jax.Array
    k_hat: jax.Array
    ess: jax.Array
    log_evidence: jax.Array


def psis(log_ratios: jax.Array) -> Smoothed:
    """Pareto-smoothed weights of log importance ratios.

    The largest M = min(S / 5, 3 sqrt(S)) ratios are replaced by the expected order statistics of a
    generalised Pareto distribution fitted to them (Zhang and Stephens, 2009, with the weak prior of
    Vehtari et al., appendix C), and none exceeds the largest raw ratio.

    Args:
        log_ratios: log p - log q of S draws from q, shape `(S,)`, S >= 25. -inf is weight zero.

    Returns:
        `Smoothed`. `k_hat` is 0 where the tail has no spread, and infinite where its ratios differ
        by more than the dtype's range. All is NaN where a ratio is NaN or
        +inf, or all are -inf.

    Raises:
        ValueError: fewer than 25 ratios, or not a vector.

    Example:
        >>> smoothed = vi.diagnostics.psis(jax.random.normal(jax.random.key(0), (1000,)))
        >>> bool(smoothed.k_hat < 0.7)
        True
    """
    if log_ratios.ndim != 1 or log_ratios.shape[0] < 25:
        raise ValueError(
            explain(
                "Too few log ratios, or not a vector of them.",
                expected="shape (num_draws,), num_draws >= 25",
                received=f"shape {log_ratios.shape}",
                where="vi.diagnostics.psis",
            )
        )
    return _smoothed(log_ratios, jnp)


def psis_on_host(log_ratios: np.ndarray) -> Smoothed:
    """`psis` on the host: computed in float64, returned in the dtype given; nothing is compiled."""
    dtype = log_ratios.dtype
    with np.errstate(all="ignore"):  # broken weights, and what the dtype does not hold
        found = _smoothed(np.asarray(log_ratios, float), np)
        return jax.tree.map(lambda leaf: np.asarray(leaf, dtype), found)


def _smoothed(log_ratios: Any, xp: Any) -> Smoothed:
    """`psis` of a vector, with jax.numpy or numpy."""
    num = log_ratios.shape[0]
    tail = tail_size(num)
    shift = xp.max(log_ratios)
    broken = ~xp.isfinite(shift)
    x = xp.where(broken, 0.0, log_ratios - shift)

    order = xp.argsort(x)
    ranked = x[order]
    tiny = math.log(float(xp.finfo(x.dtype).tiny))
    cutoff = xp.maximum(ranked[num - tail - 1], tiny)
    excess = xp.maximum(xp.exp(ranked[num - tail :]) - xp.exp(cutoff), 0.0)
    # Weights this level have no tail to fit; what is left of it may be rounding of log p and log q.
    spread = excess[-1] > 0.01 * xp.exp(cutoff)
    # Where most of the tail underflows, a few weights are all there is: no shape is heavy enough.
    hopeless = spread & (ranked[num - tail + _quartile(tail)] < tiny)
    fitted = spread & ~hopeless
    k_hat, scale = fit_pareto(xp.where(fitted, excess, xp.arange(1.0, tail + 1)), xp)
    levels = (xp.arange(tail) + 0.5) / tail
    smooth = xp.log(_pareto_quantile(levels, k_hat, scale, xp) + xp.exp(cutoff))
    smooth = xp.minimum(smooth, 0.0)
    smooth = xp.where(fitted & xp.isfinite(smooth), smooth, ranked[num - tail :])
    x = _put(x, order[num - tail :], smooth)

    total = xp.log(xp.sum(xp.exp(x)))  # the largest are about zero
    log_weights = x - total
    nan = xp.where(broken, xp.nan, 0.0)
    return Smoothed(
        log_weights=log_weights + nan,
        k_hat=xp.where(fitted, k_hat, xp.where(hopeless, xp.inf, 0.0)) + nan,
        ess=1 / xp.sum(xp.exp(2 * log_weights)) + nan,
        log_evidence=total + shift - math.log(num) + nan,
    )


def tail_size(num_draws: int) -> int:
    """How many of the largest ratios are their tail."""
    return math.ceil(min(num_draws / 5, 3 * math.sqrt(num_draws)))


def fit_pareto(x: Any, xp: Any = jnp) -> tuple[Any, Any]:
    """Shape k and scale sigma of a generalised Pareto distribution, from its ascending sample.

    Zhang and Stephens (2009), Technometrics 51(3): the posterior mean of b = k / sigma over a grid
    of m points, under a data-dependent prior; then k = mean log(1 - b x), shrunk towards 1/2 by ten
    prior observations.

    Args:
        x: shape (n,), positive.
        xp: jax.numpy, or numpy for arrays on the host.
    """
    n = x.shape[0]
    m = 30 + int(math.sqrt(n))
    quartile = x[_quartile(n)]
    grid = 1 - xp.sqrt(m / (xp.arange(1, m + 1) - 0.5))
    b = grid / (3 * xp.maximum(quartile, xp.finfo(x.dtype).tiny)) + 1 / x[-1]
    k = xp.mean(xp.log1p(-b[:, None] * x), axis=1)
    log_likelihood = n * (xp.log(-b / k) - k - 1)
    likely = xp.where(xp.isfinite(log_likelihood), log_likelihood, -xp.inf)
    weights = xp.exp(likely - xp.max(likely))
    b_hat = xp.sum(b * weights) / xp.sum(weights)
    k_hat = xp.mean(xp.log1p(-b_hat * x))
    return (n * k_hat + 10 * 0.5) / (n + 10), -k_hat / b_hat


def _quartile(n: int) -> int:
    """Where the first quartile of n ascending numbers is."""
    return int(n / 4 + 0.5) - 1


def _pareto_quantile(p: Any, k: Any, scale: Any, xp: Any) -> Any:
    """The quantile function sigma ((1 - p)^-k - 1) / k, and its limit at k = 0."""
    near_zero = xp.abs(k) < 1e-6
    safe = xp.where(near_zero, 1.0, k)
    return xp.where(near_zero, -scale * xp.log1p(-p), scale * xp.expm1(-safe * xp.log1p(-p)) / safe)


def _put(x: Any, index: Any, values: Any) -> Any:
    """x with other values at some places."""
    if not isinstance(x, np.ndarray):
        return x.at[index].set(values)
    x = x.copy()
    x[index] = values
    return x
