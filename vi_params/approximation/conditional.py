"""What follows where a Gaussian is not good enough: one whose scales follow a few directions."""

from concurrent.futures import Executor
from typing import Any

import jax
import numpy as np

from vi_params._cache import program
from vi_params.approximation.candidate import GOOD_SHAPE, Candidate, confirmed, once
from vi_params.approximation.judge import BATCH, judge_of_proposal
from vi_params.approximation.proposals import compile_params, mixture, params_of, values_of
from vi_params.approximation.tails import HEAVY_ERROR
from vi_params.guide import Guide
from vi_params.guides.contaminated import SCALES
from vi_params.solvers.conditional_gaussian import conditional, conditional_guide
from vi_params.solvers.solution import Solution
from vi_params.target import Target, flat

ACTIVE = 2
"""Given how many directions it is Gaussian."""

FEW_LATENTS = 8
"""Up to so many latents a mixture that is free in all directions does as well."""

CONDITIONAL = "conditional Gaussian"
"""What it is called."""


def has_many_latents(target: Target) -> bool:
    """Whether they are more than a few."""
    return flat(target).dim > FEW_LATENTS


def can_condition(target: Target, start: Solution) -> bool:
    """Whether there are gradients to learn from, and latents enough for it to pay."""
    return start.slopes is not None and has_many_latents(target)


def conditioned(target: Target, start: Solution, key: jax.Array, data: Any) -> Candidate:
    """The conditional Gaussian of a linear response, judged by two batches of draws.

    Unless the spread with the heaviest tail shows well, it is a spare one: across its directions it
    has no wide tails, and few draws tell of those that it lacks.

    Args:
        target: what is approximated.
        start: the linear response.
        key: a typed random key.
        data: the data.
    """
    found = conditional(values_of(start), jax.device_get(start.slopes), ACTIVE, np)
    judge = judge_of_proposal(target, mixture(found, None), start.params, data, BATCH)
    batches = (once(CONDITIONAL, start, judge, one, GOOD_SHAPE) for one in jax.random.split(key))
    candidate = confirmed(*batches)
    if not candidate.is_trustworthy:  # its solution is not asked for
        return candidate._replace(is_spare=True)
    spread = candidate.spread
    shows_well = candidate.is_good and spread is not None and spread.error <= HEAVY_ERROR
    guide = _guide(target, start.guide)
    params = {**start.params, **params_of(guide, found)}
    solution = start._replace(guide=guide, params=params)
    return candidate._replace(solution=solution, is_spare=not shows_well)


def compile_conditional(pool: Executor, target: Target, start: Guide) -> None:
    """Has compiled, by threads of `pool`, what `conditioned` needs after a guide."""
    compile_params(pool, _guide(target, start), len(SCALES), flat(target).dim, ACTIVE)


def _guide(target: Target, start: Guide) -> Guide:
    """The conditional Gaussian's, kept for the next call."""
    (name,) = start.declared
    return program(conditional_guide, target, name, ACTIVE)
