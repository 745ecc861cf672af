"""What follows where one Gaussian is not good enough: a mixture, by population Monte Carlo."""

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from typing import Any, NamedTuple

import jax
import numpy as np

from vi_params.approximation.candidate import Candidate, best_of, confirmed, once
from vi_params.approximation.conditional import has_many_latents
from vi_params.approximation.judge import judge_of_proposal
from vi_params.approximation.proposals import compile_params, mixture, params_of, values_of
from vi_params.approximation.result import resampled
from vi_params.approximation.tails import towards_spreads
from vi_params.guide import Guide
from vi_params.guides.frame import frame_of
from vi_params.importance import Weighted
from vi_params.solvers.active import num_different, scores
from vi_params.solvers.mixture_families import Mixture
from vi_params.solvers.population_monte_carlo import DF, Population, population
from vi_params.solvers.solution import Solution
from vi_params.target import Target, flat

COMPONENTS, MORE_COMPONENTS = 16, 32
"""How many components the mixture has, and how many where its start is far from the posterior."""

FAR = 0.1
"""It is far where a smaller share of its draws is effective; asked where components are free in all
directions."""

DRAWS, FEWER_DRAWS = 16000, 8000
"""How many draws a round makes: few components of few draws leave out the neck of a funnel; fewer
are enough for few latents."""

FREE = 32
"""The largest dimension in which the components are free in all directions."""

ACTIVE, MORE_ACTIVE = 2, 4
"""Along how many directions they are free in more dimensions, at least and at most."""

LARGEST = 500
"""The largest dimension in which a mixture is tried."""

ENOUGH = 0.6, 0.4
"""The k-hat below which, and the share of effective draws above which, rounds gain little more."""

ROUNDS = 16
"""How many rounds are made at most."""

WIDENED = 2
"""How many more are made towards spreads that the draws do not show."""

PATIENCE, GAIN = 4, 1.1
"""They end where so many rounds made the largest share of effective draws no larger than by this
factor."""

MUCH = 3.0
"""In up to `FREE` dimensions rounds go on from a conditional Gaussian with more than so many times
as many effective draws."""

POLISHED = "population Monte Carlo"
"""What the polished mixture is called."""


def can_polish(target: Target, start: Candidate) -> bool:
    """Whether a mixture is worth trying."""
    (name,) = start.solution.guide.declared
    is_mixture = "weights" in start.solution.params[name]
    return flat(target).dim <= (FREE if is_mixture else LARGEST)


def start_of(
    target: Target, response: Candidate, conditional: Candidate | None = None
) -> Candidate:
    """What the rounds begin with: linear response, unless in few dimensions the conditional
    Gaussian is much better. In many dimensions they are conditional by themselves."""
    if conditional is None:
        return response
    is_much = conditional.is_trustworthy and conditional.share > MUCH * response.share
    return conditional if is_much and flat(target).dim <= FREE else response


class Course(NamedTuple):
    """What rounds begin with, and how they are made.

    Attributes:
        guide: of what they begin with.
        own: its constrained parameters.
        name: what they end with is called.
        num_draws: how many a round makes.
        df: the components' degrees of freedom.
        reframed: makes a better frame for a mixture from its weighted draws; None to leave it.
    """

    guide: Guide
    own: Any
    name: str
    num_draws: int
    df: int
    reframed: Callable[[Mixture, Weighted], Mixture] | None = None


def course_of(target: Target, begun: Solution) -> Course:
    """That of rounds from a solution."""
    num_draws = DRAWS if has_many_latents(target) else FEWER_DRAWS
    return Course(begun.guide, values_of(begun), POLISHED, num_draws, DF)


