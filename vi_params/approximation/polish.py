"""What follows where one Gaussian is not good enough: a mixture, by population Monte Carlo."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from vi_params._cache import program
from vi_params._compile import Quick
from vi_params.approximation.candidate import Candidate, best_of, worse
from vi_params.approximation.result import judge, resampled
from vi_params.solvers.linear_response import gradients
from vi_params.solvers.mixture_families import slopes_at
from vi_params.solvers.population_monte_carlo import GOOD_SHARE, Population, population
from vi_params.solvers.solution import Slopes
from vi_params.target import Target, flat

COMPONENTS = 16
"""How many components the mixture has."""

DF = 5
"""Their degrees of freedom."""

DRAWS = 16000
"""How many draws a round makes: few components of few draws leave out the neck of a funnel."""

FREE = 32
"""The largest dimension in which the components are free in all directions."""

REUSED = 128
"""The largest dimension in which their gradients come from the program of linear response: its
Hessians beside them take less time there than another program takes to compile."""

ACTIVE = 4
"""Along how many directions they are free in more dimensions."""

LARGEST = 500
"""The largest dimension in which a mixture is tried."""

ROUNDS = 16
"""How many rounds are made at most."""

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


def polish(target: Target, start: Candidate, keys: Iterator[jax.Array], data: Any) -> Candidate:
    """The best mixture of some rounds of population Monte Carlo, judged by fresh draws."""
    num_active = None if flat(target).dim <= FREE else ACTIVE
    rounds = population(target, start.solution.guide, COMPONENTS, DF, DRAWS, num_active)
    begin, refit = program(_compiled, rounds)
    weighted = judge(target, rounds.guide, DRAWS, data)
    params, key = start.solution.params, next(keys)
    slopes = None if num_active is None else _slopes(target, start, next(keys), data)
    with ThreadPoolExecutor() as pool:  # as `compile_usual` does it
        shapes = begin.ahead(pool, params, key, start.drawn, slopes)
        drawn, _ = weighted.ahead(pool, shapes, key, data)
        refit.ahead(pool, shapes, drawn)

    def judged(params: Any) -> Candidate:
        drawn, diagnosis = weighted(params, next(keys), data)
        solution = start.solution._replace(guide=rounds.guide, params=params)
        diagnosis = jax.device_get(diagnosis)
        return Candidate(POLISHED, solution, diagnosis, drawn, GOOD_SHARE)

    tried: list[Candidate] = []
    params, made = begin(params, key, start.drawn, slopes), 0
    while True:
        tried.append(judged(params))
        made += 1
        if tried[-1].is_good or is_stale([one.share for one in tried]) or made == ROUNDS:
            best = best_of(tried)
            again = judged(best.solution.params)
            found = best._replace(diagnosis=worse(best.diagnosis, again.diagnosis))
            if found.is_trustworthy or not best.is_trustworthy or made == ROUNDS:
                return found
            # The best of many rounds was lucky; these draws show what it left out.
            tried = [again]
        params = refit(tried[-1].solution.params, tried[-1].drawn)


def is_stale(shares: list[float]) -> bool:
    """Whether the last rounds were in vain, by the shares of effective draws of all."""
    before = shares[:-PATIENCE]
    return bool(before) and max(shares) < GAIN * max(before)


def _slopes(target: Target, start: Candidate, key: jax.Array, data: Any) -> Slopes:
    """The gradients at draws of the posterior, as far as the start's weights give them."""
    if flat(target).dim > REUSED:
        return program(_gradients, target)(start.solution.params, start.drawn, data)
    number = len(start.solution.noise)
    chosen = resampled(key, start.drawn.smoothed.log_weights)[:number]
    position = np.asarray(start.drawn.position)[chosen]
    gradient = gradients(target, start.solution, position, data)
    return Slopes(position, gradient, np.full(number, 1 / number, position.dtype))


def _gradients(target: Target) -> Quick:
    return Quick(lambda params, drawn, data: slopes_at(target, params, drawn, data))


def _compiled(rounds: Population) -> tuple[Quick, Quick]:
    return Quick(rounds.begin), Quick(rounds.refit)
