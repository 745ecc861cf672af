"""A Gaussian given a few directions, from gradients of the log density.

In units of a Gaussian (`Frame`), let the coordinates c across the directions be normal given those
along, a, as the frame has them:

    d log q / dc_j = -t_j(a) c_j + h_0j + a h_1j,   t_j(a) = s_j(a)^-2 = exp(-2 (l_0j + a l_1j)).

Where the gradient g of the log density is known that is a regression, coordinate by coordinate:
score matching (Hyvarinen, 2005, Estimation of non-normalized statistical models by score matching,
JMLR 6) with the scores themselves at hand, their errors counted in the units of the model,

    sum_i w_i (g_ij - d log q / dc_j)^2 / t_j(a_i),

as in the weighted Fisher divergence of batch-and-match (Cai et al., 2024), with 1 / t as the last
step of Gauss-Newton left it: as part of what is minimised it would reward large t. A model that is
normal given a few of its latents, as many hierarchies are given their scales, is found from few
gradients, with little of the noise of weighted draws.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from vi_params._arrays import exact, repeated
from vi_params._cache import program
from vi_params._check import explain, require_count, require_instance, require_key
from vi_params._compile import Quick
from vi_params._tree import all_finite, pick, where_tree
from vi_params.guide import Guide
from vi_params.guides import active_mixture, contaminated_normal
from vi_params.guides.active_mixture import Across, Parts
from vi_params.guides.contaminated import SCALES, WEIGHTS
from vi_params.guides.frame import Frame, linear, unbent
from vi_params.guides.location_scale import require_gaussian
from vi_params.guides.mixture import Components
from vi_params.importance import at_once, weigh
from vi_params.params import constrain, unconstrain
from vi_params.solvers.active import active_directions, scores
from vi_params.solvers.mixture_families import Mixture
from vi_params.solvers.slopes import GRADIENTS, slopes_at
from vi_params.solvers.solution import Slopes, Solution, own_name
from vi_params.solvers.start import data_of
from vi_params.target import Target, flat, whole

RIDGE = 0.001
"""What the Gaussian itself, l = 0 and h = 0, counts for, as a share of all gradients."""

LEAST, STEEPEST = 0.2, 1.0
"""The smallest precision t where a = 0, and the largest slope l_1 of a log scale."""

STEPS, LONGEST = 6, 1.0
"""How many steps are made, and how far each coefficient of a log precision moves in one."""

WHERE = "solvers.conditional_gaussian"


def conditional_gaussian(
    target: Target,
    solution: Solution,
    key: jax.Array | None = None,
    data: Any = None,
    *,
    num_active: int = 2,
    num_draws: int = GRADIENTS,
) -> Solution:
    """A Gaussian whose mean and scales across a few directions follow them.

    For hierarchies, whose scales stretch many latents at once: what linear response leaves out.
    Without a key it is found from the gradients that this has at its fixed draws, and no density is
    evaluated; in hundreds of dimensions those are few. With a key it is found from gradients at new
    draws of the solution, widened (`vi.guides.contaminated_normal`), by a power of their importance
    weights. Along the directions, those in which posterior and Gaussian differ most, it is a
    contaminated normal. Whether it is the better approximation, `vi.diagnose` tells;
    `vi.solvers.population_monte_carlo` goes on from it.

    Tan, Bhaskaran and Nott (2020), Conditionally structured variational Gaussian approximation with
    importance weights, Statistics and Computing 30, learn such a family by stochastic gradients.

    Args:
        target: what was approximated.
        solution: what a dense `vi.linear_response` gave for it; with a key, any full-rank
            Gaussian.
        key: a typed random key, or None: the solution's own gradients then.
        data: the data, only with a key; the target's own where None.
        num_active: how many directions, fewer than there are dimensions.
        num_draws: at how many draws gradients are computed, with a key.

    Returns:
        A `Solution` with a `vi.guides.active_mixture` guide; `info` is that of `solution`.

    Raises:
        ValueError: there is no key and the solution has no gradients; it is no full-rank Gaussian;
            `num_active` is not among 1 .. dim - 1; num_draws < 25; data that are a
            batch, or without a key.
        KeyError: `data` has unknown names, or lacks one.
        TypeError: the solution is none, or `key` is not a typed key.

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
    name, target = own_name(solution.guide, where), whole(target)
    dim = flat(target).dim
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
    require_count(num_draws, "num_draws", WHERE, least=25)
    if key is not None:
        require_key(key, WHERE)
        data = data_of(target, data)
    elif data is not None:
        raise ValueError(
            explain(
                "Data are asked for nothing without a key.",
                expected="a key, for gradients at new draws, or no data",
                received="data without a key",
                where=WHERE,
                hint="give a key, or leave the data out: the solution's gradients are of its own",
            )
        )
    if "scale_tril" not in solution.params[name] or (key is None and solution.slopes is None):
        raise ValueError(
            explain(
                "The solution has no gradients to learn from, or no dense covariance.",
                expected="what a dense vi.linear_response returns; with a key, any full-rank one",
                received=f"parameters {sorted(solution.params[name])}"
                + (" without slopes" if solution.slopes is None else ""),
                where=where,
                hint="call vi.linear_response(target, solution) without a rank",
            )
        )
    guide, find = program(_build, target, solution.guide, num_active, num_draws)
    known = (solution.slopes, None, None) if key is None else (None, key, data)
    return solution._replace(guide=guide, params=find(solution.params, *known))


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
    num = terms.shape[1]
    products = (weights[:, None, None] * terms[:, :, None] * terms[:, None]).reshape(-1, num * num)

    def block(factor: Any) -> Any:
        return exact(factor.T, products, xp).reshape(-1, num, num)

    def step(found: tuple[Any, Any]) -> tuple[Any, Any]:
        """Of Gauss-Newton, for (-2 l, h)."""
        log_t, h = found
        t = xp.exp(exact(terms, log_t, xp))
        error = g + t * c - exact(terms, h, xp)
        squares, cross, ones = block(t * c**2), block(-c), block(1 / t)
        top, bottom = xp.concatenate([squares, cross], 2), xp.concatenate([cross, ones], 2)
        left = xp.concatenate([top, bottom], 1) + RIDGE * xp.eye(2 * num, dtype=c.dtype)
        weighted = weights[:, None] * terms
        right = [exact(side.T, weighted, xp) for side in (-c * error, error / t)]
        right = xp.concatenate(right, axis=1) - RIDGE * xp.concatenate([log_t, h]).T
        moved = xp.linalg.solve(left, right[:, :, None])[:, :, 0].T
        log_t = log_t + xp.clip(moved[:num], -LONGEST, LONGEST)
        level = xp.maximum(log_t[:1], math.log(LEAST))
        steepness = xp.clip(log_t[1:], -2 * STEEPEST, 2 * STEEPEST)
        return xp.concatenate([level, steepness]), h + moved[num:]

    blank = xp.zeros((num, c.shape[1]), c.dtype)
    log_t, shifts = repeated(STEPS, step, (blank, blank), xp)
    found = frame._replace(shifts=shifts, log_scales=-0.5 * log_t)
    return where_tree(all_finite(found, xp=xp), found, frame, xp)


def _build(target: Target, start: Guide, num_active: int, num_draws: int) -> tuple[Guide, Quick]:
    (name,) = start.declared
    guide = conditional_guide(target, name, num_active)
    wide = contaminated_normal(target, name=name)

    @Quick
    def find(params: Any, slopes: Slopes | None, key: Any, data: Any) -> Any:
        own = constrain(start.declared, pick(params, start.declared))[name]
        if slopes is None:
            noise, size = wide.noise(key, num_draws), at_once(num_draws, target, data)
            drawn = weigh(target, wide, params, noise, data, size, nan_is_outside=True)
            values = constrain(target.declared, pick(params, target.declared))
            slopes = slopes_at(target, values, drawn.position, drawn.smoothed.log_weights, data)
        found = conditional(own, slopes, num_active).values
        others = {key: params[key] for key in params if key != name}
        return {**others, **unconstrain(guide.declared, {name: found})}

    return guide, find
