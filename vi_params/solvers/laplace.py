"""The Laplace approximation: a Gaussian with the curvature of the log density at its mode.

    p(u | x) ~ N(u*, H^-1),   H = -d^2 log p(x, u*) / du^2,
    log p(x) ~ log p(x, u*) + (dim / 2) log 2 pi - (1 / 2) log det H.

Tierney and Kadane (1986), Accurate approximations for posterior moments and marginal densities,
JASA 81. Where the model has parameters of its own they maximise that estimate of the evidence, as
in empirical Bayes, and not the joint density, whose mode is at zero variance in many hierarchies.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

from vi_params._cache import program
from vi_params._check import require_count, require_key
from vi_params._compile import Quick
from vi_params._over import over_lanes
from vi_params.guide import Guide
from vi_params.guides import full_rank
from vi_params.guides.starts import start_vector
from vi_params.params import init_params, unconstrain
from vi_params.solvers.curvature import along
from vi_params.solvers.solution import Solution, SolverInfo, SolverStatus
from vi_params.solvers.start import data_of, first_finite, lane_radii, log_density, nats, unchanging
from vi_params.solvers.trust_region import Minimum, matrix_free, minimise
from vi_params.target import Target, flat

AT_ONCE = 32
"""How many columns of the Hessian are computed side by side."""


class Curvature(NamedTuple):
    """A negative Hessian in the units of its own diagonal.

    Attributes:
        unit: 1 / sqrt(|H_jj|), shape (dim,); 1 where the diagonal is zero.
        scale_tril: a triangle whose square is H^-1; the diagonal `unit` where H is not definite.
        log_det: log det H.
        definite: whether H is positive definite.
    """

    unit: jax.Array
    scale_tril: jax.Array
    log_det: jax.Array
    definite: jax.Array


def laplace(
    target: Target,
    key: jax.Array,
    data: Any = None,
    *,
    lanes: int = 4,
    init: Any = None,
    tolerance: float | None = None,
    max_steps: int = 200,
    name: str = "guide",
) -> Solution:
    """The Gaussian at the mode, in unconstrained coordinates, with the curvature's covariance.

    Trust-region Newton steps from several starts, measured in the units that the curvature gives,
    so that the units of a latent do not matter. Of the modes found, the one with the largest
    Laplace evidence is taken. Pure in (key, data); under `jax.vmap` take `solution.params` and
    `solution.info` out. A dense matrix: dim Hessian-vector products a step.

    Args:
        target: what to approximate. Its own parameters, if any, maximise the Laplace evidence.
        key: a typed random key: of the starts.
        data: the data; the target's own where None.
        lanes: from how many starts, the first the family's own, the next ones drawn in towards
            zero, in unconstrained coordinates.
        init: where the first lane starts, as in `vi.guides.mean_field`.
        tolerance: stop after a Newton step promising less than this, in nats; by default 1e-6 in
            float64 and 1e-5 in float32.
        max_steps: how many steps a lane tries at most.
        name: the name of the family's parameters.

    Returns:
        A `Solution` with a `vi.guides.full_rank` guide. `info.elbo` is the Laplace estimate of the
        log evidence. Where the Hessian is not positive definite, `info.status` is INDEFINITE and
        the covariance is diagonal.

    Raises:
        ValueError: lanes or max_steps < 1, tolerance <= 0, a start outside its support, or data
            that are a batch of rows.
        KeyError: `init` or `data` hold unknown names, or `data` lack one.
        TypeError: `key` is not a typed key.

    Example:
        >>> precision = jnp.array([[2.0, 0.9], [0.9, 1.0]])
        >>> target = vi.target(
        ...     lambda v, z, d: -0.5 * z["z"] @ precision @ z["z"], {"z": vi.Latent((2,))}
        ... )
        >>> solution = vi.solvers.laplace(target, jax.random.key(0))
        >>> root = vi.constrain(solution.guide.declared, solution.params)["guide"]["scale_tril"]
        >>> bool(jnp.allclose(root @ root.T @ precision, jnp.eye(2), atol=1e-3))
        True
    """
    data = data_of(target, data)
    require_key(key, "solvers.laplace")
    require_count(lanes, "lanes", "solvers.laplace")
    require_count(max_steps, "max_steps", "solvers.laplace")
    tolerance = nats(tolerance, "solvers.laplace")
    guide, solve = program(
        _build, target, lanes, tolerance, max_steps, name, alike=(unchanging(init),)
    )
    params, info = solve(key, data)
    return Solution(guide, params, info, jnp.zeros((0, flat(target).dim)))


def _build(
    target: Target, lanes: int, tolerance: float, max_steps: int, name: str, init: Any
) -> tuple[Guide, Callable]:
    guide = full_rank(target, init=init, name=name)
    dim = flat(target).dim
    density, begin = log_density(target), start_vector(target, init)

    def mode(starts: jax.Array, model: Any, data: Any) -> Minimum:
        def loss(u: jax.Array) -> jax.Array:
            return -density(u, model, data)

        return minimise(
            matrix_free(loss),
            starts,
            lambda u: curvature_units(loss, u),
            tolerance=tolerance,
            max_steps=max_steps,
        )

    def best_model(u: jax.Array, model: Any, data: Any) -> tuple[Any, Minimum]:
        """The model's parameters at the largest Laplace evidence, from a start."""
        theta, unravel = ravel_pytree(model)

        def loss(theta: jax.Array) -> jax.Array:
            return -evidence(theta, lax.stop_gradient(theta))

        def evidence(theta: jax.Array, fixed: jax.Array) -> jax.Array:
            def slope(u: jax.Array, theta: jax.Array) -> jax.Array:
                return jax.grad(density)(u, unravel(theta), data)

            u_star = lax.stop_gradient(mode(u[None], unravel(fixed), data).x)
            hessian = lax.stop_gradient(dense_hessian(lambda u: slope(u, fixed), u_star))
            # Two chord steps leave u* where it is and give it its first two derivatives in theta.
            for _ in range(2):
                u_star = u_star - jnp.linalg.solve(hessian, slope(u_star, theta))
            at_mode = dense_hessian(lambda u: -slope(u, theta), u_star)
            root = jnp.linalg.cholesky(0.5 * (at_mode + at_mode.T))
            log_det = 2 * jnp.sum(jnp.log(jnp.diagonal(root)))
            return density(u_star, unravel(theta), data) - 0.5 * log_det

        found = minimise(
            matrix_free(loss),
            theta[None],
            jnp.ones_like,
            tolerance=tolerance,
            max_steps=max_steps,
        )
        return unravel(found.x), found

    def lane(key: jax.Array, radius: jax.Array, data: Any) -> Any:
        def start(key: jax.Array) -> Any:
            of_model, of_latents = jax.random.split(key)
            return init_params(target.declared, of_model), radius * begin(of_latents)

        model, u = first_finite(lambda x: density(x[1], x[0], data), start, key)
        outer = None
        if target.declared:
            model, outer = best_model(u, model, data)
        found = mode(u[None], model, data)
        bend = curvature(lambda u: -density(u, model, data), found.x)
        evidence = -found.value + 0.5 * dim * math.log(2 * math.pi) - 0.5 * bend.log_det
        status = jnp.where(
            (found.status == SolverStatus.CONVERGED) & ~bend.definite,
            SolverStatus.INDEFINITE,
            found.status,
        )
        if outer is not None:
            clean = status == SolverStatus.CONVERGED
            status = jnp.where(clean, outer.status, status)
            found = found._replace(steps=outer.steps)
        return {**model, name: (found.x, bend.scale_tril)}, evidence, status, found.steps

    @Quick
    def solve(key: jax.Array, data: Any) -> tuple[Any, SolverInfo]:
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(lanes))
        radii = lane_radii(jnp.arange(lanes))
        found = over_lanes(lambda at: lane(at[0], at[1], data), (keys, radii))
        params, evidence, status, steps = found
        known = jnp.isfinite(evidence) & (status != SolverStatus.INVALID_START)
        # A converged lane before one that is not, then the larger evidence.
        rank = jnp.where(known, evidence, -jnp.inf)
        settled = known & (status == SolverStatus.CONVERGED)
        rank = jnp.where(jnp.any(settled) & ~settled, -jnp.inf, rank)
        unsettled = jnp.where(status == SolverStatus.INDEFINITE, -1, status)
        best = jnp.where(jnp.any(known), jnp.argmax(rank), jnp.argmin(unsettled))
        chosen = jax.tree.map(lambda leaf: leaf[best], params)
        loc, scale_tril = chosen.pop(name)
        own = unconstrain(guide.declared, {name: {"loc": loc, "scale_tril": scale_tril}})
        info = SolverInfo(
            status=status[best],
            elbo=evidence[best],
            steps=steps[best],
            lane_elbos=jnp.where(known, evidence, jnp.nan),
            lane_statuses=status,
            sampling_error=jnp.full((), jnp.nan, loc.dtype),
        )
        return {**chosen, **own}, info

    return guide, solve


