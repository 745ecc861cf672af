"""How the rows of a batch are drawn, as values: functions of a key and the number of the step.

Nothing is stored between steps: the epoch and the place in it follow from the step's number, so
that a run can be cut anywhere. A batch costs O(B) whatever the size of its plate.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vi_params._check import explain
from vi_params._tree import fold_in_name
from vi_params.batches.permutation import permute

Sizes = Mapping[str, tuple[int, int]]
"""plate -> (size, batch size)."""


class Scheme(NamedTuple):
    """A scheme of drawing batches.

    Attributes:
        name: what it is called in messages.
        draw: `(key, step, sizes) -> index`: for each plate an int32 array of its rows at that step;
            `key` is the same for all steps of a run.
        repeats: whether a row can occur twice in one batch.
    """

    name: str
    draw: Callable[[jax.Array, jax.Array, Sizes], dict[str, jax.Array]]
    repeats: bool = False


def shuffled() -> Scheme:
    """Without replacement: every epoch is a new random permutation of the rows, cut into batches.

    Where the batch size B does not divide the size N, the last N mod B rows of an epoch's
    permutation are left out, others in every epoch. Several plates are shuffled independently, each
    with epochs of its own.

    Example:
        >>> draw = vi.batches.shuffled().draw
        >>> first, second = (draw(jax.random.key(0), i, {"rows": (6, 3)})["rows"] for i in (0, 1))
        >>> sorted([*first.tolist(), *second.tolist()])
        [0, 1, 2, 3, 4, 5]
    """
    return Scheme("shuffled", _shuffled)


def with_replacement() -> Scheme:
    """Independent uniform rows; one row can occur twice in a batch, and then counts twice.

    Example:
        >>> draw = vi.batches.with_replacement().draw
        >>> draw(jax.random.key(0), 0, {"rows": (3, 5)})["rows"].shape
        (5,)
    """
    return Scheme("with_replacement", _with_replacement, repeats=True)


def in_order() -> Scheme:
    """Rows 0 to B - 1, then the next B, and around: the same batches in every epoch, no key used.

    Of several plates the first runs fastest: all combinations of batches are gone through. Where B
    does not divide N a batch goes around the end.

    Example:
        >>> draw = vi.batches.in_order().draw
        >>> [draw(jax.random.key(0), i, {"rows": (5, 2)})["rows"].tolist() for i in range(3)]
        [[0, 1], [2, 3], [4, 0]]
    """
    return Scheme("in_order", _in_order)


def _shuffled(key: jax.Array, step: jax.Array, sizes: Sizes) -> dict[str, jax.Array]:
    index = {}
    for plate, (size, batch) in sizes.items():
        epoch, place = jnp.divmod(jnp.asarray(step), size // batch)
        own = jax.random.fold_in(fold_in_name(key, plate), epoch)
        index[plate] = permute(own, size, place * batch + jnp.arange(batch))
    return index


def _with_replacement(key: jax.Array, step: jax.Array, sizes: Sizes) -> dict[str, jax.Array]:
    own = jax.random.fold_in(key, step)
    return {
        plate: jax.random.randint(fold_in_name(own, plate), (batch,), 0, size, jnp.int32)
        for plate, (size, batch) in sizes.items()
    }


def _in_order(key: jax.Array, step: jax.Array, sizes: Sizes) -> dict[str, jax.Array]:
    index, turn = {}, jnp.asarray(step)
    for plate, (size, batch) in sizes.items():
        period = size // math.gcd(size, batch)
        if period * batch >= 2**31:
            raise ValueError(
                explain(
                    "The batches of this plate go around too late to be numbered.",
                    expected="a batch size that divides the plate's size, or lcm(N, B) < 2**31",
                    received=f"N = {size}, B = {batch}",
                    where=f"vi.batches.in_order, plate {plate!r}",
                    hint="vi.batches.shuffled()",
                )
            )
        turn, place = jnp.divmod(turn, period)
        index[plate] = ((place * batch + jnp.arange(batch)) % size).astype(jnp.int32)
    return index
