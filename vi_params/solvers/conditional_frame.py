"""Coordinates in which a density is normal, from its gradients: given a few directions, or skewed.

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

What is left of the gradient in b = (c - m(a)) / s(a) tells the skewness: a density near the normal
one whose log has the third derivative k_j has the score -b_j + k_j (b_j^2 - 1) / 2 and, to first
order in k_j, mean zero, variance one and skewness k_j (the Edgeworth series). The tilts are those
that have it, none where what is seen of them may be noise.
"""

import math
from typing import Any

import jax.numpy as jnp

from vi_params._arrays import exact, repeated
from vi_params._tree import all_finite, where_tree
from vi_params.guides.frame import Frame, linear, unbent
from vi_params.guides.sinh_arcsinh import tilt_of
from vi_params.solvers.active import active_directions, scores, turned
from vi_params.solvers.solution import Slopes

RIDGE = 0.001
"""What the Gaussian itself, with l, h and k zero, counts for, as a share of all gradients."""

LEAST, STEEPEST = 0.2, 1.0
"""The smallest precision t where a = 0, and the largest slope l_1 of a log scale."""

NEAR = 5.0
"""Only gradients at a coordinate within so many standard deviations tell of its skewness."""

CERTAIN, ALL = 36.0, 3.0
"""How many of its variances the square of one third derivative is, or that of all in the sum, for
anything to be skewed: without tilts draws take less time."""

STEPS, LONGEST = 6, 1.0
"""How many steps are made, and how far each coefficient of a log precision moves in one."""


def conditional_frame(
    loc: Any, scale_tril: Any, slopes: Slopes, num_active: int, xp: Any = jnp
) -> Frame:
    """The coordinates along the active directions of N(loc, C C') and across them, which follow as
    the gradients ask for."""
    seen = scores(loc, scale_tril, slopes, xp)
    rotation = active_directions(xp.eye(len(loc), dtype=loc.dtype), seen, num_active, xp)
    return bent(unbent(loc, scale_tril, rotation, num_active, xp), seen, xp)


def bent(frame: Frame, seen: Slopes, xp: Any = jnp) -> Frame:
    """The frame with the means, scales and tilts across that the gradients ask for, given their
    `scores` in units of the frame's Gaussian."""
    num_active = frame.num_active
    if num_active == len(frame.loc):
        return frame
    z, gradient, weights = turned(seen, frame.rotation, xp)
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
    log_scales = -0.5 * log_t
    scales = xp.exp(exact(terms, log_scales, xp))
    b = (c - scales**2 * exact(terms, shifts, xp)) / scales
    tilts = tilt_of(_told(*_third(b, g * scales, weights, xp), xp), xp)
    found = frame._replace(shifts=shifts, log_scales=log_scales, tilts=tilts)
    return where_tree(all_finite(found, xp=xp), found, frame, xp)


def _third(b: Any, gradient: Any, weights: Any, xp: Any) -> tuple[Any, Any]:
    """The third derivative k of the log density along each coordinate, shape (dim - num_active,),
    and its variance: the gradient has the part k (b^2 - 1) / 2 beside what is linear in b, and a
    rest."""
    inside = weights[:, None] * (xp.abs(b) < NEAR)
    terms = xp.stack([xp.ones_like(b), b, 0.5 * (b**2 - 1)])
    left = xp.einsum("inj,knj,nj->jik", terms, terms, inside)
    slope = gradient + b
    right = xp.einsum("inj,nj->ji", terms, inside * slope)
    left = left + RIDGE * xp.eye(3, dtype=b.dtype)
    found = xp.linalg.solve(left, right[:, :, None])[:, :, 0]
    rest = slope - xp.einsum("inj,ji->nj", terms, found)
    variance = xp.sum((inside * rest * terms[2]) ** 2, axis=0) / left[:, 2, 2] ** 2
    return found[:, 2], variance


def _told(third: Any, variance: Any, xp: Any) -> Any:
    """Third derivatives, or zeros where all of them may be noise."""
    squares = third**2
    is_seen = xp.any(squares > CERTAIN * variance) | (xp.sum(squares) > ALL * xp.sum(variance))
    return xp.where(is_seen, third, 0.0)
