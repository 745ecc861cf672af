"""A Gaussian given a few directions, from gradients of the log density.

In units of a Gaussian (`Frame`), let the coordinates c across the directions be normal given those
along, a, with natural parameters linear in a:

    d log q / dc_j = -(t_0j + a t_1j) c_j + h_0j + a h_1j.

Where the gradient of the log density is known that is a linear regression, coordinate by
coordinate: score matching (Hyvarinen, 2005, Estimation of non-normalized statistical models by
score matching, JMLR 6) with the scores themselves at hand. A model that is normal given a few of
its latents, as many hierarchies are given their scales, is found from few gradients, with none of
the noise of weighted draws. To first order in a,

    log s_j = -log(t_0j) / 2 - a t_1j / (2 t_0j).
"""

from typing import Any

import jax.numpy as jnp

from vi_params._arrays import exact
from vi_params._cache import program
from vi_params._check import explain, require_count, require_instance
from vi_params._compile import Quick
from vi_params._tree import all_finite, pick, where_tree
from vi_params.guide import Guide
from vi_params.guides import active_mixture
from vi_params.guides.active_mixture import Across, Parts
from vi_params.guides.contaminated import SCALES, WEIGHTS
from vi_params.guides.frame import Frame, linear, unbent
from vi_params.guides.location_scale import require_gaussian
from vi_params.guides.mixture import Components
from vi_params.params import constrain, unconstrain
from vi_params.solvers.active import active_directions, scores
from vi_params.solvers.mixture_families import Mixture
from vi_params.solvers.solution import Slopes, Solution, own_name
from vi_params.target import Target, flat

RIDGE = 0.01
"""What the Gaussian itself, t = (1, 0) and h = 0, counts for, as a share of all gradients."""

LEAST, STEEPEST = 0.2, 1.0
"""The smallest precision t_0, and the largest slope of a log scale."""

WHERE = "solvers.conditional_gaussian"


def conditional_gaussian(target: Target, solution: Solution, *, num_active: int = 2) -> Solution:
    """A Gaussian whose mean and scales across a few directions follow them.

    For hierarchies, whose scales stretch many latents at once: what linear response leaves out,
    from the gradients that it has. No density is evaluated. Along the directions, those in which
    posterior and Gaussian differ most, it is a contaminated normal. Whether it is the better
    approximation, `vi.diagnose` tells; `vi.solvers.population_monte_carlo` goes on from it.

    Tan, Bhaskaran and Nott (2020), Conditionally structured variational Gaussian approximation with
    importance weights, Statistics and Computing 30, learn such a family by stochastic gradients.

    Args:
        target: what was approximated.
        solution: what a dense `vi.linear_response` gave for it.
        num_active: how many directions, fewer than there are dimensions.

    Returns:
        A `Solution` with a `vi.guides.active_mixture` guide; `info` is that of `solution`.

    Raises:
        ValueError: the solution has no gradients or is no Gaussian, or `num_active` is not among
            1 .. dim - 1.
        TypeError: the solution is none.

    Example:
        >>> def funnel(values, latents, data):
        ...     x, y = latents["scale"], latents["rest"]
        ...     return -0.5 * x**2 - 0.5 * jnp.sum(y**2) * jnp.exp(-x) - 2.5 * x
        >>> target = vi.target(funnel, {"scale": vi.Latent(()), "rest": vi.Latent((5,))})
        >>> mean_field = vi.solvers.deterministic(target, jax.random.key(0))
        >>> gaussian = vi.linear_response(target, mean_field)
        >>> found = vi.solvers.conditional_gaussian(target, gaussian, num_active=1)
        >>> ess = [
        ...     vi.diagnose(target, one.guide, one.params, jax.random.key(1)).ess
        ...     for one in (gaussian, found)
        ... ]
        >>> bool(ess[1] > 2 * ess[0])
        True
    """
    where = f"{WHERE}, solution"
    require_instance(solution, Solution, "vi.linear_response(...)", where)
    name, dim = own_name(solution.guide, where), flat(target).dim
    require_count(num_active, "num_active", WHERE)
    if num_active >= dim:
        raise ValueError(
            explain(
                "Nothing is left across the directions.",
                expected=f"fewer directions than dimensions, of which there are {dim}",
                received=f"num_active={num_active}",
                where=WHERE,
            )
        )
    if solution.slopes is None:
        raise ValueError(
            explain(
                "The solution has no gradients to learn from.",
                expected="what a dense vi.linear_response returns",
                received=f"a solution without slopes, parameters {sorted(solution.params[name])}",
                where=where,
                hint="call vi.linear_response(target, solution) without a rank",
            )
        )
    guide, find = program(_build, target, solution.guide, num_active)
    return solution._replace(guide=guide, params=find(solution.params, solution.slopes))


