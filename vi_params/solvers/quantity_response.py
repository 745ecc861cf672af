"""The covariances of a few quantities of interest, without that of all latents."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from vi_params._cache import program
from vi_params._check import explain
from vi_params._compile import Quick
from vi_params._over import over
from vi_params._tree import pick
from vi_params.params import constrain
from vi_params.solvers.fixed_draws import split
from vi_params.solvers.inverse_products import (
    inverse_products,
    judged,
    standard_error,
)
from vi_params.solvers.solution import Solution, require_mean_field
from vi_params.solvers.start import data_of
from vi_params.target import Target, flat, whole


class QuantityResponse(NamedTuple):
    """Posterior means and covariances of quantities.

    Attributes:
        mean: their expectations under the mean-field solution, as the quantity's own pytree.
        sd: their linear-response standard deviations, likewise.
        covariance: of all of them, flattened in the order of `jax.flatten_util.ravel_pytree`, shape
            (k, k).
        sampling_error: the standard errors of the means due to the draws being so few, as the
            quantity's own pytree.
        status: a `SolverStatus`: MAX_STEPS where conjugate gradients did not arrive, INDEFINITE
            where a variance is not positive.
    """

    mean: Any
    sd: Any
    covariance: jax.Array
    sampling_error: Any
    status: jax.Array


def quantity_response(
    target: Target,
    solution: Solution,
    quantity: Callable[[dict[str, jax.Array]], Any],
    data: Any = None,
) -> QuantityResponse:
    """Linear-response covariances of quantities f(z), one product with H^-1 each.

    The delta method at the fixed-draw optimum,

        Cov(f) = J H^-1 J',   J = d E_q[f] / d(m, log scale),

    by conjugate gradients: for models with so many latents that `vi.linear_response` would hold too
    large a matrix, of which a few functions matter. Giordano, Ingram and Broderick (2024), Black
    box variational inference with a deterministic objective, JMLR 25(18).

    Args:
        target: the target that was approximated.
        solution: what `vi.solvers.deterministic` gave for it.
        quantity: `latents -> pytree of arrays`, differentiable; `latents` constrained, by name.
        data: the data of that solution; the target's own where None.

    Returns:
        A `QuantityResponse`.

    Raises:
        ValueError: the solution is of another family, has no even number of fixed draws, or the
            quantity has no numbers; data that are a batch.
        TypeError: `solution` is none.

    Example:
        >>> precision = jnp.array([[2.0, 0.9], [0.9, 1.0]])
        >>> target = vi.target(
        ...     lambda v, z, d: -0.5 * z["z"] @ precision @ z["z"], {"z": vi.Latent((2,))}
        ... )
        >>> solution = vi.solvers.deterministic(target, jax.random.key(0))
        >>> found = vi.quantity_response(target, solution, lambda latents: latents["z"].sum())
        >>> bool(jnp.allclose(found.sd**2, jnp.linalg.inv(precision).sum(), rtol=1e-2))
        True
    """
    name = require_mean_field(solution, "quantity_response")
    data, target = data_of(target, data), whole(target)
    respond = program(_build, target, name, alike=(quantity,))
    return respond(solution.params, solution.info.status, solution.noise, data)


def _build(target: Target, name: str, quantity: Any) -> Any:
    flattened = flat(target)

    @Quick
    def respond(params: Any, status: jax.Array, draws: jax.Array, data: Any) -> QuantityResponse:
        values = constrain(target.declared, pick(params, target.declared))

        def at(u: jax.Array) -> Any:
            return quantity(flattened.constrain(u, values, data))

        blank = jax.eval_shape(at, jnp.zeros(flattened.dim))
        _require_numbers(blank)
        like = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), blank)
        vector, unravel = ravel_pytree(like)
        inverse = inverse_products(target, name, params, draws, data, vector.size)
        dim = inverse.layout.dim

        def mean(x: jax.Array) -> jax.Array:
            m, w, _ = split(x, dim)
            return over(lambda e: ravel_pytree(at(m + jnp.exp(w) * e))[0], draws).mean(0)

        jacobian = jax.jacrev(mean)(inverse.x) * inverse.unit
        moved, residual = inverse.solve(jacobian)
        covariance = jacobian @ moved.T
        covariance = 0.5 * (covariance + covariance.T)
        variances = jnp.diagonal(covariance)
        return QuantityResponse(
            mean=unravel(mean(inverse.x)),
            sd=unravel(jnp.sqrt(variances)),
            covariance=covariance,
            sampling_error=unravel(standard_error(inverse.scores @ moved.T, len(inverse.scores))),
            status=judged(status, jnp.all(variances >= 0), residual),
        )

    return respond


def _require_numbers(blank: Any) -> None:
    leaves = jax.tree.leaves(blank)
    if not leaves or not all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves):
        raise ValueError(
            explain(
                "A quantity of interest is made of floating-point numbers.",
                expected="a pytree of floating-point arrays",
                received=str(blank),
                where="quantity_response, quantity",
            )
        )
