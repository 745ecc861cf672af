"""The mean-field ELBO at fixed draws: a smooth function of locations and log scales.

With e_1 .. e_M drawn once and z_i = m + exp(w) * e_i, the loss over x = (m, w, theta) is

    F(x) = -1/M sum_i l(z_i, theta) - sum(w),

l the log density over unconstrained latents and model parameters. Its derivatives follow from those
of l at the draws, g_i and H_i, by the chain rule through A_i = d(z_i, theta)/dx:

    grad F = -1/M sum_i A_i' g_i - (0, 1, 0)
    hess F = -1/M sum_i [A_i' H_i A_i + diag(0, exp(w) e_i g_i, 0)].

A search can begin at few draws, go on at all of them and end at more (`lanes`): by one program,
since the draws are taken in blocks of so many.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vi_params._over import divisor, over
from vi_params.solvers.curvature import MISSING, along
from vi_params.solvers.trust_region import INEXACT, LAST, Smooth, matrix_free

DENSE = 32
"""The largest number of latents and model parameters for which the Hessian is held as a matrix."""

BLOCK = 2**22
"""About how many numbers an array may hold while the draws are evaluated side by side."""

CACHED = 2**18
"""The same while Hessians are computed on a CPU: arrays of so many stay in its cache."""

COLUMNS, MOST_COLUMNS = 2**24, 128
"""The same while the columns of one draw's Hessian are computed side by side, and how many of them
are at most: what a model makes of its latents may be larger than they and the data are."""

FEW = 4
"""At how many draws a search begins."""

FRESH, MANY = np.int32(-2), np.int32(-3)
"""The stages at as many draws as the last one, but others, and at all of these and all others."""

LogDensity = Callable[[jax.Array, jax.Array], jax.Array]
"""`(u, theta) -> scalar`: over unconstrained latents and model parameters, both vectors."""


class Response(NamedTuple):
    """The second-order expansion of F at a solution.

    Attributes:
        hessian: in (m, w), shape (2 dim, 2 dim); of fewer, rescaled draws where linear response was
            asked for that.
        scores: the gradients in (m, w) of the losses of single pairs of draws, shape
            (num_draws / 2, 2 dim); their mean is the gradient of F.
        slopes: the gradients of the log density at the draws, shape (num_draws, dim).
    """

    hessian: jax.Array
    scores: jax.Array
    slopes: jax.Array


def fixed_draws(
    log_density: LogDensity,
    draws: jax.Array,
    size: int,
    num_model: int,
    few: jax.Array | None = None,
    fresh: jax.Array | None = None,
) -> Smooth:
    """F as a function to be minimised; its curvature is `Response`-like where that is small.

    Args:
        log_density: `(u, theta) -> scalar`.
        draws: e, shape (num_draws, dim).
        size: how many numbers an evaluation of the log density handles, lanes at once counted.
        num_model: the length of theta.
        few: draws of first stages, by which the search of each of several lanes begins, shape
            (lanes, num_few, dim), pairs whose number divides that of all draws. Stage i is F at
            few[i], the last stage F at all draws: one program for all.
        fresh: with `few`, more draws of later stages, shape (sets, num_draws, dim): `FRESH` is F at
            the first set of them, `MANY` F at all sets and `draws`.
    """
    num_draws, dim = draws.shape
    sets = draws[None] if fresh is None else jnp.concatenate([fresh, draws[None]])
    expand = expansion(log_density, draws, size, num_model, few, sets)
    if dim + num_model <= DENSE and exists(expand, draws, num_model):
        return Smooth(expand, lambda curvature, v: curvature.hessian @ v)
    if few is not None:
        return _matrix_free(log_density, sets, size, few)
    plain = loss(log_density, draws, divisor(num_draws, BLOCK // size))
    return matrix_free(plain, lambda x: units(x, dim))


def expansion(
    log_density: LogDensity,
    draws: jax.Array,
    size: int,
    num_model: int,
    few: jax.Array | None = None,
    sets: Any = None,
) -> Callable[..., tuple[jax.Array, jax.Array, Response]]:
    """`(x, stage) -> (F, its gradient, its Response)`; arguments as for `fixed_draws`, and with
    `few` those of `Blocks`."""
    num_draws, dim = draws.shape
    width = dim + num_model
    block = CACHED if jax.default_backend() == "cpu" else BLOCK
    at_once = divisor(num_draws, block // (size * width))
    columns = min(MOST_COLUMNS, max(1, COLUMNS // size))

    @jax.jit  # traced once, though asked for more than once
    def expand(x: jax.Array, stage: Any) -> tuple[jax.Array, jax.Array, Response]:
        m, w, theta = split(x, dim)

        def one(e: jax.Array) -> tuple[jax.Array, ...]:
            """A draw's share of F, and its gradient and Hessian in (z, theta)."""

            def share(y: jax.Array) -> jax.Array:
                return -log_density(y[:dim], y[dim:])

            y = jnp.concatenate([m + jnp.exp(w) * e, theta])
            (value, slope), tangent = jax.linearize(jax.value_and_grad(share), y)
            hessian = over(lambda v: tangent(v)[1], jnp.eye(width, dtype=y.dtype), columns)
            return value, slope, hessian

        def add(sums: tuple[jax.Array, ...], e: jax.Array) -> tuple[tuple, jax.Array]:
            """Of values and Hessians only sums are kept: H, H S and S H S + diag(S g), with
            S = dz/dw on the z part; of every draw the gradient in (m, w, theta)."""
            values, slopes, hessians = over(one, e, at_once)
            spread = jnp.exp(w) * e
            right = hessians[:, :, :dim] * spread[:, None]
            both = jnp.sum(right[:, :dim] * spread[:, :, None], 0)
            both += jnp.diag(jnp.sum(spread * slopes[:, :dim], 0))
            parts = values.sum(), hessians.sum(0), right.sum(0), both
            z, rest = slopes[:, :dim], slopes[:, dim:]
            lifted = jnp.concatenate([z, z * spread, rest], axis=1)
            return tuple(map(jnp.add, sums, parts)), lifted

        shapes = (), (width, width), (width, dim), (dim, dim)
        blank = tuple(jnp.zeros(shape, jnp.result_type(x, draws)) for shape in shapes)
        if few is None:
            count, times = num_draws, 1
            sums, lifted = lax.scan(add, blank, draws.reshape(-1, at_once, dim))
            lifted = totals = lifted.reshape(count, x.size)
        else:
            blocks = Blocks(sets, few, stage)
            count, times = blocks.number * blocks.size, blocks.times
            sums, lifted, totals = blocks.stacked(add, blank, x.size)
        value, plain, right, both = (leaf / count for leaf in sums)
        hessian = jnp.block(
            [
                [plain[:dim, :dim], right[:dim], plain[:dim, dim:]],
                [right[:dim].T, both, right[dim:].T],
                [plain[dim:, :dim], right[dim:], plain[dim:, dim:]],
            ]
        )
        entropy = jnp.zeros_like(x).at[dim : 2 * dim].set(1.0)
        # Of pair i the mean over the sets of draws: their scatter tells the error of all.
        pairs = totals.reshape(2, -1, x.size).mean(0) / times - entropy
        curvature = Response(hessian, pairs, -lifted[:, :dim])
        return value - jnp.sum(w), totals.sum(0) / count - entropy, curvature

    return expand


