"""Parameters in a file: one safetensors file that keeps the declaration beside the arrays."""

import json
import os
from typing import Any

import jax
import jax.numpy as jnp
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from vi_params._check import explain, require_names
from vi_params._tree import leaves_by_path
from vi_params.params.declare import Declared
from vi_params.params.describe import describe
from vi_params.params.maps import abstract_params

FORMAT = "vi_params 1"


def save_params(path: str | os.PathLike, declared: Declared, params: Any) -> None:
    """Writes unconstrained parameters and their declaration to one safetensors file.

    The file is written beside `path` and moved there when complete.

    Args:
        path: the file to write.
        declared: what `init_params` takes.
        params: unconstrained arrays in the structure of `declared`.

    Raises:
        KeyError: the names of `params` do not match the declaration.

    Example:
        >>> import tempfile, os
        >>> declared = {"loc": vi.Param(jnp.zeros(2))}
        >>> file = os.path.join(tempfile.mkdtemp(), "params.safetensors")
        >>> vi.save_params(file, declared, {"loc": jnp.ones(2)})
        >>> vi.load_params(file, declared)
        {'loc': Array([1., 1.], dtype=float32)}
    """
    params = jax.tree.map(jnp.asarray, params)
    table = describe(declared, params)
    entries = {path: [dtype, constraint] for path, _, dtype, constraint, _, _ in table.rows}
    metadata = {"format": FORMAT, "declared": json.dumps(entries)}
    path = os.fspath(path)
    partial = f"{path}.{os.getpid()}.partial"
    try:
        save_file(leaves_by_path(params), partial, metadata=metadata)
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def load_params(path: str | os.PathLike, declared: Declared) -> Any:
    """Reads the parameters that `save_params` wrote, checked against the declaration.

    Args:
        path: the file to read.
        declared: the declaration they were saved under.

    Returns:
        The unconstrained parameters.

    Raises:
        FileNotFoundError: there is no such file.
        KeyError: a name is missing from the file or unknown to the declaration.
        ValueError: a shape, dtype or constraint differs, or the file is not of this format.

    Example:
        See `save_params`.
    """
    path = os.fspath(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"no parameter file at {path!r}")
    expected = describe(declared)
    try:
        with safe_open(path, framework="flax") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path!r} is not a readable safetensors file: {error}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(
            explain(
                "The file was not written by save_params.",
                expected=f"format {FORMAT!r}",
                received=f"format {metadata.get('format')!r}",
                where=path,
            )
        )
    require_names(list(arrays), list(expected["path"]), what="parameters in the file", where=path)
    # the dtype comes from the record: without x64, reading narrows float64 to float32
    saved = json.loads(metadata["declared"])
    for name, shape, dtype, constraint, _, _ in expected.rows:
        received = (str(tuple(arrays[name].shape)), *saved[name])
        if received != (shape, dtype, constraint):
            raise ValueError(
                explain(
                    "A saved parameter does not fit its declaration.",
                    expected=f"shape {shape}, dtype {dtype}, constraint {constraint}",
                    received="shape {}, dtype {}, constraint {}".format(*received),
                    where=f"{name!r} in {path}",
                )
            )
    structure = jax.tree.structure(abstract_params(declared))
    return structure.unflatten([arrays[name] for name in expected["path"]])
