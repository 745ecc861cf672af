"""Bad input: every message says what was expected, what was received, and where."""

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.distributions import constraints

import vi_params as vi

enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64

KEY = jax.random.key(0)
TWO = {"loc": vi.Param(jnp.zeros(3), plates=("users",)), "net": {"scale": vi.Param(1.0)}}
LOC, SCALE = jnp.zeros(3), jnp.zeros(())


def start(init, constraint=constraints.real, **options):
    """What makes a start fail, its leaf below a nested path."""
    return lambda: vi.init_params(
        {"a": {"b": vi.Param(init, constraint=constraint, **options)}}, KEY
    )


def take(index):
    return lambda: vi.take_rows(TWO, vi.init_params(TWO, KEY), index)


def put(rows, index):
    return lambda: vi.put_rows(TWO, vi.init_params(TWO, KEY), rows, index)


outside = "finite values in the interior of "
floating = "a floating dtype"

STARTS = {
    "outside": (start(-1.0, constraints.positive), ValueError, outside + "Positive(0)", "-1."),
    "outside_a_bound": (
        start(jnp.array([0.5, 0.5, 3.5]), constraints.interval(np.zeros(3), np.arange(1.0, 4.0))),
        *(ValueError, outside + "Interval([0. 0. 0.], [1. 2. 3.])", "[0.5 0.5 3.5]"),
    ),
    "boundary": (start(0.0, constraints.nonnegative), ValueError, outside, "0."),
    "boundary_of_interval": (start(1.0, constraints.unit_interval), ValueError, outside, "1."),
    "boundary_of_simplex": (
        start(jnp.array([0.5, 0.5, 0.0]), constraints.simplex),
        *(ValueError, outside + "Simplex()", "[0.5 0.5 0. ]"),
    ),
    "boundary_of_simplexes": (
        start(jnp.array([[0.5, 0.5], [1.0, 0.0]]), constraints.independent(constraints.simplex, 1)),
        *(ValueError, outside, "[1.  0. ]"),
    ),
    "boundary_of_l1_ball": (
        start(jnp.array([0.5, -0.5]), constraints.l1_ball),
        *(ValueError, outside + "L1Ball()", "[ 0.5 -0.5]"),
    ),
    "singular_matrix": (
        start(jnp.ones((2, 2)), constraints.positive_semidefinite),
        *(ValueError, outside + "PositiveSemiDefinite()", "[[1. 1.]"),
    ),
    "sum_not_one": (start(jnp.ones(3), constraints.simplex), ValueError, outside, "[1. 1. 1.]"),
    "nan": (start(jnp.array([0.0, jnp.nan])), ValueError, outside + "Real()", "[ 0. nan]"),
    "infinite": (start(jnp.inf), ValueError, outside, "inf"),
    "lazy_nan": (start(lambda key: jnp.nan), ValueError, outside, "nan"),
    "integer": (start(jnp.arange(3)), TypeError, floating, "int32"),
    "python_integer": (start(1), TypeError, floating, "1 of dtype int64"),
    "boolean": (start(True), TypeError, floating, "True of dtype bool"),
    "text": (start("float32"), TypeError, floating, "'float32'"),
    "random_key": (start(KEY), TypeError, floating, "dtype key<fry>"),
    "function_among_weights": (start({"c": jnp.tanh}), TypeError, floating, "tanh", "a/b/c"),
    "integer_among_weights": (start([1.0, jnp.arange(2)]), TypeError, floating, "int32", "a/b/1"),
    "complex_for_real": (start(1j), TypeError, "a real floating dtype for Real()", "complex"),
    "nothing": (start(None), ValueError, "an array or a pytree of arrays", "None"),
    "lazy_nothing": (start(lambda key: {}), ValueError, "a pytree of arrays", "{}"),
    "scalar_simplex": (start(1.0, constraints.simplex), ValueError, "Simplex() has", "shape ()"),
    "not_square": (
        start(jnp.ones((2, 3)), constraints.lower_cholesky),
        *(ValueError, "a shape that LowerCholesky() has", "shape (2, 3)"),
    ),
    "scalar_with_vector_bounds": (
        start(0.5, constraints.interval(np.zeros(3), np.ones(3))),
        *(ValueError, "a shape that Interval([0. 0. 0.], [1. 1. 1.]) has", "shape ()"),
    ),
    "wrong_length_of_bounds": (
        start(jnp.full(2, 0.5), constraints.greater_than(np.zeros(3))),
        *(ValueError, "a shape that GreaterThan([0. 0. 0.]) has", "shape (2,)"),
    ),
    "no_axis_for_a_plate": (
        start(jnp.full(3, 1 / 3), constraints.simplex, plates=("users",)),
        *(ValueError, "led by the plates ('users',)", "shape (3,)"),
    ),
    "dtype_without_a_bijector": (
        start(jnp.eye(2, dtype=jnp.bfloat16), constraints.positive_definite),
        *(TypeError, "dtype float32 for PositiveDefinite()", "dtype bfloat16"),
    ),
}