def exists(expand: Callable[..., Any], draws: jax.Array, num_model: int) -> bool:
    """Whether the log density has second derivatives."""
    x = jax.ShapeDtypeStruct((2 * draws.shape[1] + num_model,), draws.dtype)
    try:
        # JAX raises for some functions only where they are mapped, as they are over the draws.
        jax.eval_shape(expand, x, LAST)
    except MISSING:
        return False
    return True


class Blocks:
    """The draws of a stage in blocks of as many as the few, one of every pair from either half of
    its set: of the last stage all draws, of another one its few draws, the first fresh set, or all
    sets, all draws the last of them."""

    def __init__(self, sets: jax.Array, few: jax.Array, stage: Any) -> None:
        """Cuts the sets.

        Args:
            sets: the fresh draws and then all, shape (num_sets, num_draws, dim).
            few: as for `fixed_draws`.
            stage: likewise.
        """
        self.sets, self.few, self.stage = sets, few, stage
        self.size, self.half = few.shape[1], few.shape[1] // 2
        self.most = sets.shape[1] // self.size
        self.times = jnp.where(stage == MANY, len(sets), 1)
        self.number = jnp.where(stage >= 0, 1, self.times * self.most)

    def block(self, i: jax.Array) -> jax.Array:
        """Block i, shape (size, dim)."""
        first = jnp.where(self.stage == LAST, len(self.sets) - 1, 0)
        blocks = self.sets.reshape(len(self.sets), 2, self.most, self.half, -1)
        halves = blocks[first + i // self.most, :, i % self.most]
        return jnp.where(self.stage >= 0, self.few[self.stage], halves.reshape(self.size, -1))

    def summed(self, f: Callable[[jax.Array], tuple], blank: tuple) -> tuple:
        """The sum of f over the blocks, from `blank` on."""

        def add(i: jax.Array, sums: tuple) -> tuple:
            return jax.tree.map(jnp.add, sums, f(self.block(i)))

        return lax.fori_loop(0, self.number, add, blank)

    def stacked(
        self, f: Callable[..., tuple], carry: Any, width: int
    ) -> tuple[Any, jax.Array, jax.Array]:
        """What `lax.scan(f, carry, blocks)` gives: the carry, and f's rows of so many numbers for
        every draw of the last set, in the order of all draws, and their sums over the sets; zeros
        where a stage has fewer."""

        def put(i: jax.Array, found: tuple) -> tuple:
            carry, last, totals = found
            carry, rows = f(carry, self.block(i))
            at = i % self.most
            return carry, last.at[at].set(rows), totals.at[at].add(rows)

        def in_order(rows: jax.Array) -> jax.Array:
            return rows.reshape(-1, 2, self.half, width).swapaxes(0, 1).reshape(-1, width)

        blank = jnp.zeros((self.most, self.size, width), self.sets.dtype)
        carry, last, totals = lax.fori_loop(0, self.number, put, (carry, blank, blank))
        return carry, in_order(last), in_order(totals)


def _matrix_free(log_density: LogDensity, sets: jax.Array, size: int, few: jax.Array) -> Smooth:
    """F in stages without a Hessian: sums over the blocks that count, and products by
    differentiating these."""
    _, num_few, dim = few.shape
    at_once = divisor(num_few, BLOCK // size)

    def share(x: jax.Array, e: jax.Array) -> jax.Array:
        m, w, theta = split(x, dim)
        return -log_density(m + jnp.exp(w) * e, theta) - jnp.sum(w)

    @jax.jit
    def expand(x: jax.Array, stage: Any) -> tuple[jax.Array, jax.Array]:
        def total(e: jax.Array) -> tuple[jax.Array, jax.Array]:
            found = over(lambda e: jax.value_and_grad(share)(x, e), e, at_once)
            return jax.tree.map(lambda leaf: leaf.sum(0), found)

        blocks = Blocks(sets, few, stage)
        sums = blocks.summed(total, (jnp.zeros((), x.dtype), jnp.zeros_like(x)))
        return jax.tree.map(lambda leaf: leaf / (blocks.number * num_few), sums)

    def product(at: tuple[jax.Array, jax.Array], v: jax.Array) -> jax.Array:
        x, stage = at
        return along(lambda x: expand(x, stage)[1], x, v, units(x, dim))

    return Smooth(lambda x, stage: (*expand(x, stage), (x, jnp.asarray(stage))), product, INEXACT)


def units(x: jax.Array, dim: int) -> jax.Array:
    """The unit of every entry of (m, w, theta): a location's is its standard deviation, the others'
    is 1."""
    return jnp.ones_like(x).at[:dim].set(jnp.exp(x[dim : 2 * dim]))


def loss(
    log_density: LogDensity, draws: jax.Array, at_once: int | None = None
) -> Callable[[jax.Array], jax.Array]:
    """F as a plain function, the log density of `at_once` draws evaluated side by side."""
    dim = draws.shape[1]

    def at(x: jax.Array) -> jax.Array:
        m, w, theta = split(x, dim)
        terms = over(lambda e: log_density(m + jnp.exp(w) * e, theta), draws, at_once)
        return -jnp.mean(terms) - jnp.sum(w)

    return at


def split(x: jax.Array, dim: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(m, w, theta)."""
    return x[:dim], x[dim : 2 * dim], x[2 * dim :]