def polish(
    pool: Executor,
    target: Target,
    start: Candidate,
    keys: Iterator[jax.Array],
    data: Any,
    course: Course | None = None,
) -> Candidate:
    """The best mixture of some rounds of population Monte Carlo, judged by fresh draws.

    Args:
        pool: whose threads compile.
        target: what is approximated.
        start: what it starts from.
        keys: random keys.
        data: the data.
        course: how the rounds are made; as for the solution of `start` where None.
    """
    begun = start.solution
    guide, own, name, num_draws, df, reframed = course or course_of(target, begun)
    slopes = jax.device_get(begun.slopes)
    num_active = num_active_of(own, slopes)
    is_far = num_active is None and start.share < FAR
    num_components = MORE_COMPONENTS if is_far else COMPONENTS
    rounds = _rounds(pool, target, guide, num_active, num_components, df)

    def judged(now: Mixture) -> Candidate:
        judge = judge_of_proposal(target, mixture(now, df), begun.params, data, num_draws)
        # The mixture becomes its solution at the end; another batch must confirm what is good.
        return once(name, begun, judge, next(keys), ENOUGH)

    def begin() -> Mixture:
        drawn = start.batches[0]
        position = np.asarray(drawn.position)[resampled(next(keys), drawn.smoothed.log_weights)]
        first = position[:num_components].astype(float)
        return refit(rounds.begin(own, first, drawn, slopes, np), drawn)

    def refit(now: Mixture, drawn: Weighted) -> Mixture:
        return rounds.refit(now if reframed is None else reframed(now, drawn), drawn, np)

    now, found = _settled(begin(), judged, refit)
    for _ in range(WIDENED):
        if not found.is_trustworthy or found.is_determined:
            break
        wider = refit(now, towards_spreads(*found.batches))
        best = best_of([found, confirmed(judged(wider), judged(wider))])
        if best is found:
            break
        now, found = wider, best
    params = {**begun.params, **params_of(rounds.guide, now)}
    return found._replace(solution=begun._replace(guide=rounds.guide, params=params))


def _settled(
    now: Mixture,
    judged: Callable[[Mixture], Candidate],
    refit: Callable[[Mixture, Weighted], Mixture],
) -> tuple[Mixture, Candidate]:
    """The best mixture of some rounds, judged twice."""
    mixtures, tried = [now], [judged(now)]
    for made in itertools.count(1):
        if tried[-1].is_good or is_stale([one.share for one in tried]) or made == ROUNDS:
            best = best_of(tried)
            now = mixtures[[one is best for one in tried].index(True)]
            again = judged(now)
            found = confirmed(best, again)
            if found.is_trustworthy or not best.is_trustworthy or made == ROUNDS:
                return now, found
            # The best of many rounds was lucky; these draws show what it left out.
            mixtures, tried = [now], [again]
        # Only the draws of the best and of the last are looked at again.
        best, last = best_of(tried), tried[-1]
        tried = [one if one is best or one is last else one._replace(batches=()) for one in tried]
        mixtures.append(refit(mixtures[-1], tried[-1].batches[0]))
        tried.append(judged(mixtures[-1]))
    raise AssertionError  # rounds are counted


def compile_polish(pool: Executor, target: Target, start: Guide) -> None:
    """Has compiled, by threads of `pool`, what `polish` is likely to need from a guide on."""
    if flat(target).dim <= LARGEST:
        num_active = None if flat(target).dim <= FREE else ACTIVE
        _rounds(pool, target, start, num_active, COMPONENTS)


def _rounds(
    pool: Executor,
    target: Target,
    start: Guide,
    num_active: int | None,
    num_components: int,
    df: int = DF,
) -> Population:
    """What rounds with so many components are made of; threads of `pool` compile the program that
    they end with."""
    rounds = population(target, start, num_components, df, num_active)
    compile_params(pool, rounds.guide)
    return rounds


def num_active_of(own: Any, slopes: Any) -> int | None:
    """Along how many directions the components are free, those of a conditional Gaussian where that
    is what they begin with; None for all. Above `FREE` dimensions a Gaussian has `Slopes`."""
    if "frame" in own:
        return frame_of(own["frame"]).num_active
    if "weights" in own or len(own["loc"]) <= FREE:
        return None
    seen = scores(own["loc"], own["scale_tril"], slopes, np)
    return min(max(num_different(seen), ACTIVE), MORE_ACTIVE)


def is_stale(shares: list[float]) -> bool:
    """Whether the last rounds were in vain, by the shares of effective draws of all."""
    before = shares[:-PATIENCE]
    return bool(before) and max(shares) < GAIN * max(before)
