"""Starts of parameters: keys by path, dtypes, networks of weights; and their table."""

import functools
import json
import os
import subprocess
import sys

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.distributions import constraints

import vi_params as vi

enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64

KEY = jax.random.key(0)
REAL_AND_POSITIVE = [constraints.real, constraints.positive]
CATENATED = (  # not in the oldest numpyro
    [(constraints.cat(REAL_AND_POSITIVE), constraints.cat(REAL_AND_POSITIVE[::-1]))]
    if hasattr(constraints, "cat")
    else []
)


def normal(key):
    return jax.random.normal(key, (2,))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["weight", "bias"], meta_fields=[])
class Layer:
    """A network that is a pytree and a function at once, as those of Equinox are."""

    def __init__(self, weight, bias):
        self.weight, self.bias = weight, bias

    def __call__(self, x):
        return self.weight @ x + self.bias


def test_each_parameter_has_a_key_of_its_own():
    """Two lazy starts differ, and adding a parameter does not change where the others start."""
    few = {"a": vi.Param(normal), "c": {"d": vi.Param(normal)}}
    many = {"A": vi.Param(normal), "b": vi.Param(normal), **few, "c": {**few["c"], "a": 1.0}}
    one, two = vi.init_params(few, KEY), vi.init_params(many, KEY)
    np.testing.assert_array_equal(one["a"], two["a"])
    np.testing.assert_array_equal(one["c"]["d"], two["c"]["d"])
    starts = [two["A"], two["b"], two["a"], two["c"]["d"]]
    assert len({float(x[0]) for x in starts}) == 4
    assert not np.allclose(one["a"], vi.init_params(few, jax.random.key(1))["a"])


def test_starts_are_the_same_in_every_process():
    """The key of a path does not depend on the interpreter's seed of its string hashes."""
    program = (
        "import jax, json, vi_params as vi\n"
        "p = vi.Param(lambda key: jax.random.normal(key, (2,)))\n"
        "params = vi.init_params({'loc': p, 'net': {'w': p}}, jax.random.key(0))\n"
        "print(json.dumps([params['loc'].tolist(), params['net']['w'].tolist()]))\n"
    )
    here = vi.init_params({"loc": vi.Param(normal), "net": {"w": vi.Param(normal)}}, KEY)
    environment = {**os.environ, "PYTHONHASHSEED": "4321", "JAX_PLATFORMS": "cpu"}
    out = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    there = json.loads(out.stdout)
    np.testing.assert_allclose([here["loc"], here["net"]["w"]], there, rtol=1e-6)


def test_paths_that_read_the_same_are_refused():
    """ "a/b" and "b" under "a" would share one key and one place in a file."""
    with pytest.raises(ValueError, match="'a/b' twice"):
        vi.init_params({"a/b": vi.Param(normal), "a": {"b": vi.Param(normal)}}, KEY)


@pytest.mark.parametrize("x64", [False, True])
def test_starts_have_strong_default_dtypes(x64):
    """Python numbers, weakly typed and numpy arrays start at strong arrays of the default float."""
    with enable_x64(x64):
        declared = {
            "number": 1.0,
            "weak": vi.Param(jnp.full((2,), 0.1), constraint=constraints.positive),
            "numpy": np.ones(2),
            "lazy": vi.Param(lambda key: 0.5, constraint=constraints.unit_interval),
        }
        assert declared["weak"].init.weak_type
        params = vi.init_params(declared, jax.random.key(0))
        for leaf in jax.tree.leaves(params):
            assert leaf.dtype == (jnp.float64 if x64 else jnp.float32)
            assert not leaf.weak_type


def test_a_narrow_dtype_is_kept():
    """bfloat16 weights stay bfloat16, through the maps as well."""
    declared = {"w": vi.Param(jnp.ones(2, jnp.bfloat16), constraint=constraints.positive)}
    params = vi.init_params(declared, KEY)
    assert params["w"].dtype == jnp.bfloat16
    assert vi.constrain(declared, params)["w"].dtype == jnp.bfloat16


def test_one_declaration_stands_over_a_network():
    """The weights keep their structure; the constraint holds for each of them."""
    weights = {"dense": [jnp.full((2, 3), 2.0), jnp.full(3, 0.5)], "scale": jnp.float32(4.0)}
    declared = {"net": vi.Param(weights, constraint=constraints.positive), "loc": jnp.zeros(2)}
    params = vi.init_params(declared, KEY)
    assert jax.tree.structure(params["net"]) == jax.tree.structure(weights)
    jax.tree.map(lambda u, w: np.testing.assert_allclose(u, jnp.log(w)), params["net"], weights)
    values = vi.constrain(declared, params)
    jax.tree.map(np.testing.assert_allclose, values, {"net": weights, "loc": np.zeros(2)})


def test_a_callable_network_is_weights_and_not_a_function():
    """A pytree that can be called is taken as it is, never called with the key."""
    layer = Layer(jnp.eye(2), jnp.ones(2))
    params = vi.init_params({"net": vi.Param(layer)}, KEY)
    assert isinstance(params["net"], Layer)
    np.testing.assert_array_equal(params["net"](jnp.ones(2)), [2.0, 2.0])


