"""Gradients at weighted draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import vi_params as vi
from vi_params.params import constrain
from vi_params.solvers.slopes import (
    EFFECTIVE,
    GRADIENTS,
    evened,
    gradient_on_host,
    slopes_at,
    slopes_by_response,
)
from vi_params.target import flat

DIM = 40
POSITION = stats.norm.rvs(size=(GRADIENTS + 7, DIM), random_state=0)
LOG_WEIGHTS = stats.norm.rvs(scale=0.1, size=GRADIENTS + 7, random_state=1)


def log_density(values, latents, data):
    z = latents["z"]
    prior = -50 * (values["slope"] - 0.3) ** 2
    return prior - jnp.sum(jnp.cosh(z)) + values["slope"] * jnp.sum(z * jnp.roll(z, 1)) + data @ z


TARGET = vi.target(
    log_density,
    {"z": vi.Latent((DIM,))},
    data=jnp.linspace(-1.0, 1.0, DIM),
    declared={"slope": vi.Param(0.3)},
)


def share(weights):
    return 1 / np.sum(np.asarray(weights) ** 2) / len(weights)


@pytest.mark.parametrize("xp", [np, jnp])
def test_weights_are_raised_to_a_power(xp):
    """At which a third of the draws are effective, and no less than they are where more are; of
    draws outside the support none is."""
    heavy = 5 * stats.norm.rvs(size=600, random_state=0)
    found = np.asarray(evened(xp.asarray(heavy), xp))
    np.testing.assert_allclose(share(found), EFFECTIVE, rtol=1e-3)
    power = np.polyfit(heavy, np.log(found), 1)[0]
    assert 0 < power < 1
    np.testing.assert_allclose(
        np.log(found), power * heavy + np.log(found[0]) - power * heavy[0], atol=1e-3
    )
    light = 0.1 * heavy
    expected = np.exp(light) / np.sum(np.exp(light))
    np.testing.assert_allclose(evened(xp.asarray(light), xp), expected, rtol=1e-4)
    heavy[::2] = -np.inf
    found = np.asarray(evened(xp.asarray(heavy), xp))
    assert not found[::2].any()
    np.testing.assert_allclose(share(found), EFFECTIVE, rtol=1e-3)


def test_gradients_are_those_of_autodiff():
    """In a program, and on the host by the program of linear response, in blocks that do not fit
    the number of draws; at the model's own parameters and data."""
    response = vi.linear_response(TARGET, vi.solvers.deterministic(TARGET, jax.random.key(0)))
    values = constrain(TARGET.declared, {"slope": response.params["slope"]})
    position, few = jnp.asarray(POSITION, float), slice(GRADIENTS)
    gradient = jax.grad(lambda u: flat(TARGET).log_density(u, values, TARGET.data))
    expected = jax.vmap(gradient)(position)
    found = slopes_by_response(TARGET, response, POSITION, LOG_WEIGHTS, TARGET.data)
    np.testing.assert_allclose(found.position, POSITION[few])
    np.testing.assert_allclose(found.gradient, expected[few], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.weights, evened(LOG_WEIGHTS[few], np))
    on_host = gradient_on_host(TARGET, response, TARGET.data)
    for number in (1, GRADIENTS, len(POSITION)):  # a part of a call, one, and more
        found = on_host(POSITION[:number])
        np.testing.assert_allclose(found, expected[:number], rtol=1e-4, atol=1e-4)
    inside = slopes_at(TARGET, values, position, jnp.asarray(LOG_WEIGHTS), TARGET.data)
    np.testing.assert_allclose(inside.gradient, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(inside.weights, evened(LOG_WEIGHTS, np), rtol=1e-4)