def conditional_guide(target: Target, name: str, num_active: int) -> Guide:
    """The guide of a conditional Gaussian."""
    return active_mixture(target, len(SCALES), num_active, name=name)


def conditional(own: Any, slopes: Slopes, num_active: int, xp: Any = jnp) -> Mixture:
    """The conditional Gaussian of a Gaussian's constrained parameters, in a program or on the
    host."""
    loc, scale_tril = require_gaussian(own, f"{WHERE}, solution")
    dtype, rest = loc.dtype, len(loc) - num_active
    frame = unbent(loc, scale_tril, xp.eye(len(loc), dtype=dtype), num_active, xp)
    frame = frame._replace(rotation=active_directions(frame, slopes, num_active, xp))
    scales = xp.asarray(SCALES, dtype)
    along = Components(
        xp.asarray(WEIGHTS, dtype),
        xp.zeros((len(SCALES), num_active), dtype),
        scales[:, None, None] * xp.eye(num_active, dtype=dtype),
    )
    across = xp.zeros((len(SCALES), rest), dtype)
    return Mixture(Parts(along, Across(across, xp.ones_like(across))), bent(frame, slopes, xp))


def bent(frame: Frame, slopes: Slopes, xp: Any = jnp) -> Frame:
    """The frame with the means and scales across that the gradients ask for."""
    z, gradient, weights = scores(frame, slopes, xp)
    num_active = frame.num_active
    terms, c, g = linear(z[:, :num_active], xp), z[:, num_active:], gradient[:, num_active:]
    num, weighted = terms.shape[1], weights[:, None] * terms
    products = (weighted[:, :, None] * terms[:, None]).reshape(len(terms), num * num)

    def block(factor: Any) -> Any:
        return exact(factor.T, products, xp).reshape(-1, num, num)

    # The normal equations of every coordinate for (t, h), beyond what the Gaussian itself explains.
    squares, cross, ones = block(c**2), block(-c), block(xp.ones_like(c))
    top, bottom = xp.concatenate([squares, cross], 2), xp.concatenate([cross, ones], 2)
    left = xp.concatenate([top, bottom], 1) + RIDGE * xp.eye(2 * num, dtype=c.dtype)
    beyond = g + c
    right = [exact(side.T, weighted, xp) for side in (-c * beyond, beyond)]
    right = xp.concatenate(right, axis=1)[:, :, None]
    t, shifts = xp.split(xp.linalg.solve(left, right)[:, :, 0].T, 2)
    level = xp.maximum(1.0 + t[:1], LEAST)
    steepness = xp.clip(-0.5 * t[1:] / level, -STEEPEST, STEEPEST)
    log_scales = xp.concatenate([-0.5 * xp.log(level), steepness])
    found = frame._replace(shifts=shifts, log_scales=log_scales)
    return where_tree(all_finite(found, xp=xp), found, frame, xp)


def _build(target: Target, start: Guide, num_active: int) -> tuple[Guide, Quick]:
    (name,) = start.declared
    guide = conditional_guide(target, name, num_active)

    @Quick
    def find(params: Any, slopes: Slopes) -> Any:
        own = constrain(start.declared, pick(params, start.declared))[name]
        values = conditional(own, slopes, num_active).values
        others = {key: params[key] for key in params if key != name}
        return {**others, **unconstrain(guide.declared, {name: values})}

    return guide, find
