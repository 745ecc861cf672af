"""Which results of a function depend on which of its inputs, read off its jaxpr.

An output depends on an input if some chain of equations leads there. What is a Python number or an
array made outside depends on nothing.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
from jax.extend.core import Literal


def depends(f: Callable[..., dict[str, Any]], moving: Any, *others: Any) -> dict[str, bool]:
    """Which entries of the mapping `f(moving, *others)` depend on `moving`."""
    closed, shape = jax.make_jaxpr(f, return_shape=True)(moving, *others)
    count = len(jax.tree.leaves(moving))
    flags = jax.tree.structure(shape).unflatten(reached(closed, closed.jaxpr.invars[:count]))
    return {name: any(jax.tree.leaves(flags[name])) for name in shape}


def dependents(f: Callable[..., dict[str, Any]], moving: Mapping[str, Any], *others: Any) -> Any:
    """For each scalar of `moving` the entries of `f(moving, *others)` that depend on it; None where
    a loop stands between them, whose results are taken to depend on all that goes in."""
    closed, shape = jax.make_jaxpr(f, return_shape=True)(dict(moving), *others)
    if any(equation.primitive.name in ("scan", "while", "cond") for equation in closed.jaxpr.eqns):
        return None
    treedef, found = jax.tree.structure(shape), {}
    for name, variable in zip(sorted(moving), closed.jaxpr.invars, strict=False):
        flags = treedef.unflatten(reached(closed, [variable]))
        found[name] = {entry for entry in shape if any(jax.tree.leaves(flags[entry]))}
    return found


def reached(closed: Any, inputs: Collection[Any]) -> list[bool]:
    """For each output of a closed jaxpr, whether it depends on one of `inputs`."""
    moving = set(inputs)
    for equation in closed.jaxpr.eqns:
        if any(v in moving for v in equation.invars if not isinstance(v, Literal)):
            moving.update(equation.outvars)
    return [not isinstance(v, Literal) and v in moving for v in closed.jaxpr.outvars]
