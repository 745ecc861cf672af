"""Linear response: the covariances that mean-field leaves out, from how its optimum moves.

If the log density is tilted by t.u, the optimal locations move at the rate

    d m / d t = [H^-1]_mm,   H the Hessian of the fixed-draw loss in (m, log scale),

and the rate at which a posterior mean moves under such a tilt is the posterior covariance.
Giordano, Broderick and Jordan (2018), Covariances, robustness, and variational Bayes, JMLR 19(51).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

from vi_params._cache import program
from vi_params._check import explain
from vi_params.guides import full_rank
from vi_params.objectives.objective import resolve
from vi_params.params import unconstrain
from vi_params.solvers.deterministic import fixed_draws, own_name, units
from vi_params.solvers.solution import Solution, SolverInfo, SolverStatus
from vi_params.target import Target, flat

AT_ONCE = 32
"""How many columns of the Hessian are computed side by side."""


def linear_response(target: Target, solution: Solution, data: Any = None) -> Solution:
    """The Gaussian with the locations of a mean-field solution and linear-response covariances.

    A dense matrix: 2 dim Hessian-vector products and memory for (2 dim)^2 numbers. For a Gaussian
    target the result is exact. Judge it by k-hat (`vi.diagnose`), not by its ELBO: a mean-field
    scale is fitted to the ELBO, a covariance by linear response is not.

    Args:
        target: the target that was approximated.
        solution: what `vi.solvers.deterministic` gave for it.
        data: the data of that solution; the target's own where None.

    Returns:
        A `Solution` with a `vi.guides.full_rank` guide. `info.sampling_error` is estimated from how
        the gradient differs between the antithetic pairs. Where the Hessian is not positive
        definite, `info.status` is INDEFINITE and the scales are those of mean-field.

    Raises:
        ValueError: the solution is of another family, or has no even number of fixed draws.

    Example:
        >>> precision = jnp.array([[2.0, 0.9], [0.9, 1.0]])
        >>> target = vi.target(
        ...     lambda v, z, d: -0.5 * z["z"] @ precision @ z["z"], {"z": vi.Latent((2,))}
        ... )
        >>> solution = vi.solvers.deterministic(target, jax.random.key(0))
        >>> solution = vi.linear_response(target, solution)
        >>> root = vi.constrain(solution.guide.declared, solution.params)["guide"]["scale_tril"]
        >>> bool(jnp.allclose(root @ root.T @ precision, jnp.eye(2), atol=1e-3))
        True
    """
    name = own_name(solution)
    if set(solution.params[name]) != {"loc", "scale"} or len(solution.noise) % 2:
        raise ValueError(
            explain(
                "Linear response starts from a mean-field solution at antithetic draws.",
                expected="what vi.solvers.deterministic returns",
                received=f"parameters {sorted(solution.params[name])}, {len(solution.noise)} draws",
                where="linear_response",
            )
        )
    guide, objective, respond = program(_build, target, len(solution.noise), name)
    data = resolve(objective, data)
    params, info = respond(solution.params, solution.info, solution.noise, data)
    return Solution(guide, params, info, solution.noise)


def _build(target: Target, num_draws: int, name: str) -> Any:
    _, objective = fixed_draws(target, num_draws, None, None, name)
    guide = full_rank(target, name=name)
    dim, half = flat(target).dim, num_draws // 2

    @jax.jit
    def respond(params: Any, info: SolverInfo, draws: jax.Array, data: Any) -> Any:
        own, rest = params[name], {key: params[key] for key in params if key != name}
        # (m, log scale) in units of the scales: every block of the Hessian is then of order one.
        unit = ravel_pytree(units(params, name)[name])[0]
        x, unravel = ravel_pytree(own)

        def loss(p: jax.Array, draws: jax.Array) -> jax.Array:
            return objective.evaluate({**rest, name: unravel(x + unit * p)}, draws, data)[0]

        zero = jnp.zeros_like(x)
        slope = jax.grad(loss)
        hessian = lax.map(
            lambda v: jax.jvp(lambda p: slope(p, draws), (zero,), (v,))[1],
            jnp.eye(2 * dim, dtype=x.dtype),
            batch_size=min(AT_ONCE, 2 * dim),
        )
        factor = jnp.linalg.cholesky(0.5 * (hessian + hessian.T))
        inverse = jax.scipy.linalg.cho_solve((factor, True), jnp.eye(2 * dim, dtype=x.dtype))
        covariance, location = inverse[:dim, :dim], inverse[:dim]
        scale_tril = jnp.linalg.cholesky(0.5 * (covariance + covariance.T))

        # The loss is the mean over pairs of independent draws of a pair's own loss.
        pairs = jnp.stack([draws[:half], draws[half:]], axis=1)
        scores = lax.map(lambda pair: slope(zero, pair), pairs, batch_size=min(AT_ONCE, half))
        moved = (scores - scores.mean(0)) @ location.T
        error = jnp.sqrt(jnp.mean(moved**2, axis=0) / max(half - 1, 1))
        relative = jnp.max(error / jnp.sqrt(jnp.diagonal(covariance)))

        definite = jnp.all(jnp.isfinite(scale_tril))
        scale = jnp.exp(own["scale"])
        scale_tril = jnp.where(definite, scale[:, None] * scale_tril, jnp.diag(scale))
        values = {name: {"loc": own["loc"], "scale_tril": scale_tril}}
        status = jnp.where(definite, info.status, SolverStatus.INDEFINITE)
        info = info._replace(status=status, sampling_error=relative)
        return {**rest, **unconstrain(guide.declared, values)}, info

    return guide, objective, respond
