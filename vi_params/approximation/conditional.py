"""What follows where a Gaussian is not good enough: one whose scales follow a few directions,
skewed across them."""

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
from vi_params.solvers.slopes import slopes_by_response
from vi_params.solvers.solution import Solution
from vi_params.target import Target, flat

ACTIVE = 2
"""Given how many directions it is Gaussian."""

FEW_LATENTS = 8
"""Up to so many latents a mixture that is free in all directions does as well."""

ENOUGH = 0.65, 0.35
"""The k-hat below which, and the share of effective draws above which, rounds gain little more."""

LARGER = 2 * BATCH
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
    """The conditional Gaussian of a linear response, judged by two batches of draws, and where it
    is to be trusted, but not yet enough, by as many further ones with these.

    Unless the spread with the heaviest tail shows well, it is a spare one: across its directions it
    has no wide tails, and few draws tell of those that it lacks.

    Args:
        target: what is approximated.
        response: the linear response, `with_gradients`.
        key: a typed random key.
        data: the data.
    """
    start = response.solution
    found = conditional(values_of(start), jax.device_get(start.slopes), ACTIVE, np)
    proposal, keys = mixture(found, None), iter(jax.random.split(key, 4))
    judge = judge_of_proposal(target, proposal, start.params, data, BATCH)
    candidate = once(CONDITIONAL, start, judge, next(keys), ENOUGH)
    if candidate.is_trustworthy:
        candidate = confirmed(candidate, once(CONDITIONAL, start, judge, next(keys), ENOUGH))
    if candidate.is_trustworthy and not _shows_well(candidate):
        judge = judge_of_proposal(target, proposal, start.params, data, LARGER)
        looks = [
            judged_by(CONDITIONAL, start, judge, pooled(batch, judge(other, BATCH)[0]), ENOUGH)
            for batch, other in zip(candidate.batches, keys, strict=True)
        ]
        candidate = confirmed(*looks)
    if not candidate.is_trustworthy:  # its solution is not asked for
        return candidate._replace(is_spare=True)
    guide = _guide(target, start.guide)
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
    compile_params(pool, _guide(target, start))


def _guide(target: Target, start: Guide) -> Guide:
    """The conditional Gaussian's, kept for the next call."""
    (name,) = start.declared
    return program(conditional_guide, target, name, ACTIVE)
