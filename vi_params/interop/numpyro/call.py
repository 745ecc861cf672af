"""A program's arguments, split: arrays are data and pass through jit, everything else is static."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer.autoguide import AutoGuide

from vi_params._check import explain, require_names
from vi_params._tree import leaves_by_path, strong


class Call(NamedTuple):
    """How a program is called.

    Attributes:
        data: argument name -> its arrays, in the argument's structure, None for what is static.
        arguments: `data -> (args, kwargs)` to call the program with.
    """

    data: dict[str, Any]
    arguments: Callable[[Any], tuple[tuple, dict[str, Any]]]


def bind(program: Callable, args: tuple, kwargs: Mapping[str, Any], skip: int = 0) -> Call:
    """The call `program(*args, **kwargs)`, its arrays taken out by argument name.

    Args:
        program: a callable; NumPyro's autoguides are called as their models are.
        args: positional arguments.
        kwargs: keyword arguments.
        skip: how many leading parameters of the program are filled by someone else.

    Raises:
        TypeError: the program does not take these arguments.
    """
    signature = _signature(program, skip)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(
            explain(
                "The program does not take these arguments.",
                expected=str(signature),
                received=f"{len(args)} positional, keywords {list(kwargs)}: {error}",
                where=getattr(program, "__name__", repr(program)),
            )
        ) from error
    data, structures = {}, {}
    for name, value in bound.arguments.items():
        leaves, treedef = jax.tree.flatten(value)
        arrays = [strong(leaf) if _is_data(leaf) else None for leaf in leaves]
        if any(leaf is not None for leaf in arrays):
            data[name] = treedef.unflatten(arrays)
            structures[name] = treedef, leaves, arrays

    def arguments(given: Any) -> tuple[tuple, dict[str, Any]]:
        filled = inspect.BoundArguments(signature, type(bound.arguments)(bound.arguments))
        if structures:
            if not isinstance(given, Mapping):
                raise TypeError(
                    explain(
                        "The data of a NumPyro program are a mapping by argument name.",
                        expected=f"a mapping with {list(structures)}",
                        received=type(given).__name__,
                        where="data",
                        hint="start from target.data and replace its arrays",
                    )
                )
            require_names(
                [name for name in given if name in structures],
                list(structures),
                what="data",
                where="data",
            )
        for name, (treedef, leaves, arrays) in structures.items():
            parts = treedef.flatten_up_to(given[name])
            filled.arguments[name] = treedef.unflatten(
                leaf if array is None else part
                for part, leaf, array in zip(parts, leaves, arrays, strict=True)
            )
        return filled.args, filled.kwargs

    return Call(data, arguments)


@contextlib.contextmanager
def blaming_shapes(call: Call, data: Any) -> Iterator[None]:
    """Errors of a program that runs on data of other shapes than its own name these data."""
    try:
        yield
    except (ValueError, TypeError) as error:
        old, new = (
            {path: jnp.shape(leaf) for path, leaf in leaves_by_path(tree).items()}
            for tree in (call.data, data)
        )
        changed = [path for path in old if path in new and new[path] != old[path]]
        if not changed or "Expected:" in str(error):
            raise
        raise ValueError(
            explain(
                "The program does not run on data of these shapes.",
                expected=", ".join(f"{path} of shape {old[path]}" for path in changed),
                received=", ".join(f"{path} of shape {new[path]}" for path in changed),
                where=f"data; the program says: {error}",
                hint="let sizes follow the data, numpyro.plate(name, len(y)) or "
                "subsample_size=y.shape[0], or build a new target",
            )
        ) from error


def _signature(program: Callable, skip: int) -> inspect.Signature:
    target = program.model if isinstance(program, AutoGuide) else program
    signature = inspect.signature(target)
    return signature.replace(parameters=list(signature.parameters.values())[skip:])


def _is_data(leaf: Any) -> bool:
    """Arrays, and floating NumPy scalars; NumPy ints and bools may be sizes and switches."""
    if isinstance(leaf, jax.Array):
        return True
    if isinstance(leaf, np.ndarray):
        return leaf.dtype.kind in "biufc"
    return isinstance(leaf, np.inexact)
