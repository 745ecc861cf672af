"""A function of many draws: side by side, in blocks, or one by one where side by side is unsafe.

From jaxlib 0.10 on, a batched LAPACK call on a CPU hands its parts to the pool of threads that it
runs on itself and waits for them there: as many such calls at once as there are threads wait for
each other for ever. Two batched triangular solves do it on a machine of two cores.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax import lax
from jax.extend.core import jaxpr_as_fun

LAPACK = ("cholesky", "triangular_solve", "lu", "qr", "geqrf", "geqp3", "householder_product")
LAPACK += ("eigh", "eig", "svd", "schur", "hessenberg", "tridiagonal")
"""The primitives that are LAPACK calls on a CPU."""


HALVES = 2
"""As many on every machine: with the number of cores the rounding of results would change, and
which of several starts they come from."""


def over(f: Callable[[Any], Any], xs: Any, at_once: int | None = None) -> Any:
    """f of every row of `xs`, `at_once` of them side by side; all where None."""
    rows = jax.tree.leaves(xs)[0].shape[0]
    size = rows if at_once is None else min(at_once, rows)
    if rows == 1:
        return jax.vmap(f)(xs)
    if jax.default_backend() != "cpu":
        return jax.vmap(f)(xs) if size == rows else lax.map(f, xs, batch_size=size)
    block = jax.tree.map(lambda leaf: leaf[:size], xs)
    together, shape = jax.make_jaxpr(jax.vmap(f), return_shape=True)(block)
    if size == 1 or has_batched_lapack(together.jaxpr):
        return lax.map(f, xs)
    if size < rows:
        return lax.map(f, xs, batch_size=size)
    values = jaxpr_as_fun(together)(*jax.tree.leaves(xs))
    return jax.tree.unflatten(jax.tree.structure(shape), values)


def over_lanes(lane: Callable[[Any], Any], xs: Any) -> Any:
    """`lane`, a search that ends when it is done, of every row of `xs`: on a CPU one after the
    other, which traces, compiles and runs in less time than all in step with the slowest."""
    number = jax.tree.leaves(xs)[0].shape[0]
    return lax.map(lane, xs) if lanes_in_turn() or number == 1 else jax.vmap(lane)(xs)


def lanes_in_turn() -> bool:
    """Whether `over_lanes` makes them one after the other."""
    return jax.default_backend() == "cpu"


def lanes_at_once(lanes: int) -> int:
    """How many lanes `over_lanes` makes side by side."""
    return 1 if lanes_in_turn() else lanes


def num_parts(number: int) -> int:
    """In how many equal parts so many pieces of work are done that are done one after the other: on
    a CPU in halves, side by side (`Quick.side_by_side`)."""
    return HALVES if lanes_in_turn() and number % HALVES == 0 else 1


def divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` up to `limit`, at least 1: equal blocks, one program."""
    return next(n for n in range(max(1, min(number, limit)), 0, -1) if number % n == 0)


def runs_alone(jaxpr: Any) -> bool:
    """Whether two calls of a program should not run at once on a CPU: batched LAPACK calls are
    unsafe, and what is called back in Python may hold state."""
    names = (equation.primitive.name for equation in _equations(jaxpr))
    return has_batched_lapack(jaxpr) or any(
        "callback" in name or name.startswith("debug") for name in names
    )


def has_batched_lapack(jaxpr: Any) -> bool:
    """Whether a program makes batched LAPACK calls."""
    return any(
        equation.primitive.name in LAPACK and equation.invars[0].aval.ndim > 2
        for equation in _equations(jaxpr)
    )


def _equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a program and of the programs inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_program):
            if _is_program(inner):
                yield from _equations(getattr(inner, "jaxpr", inner))


def _is_program(value: Any) -> bool:
    return hasattr(value, "eqns")
