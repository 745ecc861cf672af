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

Where the coordinates across are coupled, their regressions on those before them follow, too (the
modified Cholesky decomposition: Pourahmadi, 1999, Joint mean-covariance models with applications to
longitudinal data, Biometrika 86), and all are splines between nodes a_k along (polyharmonic ones:
Duchon, 1977, Splines minimizing rotation-invariant semi-norms in Sobolev spaces). With p(a) one, a
and |a - a_k|^3 for each node, in units of their own, and N strictly lower triangular,

    c = m(a) + (I + N(a))^-1 s(a) T(b),   log s = p(a) l,   m = p(a) h,   N = p(a) n.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular

from vi_params._arrays import exact, inverse_lower
from vi_params._over import divisor, over
from vi_params.guides.sinh_arcsinh import log_slope, straightened, tilted

REACH = 5.0
"""Beyond so many standard deviations along, what is across follows no further."""

BLOCK = 2**22
"""How many numbers the matrices of regressions have that are there at once."""

CLIPPED = 10.0
"""Beyond so many of their own units splines are constant."""


class Coupled(NamedTuple):
    """Regressions across, splines along.

    Attributes:
        weights: n of N, shape (1 + num_active + num_nodes, rest, rest), of which what is strictly
            lower counts.
        nodes: in the units of the splines, shape (num_nodes, num_active).
        centre: where along the splines have their origin, shape (num_active,).
        unit: their units along, shape (num_active,).
    """

    weights: Any
    nodes: Any
    centre: Any
    unit: Any


class Frame(NamedTuple):
    """The coordinates y.

    Attributes:
        loc: shape (dim,).
        scale_tril: C, shape (dim, dim), lower triangular.
        rotation: Q, shape (dim, dim), orthogonal.
        shifts: h, rows for 1 and each coordinate of a, shape (1 + num_active, dim - num_active), or
            for the terms of the splines.
        log_scales: l, likewise.
        tilts: e of T, shape (dim - num_active,).
        coupled: the regressions across; None where there are none.
    """

    loc: Any
    scale_tril: Any
    rotation: Any
    shifts: Any
    log_scales: Any
    tilts: Any
    coupled: Coupled | None = None

    @property
    def num_active(self) -> int:
        """How many directions are active."""
        return self.loc.shape[0] - self.shifts.shape[1]

    @property
    def values(self) -> dict[str, Any]:
        """As the parameters of a guide."""
        found = self._asdict()
        coupled = found.pop("coupled")
        return found if coupled is None else {**found, "coupled": coupled._asdict()}

    def bends(self, xp: Any = jnp) -> bool:
        """Whether anything across follows what is along, or is skewed: on the host that is known,
        and straight coordinates cost nothing more."""
        if xp is jnp or self.coupled is not None:
            return True
        return bool(self.shifts.any() or self.log_scales.any() or self.is_tilted(xp))

    def is_tilted(self, xp: Any = jnp) -> bool:
        """Whether anything is skewed."""
        return xp is jnp or bool(self.tilts.any())

    def across(self, a: Any, xp: Any = jnp) -> tuple[Any, Any, Any]:
        """The means and the scales across, at coordinates along or at rows of them, and the terms
        that they are made of."""
        terms = self.terms(a, xp)
        scales = xp.exp(exact(terms, self.log_scales, xp))
        means = exact(terms, self.shifts, xp)
        return scales**2 * means if self.coupled is None else means, scales, terms

    def terms(self, a: Any, xp: Any = jnp) -> Any:
        """The terms p(a), or one and a, at coordinates along or at rows of them."""
        if self.coupled is None:
            return linear(a, xp)
        _, nodes, centre, unit = self.coupled
        return spline_terms((a - centre) / unit, nodes, xp)

    def released(self, terms: Any, c: Any, xp: Any = jnp) -> Any:
        """(I + N) c: what the regressions leave."""
        if self.coupled is None:
            return c
        weights = self.coupled.weights
        if xp is jnp:
            return _for_rows(lambda terms, c: exact(_matrix(weights, terms), c), terms, c)
        found = np.array(c)
        for i in range(1, c.shape[-1]):
            found[..., i] += _regression(weights, terms, c, i)
        return found

    def pulled(self, terms: Any, c: Any, xp: Any = jnp) -> Any:
        """(I + N)^-1 c, with the regressions."""
        if self.coupled is None:
            return c
        weights = self.coupled.weights
        if xp is jnp:

            def solved(terms: Any, c: Any) -> Any:
                return solve_triangular(_matrix(weights, terms), c, lower=True, unit_diagonal=True)

            return _for_rows(solved, terms, c)
        found = np.array(c)
        for i in range(1, c.shape[-1]):
            found[..., i] -= _regression(weights, terms, found, i)
        return found

    def unconstrained(self, y: Any, xp: Any = jnp) -> Any:
        """The vectors u at coordinates y, shape (dim,) or (n, dim)."""
        return self.unconstrained_with_log_det(y, xp)[0]

    def log_det(self, y: Any, xp: Any = jnp) -> Any:
        """Log |det du/dy| at coordinates y, shape () or (n,); one for all where nothing bends."""
        straight = xp.sum(xp.log(xp.diagonal(self.scale_tril)))
        if not self.bends(xp):
            return straight
        a, rest = y[..., : self.num_active], y[..., self.num_active :]
        return straight + self._log_slopes(self.terms(a, xp), rest, xp)

    def root(self, xp: Any = jnp) -> Any:
        """C Q: `unconstrained_with_log_det` makes its own unless it is given it."""
        return exact(self.scale_tril, self.rotation, xp)

    def unconstrained_with_log_det(
        self, y: Any, xp: Any = jnp, root: Any = None
    ) -> tuple[Any, Any]:
        """Both, with the root of the frame where it is known."""
        z, log_det = y, xp.sum(xp.log(xp.diagonal(self.scale_tril)))
        if self.bends(xp):
            a, rest = y[..., : self.num_active], y[..., self.num_active :]
            mean, scales, terms = self.across(a, xp)
            log_det = log_det + self._log_slopes(terms, rest, xp)
            if self.is_tilted(xp):
                rest = tilted(rest, self.tilts, xp)
            rest = self.pulled(terms, scales * rest, xp)
            z = xp.concatenate([a, mean + rest], axis=-1)
        if z.ndim == 1:  # of many rows, one product of matrices
            return self.loc + exact(self.scale_tril, exact(self.rotation, z, xp), xp), log_det
        root = self.root(xp) if root is None else root
        return self.loc + exact(z, root.T, xp), log_det

    def _log_slopes(self, terms: Any, rest: Any, xp: Any) -> Any:
        """What scales and tilts add to the logarithm of the determinant."""
        scales = exact(terms, xp.sum(self.log_scales, axis=1), xp)
        if not self.is_tilted(xp):
            return scales
        return scales + xp.sum(log_slope(rest, self.tilts, xp), axis=-1)

    def coordinates(self, u: Any, xp: Any = jnp) -> Any:
        """The coordinates of u, shape (dim,) or (n, dim)."""
        z = self.straight(u, xp)
        if not self.bends(xp):
            return z
        a = z[..., : self.num_active]
        mean, scales, terms = self.across(a, xp)
        rest = self.released(terms, z[..., self.num_active :] - mean, xp) / scales
        if self.is_tilted(xp):
            rest = straightened(rest, self.tilts, xp)
        return xp.concatenate([a, rest], axis=-1)

    def straight(self, u: Any, xp: Any = jnp) -> Any:
        """Q' C^-1 (u - loc)."""
        return exact(standardised(u, self.loc, self.scale_tril, xp), self.rotation, xp)


