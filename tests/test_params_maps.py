"""The maps of every constraint that numpyro has a bijector for, in float64."""

import functools
from typing import NamedTuple

import hypothesis
import hypothesis.extra.numpy as hypothesis_numpy
import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from numpyro.distributions import biject_to, constraints

import vi_params as vi

enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64


@pytest.fixture(autouse=True)
def _float64():
    with enable_x64(True):
        yield


def flat(x):
    return jnp.ravel(x)


def all_but_last(x):
    return x[:-1]


def lower(x):
    return x[np.tril_indices(x.shape[-1])]


def strictly_lower(x):
    return x[np.tril_indices(x.shape[-1], -1)]


def real_and_imaginary(x):
    return jnp.ravel(jnp.stack([x.real, x.imag], -1))


class Case(NamedTuple):
    constraint: constraints.Constraint
    shape: tuple = (3,)  # of the unconstrained array
    free: object = flat  # the coordinates that log_det is with respect to
    batches: bool = True  # whether leading axes are batch axes


bounds = np.zeros(3), np.arange(1.0, 4.0)
positive_and_unit = [constraints.positive, constraints.unit_interval]

CASES = {
    "real": Case(constraints.real),
    "real_scalar": Case(constraints.real, ()),
    "positive": Case(constraints.positive),
    "nonnegative": Case(constraints.nonnegative),
    "unit_interval": Case(constraints.unit_interval),
    "interval": Case(constraints.interval(-1.0, 2.0)),
    "interval_of_arrays": Case(constraints.interval(*map(jnp.asarray, bounds))),
    "interval_of_numpy_arrays": Case(constraints.interval(*bounds)),
    "interval_of_columns": Case(constraints.interval(np.zeros((2, 1)), np.ones((2, 1))), (2, 3)),
    "interval_of_mixed_bounds": Case(constraints.interval(-1, np.ones((2, 1))), (2, 3)),
    "open_interval": Case(constraints.open_interval(-1.0, 2.0)),
    "circular": Case(constraints.circular),
    "greater_than": Case(constraints.greater_than(1.5)),
    "greater_than_array": Case(constraints.greater_than(bounds[1])),
    "greater_than_eq": Case(constraints.greater_than_eq(-1)),
    "less_than": Case(constraints.less_than(1.5)),
    "less_than_eq": Case(constraints.less_than_eq(bounds[1])),
    "softplus_positive": Case(constraints.softplus_positive),
    "simplex": Case(constraints.simplex, (2,), all_but_last),
    "l1_ball": Case(constraints.l1_ball),
    "ordered_vector": Case(constraints.ordered_vector),
    "positive_ordered_vector": Case(constraints.positive_ordered_vector),
    "corr_cholesky": Case(constraints.corr_cholesky, (3,), strictly_lower),
    "corr_matrix": Case(constraints.corr_matrix, (3,), strictly_lower),
    "lower_cholesky": Case(constraints.lower_cholesky, (3,), lower),
    "scaled_unit_lower_cholesky": Case(constraints.scaled_unit_lower_cholesky, (3,), lower),
    "softplus_lower_cholesky": Case(constraints.softplus_lower_cholesky, (3,), lower),
    "positive_definite": Case(constraints.positive_definite, (3,), lower),
    "positive_semidefinite": Case(constraints.positive_semidefinite, (3,), lower),
    "real_vector": Case(constraints.real_vector),
    "real_matrix": Case(constraints.real_matrix, (2, 2)),
    "zero_sum": Case(constraints.zero_sum(1)),
    "zero_sum_matrix": Case(constraints.zero_sum(2), (2, 2)),
    "independent": Case(constraints.independent(constraints.positive, 1)),
    "independent_arrays": Case(constraints.independent(constraints.interval(*bounds), 1)),
    "complex": Case(constraints.complex, (2, 2), real_and_imaginary),
}

if hasattr(constraints, "cat"):  # not in the oldest numpyro
    CASES |= {
        "cat": Case(constraints.cat(positive_and_unit, -1, [1, 2])),
        "cat_of_first_axis": Case(constraints.cat(positive_and_unit), (2,), batches=False),
    }

