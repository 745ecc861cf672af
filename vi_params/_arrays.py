"""What jax.numpy and numpy do not share, so that one text serves a program and the host.

Mathematics of a few small matrices and many numbers takes longer to compile than to run: `xp` says
where it runs, in a program (jax.numpy) or on the host (numpy).
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
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
    """f applied `number` times to x."""
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


def eigh(a: Any, xp: Any = jnp) -> tuple[Any, Any]:
    """Eigenvalues and eigenvectors of a symmetric matrix; NaN where they are not found."""
    if xp is jnp:
        values, vectors = jnp.linalg.eigh(a)
        return values, vectors
    try:
        values, vectors = np.linalg.eigh(a)
    except np.linalg.LinAlgError:
        values, vectors = np.full(len(a), np.nan), np.full_like(a, np.nan)
    return values, vectors


def solved(a: Any, b: Any, xp: Any = jnp) -> Any:
    """a^-1 b, columns b; not finite where a is singular."""
    if xp is jnp:
        return jnp.linalg.solve(a, b)
    try:
        return np.linalg.solve(a, b)
    except np.linalg.LinAlgError:
        return np.full_like(b, np.nan)


def inverse_lower(root: Any, xp: Any = jnp) -> Any:
    """The inverse of a lower triangular matrix, not finite where there is none; on the host in
    float64."""
    if xp is jnp:
        identity = jnp.eye(len(root), dtype=root.dtype)
        return jax.scipy.linalg.solve_triangular(root, identity, lower=True)
    inverse, failed = _inverse(root, lower=1)
    return np.full_like(inverse, np.nan) if failed else inverse


def exact(a: Any, b: Any, xp: Any = jnp) -> Any:
    """The product of matrices, in full precision on accelerators too: sums of squares cancel."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST) if xp is jnp else a @ b


def logsumexp(x: Any, axis: int = 0, xp: Any = jnp) -> Any:
    """Log sum exp along an axis."""
    if xp is jnp:
        return jax.scipy.special.logsumexp(x, axis=axis)
    largest = np.max(x, axis=axis, keepdims=True)
    shift = np.where(np.isfinite(largest), largest, 0.0)
    return np.log(np.sum(np.exp(x - shift), axis=axis)) + np.squeeze(shift, axis)


def by_threads(f: Callable[[Any], Any], xs: list[Any]) -> Iterator[Any]:
    """f of every x, in their order, on the host: made by threads while what is there is used, all
    of them if they are faster."""
    if len(xs) <= 1:
        yield from map(f, xs)
        return

    def inside(x: Any) -> Any:
        with on_host():  # numpy's settings are a thread's own
            return f(x)

    with ThreadPoolExecutor(min(len(xs), os.cpu_count() or 1)) as pool:
        yield from pool.map(inside, xs)


class _OneThread:
    """Numpy's matrix products by one thread, from the first that asks for it to the last one's
    end: the number of threads is the process's."""

    def __init__(self) -> None:
        self.lock, self.users, self.limits = threading.Lock(), 0, None

    def __enter__(self) -> None:
        with self.lock:
            self.users += 1
            if self.limits is None:
                self.limits = threadpool_limits(1, user_api="blas")

    def __exit__(self, *_: Any) -> None:
        with self.lock:
            self.users -= 1
            if self.users == 0 and self.limits is not None:
                self.limits.restore_original_limits()
                self.limits = None


_ONE_THREAD = _OneThread()


@contextlib.contextmanager
def on_host() -> Iterator[None]:
    """In it numpy is as silent about what is not finite as programs are, and multiplies matrices by
    one thread: on few cores more of them and those of JAX wait for each other."""
    with np.errstate(all="ignore"), _ONE_THREAD:
        yield
