"""What `approximate` tries, one after the other, until one is good enough."""

import itertools
from concurrent.futures import Executor
from typing import Any

import jax
import numpy as np

from vi_params._check import explain
from vi_params._tree import fold_in_name
from vi_params.approximation.ahead import compile_usual
from vi_params.approximation.candidate import (
    Candidate,
    best_of,
    judge_of,
    judged,
    with_wide_tails,
)
from vi_params.approximation.centring import non_centred, suited
from vi_params.approximation.conditional import (
    CONDITIONAL,
    can_condition,
    conditioned,
    with_gradients,
)
from vi_params.approximation.flow import can_flow, flowed
from vi_params.approximation.given import GIVEN, given_latents
from vi_params.approximation.judge import BATCH
from vi_params.approximation.nested import NESTED, nested, settles
from vi_params.approximation.optima import HESSIANS, optima
from vi_params.approximation.polish import can_polish, start_of
from vi_params.approximation.polish import polish as polished
from vi_params.approximation.structure import has_structure, structure_of
from vi_params.diagnostics import check
from vi_params.solvers.linear_response import linear_response
from vi_params.solvers.merge import merge
from vi_params.solvers.refine import refine
from vi_params.solvers.solution import Solution
from vi_params.target import Target, flat

DENSE = 1000
"""The largest dimension in which linear response holds every covariance."""

HOPELESS = 0.02
"""The share of effective draws of a linear response below which, where latents can be looked for
that keep the posterior from being a Gaussian, a Gaussian given directions is left out."""

RESPONSE = "linear response"
"""What it is called."""

RANK = 64
"""How many directions it holds above."""


def tried(
    pool: Executor,
    given: Target,
    target: Target,
    key: jax.Array,
    data: Any,
    lanes: int,
    polish: bool,
    flow: bool,
) -> list[Candidate]:
    """What was tried until one was good enough, linear response first."""
    keys = (jax.random.fold_in(key, i) for i in itertools.count())
    centring = non_centred(target)
    if flat(target).dim <= DENSE:
        compile_usual(
            pool,
            given,
            target,
            key,
            data,
            centring,
            lanes,
            polished=polish and bool(centring),  # for a hierarchy a Gaussian seldom does
        )
    if centring:
        centring = suited(target, next(keys), data, lanes)

    first = next(keys)
    modes = _respond(target, first, data, centring, lanes)
    _require_valid(given, first, modes[0], data)
    wide = with_wide_tails(target, modes[0])
    judge = judge_of(target, wide, data)
    is_followed = polish and len(modes) == 1 and can_condition(target, wide)
    candidates = [judged(RESPONSE, wide, judge, keys, is_followed)]
    if len(modes) > 1:
        merged = merge(target, modes, next(keys), data, num_draws=BATCH)
        name = f"{len(modes)} optima merged"
        candidates.append(judged(name, merged, judge_of(target, merged, data), keys))
    best = start = best_of(candidates)
    if polish and not best.is_enough and can_condition(target, best.solution):
        response = start = with_gradients(target, best, data)
        if len(modes) == 1:
            # Under a name of its own: the rounds have the same keys whether it is tried or not.
            named = fold_in_name(key, CONDITIONAL)
            is_hopeless = has_structure(target) and response.share < HOPELESS
            following = [] if is_hopeless else [conditioned(target, response, named, data)]
            is_judged = len(response.batches[0].log_ratios) == judge.num_draws
            if not is_judged and not any(one.is_enough for one in following):
                response = judged(RESPONSE, response.solution, judge, keys)
            candidates = [response, *following]
            best, start = best_of(candidates), start_of(target, response, *following)
    is_done = best.is_enough
    if polish and not is_done and has_structure(target):
        response, merged = candidates[0], candidates[1:] if len(modes) > 1 else []
        structure = structure_of(target, response.solution, data)
        named = fold_in_name(key, NESTED)
        found = nested(pool, target, response, structure, merged, named, data)
        candidates += found
        is_done = best_of(candidates).is_enough or any(settles(one) for one in found)
        if not is_done:
            named = fold_in_name(key, GIVEN)
            candidates += given_latents(target, response, structure, merged, named, data)
            is_done = best_of(candidates).is_enough
        best = best_of(candidates)
    if polish and not is_done and can_polish(target, start):
        candidates.append(polished(pool, target, start, keys, data))
        best = best_of(candidates)
    if flow and not best.is_trustworthy and can_flow(candidates[0]):
        candidates.append(flowed(target, candidates[0], keys, data))
    return candidates


def _respond(target: Target, key: jax.Array, data: Any, fixed: Any, lanes: int) -> list[Solution]:
    """A solution with linear response for every distinct optimum, the best first."""
    rank, num_hessians = (None, HESSIANS) if flat(target).dim <= DENSE else (RANK, None)
    first, *others = optima(target, key, data, fixed, lanes)
    best = refine(target, key, data, init=first, fixed=fixed, rank=rank, num_hessians=num_hessians)
    rest = (
        linear_response(target, one, data, rank=rank, num_hessians=num_hessians) for one in others
    )
    return [best, *rest]


def _require_valid(target: Target, key: jax.Array, solution: Solution, data: Any) -> None:
    """Raises, saying why, where no lane had a valid start."""
    if not np.all(np.isnan(np.asarray(solution.info.lane_elbos))):
        return
    report = check(target, key, data)
    raise ValueError(
        explain(
            "No start has a finite log density and gradient.",
            expected="a finite log density, gradient and Hessian at one of the starts",
            received="; ".join(report.problems) or "a gradient or Hessian that is not finite",
            where="approximate",
            hint=f"mend the model; vi.check(target, key) shows every site:\n{report}",
        )
    )
