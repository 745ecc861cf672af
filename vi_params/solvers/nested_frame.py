"""A Gaussian whose mean and precision across a few directions follow them: nested Laplace.

Let `Frame` fix a few directions a. At nodes along them, the mode c(a) of what is across and its
precision H(a) are found by Newton's method, Hessians by differences of gradients. Splines in a
through the nodes stand for all others: of the mode, and of the modified Cholesky factor of H, whose
entries are regressions and log scales without constraints (Pourahmadi, 1999, Biometrika 86). With
the latents given which a posterior is nearly Gaussian (`third_derivative`) that is the conditional
of an integrated nested Laplace approximation (Rue, Martino and Chopin, 2009, Approximate Bayesian
inference for latent Gaussian models by using integrated nested Laplace approximations, JRSS B 71),
for any density with few such latents, and a guide: it is drawn from, and judged, exactly.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from scipy.special import chdtri, ndtri
from scipy.stats import qmc

from vi_params._arrays import cholesky, eigh, exact, in_turn, solved
from vi_params.guides.frame import CLIPPED, Coupled, Frame, spline_terms, unbent

NODES, MOST_NODES = {1: 32, 2: 64, 3: 96}, 128
"""How many nodes there are along so many directions, and along more."""

SPREAD, DF = 1.3, 5
"""The nodes lie as draws of a Student-t distribution with this scale, in standard deviations, and
so many degrees of freedom do: the tails of scales are heavy."""

STEPS, ARRIVED = 16, 1e-3
"""How many steps of Newton's method are made at most, and the square of a step, in standard
deviations, below which no further one is."""

FLAT, LONGEST = 1e-3, 3.0
"""The least curvature that a step takes for one, and the longest step, for each square root of a
dimension: in standard deviations."""

EASED, DAMPED, DAMPING = 0.25, 8.0, 0.05
"""By which factor damping falls after a step along which the log density grew, by which it grows
after another, and by how much besides."""

CLOSE = 0.25
"""A node counts whose last step, squared in standard deviations and not damped, is less."""

ENOUGH = 0.5
"""The share of the nodes that must count."""

RIDGE = 1e-8
"""What is added to the diagonal of the splines' equations."""


class Nodes(NamedTuple):
    """Where along the directions the conditional is found.

    Attributes:
        a: the places, shape (num_nodes, num_active).
        centre: the origin of the splines, shape (num_active,).
        unit: their units, shape (num_active,).
    """

    a: Any
    centre: Any
    unit: Any


def num_nodes_for(num_active: int) -> int:
    """How many nodes there are along so many directions."""
    return NODES.get(num_active, MOST_NODES)


def rounding_of(rows: Any) -> float:
    """The relative error of what is computed in the dtype of an array."""
    return float(jnp.finfo(rows.dtype).eps)


def whitened(
    gradient: Callable[[Any], Any], loc: Any, scale_tril: Any, rotation: Any, xp: Any = jnp
) -> Callable[[Any], Any]:
    """The gradient in the coordinates z, u = loc + C Q z; None for Q = I."""
    root = scale_tril if rotation is None else exact(scale_tril, rotation, xp)
    return lambda z: exact(gradient(loc + exact(z, root.T, xp)), root, xp)


def along(loc: Any, scale_tril: Any, directions: Any, xp: Any = jnp) -> Frame:
    """The frame of a Gaussian along some orthonormal directions, in which nothing follows yet."""
    axes = xp.concatenate([directions, xp.eye(len(loc), dtype=loc.dtype)], axis=1)
    rotation = xp.linalg.qr(axes)[0]
    return unbent(loc, scale_tril, rotation, directions.shape[1], xp)


def spread_nodes(num_active: int, number: int) -> np.ndarray:
    """Points of a Sobol sequence as draws of a Student-t distribution, shape (number, num_active):
    for standard deviations one."""
    points = qmc.Sobol(num_active + 1, scramble=False).random(2 ** number.bit_length())
    points = points[1 : number + 1]
    return SPREAD * ndtri(points[:, 1:]) * np.sqrt(DF / chdtri(DF, points[:, :1]))


