"""The inverse Hessian that a path of L-BFGS implies, as the covariance of a normal.

From steps s and changes of gradient y of a loss, oldest first in the columns of S and Y, and a
diagonal start A = diag(alpha),

    H^-1 = A + B G B^T,   B = [A Y, S],   E = triu(S^T Y),
    G = [[0, -E^-1], [-E^-T, E^-T (diag(E) + Y^T A Y) E^-1]].

Byrd, Nocedal and Schnabel (1994), Representations of quasi-Newton matrices and their use in limited
memory methods, Mathematical Programming 63, theorem 2.2.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

CURVATURE = 1e-12
"""A step counts where s.y exceeds this share of y.y."""


class History(NamedTuple):
    """The last steps of a path.

    Attributes:
        alpha: the diagonal start, shape (dim,).
        steps: S^T, shape (size, dim), oldest first; rows of zeros where there were none.
        changes: Y^T, likewise.
    """

    alpha: jax.Array
    steps: jax.Array
    changes: jax.Array


class Root(NamedTuple):
    """A square root C = diag(a) (I + Q (L - I) Q^T) of the inverse Hessian.

    Attributes:
        scale: a = sqrt(alpha), shape (dim,).
        frame: Q, orthonormal columns, shape (dim, k), k = min(dim, 2 size).
        lower: L, shape (k, k).
    """

    scale: jax.Array
    frame: jax.Array
    lower: jax.Array

    def times(self, e: jax.Array) -> jax.Array:
        """C e, for e of shape (dim,)."""
        inner = self.frame.T @ e
        return self.scale * (e + self.frame @ (self.lower @ inner - inner))

    def transposed(self, x: jax.Array) -> jax.Array:
        """C^T x, for x of shape (dim,)."""
        inner = self.frame.T @ (self.scale * x)
        return self.scale * x + self.frame @ (self.lower.T @ inner - inner)

    def log_det(self) -> jax.Array:
        """log det C."""
        return jnp.sum(jnp.log(self.scale)) + jnp.sum(jnp.log(jnp.diagonal(self.lower)))


def empty(dim: int, size: int, dtype: jnp.dtype) -> History:
    """No steps yet: the identity."""
    zeros = jnp.zeros((size, dim), dtype)
    return History(jnp.ones(dim, dtype), zeros, zeros)


def extend(history: History, step: jax.Array, change: jax.Array) -> History:
    """The history with one more step, if the loss curves upwards along it.

    The diagonal is updated so that it has the step's curvature: Gilbert and Lemarechal (1989), Some
    numerical experiments with variable-storage quasi-Newton algorithms, Mathematical Programming
    45, equation 4.9.
    """
    alpha = history.alpha
    b = change @ step
    usable = jnp.isfinite(b) & (b > CURVATURE * (change @ change))
    safe = jnp.where(usable, b, 1.0)
    a, c = change @ (alpha * change), step @ (step / alpha)
    inverse = a / (safe * alpha) + change**2 / safe - a * step**2 / (safe * c * alpha**2)
    new = History(
        1 / inverse,
        jnp.roll(history.steps, -1, axis=0).at[-1].set(step),
        jnp.roll(history.changes, -1, axis=0).at[-1].set(change),
    )
    usable = usable & jnp.all(jnp.isfinite(new.alpha) & (new.alpha > 0))
    return jax.tree.map(lambda new, old: jnp.where(usable, new, old), new, history)


def root(history: History) -> Root:
    """A square root of the inverse Hessian; NaN where it is not positive definite."""
    alpha, s, y = history.alpha, history.steps.T, history.changes.T
    size = s.shape[1]
    there = jnp.any(s != 0, axis=0)
    e = jnp.triu(s.T @ y) + jnp.diag(jnp.where(there, 0.0, 1.0))
    inverse = solve_triangular(e, jnp.eye(size, dtype=e.dtype), lower=False)
    middle = jnp.diag(jnp.diagonal(e)) + y.T @ (alpha[:, None] * y)
    middle = inverse.T @ jnp.where(there[:, None] & there, middle, jnp.eye(size)) @ inverse
    gamma = jnp.block([[jnp.zeros_like(inverse), -inverse], [-inverse.T, middle]])
    scale = jnp.sqrt(alpha)
    wide = jnp.concatenate([scale[:, None] * y, s / scale[:, None]], axis=1)
    frame, r = jnp.linalg.qr(wide)
    inner = jnp.eye(r.shape[0], dtype=r.dtype) + r @ gamma @ r.T
    return Root(scale, frame, jnp.linalg.cholesky(0.5 * (inner + inner.T)))
