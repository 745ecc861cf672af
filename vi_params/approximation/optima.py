"""The mean-field optima of a target: where they are looked for, which of them are distinct.

Where gradients are cheap beside compiling, scouts go first: many lanes at few draws. At few draws a
lane costs little, and it strays less: the average over many draws of a start that is far off has
optima of its own, at large scales. At all draws one lane then starts at each distinct optimum.
"""

from typing import Any

import jax
import jax.numpy as jnp

from vi_params._compile import Quick
from vi_params.guide import Guide
from vi_params.noise import moment_matched
from vi_params.solvers.deterministic import deterministic, prepared
from vi_params.solvers.fixed_draws import is_dense
from vi_params.solvers.optima import distinct
from vi_params.solvers.solution import Solution
from vi_params.target import Target, flat

SCOUTS, FEW = 2, 4
"""How many scouts there are for each lane, and at how many draws."""


def optima(target: Target, key: jax.Array, data: Any, fixed: Any, lanes: int) -> list[Solution]:
    """A mean-field solution for every distinct optimum, the best first.

    Args:
        target: what is approximated, no plate of it subsampled.
        key: a typed random key.
        data: the data.
        fixed: the parameters of the target that stay as they are.
        lanes: from how many starts.
    """
    if not _is_scouted(target):
        return _apart(deterministic(target, key, data, lanes=lanes, fixed=fixed))
    scouts = deterministic(target, key, data, **_scouts(lanes), fixed=fixed)
    found = [
        deterministic(target, key, data, lanes=1, init=scout, fixed=fixed)
        for scout in _apart(scouts)
    ]
    return _apart(_together(found))


def programs(target: Target, lanes: int, fixed: Any) -> tuple[Guide, Quick | None, Quick]:
    """The mean-field guide, the scouts' program where there are some, and that of all draws."""
    names = tuple(sorted(fixed))
    if not _is_scouted(target):
        guide, solve = prepared(target, lanes=lanes, fixed=names)
        return guide, None, solve
    guide, solve = prepared(target, lanes=1, fixed=names)
    return guide, prepared(target, **_scouts(lanes), fixed=names)[1], solve


def _is_scouted(target: Target) -> bool:
    """Whether the program at all draws brings the Hessians for linear response: together with the
    scouts' there are then two of the model's gradient size, and else three."""
    return is_dense(flat(target).dim, 0)


def _scouts(lanes: int) -> dict[str, Any]:
    return {"num_draws": FEW, "noise": moment_matched(), "lanes": SCOUTS * lanes}


def _apart(solution: Solution) -> list[Solution]:
    """The solution, and one for every other distinct optimum of its lanes."""
    found = [solution]
    for i in distinct(solution):
        params, response = jax.tree.map(lambda leaf, i=i: leaf[i], solution.lanes)
        info = solution.info._replace(
            status=solution.info.lane_statuses[i], elbo=solution.info.lane_elbos[i]
        )
        found.append(solution._replace(params=params, info=info, response=response))
    return found


def _together(solutions: list[Solution]) -> Solution:
    """Solutions of single lanes at the same draws as one of as many lanes."""
    infos = [one.info for one in solutions]
    elbos = jnp.concatenate([info.lane_elbos for info in infos])
    best = solutions[int(jnp.argmax(jnp.nan_to_num(elbos, nan=-jnp.inf)))]
    info = best.info._replace(
        lane_elbos=elbos, lane_statuses=jnp.concatenate([info.lane_statuses for info in infos])
    )
    lanes = jax.tree.map(
        lambda *leaves: jnp.stack(leaves), *[(one.params, one.response) for one in solutions]
    )
    return best._replace(info=info, lanes=lanes)
