"""Which latents keep a posterior from being a Gaussian: given them, it is nearly one.

In units of a Gaussian, z = C^-1 (u - loc), the log density has second derivatives near -I, and what
is not Gaussian about it shows first in the third ones, T_ijk. In hierarchies they are large where a
scale, or another parameter of a prior, is among i, j and k: given these few, as integrated nested
Laplace approximations take them (Rue, Martino and Chopin, 2009, JRSS B 71), the rest is near a
Gaussian. A latent u_j is fixed where z stays orthogonal to row j of C. The latents are taken one
after the other, each the one whose fixing leaves the least of |T|^2.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from vi_params._arrays import exact

STEP = 0.25
"""How far the gradients lie apart whose differences tell T, in standard deviations: far enough for
float32, and a mean over some of the posterior."""

MOST = 4
"""How many latents are taken at most."""

WORTH, LITTLE = 0.8, 0.3
"""Another latent is taken where it leaves less than this share of |T|^2, and as long as more than
so much is left."""

APART = 0.1
"""How much of a row must be orthogonal to those before it."""


def third_derivative(gradient: Callable[[Any], Any], dim: int, xp: Any = jnp) -> Any:
    """T at z = 0, shape (dim, dim, dim), from second differences of gradients, dim (dim + 1) + 1 of
    them.

    Args:
        gradient: of the log density at rows z, shape (n, dim), in the coordinates z.
        dim: how many they are.
        xp: jax.numpy, or numpy on the host.
    """
    rows, columns = np.triu_indices(dim)
    place = np.zeros((dim, dim), int)
    place[rows, columns] = place[columns, rows] = np.arange(len(rows))
    same = np.diagonal(place)
    axes = np.eye(dim)
    steps = STEP * (axes[rows] + (rows != columns)[:, None] * axes[columns])
    points = np.concatenate([steps, -steps, np.zeros((1, dim))])
    found = gradient(xp.asarray(points))
    ahead, behind, here = found[: len(rows)], found[len(rows) : -1], found[-1]
    second = (ahead + behind - 2 * here) / STEP**2
    # Along e_i + e_j it is T_ii + 2 T_ij + T_jj.
    own = second[same]
    mixed = 0.5 * (second - own[rows] - own[columns])
    t = xp.where((rows == columns)[:, None], second, mixed)[place]
    return (t + xp.moveaxis(t, 2, 0) + xp.moveaxis(t, 0, 2)) / 3


def fixed_directions(
    third: Any, scale_tril: Any, num: int | None = None, xp: Any = jnp
) -> tuple[Any, Any]:
    """Orthonormal columns that span what fixing the latents fixes, and |T|^2 before and after each.

    Args:
        third: T.
        scale_tril: C.
        num: how many latents; None for as many as are worth it, on the host.
        xp: jax.numpy, or numpy on the host.
    """
    dim, dtype = len(scale_tril), scale_tril.dtype
    rows = scale_tril / xp.linalg.norm(scale_tril, axis=1, keepdims=True)
    found, left = xp.zeros((dim, 0), dtype), [xp.sum(third**2)]
    for _ in range(min(MOST if num is None else num, dim - 1)):
        if num is None and not left[-1] > LITTLE:
            break
        apart = rows - exact(exact(rows, found, xp), found.T, xp)
        length = xp.linalg.norm(apart, axis=1, keepdims=True)
        v = apart / xp.maximum(length, xp.finfo(dtype).tiny)
        # |T|^2 less what is left of it orthogonal to v, for every latent's v.
        once = exact(v, third.reshape(dim, -1), xp).reshape(-1, dim, dim)
        twice = exact(once, v[:, :, None], xp)[..., 0]
        thrice = xp.sum(twice * v, axis=1)
        gain = 3 * xp.sum(once**2, axis=(1, 2)) - 3 * xp.sum(twice**2, axis=1) + thrice**2
        # Where no row is apart, the one that is farthest.
        best = v[xp.argmax(xp.where(length[:, 0] > APART, gain, length[:, 0] - 2))]
        projected = _projected(third, best, xp)
        if num is None and not xp.sum(projected**2) < WORTH * left[-1]:
            break
        found = xp.concatenate([found, best[:, None]], axis=1)
        third = projected
        left.append(xp.sum(third**2))
    return found, xp.stack(left)


def _projected(third: Any, v: Any, xp: Any) -> Any:
    """T orthogonal to the unit vector v in all of its indices."""
    for axis in range(3):
        rolled = xp.moveaxis(third, axis, -1)
        along = exact(rolled, v, xp)
        third = xp.moveaxis(rolled - along[:, :, None] * v, -1, axis)
    return third
