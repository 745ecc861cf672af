"""What jax.numpy and numpy do not share, so that one text serves a program and the host.

Mathematics of a few small matrices and many numbers takes longer to compile than to run: `xp` says
where it runs, in a program (jax.numpy) or on the host (numpy).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from scipy.linalg import get_lapack_funcs
from threadpoolctl import threadpool_limits

(_inverse,) = get_lapack_funcs(("trtri",), dtype=np.float64)


def in_turn(f: Callable[[Any], Any], rows: Any, xp: Any = jnp) -> Any:
    """f of every row of a tree of arrays, one after the other."""
    if xp is jnp:
        return lax.map(f, rows)
    number = len(jax.tree.leaves(rows)[0])
    found = [f(jax.tree.map(lambda leaf, i=i: leaf[i], rows)) for i in range(number)]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *found)


def repeated(number: int, f: Callable[[Any], Any], x: Any, xp: Any = jnp) -> Any:
    """F of f of ... of x."""
    if xp is jnp:
        return lax.fori_loop(0, number, lambda _, x: f(x), x)
    for _ in range(number):
        x = f(x)
    return x


def cholesky(a: Any, xp: Any = jnp) -> Any:
    """The lower triangular root of a matrix; NaN where it is not positive definite."""
    if xp is jnp:
        return jnp.linalg.cholesky(a)
    try:
        return np.linalg.cholesky(a)
    except np.linalg.LinAlgError:
        return np.full_like(a, np.nan)


def solve_lower(root: Any, b: Any, xp: Any = jnp) -> Any:
    """The product of the inverse of a lower triangular matrix with another matrix."""
    if xp is jnp:
        return jax.scipy.linalg.solve_triangular(root, b, lower=True)
    return inverse_lower(root, np) @ b


def inverse_lower(root: Any, xp: Any = jnp) -> Any:
    """The inverse of a lower triangular matrix; on the host in float64."""
    if xp is jnp:
        return solve_lower(root, jnp.eye(len(root), dtype=root.dtype))
    return _inverse(root, lower=1)[0]


def logsumexp(x: Any, axis: int = 0, xp: Any = jnp) -> Any:
    """Log sum exp along an axis."""
    if xp is jnp:
        return jax.scipy.special.logsumexp(x, axis=axis)
    largest = np.max(x, axis=axis, keepdims=True)
    shift = np.where(np.isfinite(largest), largest, 0.0)
    with np.errstate(divide="ignore"):  # of nothing but zeros
        return np.log(np.sum(np.exp(x - shift), axis=axis)) + np.squeeze(shift, axis)


def one_thread() -> threadpool_limits:
    """A context in which numpy multiplies matrices by one thread: on few cores more of them and
    those of JAX wait for each other."""
    return threadpool_limits(1, user_api="blas")
