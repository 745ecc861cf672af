"""Batches from outside: any Python iterable, checked, put on the device while a step computes."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vi_params._check import explain
from vi_params._tree import leaves_by_path
from vi_params.batches import Batch
from vi_params.batches.batch import split
from vi_params.fitting.interrupt import Interrupt
from vi_params.fitting.lanes import RUNNING, Lanes, Programs
from vi_params.objectives.objective import Objective, resolve
from vi_params.target.fed import require_fed

END = object()
"""What comes after the last batch."""


class Ended(NamedTuple):
    """Why no batch came.

    Attributes:
        failed: whether something went wrong, rather than the data being at their end.
        message: what happened, in words.
    """

    failed: bool
    message: str


def is_stream(objective: Objective, data: Any) -> bool:
    """Whether `data` are batches to iterate over, rather than the data themselves."""
    if isinstance(data, (Mapping, Batch, str)) or not isinstance(data, Iterable):
        return False
    if isinstance(data, Iterator):
        return True
    own = split(objective.data)[0]
    if isinstance(data, (list, tuple)):  # a tree as well: of batches, unless it is one of arrays
        if not data or jax.tree.structure(split(data[0])[0]) == jax.tree.structure(own):
            return True
        return not isinstance(own, (list, tuple)) and not jax.tree_util.all_leaves(data)
    return not hasattr(data, "dtype") and jax.tree_util.all_leaves([data])


class Stream:
    """Batches one after the other, from the start again where the iterable can be iterated again.

    Not an iterator itself: what goes wrong comes back as an `Ended`, so that the loop which holds
    the trained state decides what becomes of it.
    """

    def __init__(self, objective: Objective, data: Iterable[Any]) -> None:
        """Starts to iterate; nothing is taken yet."""
        self.objective = objective
        self.data = data
        self.batches = iter(data)
        self.again = self.batches is not data
        self.fed = objective.fed
        self.taken = self.in_epoch = 0
        self.first: dict[str, tuple] | None = None

    def take(self) -> Any:
        """The next batch on the device, or `Ended`."""
        try:
            batch = next(self.batches, END)
            if batch is END and self.again and self.in_epoch:
                self.batches, self.in_epoch = iter(self.data), 0
                batch = next(self.batches, END)
        except Exception as error:  # whatever a loader raises, the steps made so far are kept
            return Ended(True, f"The iterable raised after {self.taken} batches: {error!r}")
        if batch is END:
            return Ended(False, f"The data ended after {self.taken} batches.")
        try:
            batch = self._checked(batch)
        except (KeyError, ValueError, TypeError) as error:
            return Ended(True, f"Batch {self.taken} does not fit. {error}")
        self.taken += 1
        self.in_epoch += 1
        return batch

    def shorter(self, batch: Any) -> str:
        """What to do about a batch that has other rows than the first, if it has."""
        like = [shape[:1] for shape, _ in (self.first or {}).values()]
        if [jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)] == like:
            return ""
        return (
            "\nIt has not as many rows as the first. Way out: leave a short last batch out "
            "(drop_last=True), or let the model take its batch size from the data "
            "(subsample_size=y.shape[0])"
        )

    def _checked(self, batch: Any) -> Any:
        if batch is None:
            raise TypeError(
                explain(
                    "A batch is None.",
                    expected="the rows of a batch",
                    received="None",
                    where=f"batch {self.taken}",
                )
            )
        batch = resolve(self.objective, batch)
        require_fed(self.fed, batch, f"batch {self.taken}")
        found = {
            path: (jnp.shape(leaf), jnp.result_type(leaf))
            for path, leaf in leaves_by_path(batch).items()
        }
        self.first = self.first or found
        if list(found) != list(self.first):
            raise ValueError(
                explain(
                    "A batch has another structure than the first.",
                    expected=", ".join(self.first),
                    received=", ".join(found),
                    where=f"batch {self.taken}",
                )
            )
        for path, (shape, dtype) in found.items():
            like, like_dtype = self.first[path]
            if len(shape) != len(like) or shape[1:] != like[1:] or dtype != like_dtype:
                raise ValueError(
                    explain(
                        "A batch's array differs from the first's by more than its rows.",
                        expected=f"{like_dtype} of shape {('rows', *like[1:]) if like else like}",
                        received=f"{dtype} of shape {shape}",
                        where=f"batch {self.taken}, {path or 'data'}",
                    )
                )
        return batch


def first_data(objective: Objective, data: Any) -> tuple[Stream | None, Any]:
    """The stream and its first batch; or None and the data, where they are no stream."""
    if is_stream(objective, data):
        stream = Stream(objective, data)
        return stream, require_batch(stream)
    require_fed(objective.fed, data, "fit, data")
    return None, resolve(objective, data)


def require_batch(stream: Stream) -> Any:
    """The first batch of a stream.

    Raises:
        ValueError: there is none, or it does not fit the objective.
    """
    batch = stream.take()
    if not isinstance(batch, Ended):
        return batch
    raise ValueError(
        explain(
            "The iterable gives no batch to start with.",
            expected="batches of the structure of objective.data",
            received=batch.message,
            where="fit, data",
            hint=None
            if batch.failed
            else "a generator that was used up before is empty: make a "
            "new one, or pass a list or a loader",
        )
    )


class Fed(NamedTuple):
    """What came of a stream.

    Attributes:
        lanes: all restarts.
        losses: shape `(restarts, steps)`.
        interrupted: whether someone wanted to end.
        ended: why the data gave no more, or None.
    """

    lanes: Lanes
    losses: np.ndarray
    interrupted: bool
    ended: Ended | None


def feed(
    compiled: Programs,
    every: int,
    lanes: Lanes,
    keys: jax.Array,
    num_steps: int,
    first: Any,
    stream: Stream,
    tell: Callable[[int, np.ndarray, np.ndarray], bool],
) -> Fed:
    """A step for every batch, until all steps are made, all restarts have stopped, the data end, or
    someone wants to end.

    While the device works at a step the host makes and sends the next batch; never more than that,
    so that two batches are on the device.

    Args:
        compiled: the programs of the fit.
        every: steps between two looks.
        lanes: all restarts.
        keys: their keys.
        num_steps: how many steps to make at most.
        first: the first batch.
        stream: the others.
        tell: `(steps, losses since the last look, running) -> whether to end`.
    """
    records: list[np.ndarray] = []
    made, batch, ended = 0, first, None
    with Interrupt() as interrupt:
        running = np.ones(len(keys), bool)
        while made < num_steps and ended is None and running.any() and not interrupt.wanted:
            steps: list[tuple[jax.Array, jax.Array]] = []
            for _ in range(min(every, num_steps - made)):
                try:
                    lanes, *outcome = compiled.feed(lanes, keys, batch)
                except (ValueError, TypeError) as error:  # while it is traced: the lanes are whole
                    if made + len(steps) == 0:
                        raise
                    told = f"Batch {made + len(steps)} does not fit. {error}"
                    ended = Ended(True, told + stream.shorter(batch))
                    break
                steps.append((outcome[0], outcome[1]))
                if made + len(steps) < num_steps:
                    batch = stream.take()
                if len(steps) > 1:
                    jax.block_until_ready(steps[-2])
                if isinstance(batch, Ended):
                    ended = batch
                if ended is not None or interrupt.wanted:
                    break
            if not steps:
                break
            losses = np.stack([np.asarray(loss) for loss, _ in steps], axis=1)
            skipped = np.sum([np.asarray(skip) for _, skip in steps], axis=0, dtype=np.int32)
            padding = ((0, 0), (0, every - len(steps)))
            padded = np.pad(losses, padding, constant_values=np.nan)
            lanes = compiled.look(lanes, padded, skipped, jnp.int32(len(steps)))
            made += len(steps)
            records.append(losses)
            running = np.asarray(lanes.outcome) == RUNNING
            interrupt.wanted |= tell(made, losses, running)
    record = np.concatenate(records, axis=1) if records else np.zeros((len(keys), 0))
    return Fed(lanes, record, interrupt.wanted, ended)
