"""What follows where one Gaussian is not good enough: one given a few latents, whose mean and
precision follow these, and a mixture along them."""

import itertools
from concurrent.futures import Executor
from typing import Any

import jax
import numpy as np

from vi_params._cache import program
from vi_params.approximation.candidate import Candidate, misses, once
from vi_params.approximation.judge import BATCH, judge_of_proposal
from vi_params.approximation.polish import Course, polish
from vi_params.approximation.proposals import mixture
from vi_params.approximation.result import resampled
from vi_params.approximation.structure import Structure
from vi_params.guides.active_mixture import Across
from vi_params.guides.frame import Frame
from vi_params.importance import Weighted
from vi_params.solvers.mixture_families import Mixture, contaminated
from vi_params.solvers.nested_frame import (
    DF,
    Nodes,
    along,
    nested_frame,
    num_nodes_for,
    rounding_of,
    spread_nodes,
)
from vi_params.solvers.nested_laplace import nested_guide
from vi_params.solvers.slopes import evened
from vi_params.solvers.weighted_em import moments
from vi_params.target import Target

NESTED, POLISHED = "nested Laplace", "nested Laplace, polished"
"""What it is called, and what rounds make of it."""

DRAWS = 8000
"""How many draws a round makes: along few directions these are enough."""

HALF = 0.5
"""It is tried where those latents leave less than this share of the squared third derivatives."""

WELL = 0.5
"""The share of effective draws above which the nodes are where the posterior is, and rounds in all
directions not worth making."""


def nested(
    pool: Executor,
    target: Target,
    response: Candidate,
    structure: Structure,
    others: list[Candidate],
    key: jax.Array,
    data: Any,
) -> list[Candidate]:
    """The mixture that rounds from a nested Laplace approximation of a linear response end with;
    none where no few latents make the posterior more of a Gaussian, or conditional modes are not
    found.

    Args:
        pool: whose threads compile.
        target: what is approximated.
        response: the linear response.
        structure: seen from there.
        others: mixtures of several optima.
        key: a typed random key.
        data: the data.
    """
    begun = response.solution
    loc, scale_tril, gradient, _, few, left = structure
    if not left[-1] < HALF * left[0]:
        return []
    keys = (jax.random.fold_in(key, i) for i in itertools.count())
    eps = rounding_of(begun.noise)
    frame, enough = nested_frame(along(loc, scale_tril, few, np), gradient, eps, xp=np)
    if not enough:
        return []
    found = contaminated(frame, np)
    judge = judge_of_proposal(target, mixture(found, None), begun.params, data, BATCH)
    start = once(NESTED, begun, judge, next(keys))

    def reframed(now: Mixture, drawn: Weighted) -> Mixture:
        """With nodes where the weighted draws are."""
        if now.frame is None or drawn.smoothed.ess > WELL * len(drawn.log_ratios):
            return now
        nodes = _nodes(now.frame, drawn, next(keys))
        frame, enough = nested_frame(now.frame, gradient, eps, nodes, np)
        if not enough:
            return now
        across = now.parts.across
        blank = Across(np.zeros_like(across.locs), np.ones_like(across.scales))
        return Mixture(now.parts._replace(across=blank), frame)

    (name,) = begun.guide.declared
    guide = program(nested_guide, target, name, frame.num_active)
    course = Course(guide, {"frame": frame.values}, POLISHED, DRAWS, DF, reframed)
    best = polish(pool, target, start, keys, data, course)
    return [best._replace(is_partial=any(misses(best, other, DF) for other in others))]


def settles(found: Candidate) -> bool:
    """Whether rounds in all directions are not worth making after these."""
    is_whole = found.is_trustworthy and not found.is_partial
    return is_whole and found.is_determined and found.share > WELL


def _nodes(frame: Frame, drawn: Weighted, key: jax.Array) -> Nodes:
    """Nodes where the weighted draws are, half of them, and all about these."""
    weights = evened(np.asarray(drawn.smoothed.log_weights, float), np)
    a = frame.straight(np.asarray(drawn.position, float), np)[:, : frame.num_active]
    mean, root = moments(a, weights, np)
    number = num_nodes_for(frame.num_active)
    with np.errstate(divide="ignore"):
        chosen = a[resampled(key, np.log(weights))][: number // 2]
    about = mean + spread_nodes(frame.num_active, number - len(chosen)) @ root.T
    return Nodes(np.concatenate([chosen, about]), mean, np.sqrt(np.sum(root**2, axis=1)))
