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

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import chdtri, ndtri
from scipy.stats import qmc

from vi_params._arrays import cholesky, exact, in_turn, repeated
from vi_params._cache import program
from vi_params._check import explain, require_instance
from vi_params._compile import Quick
from vi_params._over import over
from vi_params._tree import pick
from vi_params.guide import Guide
from vi_params.guides import active_mixture
from vi_params.guides.contaminated import SCALES
from vi_params.guides.frame import Coupled, Frame, spline_terms, unbent
from vi_params.guides.location_scale import require_gaussian
from vi_params.importance import at_once
from vi_params.params import constrain, unconstrain
from vi_params.solvers.mixture_families import contaminated, require_room
from vi_params.solvers.solution import Solution, own_name
from vi_params.solvers.start import data_of
from vi_params.solvers.third_derivative import fixed_directions, third_derivative
from vi_params.target import Target, flat, whole

WHERE = "solvers.nested_laplace"

NODES, MOST_NODES = {1: 32, 2: 64, 3: 96}, 128
"""How many nodes there are along so many directions, and along more."""

SPREAD, DF = 1.3, 5
"""The nodes lie as draws of a Student-t distribution with this scale, in standard deviations, and
so many degrees of freedom do: the tails of scales are heavy."""

STEPS = 4
"""How many steps of Newton's method are made."""

FLAT, LONGEST = 1e-3, 10.0
"""The least curvature that a step takes for one, and the longest step, for each square root of a
dimension: in standard deviations."""

EASED, DAMPED, DAMPING = 0.25, 8.0, 0.05
"""By which factor damping falls after a step that lowered the gradient, by which it grows after
another, and by how much besides."""

CLOSE = 0.5
"""A node counts whose last step, in standard deviations across, is shorter."""

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


def nested_laplace(
    target: Target, solution: Solution, data: Any = None, *, num_active: int = 2
) -> Solution:
    """A Gaussian given a few latents, whose mean and precision follow these, from a Gaussian.

    The latents are those given which the third derivatives of the log density are smallest, such as
    the scales of a hierarchy or the hyperparameters of a Gaussian process; along them it is the
    Gaussian's marginal, with wider parts as in `vi.guides.contaminated_normal`. For up to about a
    hundred dimensions: every Hessian takes 2 dim gradients, and there are some hundred. Where too
    few conditional modes are found, nothing follows. `vi.solvers.population_monte_carlo` fits what
    is along. Pure in params and data.

    Args:
        target: what was approximated; its own parameters stay as they are.
        solution: a full-rank Gaussian, such as `vi.linear_response` gives.
        data: the data; the target's own where None.
        num_active: how many latents, fewer than there are dimensions.

    Returns:
        A `Solution` with a `vi.guides.active_mixture` guide with nodes; `info` is that of
        `solution`.

    Raises:
        ValueError: the solution is no full-rank Gaussian; `num_active` is not among 1 .. dim - 1;
            data that are a batch of rows.
        KeyError: `data` has unknown names, or lacks one.
        TypeError: the solution is none.

    Example:
        >>> def hierarchy(values, latents, data):  # two coupled latents, and their scale
        ...     x, (y, z) = latents["scale"], latents["rest"]
        ...     quadratic = jnp.exp(-x) * (y**2 + (z - 0.8 * y) ** 2)
        ...     return -0.5 * (x**2 + quadratic) - x
        >>> target = vi.target(hierarchy, {"scale": vi.Latent(()), "rest": vi.Latent((2,))})
        >>> mean_field = vi.solvers.deterministic(target, jax.random.key(0))
        >>> gaussian = vi.linear_response(target, mean_field)
        >>> found = vi.solvers.nested_laplace(target, gaussian, num_active=1)
        >>> diagnosis = vi.diagnose(target, found.guide, found.params, jax.random.key(1))
        >>> bool(diagnosis.ess > 0.8 * diagnosis.num_draws)
        True
    """
    where = f"{WHERE}, solution"
    require_instance(solution, Solution, "vi.linear_response(...)", where)
    name, target, data = own_name(solution.guide, where), whole(target), data_of(target, data)
    require_room(num_active, flat(target).dim, WHERE)
    if "scale_tril" not in solution.params[name]:
        raise ValueError(
            explain(
                "The solution has no dense covariance.",
                expected="what a dense vi.linear_response returns, or any full-rank Gaussian",
                received=f"parameters {sorted(solution.params[name])}",
                where=where,
                hint="call vi.linear_response(target, solution) without a rank",
            )
        )
    guide, find = program(_build, target, solution.guide, num_active)
    return solution._replace(guide=guide, params=find(solution.params, data), slopes=None)


def _build(target: Target, start: Guide, num_active: int) -> tuple[Guide, Quick]:
    (name,) = start.declared
    guide = nested_guide(target, name, num_active)

    @Quick
    def find(params: Any, data: Any) -> Any:
        own = constrain(start.declared, pick(params, start.declared))[name]
        values = constrain(target.declared, pick(params, target.declared))
        loc, scale_tril = require_gaussian(own, f"{WHERE}, solution")
        slope = jax.grad(lambda u: flat(target).log_density(u, values, data))

        def gradient(u: jax.Array) -> jax.Array:
            return over(slope, u, at_once(len(u), target, data))

        third = third_derivative(whitened(gradient, loc, scale_tril, None, jnp), len(loc))
        directions, _ = fixed_directions(third, scale_tril, num_active)
        frame = nested_frame(along(loc, scale_tril, directions), gradient)
        others = {key: params[key] for key in params if key != name}
        found = {name: contaminated(frame).values}
        return {**others, **unconstrain(guide.declared, found)}

    return guide, find


