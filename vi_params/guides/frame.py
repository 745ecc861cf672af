"""Coordinates along and across a few directions of a Gaussian, which may bend and be skewed.

Those of N(loc, C C'), turned by an orthogonal Q whose first columns are the active directions, are
(a, c) = Q' C^-1 (u - loc). Across, what is given a has a mean and scales that follow a, and may be
skewed:

    c = m(a) + s(a) T(b),   log s = l_0 + a l_1,   m = s^2 (h_0 + a h_1),   y = (a, b),

T the sinh-arcsinh transform of its tilt (`sinh_arcsinh`). With l_1 = 0 and no tilt what is normal
in y is normal over all; l_1 makes necks like those of funnels, tilts make the skewed latents of
counts. Where the coordinates across are coupled, their regressions on those before them follow, too
(the modified Cholesky decomposition: Pourahmadi, 1999, Joint mean-covariance models with
applications to longitudinal data, Biometrika 86), and all are polynomials p in a, clipped:

    c = m(a) + (I + N(a))^-1 s(a) T(b),   log s = p(a) l,   m = p(a) h,   N = p(a) n,

N strictly lower triangular. Tan, Bhaskaran and Nott (2020), Conditionally structured variational Gaussian approximation
with importance weights, Statistics and Computing 30, let conditional covariances of local latents
depend on global ones so; Smith, Loaiza-Maya and Nott (2020), High-dimensional copula variational
approximation through transformation, Journal of Computational and Graphical Statistics 29, skew a
Gaussian's coordinates by a transform of each.
"""

import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular

from vi_params._arrays import exact, inverse_lower
from vi_params.guides.sinh_arcsinh import log_slope, straightened, tilted

REACH = 5.0
"""Beyond so many standard deviations along, what is across follows no further."""

CLIPPED = 4.0
"""Beyond so many of their own units polynomials are constant."""


class Coupled(NamedTuple):
    """Regressions across, polynomials along.

    Attributes:
        weights: n of N, shape (num_terms, rest, rest), of which what is strictly lower counts.
        centre: where along the polynomials have their origin, shape (num_active,).
        unit: their units along, shape (num_active,).
    """

    weights: Any
    centre: Any
    unit: Any


class Frame(NamedTuple):
    """The coordinates y.

    Attributes:
        loc: shape (dim,).
        scale_tril: C, shape (dim, dim), lower triangular.
        rotation: Q, shape (dim, dim), orthogonal.
        shifts: h, rows for 1 and each coordinate of a, shape (1 + num_active, dim - num_active), or
            for the terms of the polynomials.
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

    def across(self, a: Any, xp: Any = jnp) -> tuple[Any, Any]:
        """The means and the log scales across, at coordinates along or at rows of them."""
        terms = self.terms(a, xp)
        log_scales, means = exact(terms, self.log_scales, xp), exact(terms, self.shifts, xp)
        return means if self.coupled else xp.exp(2 * log_scales) * means, log_scales

    def terms(self, a: Any, xp: Any = jnp) -> Any:
        """What is linear, or a polynomial, in coordinates along or in rows of them."""
        if self.coupled is None:
            return linear(a, xp)
        degree = degree_of(len(self.shifts), self.num_active)
        return powers((a - self.coupled.centre) / self.coupled.unit, degree, xp)

    def released(self, a: Any, c: Any, xp: Any = jnp) -> Any:
        """(I + N(a)) c: what the regressions leave."""
        if self.coupled is None:
            return c
        terms = self.terms(a, xp)
        if xp is jnp:
            return _for_rows(lambda terms, c: exact(self._matrix(terms), c), terms, c)
        found = np.array(c)
        for i in range(1, c.shape[-1]):
            found[..., i] += self._regression(terms, c, i)
        return found

    def pulled(self, a: Any, c: Any, xp: Any = jnp) -> Any:
        """(I + N(a))^-1 c, with the regressions."""
        if self.coupled is None:
            return c
        terms = self.terms(a, xp)
        if xp is jnp:

            def solved(terms: Any, c: Any) -> Any:
                return solve_triangular(self._matrix(terms), c, lower=True, unit_diagonal=True)

            return _for_rows(solved, terms, c)
        found = np.array(c)
        for i in range(1, c.shape[-1]):
            found[..., i] -= self._regression(terms, found, i)
        return found

    def _matrix(self, terms: Any) -> Any:
        """I + N, in a program."""
        lower = jnp.tril(jnp.tensordot(terms, self.coupled.weights, 1, precision="highest"), -1)
        return lower + jnp.eye(len(lower), dtype=lower.dtype)

    def _regression(self, terms: np.ndarray, c: np.ndarray, i: int) -> np.ndarray:
        """Row i of N(a) c, on the host: matrices for all draws would take too much memory."""
        row = terms @ self.coupled.weights[:, i, :i]
        return np.einsum("...j,...j->...", row, c[..., :i])

    def unconstrained(self, y: Any, xp: Any = jnp) -> Any:
        """The vectors u at coordinates y, shape (dim,) or (n, dim)."""
        z = y
        if self.bends(xp):
            a, rest = y[..., : self.num_active], y[..., self.num_active :]
            mean, log_scales = self.across(a, xp)
            if self.is_tilted(xp):
                rest = tilted(rest, self.tilts, xp)
            rest = self.pulled(a, xp.exp(log_scales) * rest, xp)
            z = xp.concatenate([a, mean + rest], axis=-1)
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
        rest = self.released(a, z[..., self.num_active :] - mean, xp) * xp.exp(-log_scales)
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


def frame_of(values: Any) -> Frame:
    """The frame that parameters of a guide, constrained, are of."""
    coupled = values.get("coupled")
    return Frame(**{**values, "coupled": None if coupled is None else Coupled(**coupled)})


def powers(x: Any, degree: int, xp: Any = jnp) -> Any:
    """All products of up to `degree` coordinates of x, clipped: shape (..., num_terms)."""
    x = xp.clip(x, -CLIPPED, CLIPPED)
    found = [xp.ones_like(x[..., 0])]
    for number in range(1, degree + 1):
        for chosen in itertools.combinations_with_replacement(range(x.shape[-1]), number):
            found.append(math.prod((x[..., i] for i in chosen[1:]), start=x[..., chosen[0]]))
    return xp.stack(found, axis=-1)


def num_terms(num_active: int, degree: int) -> int:
    """How many terms a polynomial has."""
    return math.comb(num_active + degree, degree)


def degree_of(terms: int, num_active: int) -> int:
    """The degree of a polynomial with so many terms."""
    return next(n for n in range(terms) if num_terms(num_active, n) == terms)


def _for_rows(f: Any, terms: Any, c: Any) -> Any:
    """f of one vector, or of rows of them."""
    return f(terms, c) if c.ndim == 1 else jax.vmap(f)(terms, c)


def linear(a: Any, xp: Any = jnp) -> Any:
    """One and the coordinates along, within reach: (..., 1 + num_active)."""
    return xp.concatenate([xp.ones_like(a[..., :1]), xp.clip(a, -REACH, REACH)], axis=-1)
