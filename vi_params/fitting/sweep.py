"""Restarts over values of an optimiser's numeric options, side by side with those over starts."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vi_params._check import explain
from vi_params.params.declare import Declared
from vi_params.params.maps import abstract_params


def combinations(sweep: Mapping[str, Sequence[float]] | None) -> dict[str, np.ndarray]:
    """Name -> its value in each of the combinations of all values, the last name varying fastest.

    Raises:
        TypeError: `sweep` is no mapping from names to sequences of numbers.
        ValueError: a name without values, or with one that is not finite.
    """
    if not sweep:
        return {}
    values = {}
    for name, given in sweep.items() if isinstance(sweep, Mapping) else [("sweep", sweep)]:
        try:
            array = np.asarray(given, float)
            if array.ndim != 1 or not isinstance(sweep, Mapping):
                raise TypeError
        except (TypeError, ValueError):
            raise TypeError(
                explain(
                    "A sweep gives the values of each option.",
                    expected='a mapping such as {"learning_rate": [1e-3, 1e-2]}',
                    received=f"{name!r}: {given!r}" if isinstance(sweep, Mapping) else repr(sweep),
                    where="fit, sweep",
                )
            ) from None
        if not len(array) or not np.all(np.isfinite(array)):
            raise ValueError(
                explain(
                    "An option needs values to be swept over.",
                    expected="at least one number, all finite",
                    received=repr(given),
                    where=f"fit, sweep, {name!r}",
                )
            )
        values[name] = array
    rows = np.array(list(itertools.product(*values.values())))
    return {name: rows[:, i] for i, name in enumerate(values)}


def require_injected(
    optimizer: optax.GradientTransformation, declared: Declared, names: Sequence[str]
) -> None:
    """Raises unless the optimiser's state holds these options."""
    state = jax.eval_shape(optimizer.init, abstract_params(declared))
    paths = jax.tree_util.tree_flatten_with_path(state)[0]
    held = {
        str(getattr(path[i + 1], "key", ""))
        for path, _ in paths
        for i, step in enumerate(path[:-1])
        if getattr(step, "name", None) == "hyperparams"
    }
    unknown = [name for name in names if name not in held]
    if unknown:
        raise ValueError(
            explain(
                "The optimiser's state does not hold an option to be swept over.",
                expected=f"names among {sorted(held)}" if held else "options held in the state",
                received=", ".join(map(repr, unknown)),
                where="fit, sweep",
                hint="make it with optax.inject_hyperparams(optax.adam)(learning_rate=0.01)",
            )
        )


def with_options(opt_state: Any, options: Mapping[str, jax.Array]) -> Any:
    """The optimiser's state with these values of its options."""
    for name, value in options.items():

        def is_option(path: Any, leaf: Any, name: str = name) -> bool:
            held = [getattr(step, "key", getattr(step, "name", None)) for step in path]
            return held[-2:] == ["hyperparams", name]

        opt_state = jax.tree_util.tree_map_with_path(
            lambda path, leaf, value=value, is_option=is_option: (
                jnp.asarray(value, leaf.dtype) if is_option(path, leaf) else leaf
            ),
            opt_state,
        )
    return opt_state
