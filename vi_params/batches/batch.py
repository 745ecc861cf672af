"""A batch: the data, and the rows of them that are looked at."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vi_params._check import explain, require_names
from vi_params._tree import is_traced


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """The rows of some plates: what an objective, a target or a guide takes in place of all data.

    A target's log density at a batch is an unbiased estimate of the one at all data: rows of a
    plate of size N of which B are looked at count N / B times. Rows that do not exist are an error;
    under jit, where their values are not known, the loss is NaN and the step is skipped.

    Attributes:
        data: the data, whole: their rows are taken where they are used. Of a plate whose data come
            from outside batch by batch, the rows themselves.
        index: plate -> int array of shape `(batch,)`. Plates that it lacks keep all their rows.
        taken: whether parameters with those plates come already reduced to these rows (as the
            drivers hand them on); static.

    Example:
        >>> vi.Batch(None, {"rows": jnp.array([2, 0])}).index["rows"].shape
        (2,)
    """

    data: Any
    index: Mapping[str, Any]
    taken: bool = dataclasses.field(default=False, metadata={"static": True})


def split(data: Any) -> tuple[Any, Mapping[str, jax.Array]]:
    """The data themselves, and the index: empty where they are whole."""
    return (data.data, data.index) if isinstance(data, Batch) else (data, {})


def row_scale(
    plates: Sequence[str | None], shape: Sequence[int], sizes: Mapping[str, int]
) -> float:
    """N / B over the plates of the leading axes: how often a row of such an array counts."""
    scale = 1.0
    for plate, rows in zip(plates, shape, strict=False):
        if plate is not None and plate in sizes and sizes[plate] != rows:
            scale *= sizes[plate] / rows
    return scale


def take_axes(
    x: jax.Array, plates: Sequence[str | None], index: Mapping[str, jax.Array]
) -> jax.Array:
    """The rows in `index` of an array whose leading axes those plates index."""
    for axis, plate in enumerate(plates):
        if plate is not None and plate in index:
            x = jnp.take(x, index[plate], axis=axis, mode="clip")
    return x


def put_axes(
    x: jax.Array, rows: jax.Array, plates: Sequence[str | None], index: Mapping[str, jax.Array]
) -> jax.Array:
    """`x` with the rows that `take_axes` gathered replaced; rows beyond the end are dropped."""
    at = [
        index[plate] if plate is not None and plate in index else jnp.arange(size)
        for plate, size in zip(plates, x.shape, strict=False)
    ]
    if not any(plate in index for plate in plates):
        return rows
    place = at[0] if len(at) == 1 else jnp.ix_(*at)
    return x.at[place].set(rows, mode="drop")


def require_rows(data: Any, sizes: Mapping[str, int], where: str) -> None:
    """Raises where `data` are a `Batch` of unknown plates or of rows that do not exist."""
    if isinstance(data, Batch):
        require_index(data.index, sizes, where)


def require_index(index: Mapping[str, Any], sizes: Mapping[str, int], where: str) -> None:
    """Raises unless `index` holds row numbers of known plates (their range where values are known).

    Args:
        index: plate -> rows.
        sizes: plate -> size.
        where: for the message.
    """
    if not isinstance(index, Mapping):
        raise TypeError(
            explain(
                "The index must be a mapping.",
                expected="a mapping from the names of plates to int arrays",
                received=type(index).__name__,
                where=where,
            )
        )
    require_names(list(index), list(sizes), what="plates in index", where=where, complete=False)
    for plate, rows in index.items():
        if not hasattr(rows, "dtype"):
            raise TypeError(
                explain(
                    "An index must be an array.",
                    expected="an int array of shape (batch,)",
                    received=type(rows).__name__,
                    where=f"{where}, plate {plate!r}",
                    hint="jnp.array([...])",
                )
            )
        if jnp.ndim(rows) != 1 or not jnp.issubdtype(jnp.result_type(rows), jnp.integer):
            raise TypeError(
                explain(
                    "An index must be a vector of row numbers.",
                    expected="an int array of shape (batch,)",
                    received=f"dtype {jnp.result_type(rows)}, shape {jnp.shape(rows)}",
                    where=f"{where}, plate {plate!r}",
                )
            )
        if is_traced(rows):
            continue
        known = np.asarray(rows)
        outside = known[(known < 0) | (known >= sizes[plate])]
        if outside.size or not known.size:
            raise ValueError(
                explain(
                    "An index is out of range.",
                    expected=f"rows from 0 to {sizes[plate] - 1}, at least one",
                    received=f"{outside[:5].tolist()}" if outside.size else "none",
                    where=f"{where}, plate {plate!r}",
                )
            )
