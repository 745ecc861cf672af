"""How a step updates parameters that have rows: only the batch's, or all of them.

`rows()`: the rows of a batch are gathered from the parameters and from the optimiser's state, the
loss is differentiated with respect to these rows, the optimiser updates them, and they are
scattered back: O(batch) work a step, whatever the size of the plate. What the optimiser keeps for
the other rows stays as it is: moments do not decay, weight decay does not act, while counts that
are not kept by row (Adam's, schedules') go on with every step. For an optimiser without memory
(SGD) that is the dense update exactly; for Adam it is the "lazy" or "sparse" Adam of deep-learning
libraries. Transformations that look at all gradients together (clipping by the global norm) see
those of the batch.

`dense()`: every row is updated in every step, those outside the batch with a gradient of zero.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vi_params._check import explain
from vi_params._tree import leaves_by_path, path_name
from vi_params.averaging import average_paths
from vi_params.batches.batch import Batch, put_axes, take_axes
from vi_params.params.declare import Declared, normalise
from vi_params.params.maps import abstract_params


class Lens(NamedTuple):
    """The rows that one step works on.

    Attributes:
        take_params: `params -> rows of params`.
        take: `(params, opt_state) -> rows of both`.
        put: `(params, opt_state), rows -> (params, opt_state)`, these rows replaced.
        see: `rows of params -> params` as `objective.evaluate` takes them with `batch`.
        batch: the data and the rows of the batch.
    """

    take_params: Callable[[Any], Any]
    take: Callable[[Any], Any]
    put: Callable[[Any, Any], Any]
    see: Callable[[Any], Any]
    batch: Batch


class Updates(NamedTuple):
    """Which rows a step updates.

    Attributes:
        name: what it is called in messages.
        bind: `(declared, init, sizes, distinct) -> ((noise, data) -> Lens)`, or None where every
            step updates all: from the parameters, the optimiser's `init`, plate -> (size, batch
            size), and whether the rows that a driver draws are distinct.
    """

    name: str
    bind: Callable[..., Callable[[Any, Any], Lens] | None]


def rows() -> Updates:
    """The rows of the batch alone, in parameters and optimiser state (the default).

    Example:
        >>> vi.updates.rows().name
        'rows'
    """
    return Updates("rows", _rows)


def dense() -> Updates:
    """All rows: those outside the batch with a gradient of zero, at a cost of O(N) a step.

    Example:
        >>> vi.updates.dense().name
        'dense'
    """
    return Updates("dense", _dense)


def _dense(*_: Any) -> None:
    return None


def _rows(
    declared: Declared,
    init: Callable[[Any], Any],
    sizes: Mapping[str, tuple[int, int]],
    distinct: bool,
) -> Callable[[Any, Any], Lens] | None:
    declared = normalise(declared)
    used = {plate for param in jax.tree.leaves(declared) for plate in param.plates}
    used = sorted(used & set(sizes))
    if not used:
        return None
    params = abstract_params(declared)
    params_axes = _params_axes(declared, params, used)
    _require_no_average(init, params, params_axes)
    axes = params_axes, _state_axes(init, params, params_axes, used)

    def lens(noise: Any, data: Any) -> Lens:
        given = isinstance(data, Batch)
        batch = data if given else Batch(data, noise.index)
        at = {plate: jnp.asarray(batch.index[plate]) for plate in used if plate in batch.index}
        inside: dict[str, jax.Array] = {}
        if given or not distinct:
            # Each row once, so that its gradients add up; the rest lie beyond the end.
            for plate, index in at.items():
                at[plate], inside[plate] = jnp.unique(
                    index, size=len(index), fill_value=sizes[plate][0], return_inverse=True
                )

        def reduced(axes: Any, tree: Any) -> Any:
            return _map_axes(lambda plates, leaf: take_axes(leaf, plates, at), axes, tree)

        def see(some: Any) -> Any:
            if not inside:
                return some
            return _map_axes(
                lambda plates, leaf: take_axes(leaf, plates, inside), params_axes, some
            )

        return Lens(
            take_params=lambda params: reduced(params_axes, params),
            take=lambda whole: reduced(axes, whole),
            put=lambda whole, some: _map_axes(
                lambda plates, leaf, new: put_axes(leaf, new, plates, at), axes, whole, some
            ),
            see=see,
            batch=dataclasses.replace(batch, taken=True),
        )

    return lens


class _Axes(tuple):
    """The plates of a leaf's leading axes: a tuple that JAX takes for a leaf."""


