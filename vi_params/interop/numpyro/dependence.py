"""Which results of a function depend on which of its inputs, read off its jaxpr.

An output depends on an input if some chain of equations leads there. What is a Python number or an
array made outside depends on nothing.
"""

from collections.abc import Callable, Collection
from typing import Any

import jax
from jax.extend.core import Literal


def depends(f: Callable[..., dict[str, Any]], moving: Any, *others: Any) -> dict[str, bool]:
    """Which entries of the mapping `f(moving, *others)` depend on `moving`."""
    closed, shape = jax.make_jaxpr(f, return_shape=True)(moving, *others)
    count = len(jax.tree.leaves(moving))
    flags = jax.tree.structure(shape).unflatten(reached(closed, closed.jaxpr.invars[:count]))
    return {name: any(jax.tree.leaves(flags[name])) for name in shape}


def reached(closed: Any, inputs: Collection[Any]) -> list[bool]:
    """For each output of a closed jaxpr, whether it depends on one of `inputs`."""
    moving = set(inputs)
    for equation in closed.jaxpr.eqns:
        if any(v in moving for v in equation.invars if not isinstance(v, Literal)):
            moving.update(equation.outvars)
    return [not isinstance(v, Literal) and v in moving for v in closed.jaxpr.outvars]
