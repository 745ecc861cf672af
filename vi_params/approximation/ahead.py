"""What a first call compiles, side by side: compiling is most of its time."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from vi_params.approximation.candidate import wide_tailed
from vi_params.approximation.result import judge
from vi_params.solvers.deterministic import prepared as prepared_solver
from vi_params.solvers.linear_response import prepared as prepared_response
from vi_params.target import Target


def compile_usual(
    target: Target, key: jax.Array, data: Any, fixed: Any, lanes: int, num_draws: int
) -> None:
    """Compiles, unless it is, what leads from a target to draws of its dense linear response.

    Args:
        target: what to approximate, no plate of it subsampled.
        key: a typed random key.
        data: the data.
        fixed: the parameters that the solver leaves as they are.
        lanes: as `vi.solvers.deterministic` takes them.
        num_draws: by how many draws it is judged.
    """
    mean_field, solve = prepared_solver(target, lanes=lanes, fixed=tuple(sorted(fixed)))
    (name,) = mean_field.declared
    _, expand, respond = prepared_response(target, name)
    with ThreadPoolExecutor() as pool:
        params, info, draws, response, _ = solve.ahead(pool, key, data, fixed, None)
        if response is None:
            response = expand.ahead(pool, params, draws, data)
        params, _ = respond.ahead(pool, params, info, response)
        weighted = judge(target, wide_tailed(target, name), num_draws, data)
        weighted.ahead(pool, params, key, data)