def standardised(u: Any, loc: Any, scale_tril: Any, xp: Any = jnp) -> Any:
    """C^-1 (u - loc) of u, shape (dim,) or (n, dim)."""
    if xp is jnp:
        centred = jnp.atleast_2d(u - loc).T
        return solve_triangular(scale_tril, centred, lower=True).T.reshape(u.shape)
    return (u - loc) @ inverse_lower(scale_tril, xp).T


def unbent(loc: Any, scale_tril: Any, rotation: Any, num_active: int, xp: Any = jnp) -> Frame:
    """The coordinates in which nothing follows, or is skewed."""
    nothing = xp.zeros((1 + num_active, len(loc) - num_active), loc.dtype)
    return Frame(loc, scale_tril, rotation, nothing, nothing, nothing[0])


def frame_of(values: Any) -> Frame:
    """The frame that parameters of a guide, constrained, are of."""
    coupled = values.get("coupled")
    return Frame(**{**values, "coupled": None if coupled is None else Coupled(**coupled)})


def spline_terms(x: Any, nodes: Any, xp: Any = jnp) -> Any:
    """One, x and the cubes of the distances from nodes, shape (..., 1 + num_active + num_nodes)."""
    x = xp.clip(x, -CLIPPED, CLIPPED)
    products = exact(x, nodes.T, xp)
    squares = xp.sum(x**2, axis=-1)[..., None] + xp.sum(nodes**2, axis=-1) - 2 * products
    if xp is np:
        cubes = squares * np.sqrt(np.maximum(squares, 0.0))
    else:  # by rounding it may be less than zero, where a root has no derivative
        apart = squares > 0
        cubes = jnp.where(apart, squares * jnp.sqrt(jnp.where(apart, squares, 1.0)), 0.0)
    return xp.concatenate([xp.ones_like(x[..., :1]), x, cubes], axis=-1)


def _matrix(weights: Any, terms: Any) -> Any:
    """I + N, in a program."""
    lower = jnp.tril(jnp.tensordot(terms, weights, 1, precision="highest"), -1)
    return lower + jnp.eye(len(lower), dtype=lower.dtype)


def _regression(weights: np.ndarray, terms: np.ndarray, c: np.ndarray, i: int) -> np.ndarray:
    """Row i of N c, on the host: matrices for all draws would take too much memory."""
    return np.einsum("...j,...j->...", terms @ weights[:, i, :i], c[..., :i])


def _for_rows(f: Any, terms: Any, c: Any) -> Any:
    """f of one vector, or of rows of them, so many at once that their matrices fit into memory."""
    if c.ndim == 1:
        return f(terms, c)
    return over(lambda row: f(*row), (terms, c), divisor(len(c), BLOCK // c.shape[1] ** 2))


def linear(a: Any, xp: Any = jnp) -> Any:
    """One and the coordinates along, within reach: (..., 1 + num_active)."""
    return xp.concatenate([xp.ones_like(a[..., :1]), xp.clip(a, -REACH, REACH)], axis=-1)
