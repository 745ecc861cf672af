"""A Gaussian family between mean-field and full-rank: a diagonal times a low-rank correlation.

    u = loc + D C e,   e ~ N(0, I),   Cov(u) = D (I + W W^T) D,

D diagonal, W of shape (dim, rank). A square root of I + W W^T that needs no eigenvalues is

    C = I + W (I + L)^-1 W^T,   L L^T = I + W^T W  (Cholesky, rank x rank),

since with M = (I + L)^-1 the equation C C^T = I + W W^T is M + M^T + M (L L^T - I) M^T = I, that
is (I + L)(I + L^T) = I + L + L^T + L L^T. Likewise det C = det L, and by Woodbury

    C^-1 = I - W (I + L^T)^-1 L^-1 W^T.

So noise has as many numbers as there are coordinates, every scheme of `vi.noise` fits, the entropy
is closed, and a draw or a density costs O(dim rank + rank^3). Ong, Nott and Smith (2018), Gaussian
variational approximation with a factor covariance structure, JCGS 27(3), with W scaled by D.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from numpyro.distributions import constraints

from vi_params._check import explain, require_count
from vi_params.guide import Guide
from vi_params.guides.location_scale import Scale, location_scale, positive
from vi_params.guides.starts import start_vector
from vi_params.params import Param
from vi_params.target import Target, flat

FIRST_FACTOR = 0.01
"""The standard deviation of the random factor at the start: at W = 0 its gradient is zero."""


def low_rank(
    target: Target,
    *,
    rank: int | None = None,
    init: Any = None,
    init_scale: float = 0.1,
    name: str = "guide",
) -> Guide:
    """One normal in unconstrained coordinates, with covariance D (I + W W^T) D.

    Args:
        target: what to approximate.
        rank: the number of columns of W; floor(sqrt(dim)) where None, at most dim.
        init: where `loc` starts, as in `mean_field`.
        init_scale: where `scale`, the diagonal of D, starts: a positive number in unconstrained
            units.
        name: the name of the family's parameters,
            `{"loc": (dim,), "scale": (dim,), "factor": (dim, rank)}`.

    Returns:
        A `Guide`.

    Raises:
        ValueError: `init_scale` is not positive, `rank` is not among 1 .. dim, or a start lies
            outside its support.
        KeyError: `init` names an unknown latent.

    Example:
        >>> target = vi.target(lambda v, z, d: -0.5 * jnp.sum(z["z"] ** 2), {"z": vi.Latent((9,))})
        >>> print(vi.describe(vi.guides.low_rank(target).declared))
        path          shape   dtype    constraint   plates  size
        guide/factor  (9, 3)  float32  Real()                 27
        guide/loc     (9,)    float32  Real()                  9
        guide/scale   (9,)    float32  Positive(0)             9
    """
    dim = flat(target).dim
    rank = checked_rank(rank, dim, "vi.guides.low_rank")
    scale = jnp.full(dim, positive(init_scale))
    declared = {
        name: {
            "loc": Param(start_vector(target, init)),
            "scale": Param(scale, constraint=constraints.positive),
            "factor": Param(lambda key: FIRST_FACTOR * jax.random.normal(key, (dim, rank))),
        }
    }
    return location_scale(target, declared, name, LOW_RANK)


class Root(NamedTuple):
    """The square root C of I + W W^T.

    Attributes:
        factor: W, shape (dim, rank).
        lower: L, the Cholesky factor of I + W^T W, shape (rank, rank).
    """

    factor: jax.Array
    lower: jax.Array

    def times(self, e: jax.Array) -> jax.Array:
        """C e, for e of shape (dim,)."""
        shifted = self.lower + jnp.eye(self.lower.shape[0], dtype=self.lower.dtype)
        return e + self.factor @ solve_triangular(shifted, self.factor.T @ e, lower=True)

    def transposed(self, x: jax.Array) -> jax.Array:
        """C^T x, for x of shape (dim,)."""
        shifted = self.lower + jnp.eye(self.lower.shape[0], dtype=self.lower.dtype)
        return x + self.factor @ solve_triangular(shifted.T, self.factor.T @ x, lower=False)

    def solve(self, x: jax.Array) -> jax.Array:
        """C^-1 x, for x of shape (dim,)."""
        shifted = self.lower + jnp.eye(self.lower.shape[0], dtype=self.lower.dtype)
        inner = solve_triangular(self.lower, self.factor.T @ x, lower=True)
        return x - self.factor @ solve_triangular(shifted.T, inner, lower=False)

    def log_det(self) -> jax.Array:
        """log det C."""
        return jnp.sum(jnp.log(jnp.diagonal(self.lower)))


def root(factor: jax.Array) -> Root:
    """The square root of I + W W^T."""
    gram = factor.T @ factor + jnp.eye(factor.shape[1], dtype=factor.dtype)
    return Root(factor, jnp.linalg.cholesky(gram))


LOW_RANK = Scale(
    times=lambda own, e: own["scale"] * root(own["factor"]).times(e),
    solve=lambda own, x: root(own["factor"]).solve(x / own["scale"]),
    log_det=lambda own: jnp.sum(jnp.log(own["scale"])) + root(own["factor"]).log_det(),
)


def checked_rank(rank: int | None, dim: int, where: str) -> int:
    """The rank to use: the one given, if it is among 1 .. dim, or floor(sqrt(dim))."""
    if rank is None:
        return max(1, math.isqrt(dim))
    require_count(rank, "rank", where)
    if rank > max(dim, 1):
        raise ValueError(
            explain(
                "The rank exceeds the dimension.",
                expected=f"1 <= rank <= {dim}",
                received=str(rank),
                where=where,
                hint="vi.guides.full_rank holds every covariance",
            )
        )
    return rank