def first_nodes(num_active: int, dtype: Any, xp: Any = jnp) -> Nodes:
    """Those about a Gaussian's location."""
    a = spread_nodes(num_active, num_nodes_for(num_active))
    blank = np.zeros(num_active)
    return Nodes(*(xp.asarray(one, dtype) for one in (a, blank, blank + 1)))


def nested_frame(
    frame: Frame,
    gradient: Callable[[Any], Any],
    eps: float,
    nodes: Nodes | None = None,
    xp: Any = jnp,
) -> tuple[Frame, Any]:
    """The frame with what is across following as modes and precisions at the nodes do, and
    whether enough of these count; else nothing follows.

    Args:
        frame: whose means are where the modes are looked for.
        gradient: of the log density, at rows u.
        eps: the relative error of gradients.
        nodes: where along; those of the Gaussian itself where None.
        xp: jax.numpy, or numpy on the host.
    """
    num_active = frame.num_active
    nodes = first_nodes(num_active, frame.loc.dtype, xp) if nodes is None else nodes
    straight = whitened(gradient, frame.loc, frame.scale_tril, frame.rotation, xp)
    means, *_ = frame.across(nodes.a, xp)
    c, precision, counts = _modes(straight, nodes.a, means, eps**0.25, xp)
    return _followed(frame, nodes, c, precision, counts, xp)


class Search(NamedTuple):
    """Newton's method on the way to the modes, row by row.

    Attributes:
        a: the places along.
        c: across.
        slope: the gradient there.
        precision: minus the Hessian there.
        damping: what is added to the curvatures.
        step: the next one, damped.
        left: the square of the undamped one in standard deviations: about that of the distance.
        is_definite: whether the precision is positive definite.
    """

    a: Any
    c: Any
    slope: Any
    precision: Any
    damping: Any
    step: Any
    left: Any
    is_definite: Any


def _modes(
    gradient: Callable[[Any], Any], a: Any, c: Any, step: float, xp: Any
) -> tuple[Any, Any, Any]:
    """Modes across, shape (num_nodes, rest), their precisions, from gradients a step apart, and
    which of them count."""
    rest, dtype = c.shape[1], c.dtype
    shifts = [xp.zeros((1, rest), dtype), xp.eye(rest, dtype=dtype), -xp.eye(rest, dtype=dtype)]
    shifts = step * xp.concatenate(shifts)
    places = len(shifts)

    def expanded(a: Any, c: Any) -> tuple[Any, Any]:
        """Gradients across, and minus Hessians."""
        rows = (c[:, None] + shifts).reshape(-1, rest)
        rows = xp.concatenate([xp.repeat(a, places, axis=0), rows], axis=1)
        found = gradient(rows)[:, -rest:].reshape(len(c), places, rest)
        hessian = (found[:, 1 : 1 + rest] - found[:, 1 + rest :]) / (2 * step)
        return found[:, 0], -0.5 * (hessian + xp.swapaxes(hessian, 1, 2))

    def newton(row: tuple) -> tuple[Any, Any, Any]:
        """A damped step, what is left, and whether the curvature is positive; where it is not, its
        size is taken."""
        slope, precision, damping = row
        usable = xp.all(xp.isfinite(precision))
        precision = xp.where(usable, precision, xp.eye(rest, dtype=dtype))
        values, vectors = eigh(precision, xp)
        sizes, turned = xp.maximum(xp.abs(values), FLAT), exact(vectors.T, slope, xp)
        stride = exact(vectors, turned / (sizes + damping), xp)
        length = xp.sqrt(xp.sum(stride**2))
        stride = stride * xp.minimum(1.0, LONGEST * rest**0.5 / xp.maximum(length, 1e-30))
        return stride, xp.sum(turned**2 / sizes), usable & xp.all(values > 0)

    def begun(a: Any, c: Any, slope: Any, precision: Any, damping: Any) -> Search:
        found = in_turn(newton, (slope, precision, damping), xp)
        return Search(a, c, slope, precision, damping, *found)

    def moved(now: Search) -> Search:
        ahead = now.c + now.step
        slope, precision = expanded(now.a, ahead)
        # How much the log density grows, by the trapezoid rule; not where it is NaN.
        grown = xp.sum((now.slope + slope) * now.step, axis=1) >= 0
        damping = xp.where(grown, EASED * now.damping, DAMPED * now.damping + DAMPING)
        c = xp.where(grown[:, None], ahead, now.c)
        slope = xp.where(grown[:, None], slope, now.slope)
        precision = xp.where(grown[:, None, None], precision, now.precision)
        return begun(now.a, c, slope, precision, damping)

    def on_the_way(now: Search) -> Any:
        """Which have not arrived, and still may."""
        return ~(now.left < ARRIVED) & xp.all(xp.isfinite(now.slope), axis=1)

    now = begun(a, c, *expanded(a, c), xp.zeros(len(c), dtype))
    if xp is jnp:
        now, _ = lax.while_loop(
            lambda state: (state[1] < STEPS) & jnp.any(on_the_way(state[0])),
            lambda state: (moved(state[0]), state[1] + 1),
            (now, 0),
        )
    else:
        now = Search(*(np.array(part) for part in now))
        for _ in range(STEPS):
            (rows,) = np.nonzero(on_the_way(now))
            if not len(rows):
                break
            for part, new in zip(now, moved(Search(*(part[rows] for part in now))), strict=True):
                part[rows] = new
    return now.c + now.step, now.precision, (now.left < CLOSE) & now.is_definite


