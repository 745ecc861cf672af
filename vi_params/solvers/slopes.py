"""Gradients of the log density at weighted draws: what directions and conditionals are found from.

Few weights can be all that counts, and gradients at few places tell little: a power of the weights
is taken, as Koblents and Miguez (2015), A population Monte Carlo scheme with transformed weights
and its application to stochastic kinetic models, Statistics and Computing 25, do for moments.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vi_params._arrays import repeated
from vi_params._cache import program
from vi_params._compile import Quick
from vi_params._over import over
from vi_params._tree import pick
from vi_params.importance import at_once
from vi_params.params import constrain
from vi_params.solvers.fixed_draws import DENSE
from vi_params.solvers.linear_response import PLACES, nowhere, prepared
from vi_params.solvers.solution import Slopes, Solution
from vi_params.target import Target, flat

GRADIENTS, SIDE_BY_SIDE = 1000, 100
"""At how many draws they tell enough, and how many are computed at once."""

ROWS = 500
"""How many a program of their own computes."""

EFFECTIVE = 1 / 3
"""How many of these draws are effective at least."""

HALVINGS = 20
"""By how many halvings the power is found."""


def slopes_at(target: Target, values: Any, position: Any, log_weights: Any, data: Any) -> Slopes:
    """The gradients at weighted draws, within a program."""
    return Slopes(position, gradient_at(target, values, data)(position), evened(log_weights))


def gradient_at(target: Target, values: Any, data: Any) -> Callable[[jax.Array], jax.Array]:
    """The gradient of the log density at rows u, shape (n, dim), within a program, for constrained
    parameters of the target."""
    gradient = jax.grad(lambda u: flat(target).log_density(u, values, data))

    def at(rows: jax.Array) -> jax.Array:
        return over(gradient, rows, min(SIDE_BY_SIDE, at_once(len(rows), target, data)))

    return at


def gradients(target: Target) -> Quick:
    """The program `(params, rows u, data) -> gradients of the log density` of a target."""

    @Quick
    def at(params: Any, rows: jax.Array, data: Any) -> jax.Array:
        values = constrain(target.declared, pick(params, target.declared))
        return gradient_at(target, values, data)(rows)

    return at


def gradient_on_host(
    target: Target, solution: Solution, data: Any, num_hessians: int | None = None
) -> Callable[[np.ndarray], np.ndarray]:
    """The gradient of the log density at rows u, shape (n, dim), in float64, in blocks.

    Of many latents nothing is compiled: the program that a linear response took computes it.

    Args:
        target: what was approximated, no plate of it subsampled.
        solution: its linear response, as a mean-field solution was given to it.
        data: the data.
        num_hessians: as that linear response was given it.
    """
    (name,) = solution.guide.declared
    noise, dim = solution.noise, solution.noise.shape[1]
    if dim <= DENSE:  # the solver had its Hessians itself
        size, at = ROWS, _by_program(target, solution, data)
    else:
        size, at = PLACES, _by_response(target, name, solution, data, num_hessians)

    def gradient(u: np.ndarray) -> np.ndarray:
        found = []
        for begin in range(0, len(u), size):
            rows = u[begin : begin + size]
            padded = np.resize(rows, (size, dim)).astype(noise.dtype)
            found.append(jax.device_get(at(padded, len(rows)))[: len(rows)])
        return np.concatenate(found).astype(float)

    return gradient


At = Callable[[np.ndarray, int], jax.Array]
"""`(rows, how many count) -> gradients`, for a fixed number of rows."""


def _by_program(target: Target, solution: Solution, data: Any) -> At:
    compute = program(gradients, target)
    return lambda rows, _: compute(solution.params, rows, data)


def _by_response(
    target: Target, name: str, solution: Solution, data: Any, num_hessians: int | None
) -> At:
    _, expand, _ = prepared(target, name)
    few, *_ = nowhere(solution.noise, num_hessians)
    # Gradients at places do not depend on where the guide is.
    zeros = jnp.asarray(np.zeros(solution.noise.shape[1], solution.noise.dtype))
    params = {**solution.params, name: {"loc": zeros, "scale": zeros}}
    return lambda rows, number: expand(params, solution.noise, data, few, rows, np.int32(number))[1]


def slopes_by_response(
    target: Target,
    solution: Solution,
    position: Any,
    log_weights: Any,
    data: Any,
    num_hessians: int | None = None,
) -> Slopes:
    """The gradients at the first thousand weighted draws, on the host (`gradient_on_host`)."""
    position, log_weights = position[:GRADIENTS].astype(float), log_weights[:GRADIENTS]
    gradient = gradient_on_host(target, solution, data, num_hessians)
    return Slopes(position, gradient(position), evened(log_weights, np))


def evened(log_weights: Any, xp: Any = jnp) -> Any:
    """Normalised weights: the largest power of the given ones, up to one, at which a third of the
    draws are effective."""
    x = log_weights - xp.max(log_weights)

    def weights(power: Any) -> Any:
        raised = xp.exp(power * x)
        return raised / xp.sum(raised)

    def halve(bounds: tuple[Any, Any]) -> tuple[Any, Any]:
        low, high = bounds
        power = 0.5 * (low + high)
        enough = xp.sum(weights(power) ** 2) <= 1 / (EFFECTIVE * len(x))
        return xp.where(enough, power, low), xp.where(enough, high, power)

    bounds = xp.zeros((), x.dtype), xp.ones((), x.dtype)
    low, high = repeated(HALVINGS, halve, bounds, xp)
    return weights(0.5 * (low + high))