every_case = pytest.mark.parametrize("name", CASES)


def declare(name):
    """A declaration of the case, and three unconstrained points of it (none is its start)."""
    case = CASES[name]
    transform = biject_to(case.constraint)
    start = jax.jit(lambda u: transform(u))(jnp.full(case.shape, 0.1))
    points = {"x": jax.random.normal(jax.random.key(len(name)), (3, *case.shape))}
    return {"x": vi.Param(start, constraint=case.constraint)}, points


@functools.cache
def results(name):
    """All that the laws are about at the three points, in one jitted and vmapped function."""
    declared, points = declare(name)
    shape = CASES[name].shape

    def free(u):
        return CASES[name].free(vi.constrain(declared, {"x": u.reshape(shape)})["x"])

    def score(params):
        values, log_det = vi.constrain_with_log_det(declared, params)
        return jnp.sum(jnp.abs(values["x"])) + log_det

    def everything(params):
        values, log_det = vi.constrain_with_log_det(declared, params)
        back = vi.unconstrain(declared, values)
        again = vi.constrain(declared, back)
        jacobian = jax.jacobian(free)(params["x"].ravel())
        return values, log_det, back, again, jacobian, jax.grad(score)(params)

    return declared, points, jax.tree.map(np.asarray, jax.jit(jax.vmap(everything))(points))


@every_case
def test_constrain_and_unconstrain_are_inverse(name):
    """T^-1(T(u)) = u and T(T^-1(x)) = x, and T(u) lies in the constraint's set."""
    _, points, (values, _, back, again, _, _) = results(name)
    np.testing.assert_allclose(back["x"], points["x"], atol=1e-9)
    np.testing.assert_allclose(again["x"], values["x"], atol=1e-9)
    assert all(np.all(CASES[name].constraint(x)) for x in values["x"])


@every_case
def test_log_det_is_that_of_the_jacobian(name):
    """log_det = log |det dT/du| in the free coordinates of the set.

    A zero-sum array has no free coordinates of its own: there the volume is that of the plane,
    (1/2) log det J'J.
    """
    _, points, (_, log_det, _, _, jacobian, _) = results(name)
    if name.startswith("zero_sum"):
        expected = 0.5 * np.linalg.slogdet(np.swapaxes(jacobian, 1, 2) @ jacobian)[1]
    else:
        assert jacobian.shape == (3, points["x"][0].size, points["x"][0].size)
        expected = np.linalg.slogdet(jacobian)[1]
    np.testing.assert_allclose(log_det, expected, atol=1e-9)
    assert log_det.shape == (3,)
    assert log_det.dtype == np.float64


@every_case
def test_gradients_of_the_maps_are_finite(name):
    """The gradient of value and log-determinant is finite, of the parameters' shape and dtype."""
    _, points, (*_, gradient) = results(name)
    assert gradient["x"].shape == points["x"].shape
    assert gradient["x"].dtype == points["x"].dtype
    assert np.all(np.isfinite(gradient["x"]))
    assert np.any(gradient["x"] != 0)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.batches])
def test_leading_axes_are_batch_axes(name):
    """T of a batch is the batch of T, and its log-determinant is the sum over the batch."""
    declared, points, (values, log_det, *_) = results(name)
    batched, total = jax.jit(lambda p: vi.constrain_with_log_det(declared, p))(points)
    np.testing.assert_allclose(batched["x"], values["x"], atol=1e-9)
    np.testing.assert_allclose(total, log_det.sum(), atol=1e-9)


@pytest.mark.parametrize("name", {type(c.constraint): name for name, c in CASES.items()}.values())
def test_the_start_is_the_declared_value(name):
    """constrain(init_params(declared)) is the declared start, in single precision too."""
    start, constraint = np.asarray(declare(name)[0]["x"].init), CASES[name].constraint
    with enable_x64(False):
        declared = {"x": vi.Param(jnp.asarray(start), constraint=constraint)}
        params = vi.init_params(declared, jax.random.key(0))
        assert not params["x"].weak_type
        assert params["x"].dtype == jnp.float32
        values = jax.jit(lambda p: vi.constrain(declared, p))(params)
        np.testing.assert_allclose(values["x"], start, atol=1e-5)


