"""What follows where one Gaussian is not good enough: a mixture, by population Monte Carlo."""

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from typing import Any

import jax
import numpy as np

from vi_params._cache import program
from vi_params._compile import Quick
from vi_params.approximation.candidate import Candidate, best_of, confirmed, once
from vi_params.approximation.judge import judge_of_proposal
from vi_params.approximation.proposals import mixture, values_of
from vi_params.approximation.result import resampled
from vi_params.approximation.tails import towards_spreads
from vi_params.guide import Guide
from vi_params.guides.active_mixture import Across, Parts
from vi_params.guides.frame import Frame
from vi_params.guides.mixture import Components
from vi_params.importance import Weighted
from vi_params.solvers.mixture_families import Mixture
from vi_params.solvers.population_monte_carlo import DF, Population, population
from vi_params.target import Target, flat

COMPONENTS = 16
"""How many components the mixture has."""

DRAWS, FEW_LATENTS, FEWER_DRAWS = 16000, 8, 8000
"""How many draws a round makes: few components of few draws leave out the neck of a funnel; fewer
are enough for few latents."""

FREE = 32
"""The largest dimension in which the components are free in all directions."""

ACTIVE = 4
"""Along how many directions they are free in more dimensions."""

LARGEST = 500
"""The largest dimension in which a mixture is tried."""

ROUNDS = 16
"""How many rounds are made at most."""

GOOD = 0.6, 0.4
"""They end below this k-hat and above this share of effective draws: little more is gained, and
another batch of draws must confirm it."""

WIDENED = 2
"""How many more are made towards spreads that the draws do not show."""

PATIENCE, GAIN = 4, 1.1
"""They end where so many rounds made the largest share of effective draws no larger than by this
factor."""

POLISHED = "population Monte Carlo"
"""What the polished mixture is called."""


def can_polish(target: Target, start: Candidate) -> bool:
    """Whether a mixture is worth trying."""
    (name,) = start.solution.guide.declared
    is_mixture = "weights" in start.solution.params[name]
    return flat(target).dim <= (FREE if is_mixture else LARGEST)


def polish(
    pool: Executor, target: Target, start: Candidate, keys: Iterator[jax.Array], data: Any
) -> Candidate:
    """The best mixture of some rounds of population Monte Carlo, judged by fresh draws.

    Args:
        pool: whose threads compile.
        target: what is approximated.
        start: what it starts from.
        keys: random keys.
        data: the data.
    """
    begun = start.solution
    rounds = _rounds(target, begun.guide)
    _compile_params(pool, rounds, target, begun.noise.dtype)
    num_draws = DRAWS if flat(target).dim > FEW_LATENTS else FEWER_DRAWS

    def judged(now: Mixture) -> Candidate:
        judge = judge_of_proposal(target, mixture(now, DF), begun.params, data, num_draws)
        return once(POLISHED, begun, judge, next(keys), GOOD)  # the mixture is its solution at last

    def begin() -> Mixture:
        drawn = start.batches[0]
        position = np.asarray(drawn.position)[resampled(next(keys), drawn.smoothed.log_weights)]
        first, slopes = position[:COMPONENTS].astype(float), jax.device_get(begun.slopes)
        return refit(rounds.begin(values_of(begun), first, drawn, slopes, np), drawn)

    def refit(now: Mixture, drawn: Weighted) -> Mixture:
        return rounds.refit(now, drawn, np)

    now, found = _settled(begin(), judged, refit)
    for _ in range(WIDENED):
        if not found.is_trustworthy or found.spread is None or not found.spread.can_be_shown:
            break
        wider = refit(now, towards_spreads(*found.batches))
        best = best_of([found, confirmed(judged(wider), judged(wider))])
        if best is found:
            break
        now, found = wider, best
    params = {**begun.params, **program(_params, rounds)(now)}
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


def compile_polish(pool: Executor, target: Target, start: Guide, dtype: Any) -> None:
    """Has compiled, by threads of `pool`, what `polish` needs from a guide on."""
    if flat(target).dim > LARGEST:
        return
    _compile_params(pool, _rounds(target, start), target, dtype)


def _rounds(target: Target, start: Guide) -> Population:
    return population(target, start, COMPONENTS, DF, _num_active(target))


def _num_active(target: Target) -> int | None:
    """Along how many directions the components are free; None for all."""
    return None if flat(target).dim <= FREE else ACTIVE


def is_stale(shares: list[float]) -> bool:
    """Whether the last rounds were in vain, by the shares of effective draws of all."""
    before = shares[:-PATIENCE]
    return bool(before) and max(shares) < GAIN * max(before)


def _params(rounds: Population) -> Quick:
    return Quick(rounds.params)


def _compile_params(pool: Executor, rounds: Population, target: Target, dtype: Any) -> None:
    """Has the program compiled that gives a mixture's parameters."""
    dim, number = flat(target).dim, COMPONENTS + 1  # and the guard
    along = _num_active(target) or dim

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    components = Components(array(number), array(number, along), array(number, along, along))
    across = Across(array(number, dim - along), array(number, dim - along))
    square, bend = array(dim, dim), array(1 + along, dim - along)
    frame = None if along == dim else Frame(array(dim), square, square, bend, bend)
    program(_params, rounds).ahead(pool, Mixture(Parts(components, across), frame))
