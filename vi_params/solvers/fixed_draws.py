"""The mean-field ELBO at fixed draws: a smooth function of locations and log scales.

With e_1 .. e_M drawn once and z_i = m + exp(w) * e_i, the loss over x = (m, w, theta) is

    F(x) = -1/M sum_i l(z_i, theta) - sum(w),

l the log density over unconstrained latents and model parameters. Its derivatives follow from those
of l at the draws, g_i and H_i, by the chain rule through A_i = d(z_i, theta)/dx:

    grad F = -1/M sum_i A_i' g_i - (0, 1, 0)
    hess F = -1/M sum_i [A_i' H_i A_i + diag(0, exp(w) e_i g_i, 0)].
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from vi_params._over import divisor, over
from vi_params.solvers.curvature import MISSING
from vi_params.solvers.trust_region import Smooth, matrix_free

DENSE = 32
"""The largest number of latents and model parameters for which the Hessian is held as a matrix."""

BLOCK = 2**22
"""About how many numbers an array may hold while the draws are evaluated side by side."""

LogDensity = Callable[[jax.Array, jax.Array], jax.Array]
"""`(u, theta) -> scalar`: over unconstrained latents and model parameters, both vectors."""


class Response(NamedTuple):
    """The second-order expansion of F at a solution.

    Attributes:
        hessian: in (m, w), shape (2 dim, 2 dim).
        scores: the gradients in (m, w) of the losses of single pairs of draws, shape
            (num_draws / 2, 2 dim); their mean is the gradient of F.
        slopes: the gradients of the log density at the draws, shape (num_draws, dim).
    """

    hessian: jax.Array
    scores: jax.Array
    slopes: jax.Array


class Used(NamedTuple):
    """How many draws count: the first `count` blocks, a number that need not be known when the
    program is compiled, of `block` draws each, an even number: one of every pair from either half.
    """

    block: int
    count: Any


def is_dense(dim: int, num_model: int) -> bool:
    """Whether the Hessian of that many latents and model parameters is held as a matrix."""
    return dim + num_model <= DENSE


def fixed_draws(
    log_density: LogDensity,
    draws: jax.Array,
    size: int,
    num_model: int,
    used: Used | None = None,
) -> Smooth:
    """F as a function to be minimised; its curvature is `Response`-like where that is small.

    Args:
        log_density: `(u, theta) -> scalar`.
        draws: e, shape (num_draws, dim).
        size: how many numbers an evaluation of the log density handles, lanes at once counted.
        num_model: the length of theta.
        used: how many of the draws count; None for all.
    """
    num_draws, dim = draws.shape
    expand = expansion(log_density, draws, size, num_model, used)
    if is_dense(dim, num_model) and exists(expand, draws, num_model):
        return Smooth(expand, lambda curvature, v: curvature.hessian @ v)
    plain = loss(log_density, draws, divisor(num_draws, BLOCK // size), used)
    return matrix_free(plain, lambda x: units(x, dim))


def expansion(
    log_density: LogDensity,
    draws: jax.Array,
    size: int,
    num_model: int,
    used: Used | None = None,
) -> Callable[[jax.Array], tuple[jax.Array, jax.Array, Response]]:
    """`x -> (F, its gradient, its Response)`; arguments as for `fixed_draws`."""
    num_draws, dim = draws.shape
    at_once = divisor(num_draws, BLOCK // (size * (dim + num_model)))

    @jax.jit  # traced once, though asked for more than once
    def expand(x: jax.Array) -> tuple[jax.Array, jax.Array, Response]:
        m, w, theta = split(x, dim)

        def one(e: jax.Array) -> tuple[jax.Array, ...]:
            """A draw's share of F, of its gradient and of its Hessian, and its own gradient."""
            spread = jnp.exp(w) * e

            def lift(v: jax.Array) -> jax.Array:
                """A' v: the z part counts for m and, times dz/dw, for w."""
                return jnp.concatenate([v[:dim], (v[:dim].T * spread).T, v[dim:]])

            def share(y: jax.Array) -> jax.Array:
                return -log_density(y[:dim], y[dim:])

            y = jnp.concatenate([m + spread, theta])
            (value, slope), tangent = jax.linearize(jax.value_and_grad(share), y)
            hessian = jax.vmap(lambda v: tangent(v)[1])(jnp.eye(y.size, dtype=y.dtype))
            bend = jnp.zeros_like(x).at[dim : 2 * dim].set(spread * slope[:dim])
            return value, lift(slope), lift(lift(hessian).T) + jnp.diag(bend), -slope[:dim]

        entropy = jnp.zeros_like(x).at[dim : 2 * dim].set(1.0)
        count = num_draws if used is None else used.block * used.count
        if used is None:
            found = over(one, draws, at_once)
        else:  # their shapes are known: looking them up would trace the density once more
            shapes = (), x.shape, (x.size, x.size), (dim,)
            found = over_first(one, draws, used, at_once, shapes)
        values, lifted, hessians, slopes = found
        pairs = lifted.reshape(2, -1, x.size).mean(0) - entropy
        curvature = Response(hessians.sum(0) / count, pairs, slopes)
        return values.sum() / count - jnp.sum(w), lifted.sum(0) / count - entropy, curvature

    return expand