def _followed(
    frame: Frame, nodes: Nodes, c: Any, precision: Any, counts: Any, xp: Any
) -> tuple[Frame, Any]:
    """Splines through modes and precisions: H = R'R, R = diag(1 / s) (I + N)."""
    number, rest = c.shape

    def factor(row: tuple) -> Any:
        """R; NaN where H is not positive definite."""
        precision, counts = row
        usable = counts & xp.all(xp.isfinite(precision))
        safe = xp.where(usable, precision, xp.eye(rest, dtype=precision.dtype))[::-1, ::-1]
        return xp.where(usable, cholesky(safe, xp)[::-1, ::-1].T, xp.nan)

    factors = in_turn(factor, (precision, counts), xp)
    scales = xp.diagonal(factors, axis1=1, axis2=2)
    found = [c, -xp.log(scales), (factors / scales[:, :, None]).reshape(number, -1)]
    found = xp.concatenate(found, axis=1)
    x = (nodes.a - nodes.centre) / nodes.unit
    usable = xp.all(xp.isfinite(found), axis=1) & xp.all(xp.abs(x) < CLIPPED, axis=1)
    fitted = _splines(x, xp.where(usable[:, None], found, 0.0), usable, xp)
    enough = (xp.sum(usable) >= ENOUGH * number) & xp.all(xp.isfinite(fitted))
    fitted = xp.where(enough, fitted, 0.0)
    shifts, log_scales, couplings = xp.split(fitted, [rest, 2 * rest], axis=1)
    couplings = xp.tril(couplings.reshape(-1, rest, rest), -1)
    coupled = Coupled(couplings, x, nodes.centre, nodes.unit)
    return frame._replace(shifts=shifts, log_scales=log_scales, coupled=coupled), enough


def _splines(x: Any, values: Any, usable: Any, xp: Any) -> Any:
    """The coefficients of splines through values at usable nodes x: of one, x and the cubes, which
    are orthogonal to what is linear; zero of nodes that are not usable."""
    number, dtype = len(x), x.dtype
    terms = spline_terms(x, x, xp)
    num_linear = terms.shape[1] - number
    linear = terms[:, :num_linear] * usable[:, None]
    cubes = terms[:, num_linear:] * (usable[:, None] & usable)
    cubes = cubes + xp.diag(xp.where(usable, RIDGE, 1.0).astype(dtype))
    corner = -RIDGE * xp.eye(num_linear, dtype=dtype)
    top, bottom = xp.concatenate([linear, cubes], 1), xp.concatenate([corner, linear.T], 1)
    right = xp.concatenate([values, xp.zeros((num_linear, values.shape[1]), dtype)])
    return solved(xp.concatenate([top, bottom]), right, xp)