class _Names(list):
    """The same while they are being found: a list that JAX takes for a leaf."""


def _map_axes(f: Callable[..., Any], axes: Any, tree: Any, *rest: Any) -> Any:
    """`f(plates, leaf, ...)` at every leaf that has plates; the last tree's leaf elsewhere."""

    def one(plates: _Axes, *leaves: Any) -> Any:
        return f(plates, *leaves) if plates else leaves[-1]

    return jax.tree.map(one, axes, tree, *rest)


def _params_axes(declared: Declared, params: Any, used: list[str]) -> Any:
    """The plates of every leaf's leading axes, those that are not subsampled as None."""

    def one(param: Any, subtree: Any) -> Any:
        plates = _Axes(plate if plate in used else None for plate in param.plates)
        return jax.tree.map(lambda _: plates if any(plates) else _Axes(), subtree)

    return jax.tree.map(one, declared, params)


def _state_axes(init: Callable[[Any], Any], params: Any, axes: Any, used: list[str]) -> Any:
    """The same for an optimiser's state: an axis has the plate with whose size it grows."""
    before = jax.eval_shape(init, params)
    found = jax.tree.map(lambda leaf: _Names([None] * leaf.ndim), before)
    for plate in used:

        def longer(plates: _Axes, leaf: Any, plate: str = plate) -> Any:
            shape = list(leaf.shape)
            for axis, name in enumerate(plates):
                shape[axis] += name == plate
            return jax.ShapeDtypeStruct(tuple(shape), leaf.dtype)

        after = jax.eval_shape(init, jax.tree.map(longer, axes, params))
        for (path, names), old, new in zip(
            jax.tree_util.tree_leaves_with_path(found),
            jax.tree.leaves(before),
            jax.tree.leaves(after),
            strict=True,
        ):
            grown = [n - m for m, n in zip(old.shape, new.shape, strict=False)]
            if any(g not in (0, 1) for g in grown) or old.ndim != new.ndim:
                raise _no_rows(path_name(path), old.shape, plate)
            for axis, more in enumerate(grown):
                if more:
                    names[axis] = plate

    def prefix(path: tuple, names: _Names, leaf: Any) -> _Axes:
        while names and names[-1] is None:
            names.pop()
        if names and names[0] is None and not any(_shares(names, a) for a in jax.tree.leaves(axes)):
            raise _no_rows(path_name(path), leaf.shape, next(filter(None, names)))
        return _Axes(names)

    return jax.tree_util.tree_map_with_path(prefix, found, before)


def _shares(names: list, plates: _Axes) -> bool:
    """Whether some parameter has its plates at these axes."""
    return all(name is None or name == p for name, p in zip(names, plates, strict=False)) and len(
        names
    ) <= len(plates)


def _require_no_average(init: Callable[[Any], Any], params: Any, axes: Any) -> None:
    """Raises where rows are averaged: an average moves at every step, a row only with its batch."""
    averaged = average_paths(jax.eval_shape(init, params))
    rowwise = [path for path, plates in leaves_by_path(axes).items() if plates and path in averaged]
    if rowwise:
        raise ValueError(
            explain(
                "Averages of iterates are not kept by row.",
                expected="an optimiser without iterate averaging for parameters that have rows",
                received=", ".join(rowwise),
                where="optimiser, vi.updates.rows()",
                hint="updates=vi.updates.dense(), or average the other parameters alone "
                "(optax.multi_transform with vi.labels)",
            )
        )


def _no_rows(path: str, shape: tuple[int, ...], plate: str) -> ValueError:
    return ValueError(
        explain(
            "The optimiser keeps something that has no rows.",
            expected=f"state whose leading axes are those of the parameters in plate {plate!r}",
            received=f"shape {shape}",
            where=f"optimiser state, {path}",
            hint="updates=vi.updates.dense(), or another optimiser for these parameters "
            "(optax.multi_transform with vi.labels)",
        )
    )
