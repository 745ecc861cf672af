"""What keeps a posterior from being a Gaussian, seen from a linear response."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from vi_params.approximation.conditional import has_many_latents
from vi_params.approximation.optima import HESSIANS
from vi_params.approximation.proposals import values_of
from vi_params.solvers.nested_frame import whitened
from vi_params.solvers.slopes import gradient_on_host
from vi_params.solvers.solution import Solution
from vi_params.solvers.third_derivative import fixed_directions, third_derivative
from vi_params.target import Target, flat

LARGEST = 100
"""The largest dimension in which it is looked for: third derivatives take dim^2 gradients, and what
follows more than a hundred Hessians, 2 dim of them each."""


class Structure(NamedTuple):
    """The third derivatives of a log density about a Gaussian.

    Attributes:
        loc: of the Gaussian, shape (dim,).
        scale_tril: its root, shape (dim, dim).
        gradient: rows u -> gradients of the log density.
        third: the derivatives in units of the Gaussian, shape (dim, dim, dim).
        few: the directions that fix the few latents worth it (`fixed_directions`).
        left: the sum of squares of the derivatives before and after each of these.
    """

    loc: np.ndarray
    scale_tril: np.ndarray
    gradient: Callable[[np.ndarray], np.ndarray]
    third: np.ndarray
    few: np.ndarray
    left: np.ndarray


def has_structure(target: Target) -> bool:
    """Whether it is worth looking for."""
    return has_many_latents(target) and flat(target).dim <= LARGEST


def structure_of(target: Target, response: Solution, data: Any) -> Structure:
    """That of a target, from its linear response."""
    loc, scale_tril = (values_of(response)[part] for part in ("loc", "scale_tril"))
    gradient = gradient_on_host(target, response, data, HESSIANS)
    third = third_derivative(whitened(gradient, loc, scale_tril, None, np), len(loc), np)
    return Structure(loc, scale_tril, gradient, third, *fixed_directions(third, scale_tril, xp=np))
