"""The rows of a program's plates, chosen from outside: all of them, or those of a batch."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from numpyro.contrib.control_flow.scan import scan_wrapper
from numpyro.primitives import Messenger

from vi_params._check import explain
from vi_params.batches.batch import Batch, require_index
from vi_params.target.minibatch import require_batch_size


class WithRows(Messenger):
    """A program whose subsampled plates have the rows of an index, and all rows without one.

    NumPyro scales the terms inside a plate by size / number of rows. It draws the rows by a pass
    over the whole plate; here they come from outside.
    """

    def __init__(
        self,
        program: Callable,
        index: Mapping[str, Any],
        sizes: Mapping[str, int],
        taken: Mapping[str, Any],
        streamed: Mapping[str, int],
        seen: dict[str, tuple[int, int]],
    ) -> None:
        """Takes what `with_rows` says."""
        super().__init__(program)
        self.index = index
        self.sizes = sizes
        self.taken = taken
        self.streamed = streamed
        self.seen = seen

    def process_message(self, msg: Any) -> None:
        """Sets the rows of a plate; lets a parameter that is reduced already through."""
        if msg["type"] == "param" and msg["name"] in self.taken:
            msg["kwargs"] = {**msg["kwargs"], "event_dim": None}
        if msg["type"] == "control_flow" and msg["fn"] is scan_wrapper:
            body, *rest = msg["args"]
            msg["args"] = (_Body(body), *rest)
        if msg["type"] != "plate":
            return
        name, (size, subsample_size) = msg["name"], msg["args"]
        drawn = subsample_size is not None and subsample_size != size
        if drawn and msg["value"] is not None:
            _require_free(name, size, msg["value"], self.index)
            return
        subsampled = drawn or name in self.index
        if subsample_size is not None and drawn:
            require_batch_size(subsample_size, size, name)
            self.seen[name] = size, subsample_size
            msg["subsample_size"] = subsample_size
        if subsampled and self.sizes.get(name, size) != size:
            raise ValueError(
                explain(
                    "A plate's size has changed.",
                    expected=f"{self.sizes[name]} rows",
                    received=f"{size} rows",
                    where=f"plate {name!r}",
                    hint="build a new target and guide for data of another size",
                )
            )
        if name in self.index:
            rows = jnp.asarray(self.index[name])
            if name in self.streamed:
                _require_as_many(name, subsample_size or size, len(rows))
            msg["value"], msg["args"] = rows, (size, len(rows))
        elif name in self.streamed:
            msg["value"] = jnp.arange(subsample_size or size)
        elif subsampled:
            msg["value"], msg["args"] = jnp.arange(size), (size, size)


class _Body(Messenger):
    """The body of a scan, which no handler outside of it can see into."""

    def process_message(self, msg: Any) -> None:
        """Refuses a plate whose rows would have to be drawn anew in every step."""
        if msg["type"] == "plate" and msg["value"] is None:
            name, (size, subsample_size) = msg["name"], msg["args"]
            raise ValueError(
                explain(
                    "A subsampled plate is made inside a scan.",
                    expected="a plate made before the scan and entered inside it",
                    received=f"numpyro.plate({name!r}, {size}, {subsample_size}) in its body",
                    where=f"plate {name!r}",
                    hint=f"{name} = numpyro.plate(...) before the scan, `with {name}:` in its body",
                )
            )


def with_rows(
    program: Callable,
    data: Any,
    sizes: Mapping[str, int],
    declared: Mapping[str, Any],
    streamed: Mapping[str, int],
    seen: dict[str, tuple[int, int]] | None = None,
) -> Callable:
    """The program at the rows of `data`: those of a `Batch`, or all.

    Args:
        program: a NumPyro program.
        data: a `Batch` or the whole data.
        sizes: plate -> the size it must have where its rows are chosen.
        declared: name -> `Param`, of the program's own param sites.
        streamed: plate -> batch size, of the plates whose data come batch by batch.
        seen: where the (size, batch size) of every subsampled plate that is met is noted.
    """
    seen = {} if seen is None else seen
    if not isinstance(data, Batch):
        return WithRows(program, {}, sizes, {}, streamed, seen)
    local = {
        name: param
        for name, param in declared.items()
        if data.taken and any(plate in data.index for plate in param.plates)
    }
    return WithRows(program, data.index, sizes, local, streamed, seen)


def _require_as_many(name: str, in_data: int, in_index: int) -> None:
    """Raises unless a batch from outside has as many rows as numbers of rows."""
    if in_data != in_index:
        raise ValueError(
            explain(
                "The data of a batch and their row numbers do not match.",
                expected=f"{in_data} row numbers, one for each row of the data",
                received=str(in_index),
                where=f"plate {name!r}",
            )
        )


def _require_free(name: str, size: int, rows: Any, index: Mapping[str, Any]) -> None:
    """Raises where the rows that a handler of the program fixes are not all there is to them."""
    if name in index:
        raise ValueError(
            explain(
                "The rows of a plate are given in two ways.",
                expected="either a handler of the program that fixes them, or a batch",
                received="both",
                where=f"plate {name!r}",
                hint="build the target from the program without that handler",
            )
        )
    require_index({name: rows}, {name: size}, "the program's own indices")
