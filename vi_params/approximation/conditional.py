"""What follows where a Gaussian is not good enough: one whose scales follow a few directions."""

from collections.abc import Iterator
from concurrent.futures import Executor
from typing import Any

import jax
import numpy as np

from vi_params._cache import program
from vi_params.approximation.candidate import GOOD_SHAPE, Candidate, judged
from vi_params.approximation.judge import BATCH, judge_of_proposal
from vi_params.approximation.proposals import compile_params, mixture, params_of, values_of
from vi_params.approximation.tails import HEAVY_ERROR
from vi_params.guide import Guide
from vi_params.guides.contaminated import SCALES
from vi_params.solvers.conditional_gaussian import conditional, conditional_guide
from vi_params.solvers.solution import Solution
from vi_params.target import Target, flat

ACTIVE = 2
"""How many directions it is Gaussian given."""

FEW_LATENTS = 8
"""Up to so many latents a mixture that is free in all directions does as well."""

CONDITIONAL = "conditional Gaussian"
"""What it is called."""


def are_many(target: Target) -> bool:
    """Whether the latents are."""
    return flat(target).dim > FEW_LATENTS


def can_condition(target: Target, start: Solution) -> bool:
    """Whether there are gradients to learn from, and latents enough for it to pay."""
    return start.slopes is not None and are_many(target)


def conditioned(
    pool: Executor, target: Target, start: Solution, keys: Iterator[jax.Array], data: Any
) -> Candidate:
    """The conditional Gaussian of a linear response, judged; it counts where it is good and spreads
    show well: few of its draws tell of tails that it lacks.

    Args:
        pool: whose threads compile.
        target: what is approximated.
        start: the linear response.
        keys: random keys.
        data: the data.
    """
    guide = compile_conditional(pool, target, start.guide)
    found = conditional(values_of(start), jax.device_get(start.slopes), ACTIVE, np)
    judge = judge_of_proposal(target, mixture(found, None), start.params, data, BATCH)
    candidate = judged(CONDITIONAL, start, judge, keys, GOOD_SHAPE)
    spread = candidate.spread
    if not (candidate.is_good and spread is not None and spread.error <= HEAVY_ERROR):
        return candidate._replace(counts=False)
    params = {**start.params, **params_of(guide, found)}
    return candidate._replace(solution=start._replace(guide=guide, params=params))


def compile_conditional(pool: Executor, target: Target, start: Guide) -> Guide:
    """Has compiled, by threads of `pool`, what `conditioned` needs after a guide; gives the one
    of its own, kept for the next call."""
    (name,) = start.declared
    guide = program(conditional_guide, target, name, ACTIVE)
    compile_params(pool, guide, len(SCALES), flat(target).dim, ACTIVE)
    return guide
