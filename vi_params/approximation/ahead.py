"""What a first call compiles, side by side with what it runs: compiling is most of its time."""

from concurrent.futures import Executor
from typing import Any

import jax

from vi_params.approximation.candidate import wide_tailed
from vi_params.approximation.conditional import compile_conditional, has_many_latents
from vi_params.approximation.judge import compile_density
from vi_params.approximation.optima import HESSIANS, lane_parts, solver
from vi_params.approximation.polish import compile_polish
from vi_params.approximation.proposals import compile_values
from vi_params.approximation.result import compile_draws
from vi_params.solvers.linear_response import nowhere, prepared
from vi_params.target import Target


def compile_usual(
    pool: Executor,
    given: Target,
    target: Target,
    key: jax.Array,
    data: Any,
    fixed: Any,
    lanes: int,
    *,
    polished: bool,
) -> None:
    """Has compiled, unless it is, what leads from a target to draws.

    Args:
        pool: whose threads compile.
        given: what to approximate, no plate of it subsampled.
        target: the same in the coordinates that it is approximated in.
        key: a typed random key.
        data: the data.
        fixed: the parameters that the solver leaves as they are.
        lanes: as `vi.solvers.deterministic` takes them.
        polished: whether a conditional Gaussian or a mixture is likely to follow.
    """
    mean_field, solve = solver(target, fixed, lanes)
    (name,) = mean_field.declared
    _, expand, respond = prepared(target, name)
    params, info, draws, response, _ = solve.ahead(
        pool, key, data, fixed, None, lane_parts(lanes)[0]
    )
    if response is None:
        response, _ = expand.ahead(pool, params, draws, data, *nowhere(draws, HESSIANS))
    params, _, _, _ = respond.ahead(pool, params, info.status, draws, response)
    guide = wide_tailed(target, name)
    compile_values(pool, guide, params)
    latents = compile_density(pool, target, params, data)
    compile_draws(pool, given, params, latents, data)
    if polished:
        compile_polish(pool, target, guide)
        if has_many_latents(target):
            compile_conditional(pool, target, guide)
