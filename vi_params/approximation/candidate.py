"""An approximation that was tried, and what is thought of it."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from vi_params.approximation.result import judge
from vi_params.diagnostics import Diagnosis
from vi_params.diagnostics.diagnose import threshold
from vi_params.importance import Weighted
from vi_params.solvers.population_monte_carlo import GOOD_K_HAT, GOOD_SHARE
from vi_params.solvers.solution import Solution
from vi_params.target import Target

EFFECTIVE = 0.05
"""The smallest share of effective draws at which resampling them is worth it."""


class Candidate(NamedTuple):
    """An approximation that was tried.

    Attributes:
        name: how it was found.
        solution: the guide and its parameters.
        diagnosis: the worse of two judgements by independent draws: one can be lucky.
        drawn: the draws of the first.
        limit: the k-hat below which it is good enough.
        effective: the share of effective draws above which it is to be trusted.
    """

    name: str
    solution: Solution
    diagnosis: Diagnosis
    drawn: Weighted
    limit: float
    effective: float = EFFECTIVE

    @property
    def k_hat(self) -> float:
        """K-hat; infinite where it is not a number."""
        return float(np.nan_to_num(self.diagnosis.k_hat, nan=np.inf))

    @property
    def share(self) -> float:
        """How many of the draws are effective."""
        return float(self.diagnosis.ess) / int(self.diagnosis.num_draws)

    @property
    def is_good(self) -> bool:
        """Whether there is nothing left to gain."""
        return self.k_hat < self.limit and self.share > GOOD_SHARE

    @property
    def is_trustworthy(self) -> bool:
        """Whether its weighted draws are the posterior's."""
        below = self.k_hat < threshold(int(self.diagnosis.num_draws))
        return below and self.share > self.effective


def judged(
    name: str,
    target: Target,
    solution: Solution,
    keys: Iterator[jax.Array],
    data: Any,
    num_draws: int,
) -> Candidate:
    """The candidate of a solution, by two batches of draws."""
    weighted = judge(target, solution.guide, num_draws)
    draws = [weighted(solution.params, next(keys), data) for _ in range(2)]
    judgements = [jax.device_get(diagnosis) for _, diagnosis in draws]
    worse = max(judgements, key=lambda d: np.nan_to_num(d.k_hat, nan=np.inf))
    return Candidate(name, solution, worse, draws[0][0], threshold(num_draws))


def best_of(candidates: list[Candidate]) -> Candidate:
    """The one whose weights have the lightest tail; among light ones, the most effective."""
    return min(candidates, key=lambda one: (max(one.k_hat, GOOD_K_HAT), -one.share))
