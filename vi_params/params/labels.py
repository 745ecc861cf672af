"""Labels by path: per-parameter optimisers and freezing, through optax's own combinators."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import optax

from vi_params._check import Failure, explain, listed
from vi_params._tree import leaves_by_path, path_name
from vi_params.params.declare import Declared
from vi_params.params.maps import abstract_params


def labels(declared: Declared, by_path: Mapping[str, Any], *, default: Any = None) -> Any:
    """The pytree of labels that `optax.multi_transform`, `partition` and `masked` take.

    Args:
        declared: what `init_params` takes.
        by_path: regular expression -> label. A parameter has the label of the first expression
            that is found (`re.search`) in its path, such as "guide/loc" or "encoder/0/weight".
        default: the label of parameters that no expression matches; without it there must be none.

    Returns:
        A pytree of labels in the structure of the parameters.

    Raises:
        KeyError: an expression that matches no parameter, or a parameter that none matches.
        ValueError: a pattern is no regular expression.

    Example:
        >>> declared = {"loc": vi.Param(0.0), "net": vi.Param({"w": jnp.zeros(2), "b": 0.0})}
        >>> vi.labels(declared, {"net/b": "slow", ".*": "fast"})
        {'loc': 'fast', 'net': {'b': 'slow', 'w': 'fast'}}
    """
    params = abstract_params(declared)
    paths = list(leaves_by_path(params))
    for pattern in by_path:
        if not any(_compiled(pattern).search(path) for path in paths):
            raise Failure(
                explain(
                    "A pattern matches no parameter.",
                    expected=f"a regular expression found in one of {listed(paths)}",
                    received=repr(pattern),
                    where="labels",
                )
            )

    def label(path: tuple, _: Any) -> Any:
        name = path_name(path)
        for pattern, value in by_path.items():
            if re.search(pattern, name):
                return value
        if default is None:
            raise Failure(
                explain(
                    "A parameter has no label.",
                    expected=f"a match among the patterns {listed(by_path)}",
                    received=repr(name),
                    where="labels",
                    hint="end the mapping with '.*', or pass default=",
                )
            )
        return default

    return jax.tree_util.tree_map_with_path(label, params)


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(
            explain(
                f"A pattern is no regular expression: {error}.",
                expected="a regular expression, as Python's re takes it",
                received=repr(pattern),
                where="labels",
                hint="re.escape(name) matches a name as it is written",
            )
        ) from error


def freeze(
    optimizer: optax.GradientTransformation, declared: Declared, pattern: str
) -> optax.GradientTransformationExtraArgs:
    """The optimiser with every parameter whose path matches kept where it starts.

    Args:
        optimizer: any optax transformation; it sees only the parameters that are trained.
        declared: what `init_params` takes.
        pattern: a regular expression, found (`re.search`) in the paths of the frozen parameters.

    Returns:
        An optax transformation over all parameters.

    Raises:
        KeyError: the pattern matches no parameter.

    Example:
        >>> declared = {"loc": vi.Param(0.0), "scale": vi.Param(1.0)}
        >>> optimizer = vi.freeze(optax.adam(1e-2), declared, "scale")
    """
    which = labels(declared, {pattern: "frozen"}, default="trained")
    return optax.multi_transform({"frozen": optax.set_to_zero(), "trained": optimizer}, which)
