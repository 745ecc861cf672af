"""What follows where a Gaussian is not good enough: one whose scales follow a few directions,
skewed across them."""

import itertools
from concurrent.futures import Executor
from typing import Any

import jax
import numpy as np

from vi_params._cache import program
from vi_params.approximation.candidate import Candidate, confirmed, judged_by, once
from vi_params.approximation.judge import BATCH, judge_of_proposal, pooled
from vi_params.approximation.optima import HESSIANS
from vi_params.approximation.proposals import compile_params, mixture, params_of, values_of
from vi_params.approximation.tails import HEAVY_ERROR
from vi_params.guide import Guide
from vi_params.solvers.conditional_gaussian import conditional, conditional_guide
from vi_params.solvers.fixed_draws import DENSE as RESPONDED_AT_ONCE
from vi_params.solvers.mixture_families import Mixture
from vi_params.solvers.slopes import slopes_by_response
from vi_params.solvers.solution import Solution
from vi_params.target import Target, flat

ACTIVE = 2
"""Given how many directions it is Gaussian."""

FEW_LATENTS = 8
"""Up to so many latents a mixture that is free in all directions does as well."""

ENOUGH = 0.65, 0.35
"""The k-hat below which, and the share of effective draws above which, rounds gain little more."""

LARGER = (2 * BATCH,)
"""By how many draws it is judged where a batch does not show all."""

CONDITIONAL = "conditional Gaussian"
"""What it is called."""


def has_many_latents(target: Target) -> bool:
    """Whether they are more than a few."""
    return flat(target).dim > FEW_LATENTS


def can_condition(target: Target, start: Solution) -> bool:
    """Whether there are gradients to learn from, and latents enough for it to pay."""
    return start.slopes is not None and has_many_latents(target)


def conditioned(target: Target, response: Candidate, key: jax.Array, data: Any) -> Candidate:
    """The conditional Gaussian of a linear response.

    Args:
        target: what is approximated.
        response: the linear response, `with_gradients`.
        key: a typed random key.
        data: the data.
    """
    start = response.solution
    found = conditional(values_of(start), jax.device_get(start.slopes), ACTIVE, np)
    return looked_at(CONDITIONAL, target, start, found, key, data, ENOUGH, LARGER)


def looked_at(
    name: str,
    target: Target,
    start: Solution,
    found: Mixture,
    key: jax.Array,
    data: Any,
    good: tuple[float, float],
    larger: tuple[int, ...],
) -> Candidate:
    """A Gaussian given some directions, judged by two batches of draws, and while it is to be
    trusted, but not yet enough, by further ones with these.

    Unless the spread with the heaviest tail shows well, it is a spare one: across its directions it
    has no wide tails, and few draws tell of those that it lacks.

    Args:
        name: what it is called.
        target: what is approximated.
        start: the linear response that it was found from.
        found: the Gaussian.
        key: a typed random key.
        data: the data.
        good: the k-hat and the share of effective draws at which it is.
        larger: how many draws a batch has with the further ones.
    """
    proposal, keys = mixture(found, None), (jax.random.fold_in(key, i) for i in itertools.count())
    judge = judge_of_proposal(target, proposal, start.params, data, BATCH)
    candidate = once(name, start, judge, next(keys), good)
    if candidate.is_trustworthy:
        candidate = confirmed(candidate, once(name, start, judge, next(keys), good))
    for num_draws in larger:
        if not candidate.is_trustworthy or _shows_well(candidate):
            break
        judge = judge_of_proposal(target, proposal, start.params, data, num_draws)
        further = num_draws - len(candidate.batches[0].log_ratios)
        seen = [pooled(batch, judge(next(keys), further)[0]) for batch in candidate.batches]
        candidate = confirmed(*(judged_by(name, start, judge, one, good) for one in seen))
    if not candidate.is_trustworthy:  # its solution is not asked for
        return candidate._replace(is_spare=True)
    guide = _guide(target, start.guide, found.parts.along.locs.shape[1])
    solution = start._replace(guide=guide, params={**start.params, **params_of(guide, found)})
    return candidate._replace(solution=solution, is_spare=not _shows_well(candidate))


def _shows_well(candidate: Candidate) -> bool:
    """Whether it is good, and so is the spread with the heaviest tail."""
    spread = candidate.spread
    return candidate.is_good and spread is not None and spread.error <= HEAVY_ERROR


def with_gradients(target: Target, response: Candidate, data: Any) -> Candidate:
    """The linear response with enough gradients. Of many latents, those at the draws by which it
    was judged: it took a program that computes them. Of others, it has them itself."""
    if flat(target).dim <= RESPONDED_AT_ONCE:
        return response
    drawn, solution = response.batches[0], response.solution
    weights = drawn.smoothed.log_weights
    slopes = slopes_by_response(target, solution, drawn.position, weights, data, HESSIANS)
    return response._replace(solution=solution._replace(slopes=slopes))


def compile_conditional(pool: Executor, target: Target, start: Guide) -> None:
    """Has compiled, by threads of `pool`, what `conditioned` needs after a guide."""
    compile_params(pool, _guide(target, start, ACTIVE))


def _guide(target: Target, start: Guide, num_active: int) -> Guide:
    """The conditional Gaussian's, kept for the next call."""
    (name,) = start.declared
    return program(conditional_guide, target, name, num_active)
