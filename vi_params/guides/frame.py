"""Coordinates along and across a few directions of a Gaussian, which may bend and be skewed.

Those of N(loc, C C'), turned by an orthogonal Q whose first columns are the active directions, are
(a, c) = Q' C^-1 (u - loc). Across, what is given a has a mean and scales that follow a, and may be
skewed:

    c = m(a) + s(a) T(b),   log s = l_0 + a l_1,   m = s^2 (h_0 + a h_1),   y = (a, b),

T the sinh-arcsinh transform of its tilt (`sinh_arcsinh`). With l_1 = 0 and no tilt what is normal
in y is normal over all; l_1 makes necks like those of funnels, tilts make the skewed latents of
counts. Tan, Bhaskaran and Nott (2020), Conditionally structured variational Gaussian approximation
with importance weights, Statistics and Computing 30, let conditional covariances of local latents
depend on global ones so; Smith, Loaiza-Maya and Nott (2020), High-dimensional copula variational
approximation through transformation, Journal of Computational and Graphical Statistics 29, skew a
Gaussian's coordinates by a transform of each.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from vi_params._arrays import exact, inverse_lower
from vi_params.guides.sinh_arcsinh import log_slope, straightened, tilted

REACH = 5.0
"""Beyond so many standard deviations along, what is across follows no further."""


class Frame(NamedTuple):
    """The coordinates y.

    Attributes:
        loc: shape (dim,).
        scale_tril: C, shape (dim, dim), lower triangular.
        rotation: Q, shape (dim, dim), orthogonal.
        shifts: h, rows for 1 and each coordinate of a, shape (1 + num_active, dim - num_active).
        log_scales: l, likewise.
        tilts: e of T, shape (dim - num_active,).
    """

    loc: Any
    scale_tril: Any
    rotation: Any
    shifts: Any
    log_scales: Any
    tilts: Any

    @property
    def num_active(self) -> int:
        """How many directions are active."""
        return self.shifts.shape[0] - 1

    def bends(self, xp: Any = jnp) -> bool:
        """Whether anything across follows what is along, or is skewed: on the host that is known,
        and straight coordinates cost nothing more."""
        return xp is jnp or bool(self.shifts.any() or self.log_scales.any() or self.is_tilted(xp))

    def is_tilted(self, xp: Any = jnp) -> bool:
        """Whether anything is skewed."""
        return xp is jnp or bool(self.tilts.any())

    def across(self, a: Any, xp: Any = jnp) -> tuple[Any, Any]:
        """The means and the log scales across, at coordinates along or at rows of them."""
        terms = linear(a, xp)
        log_scales = exact(terms, self.log_scales, xp)
        return xp.exp(2 * log_scales) * exact(terms, self.shifts, xp), log_scales

    def unconstrained(self, y: Any, xp: Any = jnp) -> Any:
        """The vectors u at coordinates y, shape (dim,) or (n, dim)."""
        z = y
        if self.bends(xp):
            a, rest = y[..., : self.num_active], y[..., self.num_active :]
            mean, log_scales = self.across(a, xp)
            if self.is_tilted(xp):
                rest = tilted(rest, self.tilts, xp)
            z = xp.concatenate([a, mean + xp.exp(log_scales) * rest], axis=-1)
        if z.ndim == 1:  # of many rows, one product of matrices
            return self.loc + exact(self.scale_tril, exact(self.rotation, z, xp), xp)
        return self.loc + exact(z, exact(self.scale_tril, self.rotation, xp).T, xp)

    def coordinates(self, u: Any, xp: Any = jnp) -> Any:
        """The coordinates of u, shape (dim,) or (n, dim)."""
        z = self.straight(u, xp)
        if not self.bends(xp):
            return z
        a = z[..., : self.num_active]
        mean, log_scales = self.across(a, xp)
        rest = (z[..., self.num_active :] - mean) * xp.exp(-log_scales)
        if self.is_tilted(xp):
            rest = straightened(rest, self.tilts, xp)
        return xp.concatenate([a, rest], axis=-1)

    def straight(self, u: Any, xp: Any = jnp) -> Any:
        """Q' C^-1 (u - loc)."""
        if xp is jnp:
            centred = jnp.atleast_2d(u - self.loc).T
            z = exact(self.rotation.T, solve_triangular(self.scale_tril, centred, lower=True))
            return z.T.reshape(u.shape)
        return (u - self.loc) @ (self.rotation.T @ inverse_lower(self.scale_tril, xp)).T

    def log_det(self, y: Any, xp: Any = jnp) -> Any:
        """Log |det du/dy| at coordinates y, shape () or (n,); one for all where nothing bends."""
        straight = xp.sum(xp.log(xp.diagonal(self.scale_tril)))
        if not self.bends(xp):
            return straight
        a, rest = y[..., : self.num_active], y[..., self.num_active :]
        log_slopes = self.across(a, xp)[1]
        if self.is_tilted(xp):
            log_slopes = log_slopes + log_slope(rest, self.tilts, xp)
        return straight + xp.sum(log_slopes, axis=-1)


def unbent(loc: Any, scale_tril: Any, rotation: Any, num_active: int, xp: Any = jnp) -> Frame:
    """The coordinates in which nothing follows, or is skewed."""
    nothing = xp.zeros((1 + num_active, len(loc) - num_active), loc.dtype)
    return Frame(loc, scale_tril, rotation, nothing, nothing, nothing[0])


def linear(a: Any, xp: Any = jnp) -> Any:
    """One and the coordinates along, within reach: (..., 1 + num_active)."""
    return xp.concatenate([xp.ones_like(a[..., :1]), xp.clip(a, -REACH, REACH)], axis=-1)
