"""What follows where one Gaussian is not good enough: a mixture, by population Monte Carlo."""

from collections.abc import Iterator
from concurrent.futures import Executor
from typing import Any, NamedTuple

import jax
import numpy as np

from vi_params._cache import program
from vi_params._compile import Quick
from vi_params.approximation.candidate import Candidate, best_of, worse
from vi_params.approximation.judge import Judge, judge
from vi_params.approximation.result import resampled
from vi_params.guide import Guide
from vi_params.importance import Weighted
from vi_params.solvers.linear_response import compile_gradients, gradients
from vi_params.solvers.mixture_families import slopes_at
from vi_params.solvers.population_monte_carlo import GOOD_SHARE, Population, population
from vi_params.solvers.solution import Slopes, own_name
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


class _Pieces(NamedTuple):
    """What the rounds consist of.

    Attributes:
        guide: the mixture.
        num_active: along how many directions its components are free; None for all.
        begin: the program of the first mixture.
        judge: of a mixture.
        refit: the program of the next mixture.
    """

    guide: Guide
    num_active: int | None
    begin: Quick
    judge: Judge
    refit: Quick


def can_polish(target: Target, start: Candidate) -> bool:
    """Whether a mixture is worth trying."""
    (name,) = start.solution.guide.declared
    is_mixture = "weights" in start.solution.params[name]
    return flat(target).dim <= (FREE if is_mixture else LARGEST)


def polish(
    pool: Executor, target: Target, start: Candidate, keys: Iterator[jax.Array], data: Any
) -> Candidate:
    """The best mixture of some rounds of population Monte Carlo, judged by fresh draws; `pool` has
    the threads that compile."""
    pieces = _pieces(target, start.solution.guide, data)
    key = next(keys)
    slopes = None if pieces.num_active is None else _slopes(target, start, next(keys), data)
    first = start.solution.params, key, start.drawn, slopes
    _compile(pool, pieces, first, data)

    def judged(params: Any) -> Candidate:
        drawn, diagnosis = pieces.judge(params, next(keys), data)
        solution = start.solution._replace(guide=pieces.guide, params=params)
        return Candidate(POLISHED, solution, diagnosis, drawn, GOOD_SHARE)

    tried: list[Candidate] = []
    params, made = pieces.begin(*first), 0
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
        params = pieces.refit(tried[-1].solution.params, tried[-1].drawn)


def compile_polish(
    pool: Executor,
    target: Target,
    start: Guide,
    params: Any,
    key: jax.Array,
    drawn: Weighted,
    fixed_draws: jax.Array,
    data: Any,
) -> None:
    """Has compiled what `polish` needs from a Gaussian on, where it does not take gradients of its
    own.

    Args:
        pool: whose threads compile.
        target: what is approximated.
        start: the guide it starts from.
        params: its parameters; these and the others, or their shapes and dtypes.
        key: a typed random key.
        drawn: weighted draws of it.
        fixed_draws: those of the solution it comes from, shape (num_draws, dim).
        data: the data.
    """
    if flat(target).dim > REUSED:
        return
    pieces = _pieces(target, start, data)
    slopes = None
    if pieces.num_active is not None:
        name = own_name(start, "approximate")
        slope = compile_gradients(pool, target, name, params, fixed_draws, data)
        slopes = Slopes(fixed_draws, slope, jax.eval_shape(lambda u: u[:, 0], fixed_draws))
    _compile(pool, pieces, (params, key, drawn, slopes), data)


def _pieces(target: Target, start: Guide, data: Any) -> _Pieces:
    num_active = None if flat(target).dim <= FREE else ACTIVE
    rounds = population(target, start, COMPONENTS, DF, DRAWS, num_active)
    begin, refit = program(_compiled, rounds)
    return _Pieces(rounds.guide, num_active, begin, judge(target, rounds.guide, DRAWS, data), refit)


def _compile(pool: Executor, pieces: _Pieces, start: tuple, data: Any) -> None:
    """Has the programs compiled in the order of their calls; `start` holds the arguments of
    begin."""
    params = pieces.begin.ahead(pool, *start)
    drawn = pieces.judge.ahead(pool, params, start[1], data)
    pieces.refit.ahead(pool, params, drawn)


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
