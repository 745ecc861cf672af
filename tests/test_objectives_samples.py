"""MMD and energy distance: closed forms between normals; a simulator fitted by samples alone."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpyro.distributions import constraints
from scipy import stats

import vi_params as vi

LOC, SCALE, WIDTH = 0.5, 1.3, 0.9
ROWS = np.array([-1.2, 0.1, 0.4, 2.5, 3.0, -0.7, 0.0, 1.1])

DECLARED = {"loc": vi.Param(LOC), "scale": vi.Param(SCALE, constraint=constraints.positive)}


def simulate(values, key):
    return values["loc"] + values["scale"] * jax.random.normal(key)


def gaussian_mean(a, b, variance):
    """E exp(-(x - y)^2 / 2 h^2), x - y ~ N(a - b, variance), in closed form."""
    total = WIDTH**2 + variance
    return WIDTH / np.sqrt(total) * np.exp(-0.5 * (a - b) ** 2 / total)


def distance_mean(a, b, variance):
    """E |x - y|, x - y ~ N(a - b, variance): the mean of a folded normal."""
    return stats.foldnorm.mean(np.abs(a - b) / np.sqrt(variance), scale=np.sqrt(variance))


def exact(kernel_mean, kernel):
    """The expected squared MMD between N(LOC, SCALE) and the rows themselves."""
    pairs = kernel(ROWS[:, None] - ROWS[None, :])
    n = len(ROWS)
    between_rows = (pairs.sum() - np.trace(pairs)) / (n * (n - 1))
    to_rows = np.mean(kernel_mean(LOC, ROWS, SCALE**2))
    return kernel_mean(LOC, LOC, 2 * SCALE**2) + between_rows - 2 * to_rows


CASES = {
    "mmd": (
        lambda **options: vi.mmd(
            DECLARED, simulate, ROWS, kernel=vi.kernels.gaussian(WIDTH), **options
        ),
        exact(gaussian_mean, lambda d: np.exp(-0.5 * (d / WIDTH) ** 2)),
    ),
    "energy_distance": (
        lambda **options: vi.energy_distance(DECLARED, simulate, ROWS, **options),
        -exact(distance_mean, np.abs),
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("num_observations", [None, 4])
def test_values_are_unbiased(name, num_observations):
    """The mean over simulations, and over choices of rows, is the closed form."""
    build, expected = CASES[name]
    objective = build(num_simulations=6, num_observations=num_observations)
    params = vi.init_params(objective.declared, jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), 20_000)
    found = jax.jit(jax.vmap(lambda key: objective.loss(params, key)[0]))(keys)
    found = np.asarray(found, np.float64)
    assert abs(found.mean() - expected) < 4 * found.std() / np.sqrt(found.size)


@pytest.mark.parametrize("kernel", ["gaussian", "laplace", "rational_quadratic"])
def test_zero_exactly_where_distributions_are_equal(kernel):
    """Over fresh data the mean is zero if they come from the simulator, and positive if they have
    its mean and another spread."""
    kernel = getattr(vi.kernels, kernel)(1.0)
    objective = vi.mmd(DECLARED, simulate, jnp.zeros(20), kernel=kernel, num_simulations=20)
    params = vi.init_params(objective.declared, jax.random.key(0))

    def loss(scale, key):
        first, second = jax.random.split(key)
        data = LOC + scale * jax.random.normal(first, (20,))
        return objective.loss(params, second, data)[0]

    keys = jax.random.split(jax.random.key(2), 4000)
    losses = jax.jit(jax.vmap(jax.vmap(loss, in_axes=(None, 0)), in_axes=(0, None)))
    same, other = np.asarray(losses(jnp.array([SCALE, 3 * SCALE]), keys), np.float64)
    assert abs(same.mean()) < 4 * same.std() / np.sqrt(same.size)
    assert other.mean() > 10 * other.std() / np.sqrt(other.size)


@pytest.mark.parametrize("name", ["mmd", "energy_distance"])
def test_a_simulator_is_fitted(name):
    """Location and scale of a simulator come to those of the data, whose rows are a mapping."""
    data = {"y": 3.0 + 2.0 * np.random.default_rng(0).normal(size=(150, 1))}

    def rows(values, key):
        return {"y": simulate(values, key)[None]}

    objective = getattr(vi, name)(DECLARED, rows, data, num_simulations=50, num_observations=100)
    svi = vi.svi(objective, optax.adam(optax.linear_schedule(0.1, 0.0, 600)))

    @jax.jit
    def go(key):
        return vi.run(svi, svi.init(key), key, 600)[0].params

    values = vi.constrain(objective.declared, go(jax.random.key(0)))
    assert values["loc"] == pytest.approx(data["y"].mean(), abs=0.25)
    assert values["scale"] == pytest.approx(data["y"].std(), rel=0.12)


def test_coinciding_rows_have_a_gradient():
    """Rows that are equal, and simulations equal to rows, give finite losses and gradients."""
    for objective in (
        vi.mmd({"loc": 0.0}, lambda v, key: v["loc"], jnp.zeros(4), num_simulations=3),
        vi.energy_distance({"loc": 0.0}, lambda v, key: v["loc"], jnp.zeros(4)),
    ):
        params = vi.init_params(objective.declared, jax.random.key(0))
        loss, slope = jax.value_and_grad(lambda p, o=objective: o.loss(p, jax.random.key(0))[0])(
            params
        )
        assert loss == pytest.approx(0.0, abs=1e-6)
        assert np.isfinite(slope["loc"])


ERRORS = {
    "one row": (lambda: vi.mmd(DECLARED, simulate, jnp.zeros(1)), ["length 2 or more"]),
    "ragged": (
        lambda: vi.mmd(DECLARED, simulate, (jnp.zeros(3), jnp.zeros(4))),
        ["one leading axis in common", "(4,)"],
    ),
    "a whole data set": (
        lambda: vi.energy_distance(DECLARED, lambda v, key: jnp.zeros(8), ROWS),
        ["not like a row", "vmapped over keys"],
    ),
    "a bandwidth of zero": (lambda: vi.kernels.gaussian(0.0), ["bandwidth > 0"]),
    "one simulation": (
        lambda: vi.mmd(DECLARED, simulate, ROWS, num_simulations=1),
        ["num_simulations >= 2"],
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    """What does not fit is refused when the objective is built."""
    build, fragments = ERRORS[case]
    with pytest.raises(ValueError, match=re.escape(fragments[0])) as caught:
        build()
    for fragment in fragments[1:]:
        assert fragment in str(caught.value)


def test_a_kernel_that_was_not_called():
    """The value is asked for, and the way to make it shown."""
    with pytest.raises(TypeError, match=r"gaussian\(...\)"):
        vi.mmd(DECLARED, simulate, ROWS, kernel=vi.kernels.gaussian)
