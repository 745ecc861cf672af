"""The directions along which a posterior differs most from a Gaussian."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from vi_params._arrays import exact
from vi_params.guides.frame import standardised
from vi_params.solvers.solution import Slopes

LARGE = 0.7
"""The E g^2 above which `num_different` counts a direction."""


def active_directions(rotation: Any, seen: Slopes, num_active: int, xp: Any = jnp) -> Any:
    """An orthogonal matrix whose first columns are the active directions of log p - log q.

    In units of the Gaussian, z = C^-1 (u - loc), the gradient of the log ratio is
    g = C' grad log p(u) + z; the directions are the leading eigenvectors of E[g g'] over the
    places where it is known.

    Args:
        rotation: an orthogonal matrix; the axes after the directions are its columns, made
            orthogonal to these.
        seen: `scores`.
        num_active: how many directions.
        xp: jax.numpy or numpy.
    """
    vectors = xp.linalg.eigh(_second_moments(seen))[1]
    axes = xp.concatenate([vectors[:, -num_active:], rotation], axis=1)
    return xp.linalg.qr(axes)[0]


def num_different(seen: Slopes) -> int:
    """Along how many directions g is about as large as the gradient of the Gaussian itself, E z^2 =
    1, or larger: that tells little of the target there. On the host; the directions are those of
    every other place, their E g^2 that of the rest: eigenvalues of few places are too large."""
    odd, even = (Slopes(*(part[i::2] for part in seen)) for i in (1, 0))
    vectors = np.linalg.eigh(_second_moments(odd))[1]
    along = np.sum(vectors * (_second_moments(even) @ vectors), axis=0) / np.sum(even.weights)
    return int(np.sum(along > LARGE))


def _second_moments(seen: Slopes) -> Any:
    """E[g g']."""
    g = seen.gradient + seen.position
    return (seen.weights[:, None] * g).T @ g


def scores(loc: Any, scale_tril: Any, slopes: Slopes, xp: Any = jnp) -> Slopes:
    """The slopes in units of a Gaussian, z = C^-1 (u - loc): no weight where a gradient is not
    finite."""
    gradient = exact(slopes.gradient, scale_tril, xp)
    usable = xp.all(xp.isfinite(gradient), axis=1) & xp.isfinite(slopes.weights)
    weights = xp.where(usable, slopes.weights, 0.0)
    gradient = xp.where(usable[:, None], gradient, 0.0)
    return Slopes(standardised(slopes.position, loc, scale_tril, xp), gradient, weights)


def turned(seen: Slopes, rotation: Any, xp: Any = jnp) -> Slopes:
    """The slopes along other axes, the columns of an orthogonal matrix."""
    position, gradient = (exact(x, rotation, xp) for x in (seen.position, seen.gradient))
    return Slopes(position, gradient, seen.weights)
