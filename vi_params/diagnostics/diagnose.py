"""How far an approximation can be trusted."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vi_params._cache import program
from vi_params._check import require_count, require_key
from vi_params._compile import precise
from vi_params.guide import Guide
from vi_params.importance.weigh import Weighted, weigh
from vi_params.matching import given_data, matched
from vi_params.target import Target


class Diagnosis(NamedTuple):
    """The judgement of an approximation by importance sampling from it.

    Under `vmap` every attribute has leading axes, and `verdict` is a list.

    Attributes:
        elbo: the evidence lower bound, in nats.
        elbo_se: its Monte Carlo standard error.
        k_hat: the Pareto shape of the importance weights' tail; below 0.7 they can be relied on.
        ess: the effective sample size of the importance weights, out of `num_draws`.
        log_evidence: the importance-sampling estimate of log p(x), at least the ELBO on average.
        trustworthy: whether k_hat is below its threshold min(1 - 1 / log10(num_draws), 0.7).
        num_draws: how many draws were made.
    """

    elbo: jax.Array
    elbo_se: jax.Array
    k_hat: jax.Array
    ess: jax.Array
    log_evidence: jax.Array
    trustworthy: jax.Array
    num_draws: jax.Array

    @property
    def verdict(self) -> Any:
        """The judgement in words."""
        if np.ndim(self.k_hat):
            return [
                Diagnosis(*(np.asarray(field)[i] for field in self)).verdict
                for i in range(np.shape(self.k_hat)[0])
            ]
        return _verdict(float(self.elbo), float(self.k_hat), float(self.ess), int(self.num_draws))

    def __str__(self) -> str:
        if np.ndim(self.k_hat):
            return "\n".join(self.verdict)
        return (
            f"ELBO {float(self.elbo):.3f} (se {float(self.elbo_se):.3f}), "
            f"log evidence {float(self.log_evidence):.3f}, "
            f"k-hat {float(self.k_hat):.2f}, "
            f"ESS {float(self.ess):.0f} of {int(self.num_draws)}\n{self.verdict}"
        )


def diagnose(
    target: Target,
    guide: Guide,
    params: Any,
    key: jax.Array,
    data: Any = None,
    *,
    num_draws: int = 4000,
    batch_size: int | None = None,
) -> Diagnosis:
    """The ELBO, and whether importance weights from the guide to the target behave.

    Yao, Vehtari, Simpson and Gelman (2018), Yes, but did it work?: Evaluating variational
    inference, section 2. Weights see only where the guide puts draws: a mode that it misses
    altogether stays unseen.

    Args:
        target: what was approximated.
        guide: by what.
        params: unconstrained parameters, `fit.params`.
        key: a typed random key.
        data: the data; the target's own where None. All rows of subsampled plates are looked at:
            weights by a batch would say nothing of the posterior.
        num_draws: how many draws, at least 25.
        batch_size: how many draws are made at once; all where None.

    Returns:
        A `Diagnosis`. It can be vmapped over parameters, keys and data. A point estimate has no
        weights: its k_hat, ess and log_evidence are NaN.

    Raises:
        ValueError: num_draws < 25.
        TypeError: `key` is not a typed key.

    Example:
        >>> target = vi.target(lambda v, z, d: -0.5 * jnp.sum(z["z"] ** 2), {"z": vi.Latent((2,))})
        >>> guide = vi.guides.mean_field(target, init={"z": jnp.zeros(2)}, init_scale=1.0)
        >>> params = vi.init_params(guide.declared, jax.random.key(0))
        >>> bool(vi.diagnose(target, guide, params, jax.random.key(1)).trustworthy)
        True
    """
    require_key(key, "diagnose")
    require_count(num_draws, "num_draws", "diagnose", least=25)
    if batch_size is not None:
        require_count(batch_size, "batch_size", "diagnose")
    data = given_data(target, guide, data, "diagnose")
    return program(_diagnose, target, guide, num_draws, batch_size)(params, key, data)


def _diagnose(target: Target, guide: Guide, num_draws: int, batch_size: int | None) -> Callable:
    guide = matched(target, guide)

    @jax.jit
    @precise
    def compiled(params: Any, key: jax.Array, data: Any) -> Diagnosis:
        noise = guide.noise(key, num_draws)
        weighted = weigh(target, guide, params, noise, data, batch_size)
        return judged(weighted, is_point=guide.is_point)

    return compiled


def judged(draws: Weighted, xp: Any = jnp, *, is_point: bool = False) -> Diagnosis:
    """The diagnosis that weighted draws give, with jax.numpy or, on the host, numpy."""
    num_draws = len(draws.log_ratios)
    smoothed = draws.smoothed
    unknown = xp.nan if is_point else 0.0
    k_hat = smoothed.k_hat + unknown
    return Diagnosis(
        elbo=xp.mean(draws.log_ratios),
        elbo_se=xp.std(draws.log_ratios) / math.sqrt(num_draws),
        k_hat=k_hat,
        ess=smoothed.ess + unknown,
        log_evidence=smoothed.log_evidence + unknown,
        trustworthy=k_hat < threshold(num_draws),
        num_draws=xp.int32(num_draws),
    )


def threshold(num_draws: int) -> float:
    """The largest k-hat at which that many weights can be relied on (Vehtari et al., 2024)."""
    return min(1 - 1 / math.log10(num_draws), 0.7)


def _verdict(elbo: float, k_hat: float, ess: float, num_draws: int) -> str:
    if math.isnan(k_hat):
        if math.isfinite(elbo):
            return "No verdict: a point estimate has no spread to be judged."
        return (
            "Do not trust this: the log density is not finite at some draws of the guide. "
            "vi.check(target, key) says which site."
        )
    limit = threshold(num_draws)
    share = 100 * ess / num_draws
    if k_hat < 0.5 and share > 50 and math.isfinite(elbo):
        return f"Trust this: the guide is close to the posterior (k-hat {k_hat:.2f} < 0.5)."
    if k_hat < limit:
        return (
            f"Trust this after importance weighting (k-hat {k_hat:.3f} < {limit:.2f}); unweighted, "
            f"the guide is a rougher approximation (ESS {share:.0f} % of its draws)."
        )
    if k_hat < 1:
        return (
            f"Do not trust this: k-hat {k_hat:.3f} >= {limit:.2f}. The guide misses part of the "
            "posterior's tails: try a richer family or another parameterisation, or use MCMC."
        )
    return (
        f"Do not trust this: k-hat {k_hat:.2f} >= 1. The guide is far from the posterior: the fit "
        "has not converged, or the family cannot follow the posterior's shape; use MCMC to be sure."
    )
