"""Which of several lanes ended in other optima than the best one."""

from collections.abc import Collection

import jax
import numpy as np

from vi_params.solvers.solution import Solution, SolverStatus

FAR = 2.0
"""Two optima are distinct where a location differs by more than this many standard deviations."""

BELOW = 10.0
"""Optima that are this many nats worse than the best one hold no mass that matters."""


def distinct(
    solution: Solution, ended: Collection[SolverStatus] = (SolverStatus.CONVERGED,)
) -> list[int]:
    """The best lane of each optimum other than the one that a mean-field solution reports.

    Args:
        solution: one with lanes.
        ended: how a lane may have ended.
    """
    params = solution.lanes[0]
    (name,) = solution.guide.declared
    elbos = np.asarray(solution.info.lane_elbos)
    usable = np.isin(solution.info.lane_statuses, list(ended))
    locs, scales = np.asarray(params[name]["loc"]), np.exp(np.asarray(params[name]["scale"]))
    found: list[int] = []
    seen = [(np.asarray(solution.params[name]["loc"]), np.exp(solution.params[name]["scale"]))]
    for i in np.argsort(-elbos, kind="stable").tolist():
        if not usable[i] or not elbos[i] > float(solution.info.elbo) - BELOW:
            continue
        away = [
            np.max(np.abs(locs[i] - loc) / np.maximum(scales[i], scale), initial=0.0)
            for loc, scale in seen
        ]
        if min(away) > FAR:
            found.append(i)
            seen.append((locs[i], scales[i]))
    return found


def apart(
    solution: Solution, ended: Collection[SolverStatus] = (SolverStatus.CONVERGED,)
) -> list[Solution]:
    """The solution, and one for the best lane of every other optimum that is `distinct`."""
    found = [solution]
    for i in distinct(solution, ended):
        params, response = jax.tree.map(lambda leaf, i=i: leaf[i], solution.lanes)
        info = solution.info._replace(
            status=solution.info.lane_statuses[i], elbo=solution.info.lane_elbos[i]
        )
        found.append(solution._replace(params=params, info=info, response=response))
    return found
