"""Fixed-draw mean-field in two stages by one program: scouts at few draws, then lanes at all.

A lane at few draws costs little, and it strays less: the average over many draws about a start that
is far off has optima of its own, at large scales. The number of draws that count is an argument, so
that both stages are one program of the model's gradient and Hessian.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vi_params._cache import program
from vi_params._compile import Quick
from vi_params._tree import pick
from vi_params.guide import Guide
from vi_params.guides import mean_field
from vi_params.noise import moment_matched, orthogonal
from vi_params.params import init_params
from vi_params.params.maps import abstract_params
from vi_params.solvers.deterministic import FEWEST, TRIES, Layout
from vi_params.solvers.fixed_draws import Used, fixed_draws, is_dense
from vi_params.solvers.optima import apart
from vi_params.solvers.solution import Solution, SolverStatus
from vi_params.solvers.start import RADII, nats
from vi_params.solvers.trust_region import minimise
from vi_params.target import Target, flat

SCOUTS = 2
"""How many scouts there are for each lane."""

FEW = 4
"""At how many draws they are."""

FAR_BELOW = 20.0
"""Scouts that are this many nats worse than the best one are not followed."""

STEPS = 200
"""How many steps a scout or lane tries at most."""


class Staged(NamedTuple):
    """The program of both stages, for a target and names of parameters that stay as they are.

    Attributes:
        guide: the mean-field family.
        solve: `(key, data, fixed, start, scout) -> the fields of a Solution after its guide`, of
            one lane. `start` are parameters, used unless their density is not finite; `scout` is
            the number of a scout, or -1 for a lane at all draws.
        blank: a start that is none.
    """

    guide: Guide
    solve: Quick
    blank: Any


def staged(target: Target, fixed: tuple[str, ...]) -> Staged | None:
    """The program, kept for the next call; None where the Hessian is too large for a matrix."""
    free = {name: target.declared[name] for name in target.declared if name not in fixed}
    sizes = [leaf.size for leaf in jax.tree.leaves(abstract_params(free))]
    if not is_dense(flat(target).dim, sum(sizes)):
        return None
    return program(_build, target, nats(None, "approximate"), alike=(fixed,))


def scouted(target: Target, key: jax.Array, data: Any, fixed: Any, lanes: int) -> list[Solution]:
    """A mean-field solution for every distinct optimum that the scouts found, the best first.

    Args:
        target: one that `staged` has a program for.
        key: a typed random key.
        data: the data.
        fixed: the parameters of the target that stay as they are.
        lanes: half of how many scouts there are.
    """
    found = staged(target, tuple(sorted(fixed)))
    assert found is not None

    def solve(start: Any, scout: int) -> Solution:
        own = pick(start, found.blank)
        return Solution(found.guide, *found.solve(key, data, fixed, own, np.int32(scout)))

    scouts = _together([solve(found.blank, i) for i in range(SCOUTS * lanes)])
    # Few draws can lie in several modes at once: such a broad optimum must not hide true ones.
    starts = apart(scouts, span=np.minimum, below=FAR_BELOW, ended=tuple(SolverStatus))
    optima = [solve(start.params, -1) for start in starts]
    # In float32 a lane can stall at its optimum; what it is worth, importance weights tell.
    ended = (SolverStatus.CONVERGED, SolverStatus.STALLED)
    return [_alone(one) for one in apart(_together(optima), ended=ended)]


def _build(target: Target, tolerance: float, fixed_names: tuple[str, ...]) -> Staged:
    guide = mean_field(target)
    layout = Layout(target, guide, fixed_names)
    dim = layout.dim
    half = max(FEWEST, 2 * dim) // 2
    half += -half % (FEW // 2)

    @Quick
    def solve(key: jax.Array, data: Any, fixed: Any, start: Any, scout: jax.Array) -> tuple:
        common, own = jax.random.split(key)
        keys = jax.random.split(jax.random.fold_in(own, scout), TRIES + 1)
        few = moment_matched().draw(keys[0], FEW, dim)
        all_ = orthogonal().draw(common, 2 * half, dim)
        # Of every pair one is in either half.
        rows = jnp.arange(FEW // 2)
        padded = jnp.zeros_like(all_).at[jnp.concatenate([rows, half + rows])].set(few)
        is_scout = scout >= 0
        draws = jnp.where(is_scout, padded, all_)
        used = Used(FEW, jnp.where(is_scout, 1, 2 * half // FEW))
        log_density = layout.log_density(data, fixed)
        f = fixed_draws(log_density, draws, layout.size(data), layout.num_model, used)
        starts = jax.vmap(lambda key: layout.vector(init_params(layout.declared, key)))(keys[1:])
        radius = jnp.where(is_scout, jnp.array(RADII)[scout % len(RADII)], 1.0)
        # The first try is zero for a scout of radius zero; the next ones are drawn.
        radii = jnp.where(jnp.arange(TRIES) > 1, jnp.maximum(radius, RADII[1]), radius)
        starts = starts.at[:, :dim].multiply(radii[:, None])
        starts = starts.at[0].set(layout.vector(start))
        found = minimise(f, starts, layout.units, tolerance=tolerance, max_steps=STEPS)
        return layout.result(jax.tree.map(lambda leaf: leaf[None], found), draws, fixed)

    shapes = abstract_params(layout.declared)
    blank = jax.tree.map(lambda leaf: np.full(leaf.shape, np.nan, leaf.dtype), shapes)
    return Staged(guide, solve, blank)


def _alone(solution: Solution) -> Solution:
    """The solution as one of a single lane: what follows is compiled for that, however many."""
    info = solution.info
    elbo = np.where(np.isfinite(info.elbo), info.elbo, np.nan)
    lane = {"lane_elbos": elbo[None], "lane_statuses": np.asarray(info.status)[None]}
    return solution._replace(info=info._replace(**lane), lanes=None)


def _together(solutions: list[Solution]) -> Solution:
    """Solutions of single lanes as one of as many lanes, the best in front; in numpy, since every
    number of them would compile programs of its own."""
    lanes = jax.device_get([(one.params, one.response) for one in solutions])
    infos = jax.device_get([one.info for one in solutions])
    elbos = np.concatenate([info.lane_elbos for info in infos])
    best = int(np.argmax(np.nan_to_num(elbos, nan=-np.inf)))
    statuses = np.concatenate([info.lane_statuses for info in infos])
    return solutions[best]._replace(
        info=infos[best]._replace(lane_elbos=elbos, lane_statuses=statuses),
        lanes=jax.tree.map(lambda *leaves: np.stack(leaves), *lanes),
    )
