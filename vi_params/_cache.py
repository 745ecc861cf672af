"""Compiled programs kept for the next call with the same functions.

`jax.jit` keeps what it compiled as long as it is handed the same function. A library call that
builds its function anew each time would compile each time; here it builds it once for the objects
it is built from. Objects are told apart by identity. Functions made by the same code from the same
numbers, as `optax.adam(1e-2)` gives at every call, count as the same.
"""

import functools
import types
from collections.abc import Callable, Hashable
from typing import Any

SIZE = 64
"""How many programs are kept; those not used for longest go first, with what they close over."""


class Same:
    """Equal to another if it stands for the same object, or for functions that do the same."""

    def __init__(self, thing: Any) -> None:
        """Keeps `thing` alive, so that its identity is not given to another object."""
        self.thing = thing
        self.identity = _identity(thing, ())
        self.hash = hash(self.identity)

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.identity == other.identity


def program(build: Callable[..., Any], *parts: Any) -> Any:
    """`build(*parts)`, built once for the same parts."""
    return _built(build, tuple(Same(part) for part in parts))


@functools.lru_cache(SIZE)
def _built(build: Callable[..., Any], parts: tuple[Same, ...]) -> Any:
    return build(*(part.thing for part in parts))


def _identity(thing: Any, above: tuple[int, ...]) -> Hashable:
    """A value that is equal for things that behave the same, by what they are made of."""
    if thing is None or isinstance(thing, (bool, int, float, complex, str, bytes)):
        return type(thing), repr(thing)
    if id(thing) in above:
        return id(thing)
    above = (*above, id(thing))
    if isinstance(thing, tuple):
        return type(thing), tuple(_identity(part, above) for part in thing)
    if isinstance(thing, functools.partial):
        parts = (thing.func, thing.args, tuple(thing.keywords.items()))
        return functools.partial, _identity(parts, above)
    if isinstance(thing, types.FunctionType):
        cells = tuple(_contents(cell) for cell in thing.__closure__ or ())
        defaults = (thing.__defaults__, tuple((thing.__kwdefaults__ or {}).items()))
        return thing.__code__, id(thing.__globals__), _identity((cells, defaults), above)
    return id(thing)


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that is not bound yet
        return cell
