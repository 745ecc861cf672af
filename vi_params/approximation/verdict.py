"""What is said of the approximation that was taken."""

import math

from vi_params.approximation.candidate import Candidate
from vi_params.diagnostics.diagnose import threshold
from vi_params.solvers.solution import SolverInfo, SolverStatus


def verdict(best: Candidate, first: SolverInfo) -> str:
    """Whether to trust it, why, and what to do.

    Args:
        best: the candidate that was taken.
        first: how the solver ended that all of them began with.
    """
    k_hat, limit = float(best.diagnosis.k_hat), threshold(int(best.diagnosis.num_draws))
    found = f"{best.name}: k-hat {k_hat:.2f}, {100 * best.share:.0f} % of the draws effective"
    spread = best.spread
    if best.is_trustworthy and best.is_shown:
        return f"Trust this ({found}); draws are importance-resampled."
    if best.is_trustworthy and spread is not None:
        return (
            f"Do not trust this ({found}): draws like these do not show the spread of "
            f"{spread.name}: {spread}. Use quantiles, or MCMC with many draws; .nuts_start(key) "
            "gives it starting points and a mass matrix. Draws are importance-resampled."
        )
    if math.isnan(k_hat):
        reason = "the log density is not finite at some draws; vi.check(target, key) looks at it"
    elif k_hat < limit:
        reason = "too few draws count, or tails were not reached"
    else:
        reason = "the tail of the importance weights is too heavy"
    told = ""
    if int(first.status) != SolverStatus.CONVERGED:
        told = f" The solver it began with: {first.message}."
    return (
        f"Do not trust this ({found}): {reason}. Use MCMC; .nuts_start(key) gives it starting "
        f"points and a mass matrix. Draws are the guide's own, not resampled.{told}"
    )
