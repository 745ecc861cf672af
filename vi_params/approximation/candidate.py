"""An approximation that was tried, and what is thought of it."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from vi_params._cache import program
from vi_params.approximation.judge import BATCH, Judge, judge_of_guide, judge_of_proposal
from vi_params.approximation.proposals import log_density_of, proposal_of
from vi_params.approximation.tails import Spread, worst_spread
from vi_params.diagnostics import Diagnosis
from vi_params.diagnostics.diagnose import threshold
from vi_params.guide import Guide
from vi_params.guides import contaminated_normal
from vi_params.importance import Weighted
from vi_params.solvers.solution import Solution
from vi_params.target import Target

EFFECTIVE = 0.15
"""The smallest share of effective draws to be trusted: what no draw reached is missing from the
weights and from k-hat alike, and more likely so where few draws count."""

MISSED = 0.15
"""By how many nats less log evidence one approximation shows that it misses mass of another: more
than chance makes between two that are to be trusted."""

BARE = math.log(20)
"""Where the log density exceeds that of an approximation by so much, this hardly draws."""

DISCOUNT = 0.7
"""What a share of effective draws counts for where their weights have a heavy tail."""

LIGHT = 0.5
"""The k-hat below which a tail is light: the weights have a variance."""

GOOD = LIGHT, 0.2
"""The k-hat below which, and the share of effective draws above which, nothing is left to gain."""

CLEAR = 0.3, 0.5
"""The k-hat below which, and the share above which, few draws are enough to tell."""


class Candidate(NamedTuple):
    """An approximation that was tried.

    Attributes:
        name: how it was found.
        solution: the guide and its parameters.
        diagnosis: the worse of two judgements by independent draws, since one can be lucky; the
            first where that is not to be trusted.
        batches: these draws.
        judge: makes further ones.
        spread: the worst of the standard deviations as these draws show them; None where there is
            but one batch, and of what is not to be trusted.
        good: the k-hat and the share of effective draws at which it is good enough.
        is_spare: whether it is taken only where nothing else is to be trusted, and it is good.
        is_partial: whether it misses mass that another one has found, and is never taken.
    """

    name: str
    solution: Solution
    diagnosis: Diagnosis
    batches: tuple[Weighted, ...]
    judge: Judge
    spread: Spread | None = None
    good: tuple[float, float] = GOOD
    is_spare: bool = False
    is_partial: bool = False

    @property
    def k_hat(self) -> float:
        """K-hat; infinite where it is not a number."""
        return _k_hat(self.diagnosis)

    @property
    def share(self) -> float:
        """How many of the draws are effective."""
        return _share(self.diagnosis)

    @property
    def merit(self) -> float:
        """The share of effective draws, of less worth where the tail is heavy."""
        return self.share if self.k_hat < LIGHT else DISCOUNT * self.share

    @property
    def is_good(self) -> bool:
        """Whether there is nothing left to gain."""
        k_hat, share = self.good
        return self.k_hat < k_hat and self.share > share and self.is_determined

    @property
    def is_determined(self) -> bool:
        """Whether there is no spread that other draws might show."""
        return self.spread is None or not self.spread.can_be_shown

    @property
    def is_enough(self) -> bool:
        """Whether nothing else need be tried."""
        return self.is_good and not self.is_spare

    @property
    def is_clear(self) -> bool:
        """Whether more draws would tell the same."""
        k_hat, share = CLEAR
        is_light = self.k_hat < k_hat and self.share > share
        return is_light and self.is_good and self.is_shown

    @property
    def is_shown(self) -> bool:
        """Whether no standard deviation is known not to show."""
        return self.spread is None or self.spread.is_shown

    @property
    def is_trustworthy(self) -> bool:
        """Whether its weighted draws are the posterior's."""
        return is_reliable(self.diagnosis)


def judged(
    name: str,
    solution: Solution,
    judge: Judge,
    keys: Iterator[jax.Array],
    is_followed: bool = False,
) -> Candidate:
    """The candidate of a solution: by two small batches of draws where densities take long and
    these leave no doubt, else by two full ones; by the first alone where that is not to be
    trusted.

    Args:
        name: how it was found.
        solution: the guide and its parameters.
        judge: of these.
        keys: random keys.
        is_followed: whether a small batch by which it is not to be trusted is enough, since it is
            looked at again where what follows is not good enough.
    """

    def by(num_draws: int) -> Candidate:
        first, second = next(keys), next(keys)
        found = once(name, solution, judge, first, num_draws=num_draws)
        if not found.is_trustworthy:
            return found
        return confirmed(found, once(name, solution, judge, second, num_draws=num_draws))

    if judge.block < min(BATCH, judge.num_draws):
        found = by(judge.block)
        if found.is_clear or (is_followed and not found.is_trustworthy):
            return found
    return by(judge.num_draws)