def test_lazy_starts_may_be_pytrees_or_partial_functions():
    """A function of the key gives an array or a network; a partial function is a function."""

    def network(key, width):
        first, second = jax.random.split(key)
        return {"w": jax.random.normal(first, (width, 2)), "b": jax.random.normal(second, (width,))}

    declared = {
        "net": vi.Param(functools.partial(network, width=3)),
        "jitted": vi.Param(jax.jit(normal)),
    }
    params = vi.init_params(declared, KEY)
    assert params["net"]["w"].shape == (3, 2)
    assert params["jitted"].shape == (2,)
    again = jax.jit(functools.partial(vi.init_params, declared))(KEY)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), params, again)


def test_starts_can_be_vmapped_over_keys():
    """Restarts: a batch of keys gives the batch of starts."""
    declared = {"x": vi.Param(normal), "y": vi.Param(jnp.ones(1), constraint=constraints.positive)}
    keys = jax.random.split(KEY, 3)
    params = jax.vmap(lambda key: vi.init_params(declared, key))(keys)
    assert params["x"].shape == (3, 2)
    np.testing.assert_allclose(params["x"][1], vi.init_params(declared, keys[1])["x"], rtol=1e-6)
    np.testing.assert_array_equal(params["y"], np.zeros((3, 1)))


def test_nested_declarations_keep_their_structure():
    """Mappings and lists of declarations and bare arrays nest as they are written."""
    declared = {"a": [vi.Param(1.0, constraint=constraints.positive), jnp.ones(2)], "b": {"c": 0.0}}
    params = vi.init_params(declared, KEY)
    np.testing.assert_allclose(params["a"][0], 0.0)
    np.testing.assert_allclose(params["a"][1], [1.0, 1.0])
    assert set(params["b"]) == {"c"}
    assert declared["b"]["c"] == 0.0


def test_describe_has_a_row_for_each_leaf():
    """Shapes and sizes of unconstrained arrays, one row a leaf, as the table prints them."""
    declared = {
        "net": vi.Param({"w": jnp.zeros((2, 3)), "b": jnp.zeros(3, jnp.bfloat16)}),
        "p": vi.Param(jnp.full((4, 3), 1 / 3), constraint=constraints.simplex, plates=("users",)),
    }
    table = vi.describe(declared)
    assert table.rows == (
        ("net/b", "(3,)", "bfloat16", "Real()", "", 3),
        ("net/w", "(2, 3)", "float32", "Real()", "", 6),
        ("p", "(4, 2)", "float32", "Simplex()", "users", 8),
    )
    assert table["size"] == (3, 6, 8)
    assert str(table).splitlines() == [
        "path   shape   dtype     constraint  plates  size",
        "net/b  (3,)    bfloat16  Real()                 3",
        "net/w  (2, 3)  float32   Real()                 6",
        "p      (4, 2)  float32   Simplex()   users      8",
    ]
    assert table._repr_html_().count("<tr>") == 4
    assert vi.describe(declared, vi.init_params(declared, KEY)).rows == table.rows
    latent = vi.describe({"z": vi.Latent((3,), constraints.simplex)})
    assert latent.rows == (("z", "(2,)", "float32", "Simplex()", "", 2),)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (constraints.positive, constraints.softplus_positive),
        (constraints.positive, constraints.nonnegative),
        (constraints.lower_cholesky, constraints.softplus_lower_cholesky),
        (constraints.interval(0.0, 1.0), constraints.interval(0.0, 1.0 + 1e-9)),
        (constraints.interval(0.0, 1.0), constraints.unit_interval),
        (constraints.greater_than(np.zeros(100)), constraints.greater_than(np.eye(100)[50])),
        (constraints.greater_than(np.zeros((2, 1))), constraints.greater_than(np.zeros(2))),
        (constraints.zero_sum(1), constraints.zero_sum(2)),
        (constraints.real_vector, constraints.real_matrix),
        *CATENATED,
    ],
)
def test_names_of_constraints_tell_them_apart(one, other):
    """Sets and bijectors that differ have names that differ, whatever numpyro's == says."""
    one, other = (
        vi.describe({"x": vi.Latent((3, 100), c, unconstrained_shape=(3, 100))})["constraint"]
        for c in (one, other)
    )
    assert one != other


def test_starts_are_checked_under_vmap_too():
    """A start on (0, 1), whose logit has a derivative of its own, can be vmapped over keys."""
    declared = {"p": vi.Param(jnp.full(3, 0.5), constraint=constraints.unit_interval)}
    keys = jax.random.split(jax.random.key(0), 2)
    starts = jax.vmap(lambda key: vi.init_params(declared, key))(keys)
    np.testing.assert_allclose(starts["p"], np.zeros((2, 3)), atol=1e-6)


@pytest.mark.parametrize("lower", [jnp.zeros(2), jnp.float32(0.0)])
def test_bounds_that_are_jax_arrays_are_checked_in_a_trace(lower):
    """Bounds made by jax do not become unknown where the start is checked under jit."""
    constraint = constraints.interval(lower, 1.0)
    declared = {"u": vi.Param(jnp.full(2, 0.5), constraint=constraint)}
    np.testing.assert_allclose(jax.jit(lambda key: vi.init_params(declared, key))(KEY)["u"], 0.0)
    outside = {"u": vi.Param(jnp.full(2, 1.5), constraint=constraint)}
    with pytest.raises(ValueError, match="outside its constraint"):
        jax.jit(lambda key: vi.init_params(outside, key))(KEY)
