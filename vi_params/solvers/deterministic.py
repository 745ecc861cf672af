"""Variational inference at fixed draws: the ELBO as a deterministic function, minimised by Newton.

With e_1 .. e_M drawn once, the mean-field ELBO of u = m + exp(w) * e is

    F(m, w) = -1/M sum_i log p(m + exp(w) * e_i) - sum(w),

a smooth function with a Hessian: no learning rate, and an end that can be told. Giordano, Ingram
and Broderick (2024), Black box variational inference with a deterministic objective, JMLR 25(18).
The draws are antithetic, with sample moments made exact (`vi.noise`), so that quadratic log
densities have their exact optimum; steps are measured in the current standard deviations, so that
the units of a latent do not matter.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from vi_params._cache import program
from vi_params._check import require_count, require_key
from vi_params.estimators import closed_form_entropy
from vi_params.guide import Guide
from vi_params.guides import mean_field
from vi_params.noise import Noise, moment_matched, orthogonal
from vi_params.objectives.elbo import elbo
from vi_params.objectives.objective import Objective, resolve
from vi_params.solvers.solution import Solution, SolverInfo
from vi_params.solvers.trust_region import minimise
from vi_params.svi import svi
from vi_params.target import Target, flat

FEWEST = 32
"""The smallest number of draws chosen by default."""

FULL_FRAME = 256
"""The largest dimension at which the default draws hold a whole orthogonal frame."""

RADII = (1.0, 0.15, 0.5, 0.0)
"""The starts of the lanes, as multiples of the family's start."""


class FixedDraws(NamedTuple):
    """The problem that the solver minimises.

    Attributes:
        guide: the mean-field family.
        objective: its ELBO with the closed-form entropy.
    """

    guide: Guide
    objective: Objective


def deterministic(
    target: Target,
    key: jax.Array,
    data: Any = None,
    *,
    num_draws: int | None = None,
    noise: Noise | None = None,
    lanes: int = 4,
    init: Any = None,
    tolerance: float | None = None,
    max_steps: int = 200,
    name: str = "guide",
) -> Solution:
    """The mean-field optimum at fixed draws, by trust-region Newton-CG from several starts.

    Pure in (key, data); under `jax.vmap` take `solution.params` and `solution.info` out, since the
    guide is no array. For full data only: the draws stay the same, and so must the data. Its
    locations are good, its scales are those of mean-field: `vi.linear_response` corrects them.

    Args:
        target: what to approximate; its own parameters, if any, are optimised along.
        key: a typed random key: of the draws and of the starts.
        data: the data; the target's own where None.
        num_draws: how many draws, an even number; by default twice the dimension and at least 32
            (32 above dimension 256).
        noise: their scheme; `vi.noise.orthogonal()`, or `moment_matched()` above dimension 256.
        lanes: from how many starts, the first the family's own, the next ones drawn in towards
            zero, in unconstrained coordinates.
        init: where the first lane starts, as in `vi.guides.mean_field`.
        tolerance: stop after a Newton step promising less than this, in nats; by default 1e-6 in
            float64 and 1e-5 in float32.
        max_steps: how many steps a lane tries at most.
        name: the name of the family's parameters.

    Returns:
        A `Solution` with a `vi.guides.mean_field` guide; `info.status` says how it ended.

    Raises:
        ValueError: lanes, num_draws or max_steps < 1, an odd num_draws, or a start outside its
            support.
        KeyError: `init` or `data` hold unknown names, or `data` lack one.
        TypeError: `key` is not a typed key.

    Example:
        >>> def log_density(values, latents, data):
        ...     return -0.5 * jnp.sum(((latents["z"] - 3.0) / 2.0) ** 2)
        >>> target = vi.target(log_density, {"z": vi.Latent((2,))})
        >>> solution = vi.solvers.deterministic(target, jax.random.key(0))
        >>> values = vi.constrain(solution.guide.declared, solution.params)["guide"]
        >>> bool(jnp.allclose(values["loc"], 3.0)), bool(jnp.allclose(values["scale"], 2.0))
        (True, True)
    """
    require_key(key, "solvers.deterministic")
    require_count(lanes, "lanes", "solvers.deterministic")
    require_count(max_steps, "max_steps", "solvers.deterministic")
    dim = flat(target).dim
    if num_draws is None:
        num_draws = max(FEWEST, 2 * dim) if dim <= FULL_FRAME else FEWEST
    require_count(num_draws, "num_draws", "solvers.deterministic")
    if tolerance is None:
        tolerance = 1e-6 if jnp.result_type(float) == jnp.float64 else 1e-5
    scheme = noise or (orthogonal() if dim <= FULL_FRAME else moment_matched())
    problem, solve = program(
        _build, target, num_draws, lanes, tolerance, max_steps, name, alike=(scheme, init)
    )
    params, info, draws = solve(key, resolve(problem.objective, data))
    return Solution(problem.guide, params, info, draws)


def fixed_draws(
    target: Target, num_draws: int, scheme: Noise | None, init: Any, name: str
) -> FixedDraws:
    """The mean-field ELBO of a target at draws to be given."""
    guide = mean_field(target, init=init, name=name)
    objective = elbo(
        target, guide, num_particles=num_draws, estimator=closed_form_entropy(), noise=scheme
    )
    return FixedDraws(guide, objective)


def units(params: Any, name: str) -> Any:
    """The unit of every parameter: a location's is its standard deviation, the others' is one."""
    ones = jax.tree.map(jnp.ones_like, params)
    return {**ones, name: {**ones[name], "loc": jnp.exp(params[name]["scale"])}}


def _build(
    target: Target,
    num_draws: int,
    lanes: int,
    tolerance: float,
    max_steps: int,
    name: str,
    scheme: Noise,
    init: Any,
) -> tuple[FixedDraws, Any]:
    problem = fixed_draws(target, num_draws, scheme, init, name)
    objective = problem.objective
    begin = svi(objective, optax.identity()).start
    radii = jnp.array([RADII[i] if i < len(RADII) else 1.0 for i in range(lanes)])

    @jax.jit
    def solve(key: jax.Array, data: Any) -> tuple[Any, SolverInfo, jax.Array]:
        draws = objective.noise(jax.random.fold_in(key, lanes))

        def lane(i: jax.Array, radius: jax.Array) -> Any:
            params = begin(jax.random.fold_in(key, i), None, data).state.params
            own = params[name]
            params = {**params, name: {**own, "loc": radius * own["loc"]}}
            x, unravel = ravel_pytree(params)
            found = minimise(
                lambda x: objective.evaluate(unravel(x), draws, data)[0],
                x,
                lambda x: ravel_pytree(units(unravel(x), name))[0],
                tolerance=tolerance,
                max_steps=max_steps,
            )
            return unravel(found.x), found

        params, found = jax.vmap(lane)(jnp.arange(lanes), radii)
        best = jnp.argmin(found.value)
        info = SolverInfo(
            status=found.status[best],
            elbo=-found.value[best],
            steps=found.steps[best],
            lane_elbos=jnp.where(jnp.isfinite(found.value), -found.value, jnp.nan),
            lane_statuses=found.status,
            sampling_error=jnp.full((), jnp.nan, found.value.dtype),
        )
        return jax.tree.map(lambda leaf: leaf[best], params), info, draws

    return problem, solve


def own_name(solution: Solution) -> str:
    """The name of the parameters of a solution's family."""
    (name,) = solution.guide.declared
    return name
