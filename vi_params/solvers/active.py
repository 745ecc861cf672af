"""The directions along which a posterior differs most from a Gaussian."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from vi_params._arrays import exact
from vi_params.guides.frame import Frame
from vi_params.solvers.solution import Slopes

LARGE = 0.7
"""The E g^2 above which `num_different` counts a direction."""


def active_directions(frame: Frame, slopes: Slopes, num_active: int, xp: Any = jnp) -> Any:
    """An orthogonal matrix whose first columns are the active directions of log p - log q.

    In units of the Gaussian, z = C^-1 (u - loc), the gradient of the log ratio is
    g = C' grad log p(u) + z; the directions are the leading eigenvectors of E[g g'] over the
    places where it is known.
    """
    vectors = xp.linalg.eigh(_second_moments(frame, slopes, xp))[1]
    # The rest of the axes follow, made orthogonal to the directions.
    axes = xp.concatenate([vectors[:, -num_active:], frame.rotation], axis=1)
    return xp.linalg.qr(axes)[0]


def num_different(frame: Frame, slopes: Slopes) -> int:
    """Along how many directions g is about as large as the gradient of the Gaussian itself, E z^2 =
    1, or larger: that tells little of the target there. On the host; the directions are those of
    every other place, their E g^2 that of the rest: eigenvalues of few places are too large."""
    odd, even = (Slopes(*(part[i::2] for part in slopes)) for i in (1, 0))
    vectors = np.linalg.eigh(_second_moments(frame, odd, np))[1]
    seen = _second_moments(frame, even, np)
    along = np.sum(vectors * (seen @ vectors), axis=0) / np.sum(even.weights)
    return int(np.sum(along > LARGE))


def _second_moments(frame: Frame, slopes: Slopes, xp: Any) -> Any:
    """E[g g']."""
    z, gradient, weights = scores(frame, slopes, xp)
    g = gradient + z
    return (weights[:, None] * g).T @ g


def scores(frame: Frame, slopes: Slopes, xp: Any = jnp) -> tuple[Any, Any, Any]:
    """Places in the straight coordinates of a frame, gradients of the log density in these, and
    weights: none where a gradient is not finite."""
    gradient = exact(exact(slopes.gradient, frame.scale_tril, xp), frame.rotation, xp)
    usable = xp.all(xp.isfinite(gradient), axis=1) & xp.isfinite(slopes.weights)
    weights = xp.where(usable, slopes.weights, 0.0)
    gradient = xp.where(usable[:, None], gradient, 0.0)
    return frame.straight(slopes.position, xp), gradient, weights
