"""Parameters in files: written, read, and checked against the declaration."""

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.distributions import constraints
from safetensors.flax import save_file

import vi_params as vi

enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64

DECLARED = {
    "net": vi.Param([{"w": jnp.zeros((3, 2)), "b": jnp.zeros(2, jnp.bfloat16)}]),
    "p": vi.Param(jnp.full(3, 1 / 3), constraint=constraints.simplex),
    "scale": vi.Param(1.0, constraint=constraints.positive),
}
PARAMS = {
    "net": [{"w": jnp.arange(6.0).reshape(2, 3).T, "b": jnp.array([0.5, -2.0], jnp.bfloat16)}],
    "p": jnp.array([0.1, -0.3]),
    "scale": jnp.float32(-1.5),
}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "params.safetensors"
    vi.save_params(path, DECLARED, PARAMS)
    return path


def test_what_is_saved_is_loaded(path):
    """Structure, dtypes (bfloat16 too), shapes and every bit survive; no other file is left."""
    loaded = vi.load_params(path, DECLARED)
    assert jax.tree.structure(loaded) == jax.tree.structure(PARAMS)
    for one, other in zip(jax.tree.leaves(loaded), jax.tree.leaves(PARAMS), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_saved_file_is_replaced_whole(path):
    """Saving again under the same name replaces the file."""
    vi.save_params(path, DECLARED, {**PARAMS, "scale": jnp.float32(2.0)})
    assert vi.load_params(path, DECLARED)["scale"] == 2.0


def test_numpy_arrays_are_saved_in_the_dtype_of_jax(tmp_path):
    """A float64 array of numpy is float32 to JAX without x64, in the file as well."""
    declared = {"x": vi.Param(jnp.zeros(2))}
    vi.save_params(tmp_path / "x", declared, {"x": np.array([1.0, 2.0])})
    np.testing.assert_array_equal(vi.load_params(tmp_path / "x", declared)["x"], [1.0, 2.0])


def test_double_precision_is_not_narrowed_silently(tmp_path):
    """A file of float64 is refused without x64, and read as it is with it."""
    path = tmp_path / "x"
    with enable_x64(True):
        declared = {"x": vi.Param(jnp.zeros(1))}
        vi.save_params(path, declared, {"x": jnp.array([1 + 1e-12])})
        assert vi.load_params(path, declared)["x"][0] == 1 + 1e-12
    with pytest.raises(ValueError, match=r"dtype float32(.|\n)*dtype float64"):
        vi.load_params(path, {"x": vi.Param(jnp.zeros(1, jnp.float32))})


WRONG = {
    "shape": (
        {"p": vi.Param(jnp.full(4, 1 / 4), constraint=constraints.simplex)},
        ValueError,
        ("Expected: shape (3,)", "Received: shape (2,)", "'p' in "),
    ),
    "shape_of_a_weight": (
        {"net": vi.Param([{"w": jnp.zeros((2, 3)), "b": jnp.zeros(2, jnp.bfloat16)}])},
        ValueError,
        ("Expected: shape (2, 3)", "Received: shape (3, 2)", "'net/0/w' in "),
    ),
    "dtype": (
        {"net": vi.Param([{"w": jnp.zeros((3, 2)), "b": jnp.zeros(2)}])},
        ValueError,
        ("dtype float32", "dtype bfloat16", "'net/0/b' in "),
    ),
    "constraint": (
        {"scale": vi.Param(1.0, constraint=constraints.softplus_positive)},
        ValueError,
        ("constraint SoftplusPositive", "constraint Positive", "'scale' in "),
    ),
    "missing": (
        {"extra": vi.Param(1.0)},
        KeyError,
        ("Expected: ", "Received: ", "missing: 'extra'", "params.safetensors"),
    ),
    "misspelt": (
        {"scale": None, "scales": vi.Param(1.0, constraint=constraints.positive)},
        KeyError,
        ("unknown: 'scale'", "missing: 'scales'", "did you mean 'scales'?"),
    ),
    "unknown_weight": (
        {"net": vi.Param([{"w": jnp.zeros((3, 2))}])},
        KeyError,
        ("unknown: 'net/0/b'",),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_file_that_does_not_fit_is_refused(path, name):
    """Shapes, dtypes, constraints and names are compared; the message names the parameter.

    numpyro holds positive and softplus_positive for equal: read as the other, a scale would change.
    """
    change, error_type, fragments = WRONG[name]
    declared = {k: v for k, v in {**DECLARED, **change}.items() if v is not None}
    with pytest.raises(error_type) as error:
        vi.load_params(path, declared)
    for fragment in fragments:
        assert fragment in str(error.value)


def test_other_files_are_refused(tmp_path):
    """No file, a file that is no safetensors, and a safetensors file of somebody else."""
    path = tmp_path / "params.safetensors"
    with pytest.raises(FileNotFoundError, match="no parameter file"):
        vi.load_params(path, DECLARED)
    path.write_bytes(b"not a safetensors file")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        vi.load_params(path, DECLARED)
    save_file({"p": jnp.zeros(2)}, path)
    with pytest.raises(ValueError, match="not written by save_params"):
        vi.load_params(path, DECLARED)


def test_names_that_do_not_match_are_not_saved(tmp_path):
    """Parameters of another declaration raise, and leave no file behind."""
    with pytest.raises(KeyError, match="missing: 'p'"):
        vi.save_params(tmp_path / "x", DECLARED, {"net": PARAMS["net"], "scale": PARAMS["scale"]})
    assert list(tmp_path.iterdir()) == []