def once(
    name: str,
    solution: Solution,
    judge: Judge,
    key: jax.Array,
    good: tuple[float, float] = GOOD,
    num_draws: int | None = None,
) -> Candidate:
    """The candidate of a solution, by one batch of draws."""
    return judged_by(name, solution, judge, judge(key, num_draws), good)


def judged_by(
    name: str,
    solution: Solution,
    judge: Judge,
    seen: tuple[Weighted, Diagnosis],
    good: tuple[float, float],
) -> Candidate:
    """The candidate of a solution, by a batch of draws that is known."""
    drawn, diagnosis = seen
    return Candidate(name, solution, diagnosis, (drawn,), judge, good=good)


def confirmed(one: Candidate, again: Candidate) -> Candidate:
    """A candidate that was judged again."""
    found = one._replace(
        diagnosis=worse(one.diagnosis, again.diagnosis), batches=one.batches + again.batches
    )
    if not found.is_trustworthy:
        return found
    return found._replace(spread=worst_spread(*found.batches))


def judge_of(target: Target, solution: Solution, data: Any, num_draws: int = BATCH) -> Judge:
    """Judges the guide of a solution of this pipeline, as `proposal_of` knows it."""
    proposal = proposal_of(solution)
    if proposal is None:
        return judge_of_guide(target, solution.guide, solution.params, data, num_draws)
    return judge_of_proposal(target, proposal, solution.params, data, num_draws)


def is_reliable(diagnosis: Diagnosis) -> bool:
    """Whether weights like these turn draws into the posterior's."""
    limit = threshold(int(diagnosis.num_draws))
    return _k_hat(diagnosis) < limit and _share(diagnosis) > EFFECTIVE


def worse(one: Diagnosis, other: Diagnosis) -> Diagnosis:
    """The judgement that is not reliable; of two that are alike, the one with the larger k-hat."""
    return max(one, other, key=lambda d: (not is_reliable(d), _k_hat(d)))


def _k_hat(diagnosis: Diagnosis) -> float:
    return float(np.nan_to_num(diagnosis.k_hat, nan=np.inf))


def _share(diagnosis: Diagnosis) -> float:
    return float(np.nan_to_num(diagnosis.ess)) / int(diagnosis.num_draws)


def with_wide_tails(target: Target, solution: Solution) -> Solution:
    """A Gaussian solution as a contaminated normal; one without dense covariances as it is."""
    (name,) = solution.guide.declared
    if "scale_tril" not in solution.params[name]:
        return solution
    return solution._replace(guide=wide_tailed(target, name))


def wide_tailed(target: Target, name: str) -> Guide:
    """The contaminated normal of a target, kept for the next call."""
    return program(_wide_tailed, target, name)


def _wide_tailed(target: Target, name: str) -> Guide:
    return contaminated_normal(target, name=name)


def best_of(candidates: list[Candidate]) -> Candidate:
    """The one to be taken.

    Of those to be trusted that miss no mass which another one sees, the one of the largest merit,
    one whose spreads show before others. Where none is to be trusted, a spare one that is good, or
    else the one whose weights have the lightest tail, and among light ones the most effective.
    """
    candidates = [one for one in candidates if not one.is_partial]
    spare = [one for one in candidates if one.is_spare and one.is_good and one.is_trustworthy]
    candidates = [one for one in candidates if not one.is_spare]
    trusted = [one for one in candidates if one.is_trustworthy] or spare
    if trusted:
        evidences = [
            float(np.nan_to_num(one.diagnosis.log_evidence, nan=-np.inf)) for one in trusted
        ]
        least = max(evidences) - MISSED
        whole = [one for one, e in zip(trusted, evidences, strict=True) if e >= least]
        return max(whole, key=lambda one: (one.is_shown, one.merit))
    return min(candidates, key=lambda one: (max(one.k_hat, LIGHT), -one.share))


def misses(best: Candidate, other: Candidate, df: int | None) -> bool:
    """Whether the draws of another approximation have found mass where this one, of components with
    so many degrees of freedom, has hardly any."""
    drawn = other.batches[0]
    position = np.asarray(drawn.position, float)
    log_ratios = np.asarray(drawn.log_ratios, float)
    log_p = log_ratios + log_density_of(other.solution, None)(position)
    log_z = float(best.diagnosis.log_evidence)
    is_bare = log_p - log_z - log_density_of(best.solution, df)(position) > BARE
    with np.errstate(over="ignore"):  # more than can be counted is missed
        return bool(np.sum(np.exp(log_ratios[is_bare] - log_z)) > MISSED * len(log_ratios))