param, latent = "Where: Param", "Where: Latent"
OTHERS = {
    "discrete": (
        lambda: vi.Param(1.0, constraint=constraints.nonnegative_integer),
        *(ValueError, "biject_to knows", "IntegerNonnegative(0)", param, "discrete values"),
    ),
    "sphere": (
        lambda: vi.Param(1.0, constraint=constraints.sphere),
        *(ValueError, "biject_to knows", "Sphere()", param, "biject_to.register"),
    ),
    "dependent": (
        lambda: vi.Param(1.0, constraint=constraints.dependent),
        *(ValueError, "bounds are known beforehand", "Dependent", param),
    ),
    "class_of_constraints": (
        lambda: vi.Param(1.0, constraint=constraints.interval),
        *(TypeError, "an object of numpyro.distributions.constraints", "_Interval", param),
    ),
    "no_constraint": (
        lambda: vi.Latent((), "positive"),
        *(TypeError, "an object of numpyro.distributions.constraints", "'positive' (str)", latent),
    ),
    "plates_as_text": (lambda: vi.Param(1.0, plates="users"), TypeError, "tuple", "'users'", param),
    "shape_as_int": (lambda: vi.Latent(3), TypeError, "a shape such as ()", "3", latent),
    "latent_as_parameter": (
        lambda: vi.init_params({"a": {"z": vi.Latent()}}, KEY),
        *(TypeError, "Param", "Latent", "Where: a/z"),
    ),
    "raw_key": (
        lambda: vi.init_params(TWO, jax.random.PRNGKey(0)),
        *(TypeError, "a typed key", "a raw uint32 array of shape (2,)", "init_params"),
    ),
    "int_as_key": (
        lambda: vi.init_params(TWO, 3),
        *(TypeError, "a typed key", "the int 3", "init_params", "jax.random.key(3)"),
    ),
    "keys": (
        lambda: vi.init_params(TWO, jax.random.split(KEY, 4)),
        *(TypeError, "a typed key of shape ()", "shape (4,)", "init_params", "jax.vmap"),
    ),
    "not_a_mapping": (
        lambda: vi.init_params([vi.Param(1.0)], KEY),
        *(TypeError, "a mapping from names to Param", "list", "Where: declared"),
    ),
    "function_not_wrapped": (
        lambda: vi.init_params({"a": {"b": jnp.tanh}}, KEY),
        *(TypeError, "a Param, an array", "tanh", "Where: a/b", "Param(init)"),
    ),
    "unknown_param": (
        lambda: vi.constrain(TWO, {"loc": LOC, "net": {"scale": SCALE, "bias": SCALE}}),
        *(KeyError, "'loc', 'net/scale'", "unknown: 'net/bias'", "Where: constrain"),
    ),
    "misspelt_param": (
        lambda: vi.constrain_with_log_det(TWO, {"lok": LOC, "net": {"scale": SCALE}}),
        *(KeyError, "unknown: 'lok'; missing: 'loc'", "constrain_with_log_det", "mean 'loc'?"),
    ),
    "missing_value": (
        lambda: vi.unconstrain(TWO, {"net": {"scale": SCALE}}),
        *(KeyError, "'loc', 'net/scale'", "missing: 'loc'", "Where: unconstrain"),
    ),
    "missing_beside_a_network": (
        lambda: vi.constrain({"net": vi.Param({"w": LOC}), "x": 1.0}, {"net": {"w": LOC}}),
        *(KeyError, "Received: 'net' (missing: 'x')", "Where: constrain"),
    ),
    "params_not_a_mapping": (
        lambda: vi.constrain(TWO, LOC),
        *(KeyError, "'loc', 'net/scale'", "missing: 'loc', 'net/scale'", "Where: constrain"),
    ),
    "describe_unknown": (
        lambda: vi.describe(TWO, {"loc": LOC, "net": {}}),
        *(KeyError, "missing: 'net/scale'", "Where: describe"),
    ),
    "unknown_plate": (
        take({"user": jnp.arange(2)}),
        *(KeyError, "Expected: 'users'", "unknown: 'user'", "take_rows", "did you mean 'users'?"),
    ),
    "index_of_floats": (
        take({"users": jnp.zeros(2)}),
        *(TypeError, "an int array of shape (batch,)", "float32", "take_rows, plate 'users'"),
    ),
    "index_of_mask": (
        take({"users": jnp.array([True, False, True])}),
        *(TypeError, "an int array", "bool", "take_rows, plate 'users'"),
    ),
    "index_of_matrix": (
        put(vi.init_params(TWO, KEY), {"users": jnp.zeros((2, 2), int)}),
        *(TypeError, "an int array of shape (batch,)", "(2, 2)", "put_rows, plate 'users'"),
    ),
    "index_not_a_mapping": (
        take(jnp.arange(2)),
        *(TypeError, "a mapping from the names of plates", "ArrayImpl", "take_rows"),
    ),
    "unknown_rows": (
        put({"loc": LOC[:1], "net": {}}, {"users": jnp.array([0])}),
        *(KeyError, "the rows", "missing: 'net/scale'", "Where: put_rows"),
    ),
    "too_few_rows": (
        put({"loc": LOC[:1], "net": {"scale": SCALE}}, {"users": jnp.array([0, 1])}),
        *(ValueError, "rows of shape (2,)", "shape (1,)", "put_rows, loc"),
    ),
    "pattern_of_nothing": (
        lambda: vi.labels(TWO, {"scales": "slow", ".*": "fast"}),
        *(KeyError, "found in one of 'loc', 'net/scale'", "'scales'", "Where: labels"),
    ),
    "freeze_nothing": (
        lambda: vi.freeze(None, TWO, "^scale"),
        *(KeyError, "found in one of 'loc', 'net/scale'", "'^scale'", "Where: labels"),
    ),
    "unlabelled": (
        lambda: vi.labels(TWO, {"loc": "slow"}),
        *(KeyError, "a match among the patterns 'loc'", "'net/scale'", "labels", "default="),
    ),
}


