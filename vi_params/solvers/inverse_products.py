"""Products with the inverse Hessian of the fixed-draw loss, by conjugate gradients.

What linear response takes where a Hessian of (2 dim)^2 numbers would be too large: each product
with it costs about two gradients at the fixed draws, and nothing is stored. Coordinates are in
units of the mean-field scales, where the Hessian's diagonal is of order one: the preconditioner of
Giordano, Ingram and Broderick (2024), Black box variational inference with a deterministic
objective, JMLR 25(18).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.sparse.linalg import cg

from vi_params._over import divisor
from vi_params.guides import mean_field
from vi_params.solvers.curvature import along
from vi_params.solvers.fixed_draws import BLOCK, loss
from vi_params.solvers.layout import Layout
from vi_params.solvers.solution import SolverStatus
from vi_params.target import Target

TOLERANCE = 1e-3
"""Products are solved until their residual is this part of the right-hand side."""

CG_STEPS = 1000
"""How many steps of conjugate gradients a product takes at most."""

ENOUGH = 0.05
"""The residual above which a product does not count as solved."""


class InverseProducts(NamedTuple):
    """What is known at a mean-field solution, in units of its scales.

    Attributes:
        layout: how parameters lie in a vector.
        x: the solution (m, w).
        unit: the units of (m, w): shape (2 dim,), the scales and ones.
        solve: right-hand sides of shape (k, 2 dim) -> (H^-1 of each, the largest relative
            residual).
        scores: the gradients of the losses of single pairs of draws, shape (pairs, 2 dim), without
            their mean.
    """

    layout: Layout
    x: jax.Array
    unit: jax.Array
    solve: Any
    scores: jax.Array


def inverse_products(
    target: Target, name: str, params: Any, draws: jax.Array, data: Any, side_by_side: int
) -> InverseProducts:
    """Products with H^-1 for about `side_by_side` right-hand sides at once."""
    layout = Layout(target, mean_field(target, name=name))
    dim, log_density = layout.dim, layout.log_density(data)
    full = layout.vector(params)
    x, theta = full[: 2 * dim], full[2 * dim :]
    unit = layout.units(full)[: 2 * dim]

    def density(u: jax.Array, _: jax.Array) -> jax.Array:
        return log_density(u, theta)

    at_once = divisor(len(draws), BLOCK // (layout.size(data) * side_by_side))
    slope = jax.grad(loss(density, draws, at_once))

    pairs = draws.reshape(2, -1, dim).swapaxes(0, 1)
    scores = jax.lax.map(lambda pair: unit * jax.grad(loss(density, pair))(x), pairs)
    # As for dense covariances: nothing at the optimum of these draws.
    missing = (-scores.mean(0)).at[:dim].set(0.0)

    def product(p: jax.Array) -> jax.Array:
        return unit * along(slope, x, unit * p, unit) + missing * p

    def solve_one(b: jax.Array) -> tuple[jax.Array, jax.Array]:
        found, _ = cg(product, b, tol=TOLERANCE, maxiter=CG_STEPS)
        tiny = jnp.finfo(b.dtype).tiny
        return found, jnp.linalg.norm(product(found) - b) / (jnp.linalg.norm(b) + tiny)

    def solve(b: jax.Array) -> tuple[jax.Array, jax.Array]:
        found, residuals = jax.vmap(solve_one)(b)
        return found, jnp.max(residuals)

    return InverseProducts(layout, x, unit, solve, scores - scores.mean(0))


def standard_error(moved: jax.Array, num_pairs: int) -> jax.Array:
    """The standard error of the mean over all pairs, from what some of them move, shape (some, k),
    without its mean; NaN where one pair tells nothing of it."""
    if len(moved) < 2:
        return jnp.full(moved.shape[1], jnp.nan, moved.dtype)
    return jnp.sqrt(jnp.sum(moved**2, axis=0) / (len(moved) - 1) / num_pairs)


def judged(status: jax.Array, definite: jax.Array, residual: jax.Array) -> jax.Array:
    """The status of a solution whose products were found so."""
    solved = jnp.where(residual < ENOUGH, status, SolverStatus.MAX_STEPS)
    return jnp.where(definite, solved, SolverStatus.INDEFINITE)