def test_every_constraint_with_a_bijector_is_tested():
    """No constraint that numpyro can map is missing from the cases above."""
    covered = {type(case.constraint) for case in CASES.values()}
    exported = {*constraints.__all__, *(name for name in vars(constraints) if name[0] != "_")}
    objects = [getattr(constraints, name) for name in exported]
    found = {type(c) for c in objects if isinstance(c, constraints.Constraint) and has_bijector(c)}
    registered = {c for c in biject_to._registry if c.__module__.startswith("numpyro.")}
    assert len(found) >= 20
    assert found <= covered
    assert registered <= covered


def has_bijector(constraint):
    try:
        biject_to(constraint)
    except NotImplementedError:
        return False
    return True


def test_bounds_may_be_traced_and_differentiated():
    """Bounds that an outer function traces: d/db of b sigmoid(0) is 1/2."""

    @jax.jit
    def upper(b):
        declared = {"x": vi.Param(jnp.float64(0.1), constraint=constraints.interval(0.0, b))}
        return vi.constrain(declared, {"x": jnp.zeros(())})["x"]

    np.testing.assert_allclose(jax.grad(upper)(3.0), 0.5)


def test_log_det_is_summed_over_leaves_and_subtrees():
    """One declaration over a subtree holds for each leaf: log det exp = sum of all entries."""
    declared = {
        "net": vi.Param(
            {"w": jnp.ones((2, 2)), "b": [jnp.ones(2)]}, constraint=constraints.positive
        ),
        "free": vi.Param(jnp.ones(3)),
    }
    params = jax.tree.map(lambda x: x + 1.0, vi.init_params(declared, jax.random.key(0)))
    values, log_det = vi.constrain_with_log_det(declared, params)
    np.testing.assert_allclose(log_det, 6.0)
    np.testing.assert_allclose(values["net"]["b"][0], jnp.exp(1.0) * jnp.ones(2))
    np.testing.assert_allclose(values["free"], 2.0)


def test_latents_are_mapped_by_their_support():
    """constrain and unconstrain take a target's latents as they take parameters."""
    latents = {"p": vi.Latent((3,), constraints.simplex), "x": vi.Latent((2,))}
    assert latents["p"].unconstrained_shape == (2,)
    u = {"p": jnp.array([0.3, -1.0]), "x": jnp.array([1.0, 2.0])}
    values = vi.constrain(latents, u)
    np.testing.assert_allclose(values["p"].sum(), 1.0)
    np.testing.assert_allclose(vi.unconstrain(latents, values)["p"], u["p"], atol=1e-9)


def test_unconstrain_makes_integers_floating():
    """Whole numbers given as ints become parameters that can be trained."""
    params = vi.unconstrain({"x": vi.Param(0.0)}, {"x": 1})
    assert params["x"].dtype == jnp.float64
    assert not params["x"].weak_type


PROPERTIES = set(CASES) & {
    "positive", "interval_of_arrays", "softplus_positive", "simplex", "ordered_vector",
    "corr_cholesky", "softplus_lower_cholesky", "zero_sum", "cat",
}  # fmt: skip


@functools.cache
def forward_and_back(name):
    declared, _ = declare(name)

    def f(u):
        values, log_det = vi.constrain_with_log_det(declared, {"x": u})
        return values["x"], log_det, vi.unconstrain(declared, values)["x"]

    return jax.jit(f)


@pytest.mark.parametrize("name", sorted(PROPERTIES))
def test_inverse_undoes_forward_everywhere(name):
    """T^-1(T(u)) = u and log_det is finite for any moderate u, with T(u) inside the set."""
    shape = CASES[name].shape

    @hypothesis.settings(max_examples=50, deadline=None, derandomize=True, database=None)
    @hypothesis.given(
        hypothesis_numpy.arrays(np.float64, shape, elements=st.floats(-5, 5, allow_subnormal=False))
    )
    def law(u):
        x, log_det, back = forward_and_back(name)(u)
        assert np.all(CASES[name].constraint(x))
        assert np.isfinite(log_det)
        np.testing.assert_allclose(back, u, atol=1e-6)

    law()