@pytest.mark.parametrize("name", [*STARTS, *OTHERS])
def test_bad_input_is_explained(name):
    """The type of the exception, and each labelled part of its message."""
    call, error_type, *fragments = {**STARTS, **OTHERS}[name]
    if name in STARTS:
        fragments = [*fragments, "Expected: ", "Received: ", "Where: a/b"]
    with pytest.raises(error_type) as error:
        call()
    assert type(error.value) is error_type or isinstance(error.value, KeyError)
    message = str(error.value)
    assert "\\n" not in message  # a KeyError would print the repr of its message
    for fragment in fragments:
        assert fragment in message


def test_starts_are_checked_for_shape_when_they_are_traced():
    """Under jit a value cannot be looked at, its shape and dtype can."""
    declared = {"x": vi.Param(lambda key: jax.random.normal(key, (2, 3)))}
    assert jax.jit(lambda key: vi.init_params(declared, key))(KEY)["x"].shape == (2, 3)
    declared = {"x": vi.Param(declared["x"].init, constraint=constraints.lower_cholesky)}
    with pytest.raises(ValueError, match=r"shape \(2, 3\)"):
        jax.jit(lambda key: vi.init_params(declared, key))(KEY)


def test_single_precision_matrices_are_refused_where_numpyro_cannot_map_them():
    """With x64 on, numpyro's Cholesky bijectors take float64 alone: said as that."""
    with enable_x64(True):
        eye = jnp.eye(2, dtype=jnp.float32)
        declared = {"x": vi.Param(eye, constraint=constraints.lower_cholesky)}
        with pytest.raises(TypeError, match="Expected: dtype float64 for LowerCholesky"):
            vi.init_params(declared, jax.random.key(0))
