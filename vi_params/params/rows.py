"""Rows of plate-annotated parameters: gathered for a minibatch, scattered back after it.

A plate indexes a leading axis, and bijectors act on trailing axes only, so that rows of the
unconstrained array are the rows of the value. Bounds that differ between rows would break that.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vi_params._check import explain, require_names
from vi_params._tree import flatten_like, is_traced, leaves_by_path
from vi_params.batches.batch import Batch, put_axes, require_index, take_axes
from vi_params.params.declare import Declared, Param, bijector, constraint_name, normalise
from vi_params.params.maps import abstract_params


def take_rows(declared: Declared, params: Any, index: Mapping[str, jax.Array]) -> Any:
    """The rows of every plate-annotated parameter that a batch uses.

    Args:
        declared: what `init_params` took.
        params: unconstrained (or constrained) arrays in the structure of `declared`.
        index: for each plate that is subsampled, an int array of its rows, shape `(batch,)`.

    Returns:
        `params` with the axis of each plate in `index` reduced to its rows; leaves without such a
        plate as they were.

    Raises:
        KeyError: a plate that no parameter is annotated with.
        TypeError: an index that is not a vector of ints.
        ValueError: rows that do not exist (under jit, where their values are not known, the nearest
            is taken), or a constraint whose bounds differ between the rows of a plate in `index`.

    Example:
        >>> declared = {"loc": vi.Param(jnp.arange(4.0), plates=("users",))}
        >>> vi.take_rows(declared, {"loc": jnp.arange(4.0)}, {"users": jnp.array([2, 0])})
        {'loc': Array([2., 0.], dtype=float32)}
    """
    index = _checked(declared, index, "take_rows")

    def take(param: Param, path: str, leaf: jax.Array) -> jax.Array:
        _require_inside(param, f"take_rows, {path}", leaf, index)
        _require_like_rows(param, path, leaf, index)
        return take_axes(leaf, param.plates, index)

    return _map_plates(declared, take, "take_rows", params)


def rows_at(declared: Declared, params: Any, data: Any) -> Any:
    """The parameters as a function of `data` sees them: reduced to the rows of a batch once."""
    if not isinstance(data, Batch) or data.taken:
        return params
    known = {plate for param in jax.tree.leaves(normalise(declared)) for plate in param.plates}
    index = {plate: rows for plate, rows in data.index.items() if plate in known}
    return take_rows(declared, params, index) if index else params


def plates_of(declared: Declared) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """Path -> (its plates, its shape), of the leaves of parameters with plates."""
    declared = normalise(declared)
    local = [param for param in jax.tree.leaves(declared) if param.plates]
    if not local:
        return {}
    below = jax.tree.structure(declared).flatten_up_to(abstract_params(declared))
    found = {}
    named = zip(leaves_by_path(declared).items(), below, strict=True)
    for (path, param), subtree in named:
        for inside, leaf in leaves_by_path(subtree).items():
            if param.plates:
                name = f"{path}/{inside}" if inside else path
                found[name] = param.plates, leaf.shape
    return found


def put_rows(declared: Declared, params: Any, rows: Any, index: Mapping[str, jax.Array]) -> Any:
    """`params` with the rows that `take_rows` gathered replaced by `rows`.

    Args:
        declared: what `init_params` took.
        params: arrays in the structure of `declared`.
        rows: the new rows, as `take_rows` gives them; leaves without a plate in `index` replace
            the whole leaf.
        index: for each plate that is subsampled, an int array of its rows, without repeats.

    Returns:
        The updated pytree; nothing is changed in place.

    Raises:
        KeyError: a plate that no parameter is annotated with, or names that do not match.
        TypeError: an index that is not a vector of ints.
        ValueError: rows of another shape than `take_rows` gives; rows that do not exist or occur
            twice (under jit, where their values are not known, the former are dropped).

    Example:
        >>> declared = {"loc": vi.Param(jnp.zeros(3), plates=("users",))}
        >>> rows = {"loc": jnp.array([7.0])}
        >>> vi.put_rows(declared, {"loc": jnp.zeros(3)}, rows, {"users": jnp.array([1])})
        {'loc': Array([0., 7., 0.], dtype=float32)}
    """
    index = _checked(declared, index, "put_rows")

    def put(param: Param, path: str, leaf: jax.Array, new: jax.Array) -> jax.Array:
        leaf, shape = jnp.asarray(leaf), list(jnp.shape(leaf))
        _require_inside(param, f"put_rows, {path}", leaf, index, distinct=True)
        for axis, plate in enumerate(param.plates):
            if plate in index:
                shape[axis] = len(index[plate])
        if jnp.shape(new) != tuple(shape):
            raise ValueError(
                explain(
                    "Rows do not fit their index.",
                    expected=f"rows of shape {tuple(shape)}, as take_rows gives them",
                    received=f"shape {jnp.shape(new)}",
                    where=f"put_rows, {path}",
                )
            )
        return put_axes(leaf, new, param.plates, index)

    return _map_plates(declared, put, "put_rows", params, rows)


def _map_plates(declared: Declared, f: Any, where: str, first: Any, *rest: Any) -> Any:
    declared = normalise(declared)
    first, paths, treedef = flatten_like(declared, first, what="params", where=where)
    rest = tuple(flatten_like(declared, tree, what="rows", where=where)[0] for tree in rest)
    return treedef.unflatten(
        jax.tree.map(lambda *leaves, p=param, at=path: f(p, at, *leaves), *subtrees)
        for param, path, *subtrees in zip(
            jax.tree.leaves(declared), paths, first, *rest, strict=True
        )
    )


def _checked(declared: Declared, index: Mapping[str, Any], where: str) -> dict[str, jax.Array]:
    if not isinstance(index, Mapping):
        raise TypeError(
            explain(
                "The index must be a mapping.",
                expected="a mapping from the names of plates to int arrays",
                received=type(index).__name__,
                where=where,
            )
        )
    plates = dict.fromkeys(
        plate for param in jax.tree.leaves(normalise(declared)) for plate in param.plates
    )
    require_names(list(index), list(plates), what="plates in index", where=where, complete=False)
    for plate, rows in index.items():
        rows = jnp.asarray(rows)
        if rows.ndim != 1 or not jnp.issubdtype(rows.dtype, jnp.integer):
            raise TypeError(
                explain(
                    "An index must be a vector of row numbers.",
                    expected="an int array of shape (batch,)",
                    received=f"dtype {rows.dtype}, shape {rows.shape}",
                    where=f"{where}, plate {plate!r}",
                )
            )
    return {plate: jnp.asarray(rows) for plate, rows in index.items()}


def _require_inside(
    param: Param, where: str, leaf: Any, index: Mapping[str, Any], distinct: bool = False
) -> None:
    """Raises where an index, if its values are known, has rows that a leaf has not."""
    for plate, size in zip(param.plates, jnp.shape(leaf), strict=False):
        if plate in index:
            require_index({plate: index[plate]}, {plate: size}, where)
            rows = index[plate]
            if distinct and not is_traced(rows) and len(np.unique(rows)) < len(rows):
                raise ValueError(
                    explain(
                        "A row is put twice.",
                        expected="distinct rows",
                        received=f"{np.asarray(rows)[:10].tolist()}",
                        where=f"{where}, plate {plate!r}",
                    )
                )


def _require_like_rows(param: Param, path: str, leaf: Any, index: Mapping[str, Any]) -> None:
    """Raises unless the constraint maps any number of rows, one as the other.

    Bounds with an axis for the plate would meet the rows in the wrong order: here they do not
    broadcast with one row more.
    """
    axes = [axis for axis, plate in enumerate(param.plates) if plate in index]
    if not axes:
        return
    shape = tuple(size + (axis in axes) for axis, size in enumerate(jnp.shape(leaf)))
    more = jax.ShapeDtypeStruct(shape, jnp.result_type(leaf))
    transform = bijector(param.constraint, path)
    for f in (transform, transform.inv):  # the leaf is an unconstrained array, or a value
        try:
            image = jax.eval_shape(f, more).shape
        except (ValueError, TypeError, IndexError, AssertionError):
            continue
        if image[: len(param.plates)] == shape[: len(param.plates)]:
            return
    raise ValueError(
        explain(
            "The constraint differs between the rows of a plate.",
            expected=f"one set for every row of {', '.join(param.plates)}",
            received=constraint_name(param.constraint),
            where=f"take_rows, {path}",
            hint="constrain to a common set and rescale the value in the model or guide",
        )
    )