def dense_hessian(slope: Callable[[jax.Array], jax.Array], u: jax.Array) -> jax.Array:
    """The derivative of a gradient, column by column, shape (dim, dim)."""
    return lax.map(
        lambda v: along(slope, u, v),
        jnp.eye(u.size, dtype=u.dtype),
        batch_size=min(AT_ONCE, u.size),
    )


def curvature_units(loss: Callable[[jax.Array], jax.Array], u: jax.Array) -> jax.Array:
    """The unit of every coordinate: 1 / sqrt(|H_jj|), H the Hessian of the loss."""
    return _units(jnp.diagonal(dense_hessian(jax.grad(loss), u)))


def curvature(loss: Callable[[jax.Array], jax.Array], u: jax.Array) -> Curvature:
    """The Hessian of a loss as that of a Gaussian."""
    return of_hessian(dense_hessian(jax.grad(loss), u))


def of_hessian(hessian: jax.Array) -> Curvature:
    """A Hessian as that of a Gaussian, shape (dim, dim)."""
    unit = _units(jnp.diagonal(hessian))
    # In units of its diagonal the matrix has entries of order one, whatever those of the latents.
    scaled = unit[:, None] * (0.5 * (hessian + hessian.T)) * unit
    root = jnp.linalg.cholesky(scaled)
    inverse = jax.scipy.linalg.cho_solve((root, True), jnp.eye(len(unit), dtype=unit.dtype))
    scale_tril = jnp.linalg.cholesky(0.5 * (inverse + inverse.T))
    definite = jnp.all(jnp.isfinite(scale_tril))
    scale_tril = jnp.where(definite, scale_tril, jnp.eye(len(unit), dtype=unit.dtype))
    log_det = 2 * jnp.sum(jnp.log(jnp.diagonal(root))) - 2 * jnp.sum(jnp.log(unit))
    return Curvature(unit, unit[:, None] * scale_tril, log_det, definite)


def _units(diagonal: jax.Array) -> jax.Array:
    bend = jnp.abs(diagonal)
    least = jnp.finfo(bend.dtype).eps * jnp.max(bend, initial=0.0)
    usable = jnp.isfinite(bend) & (bend > 0)
    return jnp.where(usable, jnp.maximum(bend, least) ** -0.5, 1.0)
