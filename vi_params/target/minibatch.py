"""Arrays whose leading axis is a plate, marked to be looked at a batch of rows at a time."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vi_params._check import explain, require_count
from vi_params._tree import leaves_by_path, path_name, strong
from vi_params.batches.batch import split


@dataclasses.dataclass(frozen=True, eq=False)
class Minibatch:
    """Marked data: what `vi.minibatch` gives.

    Attributes:
        data: a pytree of arrays with one leading axis.
        batch_size: how many rows a step sees.
        plate: what the axis is called.
        size: its length.
        streamed: whether the data are a first batch, and the others come from outside.
    """

    data: Any
    batch_size: int
    plate: str
    size: int
    streamed: bool = False


class Rows(NamedTuple):
    """Which arrays of some data have which plate.

    Attributes:
        plates: a pytree of plate names in the structure of the data, "" where there is none.
        sizes: plate -> size.
        subsample: plate -> batch size, of those whose rows are drawn.
        streamed: plate -> batch size, of those whose rows come from outside.
    """

    plates: Any
    sizes: dict[str, int]
    subsample: dict[str, int]
    streamed: dict[str, int]


def minibatch(
    data: Any, batch_size: int, *, plate: str = "rows", size: int | None = None
) -> Minibatch:
    """Data for `vi.target(..., data=...)` of which every step sees `batch_size` rows.

    The arrays stay whole on the device; a step gathers the rows of its batch inside the compiled
    loop. Parts of the data that are not marked are seen whole, and several plates are several
    marks: `data={"x": vi.minibatch(x, 100), "sd": sd}`.

    Args:
        data: a pytree of arrays that share their leading axis.
        batch_size: how many rows a step sees, at most their number.
        plate: what the axis is called: the name that `Latent(..., plates=)`, `Param(..., plates=)`
            and `vi.Batch` use for it.
        size: None where `data` are whole. Their number of rows where they do not fit: `data` are
            then the first batch, and the others come from outside, `vi.fit(..., data=iterable)`;
            where latents or parameters have rows, as `vi.Batch(rows, {plate: their numbers})`.

    Returns:
        A `Minibatch`.

    Raises:
        ValueError: leading axes differ, batch_size is larger than they are, or with `size` not
            their length.
        TypeError: batch_size or size is no int, or plate no name.

    Example:
        >>> def prior(values, latents, data):
        ...     return -0.5 * latents["mean"] ** 2
        >>> def likelihood(values, latents, data):
        ...     return -0.5 * (data - latents["mean"]) ** 2  # one term a row
        >>> data = vi.minibatch(jnp.arange(6.0), 2)
        >>> target = vi.target(prior, {"mean": vi.Latent(())}, per_row=likelihood, data=data)
        >>> batch = vi.Batch(target.data, {"rows": jnp.array([0, 4])})
        >>> target.log_density({}, {"mean": jnp.zeros(())}, batch)  # 6 / 2 times (0 + 8)
        Array(-24., dtype=float32)
    """
    require_count(batch_size, "batch_size", "vi.minibatch")
    if not isinstance(plate, str) or not plate:
        raise TypeError(
            explain(
                "A plate needs a name.",
                expected='a str such as "rows"',
                received=repr(plate),
                where="vi.minibatch, plate",
            )
        )
    sizes = {
        path: jnp.shape(leaf)[0] if jnp.ndim(leaf) else None
        for path, leaf in leaves_by_path(data).items()
    }
    known = set(sizes.values())
    if len(known) != 1 or None in known:
        raise ValueError(
            explain(
                "The arrays of a minibatch do not share their leading axis.",
                expected="arrays with one leading axis of the same length",
                received=", ".join(f"{path or 'data'}: {n}" for path, n in sizes.items())
                or "no array",
                where=f"vi.minibatch, plate {plate!r}",
                hint="leave what has no rows outside of vi.minibatch",
            )
        )
    (length,) = known
    assert length is not None
    if size is not None:
        require_count(size, "size", "vi.minibatch")
        require_batch_size(batch_size, size, plate)
        if length != batch_size:
            raise ValueError(
                explain(
                    "With size=, the data are one batch.",
                    expected=f"batch_size={batch_size} rows, the first of {size}",
                    received=f"{length} rows",
                    where=f"vi.minibatch, plate {plate!r}",
                    hint="leave size= out where the data are whole",
                )
            )
    require_batch_size(batch_size, length, plate)
    return Minibatch(
        jax.tree.map(strong, data), int(batch_size), plate, size or length, size is not None
    )


def require_batch_size(batch_size: Any, size: int, plate: str) -> None:
    """Raises unless a batch of distinct rows fits into its plate."""
    if not isinstance(batch_size, (int, np.integer)) or not 0 < batch_size <= size:
        raise ValueError(
            explain(
                "A batch does not fit into its plate.",
                expected=f"a batch size from 1 to {size}, the number of rows",
                received=repr(batch_size),
                where=f"plate {plate!r}",
            )
        )


def unmark(data: Any) -> tuple[Any, Rows]:
    """The data without marks, and which of their arrays have which plate."""
    sizes: dict[str, int] = {}
    subsample: dict[str, int] = {}
    streamed: set[str] = set()

    def is_marked(x: Any) -> bool:
        return isinstance(x, Minibatch)

    def plain(path: tuple, leaf: Any) -> tuple[Any, Any]:
        if not is_marked(leaf):
            return strong(leaf), ""
        before = sizes.setdefault(leaf.plate, leaf.size), subsample.get(leaf.plate, leaf.batch_size)
        if before != (leaf.size, leaf.batch_size):
            raise ValueError(
                explain(
                    "A plate is marked in two ways.",
                    expected=f"{before[0]} rows, batches of {before[1]}",
                    received=f"{leaf.size} rows, batches of {leaf.batch_size}",
                    where=f"plate {leaf.plate!r}, data {path_name(path)}",
                )
            )
        subsample[leaf.plate] = leaf.batch_size
        if leaf.streamed:
            streamed.add(leaf.plate)
        return leaf.data, jax.tree.map(lambda _: leaf.plate, leaf.data)

    both = jax.tree_util.tree_map_with_path(plain, data, is_leaf=is_marked)
    outer = jax.tree.structure(data, is_leaf=is_marked)
    pairs = outer.flatten_up_to(both)
    unmarked = outer.unflatten([pair[0] for pair in pairs])
    plates = outer.unflatten([pair[1] for pair in pairs])
    fed = {plate: subsample.pop(plate) for plate in sorted(streamed)}
    # A batch of all rows is no batch: the plate is looked at whole.
    subsample = {plate: n for plate, n in subsample.items() if n != sizes[plate]}
    return unmarked, Rows(plates, sizes, subsample, fed)


def unmarked(data: Any, plates: Mapping[str, int], sizes: Mapping[str, tuple[int, int]]) -> Any:
    """New data without marks, which must be those of the data that a target was built with.

    Args:
        data: the new data; handed back as they are where nothing is marked.
        plates: plate -> size, of the target.
        sizes: plate -> (size, batch size), of its plates whose rows are drawn.
    """
    if not any(isinstance(leaf, Minibatch) for leaf in jax.tree.leaves(data)):
        return data
    data, rows = unmark(data)
    for plate, size in rows.sizes.items():
        marked = size, rows.subsample.get(plate, size)
        known = sizes.get(plate, (plates.get(plate), plates.get(plate)))
        if marked != known:
            raise ValueError(
                explain(
                    "The data are marked for other batches than the target was built for.",
                    expected=f"{known[0]} rows in batches of {known[1]}"
                    if plate in plates
                    else f"plates {list(plates)}",
                    received=f"{marked[0]} rows in batches of {marked[1]}",
                    where=f"data, plate {plate!r}",
                    hint="build a new target for data of another size or other batches",
                )
            )
    return data


def gather(rows: Rows, data: Any) -> tuple[Any, dict[str, float]]:
    """What a log density sees of some data: a batch's rows, and plate -> N / B.

    Raises:
        ValueError: an array's leading axis is not its plate's size, or not that of the batch.
    """
    whole, index = split(data)
    lengths = {plate: len(at) for plate, at in index.items()}

    def take(path: tuple, plate: str, leaf: Any) -> Any:
        if not plate:
            return leaf
        found = jnp.shape(leaf)[0] if jnp.ndim(leaf) else None
        if plate in rows.streamed:
            if found is None or found != lengths.setdefault(plate, found):
                raise _unequal(plate, path, lengths.get(plate), leaf)
            return leaf
        if found != rows.sizes[plate]:
            raise ValueError(
                explain(
                    "A plate's size has changed.",
                    expected=f"a leading axis of {rows.sizes[plate]}",
                    received=f"shape {jnp.shape(leaf)}",
                    where=f"plate {plate!r}, data {path_name(path)}",
                    hint="build a new target for data of another size; where batches come from "
                    "outside, with data=vi.minibatch(first_batch, batch_size, size=N)",
                )
            )
        return jnp.take(leaf, index[plate], axis=0) if plate in index else leaf

    seen = jax.tree_util.tree_map_with_path(take, rows.plates, whole)
    scale = {plate: size / lengths.get(plate, size) for plate, size in rows.sizes.items()}
    return seen, scale


def _unequal(plate: str, path: tuple, length: int | None, leaf: Any) -> ValueError:
    return ValueError(
        explain(
            "The arrays of a batch do not share their leading axis.",
            expected=f"a leading axis of {length or 'the rows of the batch'}",
            received=f"shape {jnp.shape(leaf)}",
            where=f"plate {plate!r}, data {path_name(path)}",
        )
    )


def require_plates(plates: Mapping[str, Any], sizes: Mapping[str, int], where: str) -> None:
    """Raises unless declared leading axes have their plates' sizes.

    Args:
        plates: path -> (names of the leading axes, shape).
        sizes: plate -> size.
        where: for the message.
    """
    for path, (names, shape) in plates.items():
        for axis, plate in enumerate(names):
            if plate in sizes and shape[axis] != sizes[plate]:
                raise ValueError(
                    explain(
                        "A leading axis is not its plate's size.",
                        expected=f"{sizes[plate]} along axis {axis}, plate {plate!r}",
                        received=f"shape {tuple(shape)}",
                        where=f"{where}, {path}",
                    )
                )
