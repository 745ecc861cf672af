"""As many fixed draws as matter: they are doubled while their sampling error is large."""

import functools
import math
from typing import Any

import jax

from vi_params._check import explain, require_count, require_instance, require_key
from vi_params._tree import is_traced
from vi_params.solvers.deterministic import deterministic
from vi_params.solvers.linear_response import linear_response
from vi_params.solvers.solution import ENDED, Solution, require_mean_field
from vi_params.target import Target

TOLERABLE = 0.5
"""The largest sampling error that is left, in posterior standard deviations."""


def refine(
    target: Target,
    key: jax.Array,
    data: Any = None,
    *,
    init: Solution,
    fixed: Any = None,
    tolerable: float = TOLERABLE,
    doublings: int = 3,
    rank: int | None = None,
    num_hessians: int | None = None,
) -> Solution:
    """The linear response of a fixed-draw solution, its draws doubled while they are too few.

    An optimum at fixed draws differs from that of the ELBO by a sampling error, which linear
    response estimates. Where it exceeds what is tolerable, the search goes on from the optimum at
    twice as many draws; where that comes to no end, it starts anew, and may find another optimum.
    Giordano, Ingram and Broderick (2024), JMLR 25(18), section 3.3. On the host, since the number
    of draws is a shape: not under `jax.jit` or `jax.vmap`.

    Args:
        target: what was approximated.
        key: a typed random key, of further draws.
        data: the data of that solution; the target's own where None.
        init: what `vi.solvers.deterministic` gave for it.
        fixed: what `init` was given; `noise`, `tolerance` and `max_steps` are the defaults.
        tolerable: the largest sampling error of a location that is left, in posterior standard
            deviations.
        doublings: how often they are doubled at most.
        rank: as `vi.linear_response` takes it.
        num_hessians: as `vi.linear_response` takes it.

    Returns:
        The `Solution` of `vi.linear_response`; `info.details` is the number of draws and
        `info.sampling_error` what is left of the error.

    Raises:
        ValueError: tolerable <= 0, doublings < 0, `init` is of another family or has no even number
            of fixed draws, a rank not among 1 .. dim, `num_hessians` no even number above zero or
            together with `rank`, or data that are a batch.
        KeyError: `fixed` or `data` hold unknown names, or `data` lack one.
        TypeError: `key` is not a typed key, `init` is no `Solution`, `num_hessians` no int, or key,
            solution or data are traced.

    Example:
        >>> def log_density(values, latents, data):
        ...     return 3.0 * latents["z"] - jnp.exp(3.0 * latents["z"])
        >>> target = vi.target(log_density, {"z": vi.Latent(())})
        >>> rough = vi.solvers.deterministic(target, jax.random.key(0), num_draws=4)
        >>> fine = vi.solvers.refine(target, jax.random.key(0), init=rough, tolerable=0.01)
        >>> len(rough.noise), len(fine.noise), bool(fine.info.sampling_error <= 0.01)
        (4, 8, True)
    """
    require_key(key, "solvers.refine")
    require_instance(init, Solution, "vi.solvers.deterministic(target, key)", "init")
    name = require_mean_field(init, "solvers.refine, init")
    require_count(doublings, "doublings", "solvers.refine", least=0)
    if is_traced(key, init.params, data):
        raise TypeError(
            explain(
                "The number of draws cannot depend on values that are traced.",
                expected="a key, data and a solution that are known",
                received="tracers of jax.jit, jax.vmap or another transformation",
                where="solvers.refine",
                hint="inside of them vi.solvers.deterministic(num_draws=...) and "
                "vi.linear_response take a number of draws that is given",
            )
        )
    if not tolerable > 0:
        raise ValueError(
            explain(
                "No number of draws has no sampling error.",
                expected="tolerable > 0, in posterior standard deviations",
                received=str(tolerable),
                where="solvers.refine",
            )
        )

    respond = functools.partial(
        linear_response, target, data=data, rank=rank, num_hessians=num_hessians
    )
    solution = init
    found = respond(solution)
    for _ in range(doublings):
        error = float(found.info.sampling_error)
        if math.isnan(error) or error <= tolerable:
            break
        now = solution.info.details
        num_draws = 2 * (len(solution.noise) if now is None else int(now))
        solve = functools.partial(
            deterministic,
            target,
            jax.random.fold_in(key, num_draws),
            data,
            num_draws=num_draws,
            fixed=fixed,
            name=name,
        )
        solution = solve(lanes=1, init=solution)
        if int(solution.info.status) not in ENDED:
            # The scales of too few draws can be out of all proportion, and lead nowhere.
            solution = solve()
        found = respond(solution)
    return found
