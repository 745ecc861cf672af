"""Trust-region Newton-CG: a minimiser that needs products with the Hessian only.

The trust region is a ball in the coordinates p of x + D p, with the diagonal D given by the current
x, so that a change of units of x changes nothing. Steihaug (1983), The conjugate gradient method
and trust regions in large scale optimization; Nocedal and Wright (2006), algorithms 4.1 and 7.2.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vi_params._tree import all_finite, where_tree
from vi_params.solvers.curvature import along
from vi_params.solvers.solution import SolverStatus

RADIUS = 1.0
"""The first radius of the trust region."""

LARGEST = 1e8
"""The largest radius: flat priors on raw data may start millions of standard deviations away."""

LAST = np.int32(-1)
"""The stage of a function that has one only, and the last one of others."""

INEXACT = 0.3
"""The accuracy of steps where a product costs more than an expansion: more steps, fewer products
over all."""

CG_STEPS = 200
"""How many products with the Hessian one step takes at most."""


class Smooth(NamedTuple):
    """A function of a vector that has a gradient and a Hessian, or several, one for each stage.

    Attributes:
        expand: `(x, stage) -> (value, gradient, curvature)`, the curvature any pytree of arrays,
            the stage an int32 that may be traced.
        product: `(curvature, v) -> H v`.
        accuracy: up to which share of the gradient is left conjugate gradients go on.
    """

    expand: Callable[[jax.Array, Any], tuple[jax.Array, jax.Array, Any]]
    product: Callable[[Any, jax.Array], jax.Array]
    accuracy: float = 0.1


def matrix_free(
    f: Callable[[jax.Array], jax.Array], scale: Callable[[jax.Array], jax.Array] = jnp.ones_like
) -> Smooth:
    """f with products by differentiation (`along`); its curvature is the point.

    Args:
        f: a function of a vector.
        scale: as `minimise` takes it.
    """
    slope = jax.grad(f)
    expand = jax.value_and_grad(f)
    return Smooth(
        lambda x, stage: (*expand(x), x), lambda x, v: along(slope, x, v, scale(x)), INEXACT
    )


class Minimum(NamedTuple):
    """Where a minimisation ended.

    Attributes:
        x: the point.
        value: f there; infinite where no start was finite.
        curvature: that of `Smooth` there.
        steps: how many steps were tried.
        status: a `SolverStatus`.
    """

    x: jax.Array
    value: jax.Array
    curvature: Any
    steps: jax.Array
    status: jax.Array


def not_begun(f: Smooth, x: jax.Array) -> Minimum:
    """What is known before the first start, of shape x, was tried."""
    like = jax.eval_shape(f.expand, x, LAST)[2]
    curvature = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
    infinite = jnp.full((), jnp.inf, x.dtype)
    return Minimum(x, infinite, curvature, jnp.int32(0), jnp.int32(SolverStatus.INVALID_START))


class _State(NamedTuple):
    x: jax.Array
    value: jax.Array
    grad: jax.Array
    curvature: Any
    radius: jax.Array
    tries: jax.Array
    steps: jax.Array
    done: jax.Array


def minimise(
    f: Smooth,
    starts: jax.Array,
    scale: Callable[[jax.Array], jax.Array],
    *,
    tolerance: Any,
    max_steps: Any,
    stage: Any = LAST,
    enabled: jax.Array | bool = True,
    radius: Any = RADIUS,
) -> Minimum:
    """A local minimum of f.

    The program holds `expand` once: its first turns evaluate starts until one is finite.

    Args:
        f: what to minimise.
        starts: shape (tries, n).
        scale: x -> the diagonal of D, shape (n,).
        tolerance: stop after a full Newton step that promised to lower f by less than this, and
            did, or changed f by less than this.
        max_steps: how many steps are tried at most; it may be traced.
        stage: of f.
        enabled: whether to look for one at all; it may be traced.
        radius: the first one of the trust region.
    """
    num_starts, size = starts.shape
    smallest = jnp.finfo(starts.dtype).eps

    def body(state: _State) -> _State:
        began = jnp.isfinite(state.value)
        diagonal = scale(state.x)
        model = _steihaug(
            diagonal * state.grad,
            lambda p: diagonal * f.product(state.curvature, diagonal * p),
            state.radius,
            f.accuracy,
        )
        x = jnp.where(began, state.x + diagonal * model.step, starts[state.tries])
        value, grad, curvature = f.expand(x, stage)
        # Differences of f below its rounding say nothing: they count as promised.
        rounding = 10 * smallest * jnp.abs(value)
        ratio = (state.value - value + rounding) / (model.decrease + rounding)
        finite = all_finite(value, grad, curvature)
        accepted = finite & ((ratio > 1e-4) | ~began)
        # A step that neither promised nor made a difference need not be taken to be the last.
        ended = accepted | (finite & (jnp.abs(value - state.value) < tolerance))
        length = jnp.linalg.norm(model.step)
        grown = jnp.where(
            (ratio > 0.75) & model.at_boundary,
            jnp.minimum(2 * state.radius, LARGEST),
            state.radius,
        )
        shrunk = 0.25 * jnp.minimum(length, state.radius)
        next_radius = jnp.where(accepted & (ratio > 0.25), grown, shrunk)
        return _State(
            *where_tree(accepted, (x, value, grad, curvature), (state.x, *state[1:4])),
            radius=jnp.where(began, next_radius, radius),
            tries=state.tries + ~began,
            steps=state.steps + began,
            done=began & ended & ~model.at_boundary & (model.decrease < tolerance),
        )

    def go_on(state: _State) -> jax.Array:
        trying = jnp.isinf(state.value) & (state.tries < num_starts)
        improving = (state.steps < max_steps) & (state.radius > smallest) & ~state.done
        return enabled & (trying | (jnp.isfinite(state.value) & improving))

    blank = not_begun(f, starts[0])
    start = _State(
        blank.x,
        blank.value,
        jnp.zeros(size, starts.dtype),
        blank.curvature,
        radius=jnp.asarray(radius, starts.dtype),
        tries=jnp.int32(0),
        steps=blank.steps,
        done=jnp.bool_(False),
    )
    end = lax.while_loop(go_on, body, start)
    status = jnp.select(
        [~jnp.isfinite(end.value), end.done, end.radius <= smallest],
        [SolverStatus.INVALID_START, SolverStatus.CONVERGED, SolverStatus.STALLED],
        SolverStatus.MAX_STEPS,
    ).astype(jnp.int32)
    return Minimum(end.x, end.value, end.curvature, end.steps, status)


class _Model(NamedTuple):
    """The step within the trust region, and by how much the quadratic model falls along it."""

    step: jax.Array
    decrease: jax.Array
    at_boundary: jax.Array


def _steihaug(
    gradient: jax.Array,
    product: Callable[[jax.Array], jax.Array],
    radius: jax.Array,
    accuracy: float,
) -> _Model:
    """Conjugate gradients on g.p + p.Hp / 2, up to the boundary or a direction of descent without
    end."""
    size = jnp.linalg.norm(gradient)
    enough = jnp.minimum(accuracy, jnp.sqrt(size)) * size

    def body(carry: Any) -> Any:
        p, hp, r, d, i, _, _ = carry
        hd = product(d)
        curvature = d @ hd
        rr = r @ r
        alpha = rr / curvature
        inside = (curvature > 0) & (jnp.linalg.norm(p + alpha * d) < radius)
        length = jnp.where(inside, alpha, _to_boundary(p, d, radius))
        broken = ~all_finite(hd)
        length = jnp.where(broken, 0.0, length)
        hd = jnp.where(broken, 0.0, hd)
        p, hp, r = p + length * d, hp + length * hd, r + length * hd
        d = -r + (r @ r) / rr * d
        finished = ~inside | broken | (jnp.linalg.norm(r) <= enough)
        return p, hp, r, d, i + 1, finished, ~inside

    zero = jnp.zeros_like(gradient)
    no = jnp.bool_(False)
    p, hp, *_, at_boundary = lax.while_loop(
        lambda carry: ~carry[5] & (carry[4] < min(CG_STEPS, gradient.size)),
        body,
        (zero, zero, gradient, -gradient, jnp.int32(0), size == 0, no),
    )
    return _Model(p, -(gradient @ p + 0.5 * p @ hp), at_boundary)


def _to_boundary(p: jax.Array, d: jax.Array, radius: jax.Array) -> jax.Array:
    """The positive t with |p + t d| = radius."""
    a, b, c = d @ d, p @ d, p @ p - radius**2
    return (-b + jnp.sqrt(jnp.maximum(b**2 - a * c, 0.0))) / a
