"""Base noise as an explicit value: how the standard normal draws behind a guide are made.

A family maps noise to draws, so that the choice of noise is one argument of an objective. Each
scheme gives an array of shape `(num_particles, dim)` whose rows have mean zero and covariance the
identity. Under `iid`, `antithetic` and `sobol` every row is standard normal and only the dependence
between rows differs: estimates are unbiased. `moment_matched` and `orthogonal` give that up for
moments that hold exactly in every array: expectations of quadratics are exact, others are biased.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import qmc

from vi_params._check import explain

ROW = 8
"""XLA's CPU backend vectorises the counter-based generator over rows whose length is a multiple of
this one only; rows cut short in the same program are not such rows."""


class Noise(NamedTuple):
    """A scheme of standard normal draws.

    Attributes:
        name: what the scheme is called in messages.
        draw: `(key, num_particles, dim) -> array of shape (num_particles, dim)`.
    """

    name: str
    draw: Callable[[jax.Array, int, int], jax.Array]

    @property
    def is_iid(self) -> bool:
        """Whether the draws are independent of each other."""
        return self.name == "iid"


def iid() -> Noise:
    """Independent draws.

    Example:
        >>> vi.noise.iid().draw(jax.random.key(0), 3, 2).shape
        (3, 2)
    """
    return Noise("iid", _normal)


def antithetic() -> Noise:
    """Independent pairs (e, -e): odd moments are exact. The number of draws is even.

    Example:
        >>> e = vi.noise.antithetic().draw(jax.random.key(0), 4, 2)
        >>> bool(jnp.all(e[2:] == -e[:2]))
        True
    """

    def draw(key: jax.Array, num_particles: int, dim: int) -> jax.Array:
        half = _normal(key, _half(num_particles, "antithetic"), dim)
        return jnp.concatenate([half, -half])

    return Noise("antithetic", draw)


def moment_matched() -> Noise:
    """Antithetic pairs, each coordinate rescaled to mean square one.

    First moments and marginal second moments are exact, so that the mean of a Gaussian target is
    found without error from any number of draws. The rows are standard normal only in the limit of
    many of them.

    Example:
        >>> e = vi.noise.moment_matched().draw(jax.random.key(0), 8, 3)
        >>> bool(jnp.allclose((e**2).mean(0), 1.0))
        True
    """

    def draw(key: jax.Array, num_particles: int, dim: int) -> jax.Array:
        half = _normal(key, _half(num_particles, "moment_matched"), dim)
        half = half / jnp.sqrt(jnp.mean(half**2, axis=0))
        return jnp.concatenate([half, -half])

    return Noise("moment_matched", draw)


def orthogonal(*, normal_lengths: bool = False) -> Noise:
    """Antithetic pairs from a random orthogonal frame.

    With num_particles >= 2 dim, the draws' mean is zero and their covariance the identity, both
    exactly: {E, -E} with E = sqrt(h) Q, Q the thin QR factor of an h x dim normal matrix,
    h = num_particles / 2. With fewer, the rows are orthogonal directions of length sqrt(dim), and
    the moments are exact in expectation. The direction of a row is uniform; its length is not that
    of a normal vector: averages of many such frames keep an error in fourth moments.

    Args:
        normal_lengths: whether rows have the lengths of independent normal vectors. Every draw is
            then standard normal, and the covariance is exact in expectation only (Yu, Suresh,
            Choromanski, Holtmann-Rice and Kumar, 2016, Orthogonal random features, section 3).

    Example:
        >>> e = vi.noise.orthogonal().draw(jax.random.key(0), 6, 3)
        >>> bool(jnp.allclose(e.T @ e / 6, jnp.eye(3), atol=1e-5))
        True
    """

    def draw(key: jax.Array, num_particles: int, dim: int) -> jax.Array:
        h = _half(num_particles, "orthogonal")
        of_frame, of_lengths = jax.random.split(key) if normal_lengths else (key, key)
        normal = _normal(of_frame, h, dim)
        frame = jnp.sqrt(h) * _haar(normal) if h >= dim else jnp.sqrt(dim) * _haar(normal.T).T
        if normal_lengths:
            frame *= _lengths(_normal(of_lengths, h, dim)) / _lengths(frame)
        return jnp.concatenate([frame, -frame])

    return Noise("orthogonal", draw)


def sobol() -> Noise:
    """Randomised quasi-Monte Carlo: a Sobol net under a random digital shift, through the normal
    quantile function (Buchholz, Wenzel and Mandt, 2018, section 3).

    A power of two is the natural number of draws.

    Example:
        >>> vi.noise.sobol().draw(jax.random.key(0), 8, 2).shape
        (8, 2)
    """

    def draw(key: jax.Array, num_particles: int, dim: int) -> jax.Array:
        if dim == 0:
            return jnp.zeros((num_particles, 0))
        if dim > qmc.Sobol.MAXDIM:
            raise ValueError(
                explain(
                    "Sobol nets end at a largest dimension.",
                    expected=f"dim <= {qmc.Sobol.MAXDIM}",
                    received=str(dim),
                    where="vi.noise.sobol",
                    hint="use vi.noise.antithetic() or vi.noise.orthogonal()",
                )
            )
        net = qmc.Sobol(dim, scramble=False, bits=32).random(_power_of_two(num_particles))
        digits = jnp.asarray((net[:num_particles] * 2.0**32).astype(np.uint32))
        shift = jax.random.bits(key, (dim,), jnp.uint32)
        dtype = jnp.result_type(float)
        mantissa = 23 if dtype == jnp.float32 else 32
        cell = (digits ^ shift) >> np.uint32(32 - mantissa)
        return jax.scipy.special.ndtri((cell.astype(dtype) + 0.5) * 2.0**-mantissa)

    return Noise("sobol", draw)


def whole_rows(size: int) -> int:
    """The length of the shortest whole rows that hold `size` numbers."""
    return -(-size // ROW) * ROW


def _normal(key: jax.Array, num: int, dim: int) -> jax.Array:
    """Standard normal draws of shape (num, dim): the first of whole rows, whatever the shape."""
    size = num * dim
    return jax.random.normal(key, (whole_rows(size),))[:size].reshape(num, dim)


def _lengths(rows: jax.Array) -> jax.Array:
    """Of vectors, shape (n, 1)."""
    return jnp.linalg.norm(rows, axis=1, keepdims=True)


def _haar(normal: jax.Array) -> jax.Array:
    """A random matrix with orthonormal columns, uniform: QR with the signs of R made positive."""
    q, r = jnp.linalg.qr(normal)
    return q * jnp.sign(jnp.diagonal(r))


def _half(num_particles: int, name: str) -> int:
    if num_particles % 2:
        raise ValueError(
            explain(
                "Antithetic draws come in pairs.",
                expected="an even num_particles",
                received=str(num_particles),
                where=f"vi.noise.{name}",
                hint=f"num_particles={num_particles + 1}, or vi.noise.iid()",
            )
        )
    return num_particles // 2


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
