"""Compiled programs kept for the next call with the same functions.

`jax.jit` keeps what it compiled as long as it is handed the same function. A library call that
builds its function anew each time would compile each time; here it builds it once for the objects
it is built from. Objects are told apart by identity. Functions made by the same code from the same
parts, as `optax.adam(1e-2)` gives at every call, count as the same.
"""

import functools
import types
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

SIZE = 64
"""How many programs are kept; those not used for longest go first, with what they close over."""

NUMBERS = (bool, int, float, complex, str, bytes, np.generic)


class Part:
    """A part of a program: equal to another if their identities are."""

    def __init__(self, thing: Any, identity: Hashable) -> None:
        """Takes `identity` as what tells `thing` from others."""
        self.thing = thing
        self.identity = identity
        self.hash = hash(identity)

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Part) and self.identity == other.identity


class Itself:
    """Equal to another if both hold one object, which lives on here: its id is not given away."""

    def __init__(self, thing: Any) -> None:
        """Keeps `thing` alive."""
        self.thing = thing

    def __hash__(self) -> int:
        return id(self.thing)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Itself) and self.thing is other.thing


def program(build: Callable[..., Any], *parts: Any, alike: tuple = ()) -> Any:
    """`build(*parts, *alike)`, built once for the same parts.

    Args:
        build: what builds the program.
        *parts: told apart as objects: tuples field by field, numbers by value.
        alike: told apart by what they are made of now, functions by their code and what it reads.
    """
    keyed = [Part(part, _object(part)) for part in parts]
    keyed += [Part(part, _identity(part, ())) for part in alike]
    return _built(build, tuple(keyed))


@functools.lru_cache(SIZE)
def _built(build: Callable[..., Any], parts: tuple[Part, ...]) -> Any:
    return build(*(part.thing for part in parts))


def _object(thing: Any) -> Hashable:
    """A value that is equal for the same object."""
    if thing is None or isinstance(thing, NUMBERS):
        return type(thing), repr(thing)
    if isinstance(thing, tuple):
        return type(thing), tuple(Itself(field) for field in thing)
    return Itself(thing)


def _identity(thing: Any, above: tuple[int, ...]) -> Hashable:
    """A value that is equal for things that behave the same, by what they are made of."""
    if isinstance(thing, NUMBERS):
        return type(thing), repr(thing)
    if isinstance(thing, (frozenset, jax.tree_util.PyTreeDef)):
        return type(thing), thing
    if isinstance(thing, (np.ndarray, jax.Array)) and not isinstance(thing, Tracer):
        return _values(thing)
    if id(thing) in above:
        return Itself(thing)
    above = (*above, id(thing))
    if isinstance(thing, tuple):
        return type(thing), tuple(_identity(part, above) for part in thing)
    if type(thing) is dict:
        return dict, _identity(tuple(thing.items()), above)
    if isinstance(thing, functools.partial):
        parts = (thing.func, thing.args, thing.keywords)
        return functools.partial, _identity(parts, above)
    if isinstance(thing, types.FunctionType):
        cells = tuple(_contents(cell) for cell in thing.__closure__ or ())
        parts = (cells, thing.__defaults__, thing.__kwdefaults__)
        return thing.__code__, _globals(thing), _identity(parts, above)
    return Itself(thing)


def _values(array: np.ndarray | jax.Array) -> Hashable:
    """What an array holds now. One that may be written into, and so be read otherwise when the
    program is traced again, is the same object as well; so are arrays of other things than numbers.
    """
    if not any(jnp.issubdtype(array.dtype, kind) for kind in (np.number, np.bool_)):
        return Itself(array)
    values = array.shape, array.dtype, np.asarray(array).tobytes()
    if isinstance(array, np.ndarray):
        return Itself(array), values
    return array.weak_type, values


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that is not bound yet
        return cell


def _globals(function: types.FunctionType) -> Hashable:
    """What a function's global names stand for now; equal code reads other values elsewhere."""
    known = function.__globals__
    found = ((name, known[name]) for name in _names(function.__code__) if name in known)
    return tuple(
        (name, _identity(value, ()) if isinstance(value, NUMBERS) else Itself(value))
        for name, value in found
    )


def _names(code: types.CodeType) -> Iterator[str]:
    """The names that code reads by name, that of the functions within it included."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
