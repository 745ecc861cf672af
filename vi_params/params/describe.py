"""A table of what is declared."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from vi_params._table import Table
from vi_params._tree import flatten_like, leaves_by_path
from vi_params.params.declare import Declared, Latent, constraint_name, normalise
from vi_params.params.maps import abstract_params


def describe(declared: Declared, params: Any = None) -> Table:
    """A table of the declared parameters: path, shape, dtype, constraint, plates, size.

    Args:
        declared: what `init_params` takes, or a target's latents.
        params: their unconstrained arrays; shapes are those of the values at the declared start
            where None.

    Returns:
        A `Table` with one row a leaf; shapes and sizes are those of the unconstrained arrays.

    Raises:
        KeyError: the names of `params` do not match.

    Example:
        >>> print(vi.describe({"loc": vi.Param(jnp.zeros(3)), "scale": vi.Param(1.0)}))
        path   shape  dtype    constraint  plates  size
        loc    (3,)   float32  Real()                 3
        scale  ()     float32  Real()                 1
    """
    declared = normalise(declared)
    if params is None:
        params = _abstract(declared)
    subtrees, paths, _ = flatten_like(declared, params, what="params", where="describe")
    rows = []
    for param, path, subtree in zip(jax.tree.leaves(declared), paths, subtrees, strict=True):
        for below, leaf in leaves_by_path(subtree).items():
            rows.append(
                (
                    f"{path}/{below}" if below else path,
                    str(jnp.shape(leaf)),
                    str(jnp.result_type(leaf)),
                    constraint_name(param.constraint),
                    ", ".join(getattr(param, "plates", ())),
                    math.prod(jnp.shape(leaf)),
                )
            )
    return Table(("path", "shape", "dtype", "constraint", "plates", "size"), tuple(rows))


def _abstract(declared: Any) -> Any:
    """The shapes and dtypes of the unconstrained arrays."""
    if any(isinstance(leaf, Latent) for leaf in jax.tree.leaves(declared)):
        return jax.tree.map(
            lambda latent: jax.ShapeDtypeStruct(latent.unconstrained_shape, latent.dtype), declared
        )
    return abstract_params(declared)
