"""Rows of plates: gathered, scattered, and left alone where there is no plate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.distributions import constraints

import vi_params as vi

KEY = jax.random.key(0)
DECLARED = {
    "p": vi.Param(jnp.full((5, 3), 1 / 3), constraint=constraints.simplex, plates=("users",)),
    "r": vi.Param(jnp.arange(20.0).reshape(5, 4), plates=("users", "items")),
    "net": vi.Param({"w": jnp.arange(8.0).reshape(4, 2)}, plates=("items",)),
    "loc": vi.Param(jnp.ones(2)),
}
INDEX = {"users": jnp.array([3, 0]), "items": jnp.array([1, 2, 0])}


def test_rows_are_gathered_along_every_plate():
    """A leaf of two plates gives the product of their rows; one without passes through."""
    params = vi.init_params(DECLARED, KEY)
    rows = vi.take_rows(DECLARED, params, INDEX)
    np.testing.assert_array_equal(rows["r"], [[13.0, 14.0, 12.0], [1.0, 2.0, 0.0]])
    np.testing.assert_array_equal(rows["net"]["w"], [[2.0, 3.0], [4.0, 5.0], [0.0, 1.0]])
    assert rows["p"].shape == (2, 2)
    assert rows["loc"] is params["loc"]


@pytest.mark.parametrize("plates", [("users",), ("items",), ("users", "items"), ()])
def test_put_undoes_take(plates):
    """put_rows(take_rows(params)) = params, for each set of subsampled plates."""
    index = {plate: INDEX[plate] for plate in plates}
    params = vi.init_params(DECLARED, KEY)
    rows = vi.take_rows(DECLARED, params, index)
    jax.tree.map(np.testing.assert_array_equal, vi.put_rows(DECLARED, params, rows, index), params)


@pytest.mark.parametrize("plates", [("users",), ("items",), ("users", "items")])
def test_take_finds_what_was_put_and_the_rest_stays(plates):
    """take(put(rows)) = rows; entries outside the index keep their values."""
    index = {plate: INDEX[plate] for plate in plates}
    params = vi.init_params(DECLARED, KEY)
    rows = jax.tree.map(lambda x: x + 100.0, vi.take_rows(DECLARED, params, index))
    new = vi.put_rows(DECLARED, params, rows, index)
    jax.tree.map(np.testing.assert_array_equal, vi.take_rows(DECLARED, new, index), rows)
    changed = np.asarray(new["r"] != params["r"])
    expected = np.ones((5, 4), bool)
    for axis, plate in enumerate(("users", "items")):
        if plate in index:
            inside = np.isin(np.arange(expected.shape[axis]), index[plate])
            expected &= np.expand_dims(inside, 1 - axis)
    np.testing.assert_array_equal(changed, expected)
    np.testing.assert_array_equal(params["r"], np.arange(20.0).reshape(5, 4))


def test_rows_of_parameters_are_rows_of_values():
    """constrain(take_rows(u)) = take_rows(constrain(u)), where shapes differ as well."""
    params = vi.init_params(DECLARED, KEY)
    params["p"] = jax.random.normal(KEY, (5, 2))

    @jax.jit
    def both(params, index):
        values = vi.constrain(DECLARED, params)
        rows = vi.take_rows(DECLARED, params, index)
        return vi.constrain(DECLARED, rows), vi.take_rows(DECLARED, values, index)

    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), *both(params, INDEX))


def test_rows_can_be_jitted_and_differentiated():
    """The gradient through take_rows lands on the rows taken, once for each time they were."""
    declared = {"x": vi.Param(jnp.zeros(4), plates=("users",))}

    @jax.jit
    @jax.grad
    def gradient(params, index):
        return vi.take_rows(declared, params, {"users": index})["x"].sum()

    count = gradient({"x": jnp.zeros(4)}, jnp.array([2, 0, 2]))["x"]
    np.testing.assert_array_equal(count, [1.0, 0.0, 2.0, 0.0])


@pytest.mark.parametrize(
    "constraint",
    [
        constraints.interval(np.zeros(3), np.arange(1.0, 4.0)),
        *([constraints.cat([constraints.real] * 3)] if hasattr(constraints, "cat") else []),
    ],
)
def test_bounds_that_differ_between_rows_are_refused(constraint):
    """Rows in another order would meet the bounds of other rows: an error, not a wrong value."""
    declared = {"x": vi.Param(jnp.full(3, 0.5), constraint=constraint, plates=("users",))}
    params = vi.init_params(declared, KEY)
    with pytest.raises(ValueError, match="differs between the rows") as error:
        vi.take_rows(declared, params, {"users": jnp.array([2, 0, 1])})
    for fragment in ("one set for every row of users", "Received: ", "take_rows, x"):
        assert fragment in str(error.value)


def test_bounds_of_the_other_axes_are_allowed():
    """Bounds along the axes that are no plate go with every row."""
    constraint = constraints.interval(np.zeros(2), np.array([1.0, 3.0]))
    declared = {"x": vi.Param(jnp.full((3, 2), 0.5), constraint=constraint, plates=("users",))}
    params = vi.init_params(declared, KEY)
    rows = vi.take_rows(declared, params, {"users": jnp.array([1])})
    np.testing.assert_allclose(vi.constrain(declared, rows)["x"], [[0.5, 0.5]], rtol=1e-6)


def test_rows_that_do_not_exist_or_repeat_are_named():
    """An index out of range, and a row put twice: errors that name parameter and plate."""
    declared = {"loc": vi.Param(jnp.zeros(4), plates=("users",))}
    params = {"loc": jnp.arange(4.0)}
    for call in (
        lambda index: vi.take_rows(declared, params, index),
        lambda index: vi.put_rows(declared, params, {"loc": jnp.zeros(2)}, index),
    ):
        for rows in ([0, 4], [-1, 0]):
            with pytest.raises(ValueError, match=r"from 0 to 3[\s\S]*loc, plate 'users'"):
                call({"users": jnp.array(rows)})
    with pytest.raises(ValueError, match=r"put twice[\s\S]*loc, plate 'users'"):
        vi.put_rows(declared, params, {"loc": jnp.zeros(2)}, {"users": jnp.array([1, 1])})
