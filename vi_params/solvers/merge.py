"""Several approximations of one posterior joined in a mixture."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vi_params._cache import program
from vi_params._check import explain, require_count, require_instance, require_key
from vi_params._compile import Quick
from vi_params.guide import Guide
from vi_params.guides import mixture
from vi_params.guides.location_scale import require_gaussian
from vi_params.guides.mixture import Components
from vi_params.importance import at_once, weigh
from vi_params.params import constrain, unconstrain
from vi_params.solvers.solution import Solution, SolverInfo, SolverStatus, own_name
from vi_params.solvers.start import data_of
from vi_params.target import Target


def merge(
    target: Target,
    solutions: Sequence[Solution],
    key: jax.Array,
    data: Any = None,
    *,
    num_draws: int = 4000,
    name: str = "guide",
) -> Solution:
    """A mixture of Gaussian approximations, weighted by the evidence that each accounts for.

    For approximations of different modes: the weight of each is its Pareto-smoothed importance
    estimate of the evidence. Two of one mode count its mass twice: leave all but one of them out.

    Args:
        target: what was approximated.
        solutions: Gaussian `Solution`s: by `vi.linear_response`, `vi.solvers`, or made from fits,
            `vi.Solution(guide, fit.params, None, None)`.
        key: a typed random key.
        data: the data; the target's own where None.
        num_draws: of each, at least 25.
        name: the name of the mixture's parameters.

    Returns:
        A `Solution` with a `vi.guides.mixture` guide; `info.lane_elbos` are the log evidences. The
        model's own parameters, if any, are those of the solution with the largest.

    Raises:
        ValueError: no solutions, one that is no Gaussian, num_draws < 25, or data that are a batch
            of rows.
        TypeError: `key` is not a typed key, or a solution is none.

    Example:
        >>> def log_density(values, latents, data):  # two modes, the right one thrice as likely
        ...     z = latents["z"]
        ...     return jnp.logaddexp(-0.5 * (z + 9) ** 2, jnp.log(3) - 0.5 * (z - 9) ** 2)
        >>> target = vi.target(log_density, {"z": vi.Latent(())})
        >>> solve = lambda at: vi.solvers.deterministic(
        ...     target, jax.random.key(0), init={"z": at}, lanes=1
        ... )
        >>> both = vi.merge(target, [solve(-8.0), solve(8.0)], jax.random.key(1))
        >>> weights = vi.constrain(both.guide.declared, both.params)["guide"]["weights"]
        >>> bool(jnp.allclose(weights, jnp.array([0.25, 0.75]), atol=0.01))
        True
    """
    data = data_of(target, data)
    require_key(key, "merge")
    require_count(num_draws, "num_draws", "merge", least=25)
    if not solutions:
        raise ValueError(
            explain(
                "There is nothing to merge.",
                expected="at least one Solution",
                received="none",
                where="merge, solutions",
            )
        )
    for i, solution in enumerate(solutions):
        require_instance(solution, Solution, "vi.linear_response(...)", f"merge, solutions[{i}]")
    guides = tuple(solution.guide for solution in solutions)
    guide, join = program(_build, target, name, num_draws, *guides)
    params = tuple(solution.params for solution in solutions)
    merged, info = join(params, key, data)
    return Solution(guide, merged, info, jnp.zeros((0, 0)))


def _build(target: Target, name: str, num_draws: int, *guides: Guide) -> tuple[Guide, Any]:
    guide = mixture(target, len(guides), name=name)

    @Quick
    def join(all_params: tuple, key: jax.Array, data: Any) -> tuple[Any, SolverInfo]:
        keys = jax.random.split(key, len(guides))
        log_evidences, parts = [], []
        for one, params, key in zip(guides, all_params, keys, strict=True):
            noise, size = one.noise(key, num_draws), at_once(num_draws, target, data)
            drawn = weigh(target, one, params, noise, data, size, nan_is_outside=True)
            log_evidences.append(drawn.smoothed.log_evidence)
            own = own_name(one, "merge")
            values = constrain(one.declared, {own: params[own]})[own]
            parts.append(require_gaussian(values, "merge"))
        found = jnp.stack(log_evidences)
        best = jnp.argmax(jnp.where(jnp.isnan(found), -jnp.inf, found))
        weights = jax.nn.softmax(jnp.where(jnp.isnan(found), -jnp.inf, found))
        tiny = jnp.finfo(weights.dtype).eps  # the simplex is open: no weight is zero
        weights = (weights + tiny) / jnp.sum(weights + tiny)
        locs, scale_trils = (jnp.stack(leaves) for leaves in zip(*parts, strict=True))
        values = {name: Components(weights, locs, scale_trils)._asdict()}
        models = [{k: params[k] for k in target.declared} for params in all_params]
        model = jax.tree.map(lambda *leaves: jnp.stack(leaves)[best], *models)
        status = jnp.where(jnp.isfinite(found), SolverStatus.CONVERGED, SolverStatus.INVALID_START)
        total = jax.scipy.special.logsumexp(jnp.where(jnp.isnan(found), -jnp.inf, found))
        info = SolverInfo(
            status[best], total, jnp.int32(0), found, status, jnp.full((), jnp.nan, found.dtype)
        )
        return {**model, **unconstrain(guide.declared, values)}, info

    return guide, join