def nested_guide(target: Target, name: str, num_active: int) -> Guide:
    """The guide of a nested Laplace approximation."""
    num_nodes = num_nodes_for(num_active)
    return active_mixture(target, len(SCALES), num_active, num_nodes=num_nodes, name=name)


def num_nodes_for(num_active: int) -> int:
    """How many nodes there are along so many directions."""
    return NODES.get(num_active, MOST_NODES)


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
    nodes: Nodes | None = None,
    steps: int = STEPS,
    xp: Any = jnp,
) -> Frame:
    """The frame with what is across following as modes and precisions at the nodes do.

    Args:
        frame: whose means are where the modes are looked for.
        gradient: of the log density, at rows u.
        nodes: where along; those of the Gaussian itself where None.
        steps: of Newton's method.
        xp: jax.numpy, or numpy on the host.
    """
    num_active = frame.num_active
    nodes = first_nodes(num_active, frame.loc.dtype, xp) if nodes is None else nodes
    straight = whitened(gradient, frame.loc, frame.scale_tril, frame.rotation, xp)
    means, *_ = frame.across(nodes.a, xp)
    c, precision, counts = _modes(straight, nodes.a, means, steps, xp)
    return _followed(frame, nodes, c, precision, counts, xp)


def _modes(
    gradient: Callable[[Any], Any], a: Any, c: Any, steps: int, xp: Any
) -> tuple[Any, Any, Any]:
    """Modes across, shape (num_nodes, rest), their precisions, and which of them count."""
    number, rest = c.shape
    step = float(xp.finfo(c.dtype).eps) ** 0.25
    shifts = step * xp.concatenate([xp.zeros((1, rest)), xp.eye(rest), -xp.eye(rest)]).astype(
        c.dtype
    )
    places = len(shifts)

    def expanded(c: Any) -> tuple[Any, Any]:
        """Gradients across, and minus Hessians."""
        rows = (c[:, None] + shifts).reshape(-1, rest)
        rows = xp.concatenate([xp.repeat(a, places, axis=0), rows], axis=1)
        found = gradient(rows)[:, -rest:].reshape(number, places, rest)
        hessian = (found[:, 1 : 1 + rest] - found[:, 1 + rest :]) / (2 * step)
        return found[:, 0], -0.5 * (hessian + xp.swapaxes(hessian, 1, 2))

    def newton(row: tuple) -> Any:
        """A damped step: where the curvature is not positive, by its size."""
        slope, precision, damping = row
        usable = xp.all(xp.isfinite(precision))
        precision = xp.where(usable, precision, xp.eye(rest, dtype=precision.dtype))
        values, vectors = xp.linalg.eigh(precision)
        sizes = xp.maximum(xp.abs(values), FLAT) + damping
        moved = exact(vectors, exact(vectors.T, slope, xp) / sizes, xp)
        length = xp.sqrt(xp.sum(moved**2))
        return moved * xp.minimum(1.0, LONGEST * rest**0.5 / xp.maximum(length, 1e-30))

    def moved(state: tuple) -> tuple:
        c, slope, precision, damping = state
        ahead = c + in_turn(newton, (slope, precision, damping), xp)
        found = expanded(ahead)
        shorter = xp.sum(found[0] ** 2, axis=1) <= xp.sum(slope**2, axis=1)  # not where it is NaN
        damping = xp.where(shorter, EASED * damping, DAMPED * damping + DAMPING)
        c = xp.where(shorter[:, None], ahead, c)
        slope = xp.where(shorter[:, None], found[0], slope)
        precision = xp.where(shorter[:, None, None], found[1], precision)
        return c, slope, precision, damping

    state = c, *expanded(c), xp.zeros(number, c.dtype)
    c, slope, precision, _ = repeated(steps, moved, state, xp)
    last = in_turn(newton, (slope, precision, xp.zeros(number, c.dtype)), xp)
    return c + last, precision, xp.sum(last * slope, axis=1) < CLOSE**2


def _followed(frame: Frame, nodes: Nodes, c: Any, precision: Any, counts: Any, xp: Any) -> Frame:
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
    usable = xp.all(xp.isfinite(found), axis=1)
    x = (nodes.a - nodes.centre) / nodes.unit
    fitted = _splines(x, xp.where(usable[:, None], found, 0.0), usable, xp)
    enough = (xp.sum(usable) >= ENOUGH * number) & xp.all(xp.isfinite(fitted))
    fitted = xp.where(enough, fitted, 0.0)
    shifts, log_scales, couplings = xp.split(fitted, [rest, 2 * rest], axis=1)
    couplings = xp.tril(couplings.reshape(-1, rest, rest), -1)
    coupled = Coupled(couplings, x, nodes.centre, nodes.unit)
    return frame._replace(shifts=shifts, log_scales=log_scales, coupled=coupled)


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
    return xp.linalg.solve(xp.concatenate([top, bottom]), right)
