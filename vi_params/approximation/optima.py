"""The mean-field optima that `vi.approximate` goes on from."""

from typing import Any

import jax
import numpy as np

from vi_params._compile import Quick
from vi_params._over import num_parts
from vi_params.guide import Guide
from vi_params.solvers.deterministic import default_draws, prepared
from vi_params.solvers.optima import apart
from vi_params.solvers.solution import ENDED, Solution
from vi_params.target import Target, flat

TOLERANCE = 0.01
"""How many nats a Newton step may still promise at the end: the error of fixed draws, and what
linear response corrects, are larger."""

HESSIANS = 8
"""At how many fixed draws Hessians are computed for the linear response of many latents: importance
weights judge its covariances, and what follows corrects them."""


def optima(target: Target, key: jax.Array, data: Any, fixed: Any, lanes: int) -> list[Solution]:
    """A mean-field solution for every distinct optimum, the best first.

    Args:
        target: what is approximated, no plate of it subsampled.
        key: a typed random key.
        data: the data.
        fixed: the parameters of the target that stay as they are.
        lanes: from how many starts.
    """
    guide, solve = solver(target, fixed, lanes)
    parts = solve.side_by_side([(key, data, fixed, None, part) for part in lane_parts(lanes)])
    return apart(together(guide, parts), ended=ENDED)


def solver(target: Target, fixed: Any, lanes: int) -> tuple[Guide, Quick]:
    """As `prepared` gives it, at the default number of draws and no more: weights correct it."""
    num_draws = default_draws(flat(target).dim)
    return prepared(target, num_draws, lanes=lanes, tolerance=TOLERANCE, fixed=tuple(sorted(fixed)))


def lane_parts(lanes: int) -> np.ndarray:
    """The numbers of the lanes that each call searches, shape (calls, lanes of each)."""
    return np.arange(lanes, dtype=np.int32).reshape(-1, num_parts(lanes)).T


def together(guide: Guide, parts: list[tuple]) -> Solution:
    """One solution of all lanes, that of the best part, of what every part has found: lanes at one
    optimum share a result within their part."""
    solutions = [Solution(guide, *part) for part in parts]
    if len(parts) == 1:
        return solutions[0]

    def woven(*leaves: Any) -> np.ndarray:
        """What the lanes of all parts have, in their order."""
        stacked = np.stack(jax.device_get(leaves), axis=1)
        return stacked.reshape(stacked.shape[0] * stacked.shape[1], *stacked.shape[2:])

    best = max(solutions, key=lambda one: np.nan_to_num(float(one.info.elbo), nan=-np.inf))
    infos = [one.info for one in solutions]
    info = best.info._replace(
        lane_elbos=woven(*(one.lane_elbos for one in infos)),
        lane_statuses=woven(*(one.lane_statuses for one in infos)),
    )
    return best._replace(info=info, lanes=jax.tree.map(woven, *(one.lanes for one in solutions)))