def over_first(
    one: Callable[[jax.Array], tuple],
    draws: jax.Array,
    used: Used,
    at_once: int,
    shapes: tuple[tuple[int, ...], ...],
) -> tuple:
    """`one` of the draws in the first blocks of pairs, arrays of these shapes; zeros for the
    others."""
    number, half = len(draws) // used.block, used.block // 2
    blocks = draws.reshape(2, number, half, -1).swapaxes(0, 1).reshape(number, used.block, -1)

    def add(i: jax.Array, found: tuple) -> tuple:
        new = over(one, blocks[i], divisor(used.block, at_once))
        return tuple(
            lax.dynamic_update_index_in_dim(old, now, i, 0)
            for old, now in zip(found, new, strict=True)
        )

    blank = tuple(jnp.zeros((number, used.block, *shape), draws.dtype) for shape in shapes)
    found = lax.fori_loop(0, used.count, add, blank)
    return tuple(
        leaf.reshape(number, 2, half, *shape).swapaxes(0, 1).reshape(len(draws), *shape)
        for leaf, shape in zip(found, shapes, strict=True)
    )


def exists(expand: Callable[[jax.Array], Any], draws: jax.Array, num_model: int) -> bool:
    """Whether the log density has second derivatives."""
    size = 2 * draws.shape[1] + num_model
    try:
        # JAX raises for some functions only where they are mapped, as they are over lanes.
        jax.eval_shape(jax.vmap(expand), jax.ShapeDtypeStruct((1, size), draws.dtype))
    except MISSING:
        return False
    return True


def units(x: jax.Array, dim: int) -> jax.Array:
    """The unit of every entry of (m, w, theta): a location's is its standard deviation, the others'
    is 1."""
    return jnp.ones_like(x).at[:dim].set(jnp.exp(x[dim : 2 * dim]))


def loss(
    log_density: LogDensity,
    draws: jax.Array,
    at_once: int | None = None,
    used: Used | None = None,
) -> Callable[[jax.Array], jax.Array]:
    """F as a plain function, the log density of `at_once` draws evaluated side by side."""
    dim = draws.shape[1]

    def at(x: jax.Array) -> jax.Array:
        m, w, theta = split(x, dim)
        terms = over(lambda e: log_density(m + jnp.exp(w) * e, theta), draws, at_once)
        if used is None:
            return -jnp.mean(terms) - jnp.sum(w)
        blocks = jnp.arange(len(draws)) % (len(draws) // 2) // (used.block // 2)
        return -jnp.mean(terms, where=blocks < used.count) - jnp.sum(w)

    return at


def split(x: jax.Array, dim: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(m, w, theta)."""
    return x[:dim], x[dim : 2 * dim], x[2 * dim :]
