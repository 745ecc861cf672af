"""Trees: paths as text, keys folded in by name, strong dtypes."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from vi_params._check import explain, require_names


def path_name(path: tuple) -> str:
    """A path of the tree as text, its steps joined by slashes: "encoder/0/weight"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree, by path, in the tree's order.

    Raises ValueError where two leaves have one path, as "a/b" and "b" under "a" have.
    """
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = path_name(path)
        if name in leaves:
            raise ValueError(
                explain(
                    "Two leaves have the same path.",
                    expected="paths that differ when their names are joined by slashes",
                    received=f"{name!r} twice",
                    where=name,
                    hint="rename one of them",
                )
            )
        leaves[name] = leaf
    return leaves


def name_words(name: str) -> tuple[int, int]:
    """Two words of 32 bits that stand for a name, the same in every process."""
    digest = hashlib.blake2s(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def fold_in_words(key: jax.Array, words: Iterable[Any]) -> jax.Array:
    """The key with each word folded in, one after the other."""
    for word in words:
        key = jax.random.fold_in(key, word)
    return key


def fold_in_name(key: jax.Array, name: str) -> jax.Array:
    """A key for `name`: the same in every process, and whatever other names there are."""
    return fold_in_words(key, name_words(name))


def pick(mapping: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The entries of a mapping under the given names."""
    return {name: mapping[name] for name in names}


def strong(x: Any) -> jax.Array:
    """`x` as an array whose dtype is not weak, so that a compiled step is traced once."""
    x = jnp.asarray(x)
    return lax.convert_element_type(x, x.dtype) if x.weak_type else x


def is_traced(*trees: Any) -> bool:
    """Whether any leaf stands for a value that is not known yet."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(trees))


def is_within_program(*trees: Any) -> bool:
    """Whether another program is being traced, these values known or not: there even a constant is
    traced."""
    return is_traced(trees, jnp.zeros(()))


def abstract_key() -> Any:
    """The shape and dtype of a key, for tracing without one."""
    return jax.eval_shape(lambda: jax.random.key(0))


def is_key(x: Any) -> bool:
    """Whether `x` is an array of typed random keys."""
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def all_finite(*trees: Any, xp: Any = jnp) -> Any:
    """Whether every entry of every inexact leaf is finite; a scalar, by jax.numpy or numpy."""
    leaves = [x for x in jax.tree.leaves(trees) if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]
    finite = [xp.all(xp.isfinite(x)) for x in leaves]
    return xp.all(xp.stack(finite)) if finite else xp.bool_(True)


def where_tree(condition: Any, new: Any, old: Any, xp: Any = jnp) -> Any:
    """`new` where the scalar condition holds, else `old`, leaf by leaf; random keys included, where
    `xp` is jax.numpy."""

    def choose(a: Any, b: Any) -> Any:
        if is_key(a):
            data = jnp.where(condition, jax.random.key_data(a), jax.random.key_data(b))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(a))
        return xp.where(condition, a, b)

    return jax.tree.map(choose, new, old)


def flatten_like(prefix: Any, tree: Any, *, what: str, where: str) -> tuple[list, list[str], Any]:
    """The subtrees of `tree` below the leaves of `prefix`, their paths, and the prefix's structure.

    Raises an error that names the missing and the unknown paths where the two do not fit.
    """
    with_paths, treedef = jax.tree_util.tree_flatten_with_path(prefix)
    paths = [path_name(path) for path, _ in with_paths]
    try:
        return treedef.flatten_up_to(tree), paths, treedef
    except (ValueError, TypeError, KeyError) as error:
        received = _paths_to_depth(prefix, tree)
        require_names(received, paths, what=what, where=where)
        raise ValueError(
            explain(
                f"The structure of the {what} does not match.",
                expected=str(treedef),
                received=str(jax.tree.structure(tree)),
                where=where,
            )
        ) from error


def _paths_to_depth(prefix: Any, tree: Any, at: str = "") -> list[str]:
    """The paths of `tree`, followed only as deep as `prefix` goes."""
    if isinstance(prefix, Mapping) and isinstance(tree, Mapping):
        found = []
        for name, below in tree.items():
            path = f"{at}/{name}" if at else str(name)
            found += _paths_to_depth(prefix[name], below, path) if name in prefix else [path]
        return found
    if jax.tree_util.all_leaves([prefix]):
        return [at]
    if isinstance(prefix, Mapping) or isinstance(tree, Mapping):
        return [f"{at} ({type(tree).__name__})"]
    return [at]


def merge(*mappings: Mapping[str, Any] | None, what: str, where: str) -> dict[str, Any]:
    """The union of mappings; a name in two of them must hold the same object."""
    union: dict[str, Any] = {}
    for mapping in mappings:
        for name, value in (mapping or {}).items():
            if name in union and union[name] is not value:
                raise ValueError(
                    explain(
                        f"A name is used twice among the {what}.",
                        expected="each name once, or the same object under it",
                        received=repr(name),
                        where=where,
                        hint="families in vi.guides take name=, others rename the declaration",
                    )
                )
            union[name] = value
    return union
