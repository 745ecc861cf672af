"""Stein variational gradient descent, against the formula by differentiation and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpyro import distributions as dist
from numpyro.distributions import constraints

import vi_params as vi
from vi_params.solvers.svgd import stein_direction

KEY = jax.random.key(0)
Status = vi.SolverStatus

MEAN = np.array([3.0, -200.0])
UNITS = np.array([1.0, 50.0])
CORRELATION = np.array([[1.0, 0.8], [0.8, 1.0]])


@pytest.fixture(scope="module")
def gaussian():
    covariance = jnp.asarray(UNITS[:, None] * CORRELATION * UNITS)

    def log_density(values, latents, data):
        return dist.MultivariateNormal(data["mean"], covariance).log_prob(latents["z"])

    return vi.target(log_density, {"z": vi.Latent((2,))}, data={"mean": jnp.asarray(MEAN)})


@pytest.mark.parametrize("kernel", [vi.solvers.rbf(2.0), vi.solvers.imq(2.0)])
def test_the_direction_is_that_of_the_definition(kernel):
    """mean_j of k(x_j, x_i) score_j + the derivative of k in its first argument."""
    x, score = jax.random.normal(KEY, (2, 4, 3))

    def k(a, b):
        return kernel.value(jnp.sum((a - b) ** 2) / 2.0)

    slope = jax.jit(jax.grad(k))
    for i in range(4):
        terms = [k(x[j], x[i]) * score[j] + slope(x[j], x[i]) for j in range(4)]
        found = stein_direction(kernel, x, score)[i]
        np.testing.assert_allclose(found, np.mean(terms, axis=0), atol=1e-5)


def test_the_median_heuristic_follows_the_units():
    """Ten times the distances and a tenth of the scores: the direction is a tenth."""
    x, score = jax.random.normal(KEY, (2, 6, 3))
    phi = stein_direction(vi.solvers.rbf(), x, score)
    np.testing.assert_allclose(
        stein_direction(vi.solvers.rbf(), 10 * x, score / 10), phi / 10, atol=1e-6
    )


@pytest.mark.parametrize("kernel", [vi.solvers.rbf(), vi.solvers.imq()])
def test_a_gaussian(gaussian, kernel):
    """The particles' mean is the target's, their covariance is near, in any units."""
    start = {"loc": MEAN + UNITS, "scale": UNITS}
    particles = vi.solvers.svgd(gaussian, KEY, num_particles=50, kernel=kernel, init=start)
    z = (np.asarray(particles.latents["z"]) - MEAN) / UNITS
    np.testing.assert_allclose(z.mean(0), np.zeros(2), atol=0.05)
    np.testing.assert_allclose(np.cov(z.T), CORRELATION, atol=0.25)
    assert particles.status in (Status.CONVERGED, Status.MAX_STEPS)
    assert particles.residual < 0.02


def test_one_particle_goes_to_the_mode():
    """There is nobody to keep apart from: gradient ascent. Gamma(a, b) on its logarithm has its
    mode at log(a / b)."""
    target = vi.target(
        lambda v, z, d: dist.Gamma(3.0, 2.0).log_prob(z["rate"]),
        {"rate": vi.Latent((), constraints.positive)},
    )
    start = {"loc": np.zeros(1), "scale": np.ones(1)}
    particles = vi.solvers.svgd(target, KEY, num_particles=1, optimizer=optax.sgd(0.2), init=start)
    np.testing.assert_allclose(particles.latents["rate"], [1.5], rtol=1e-2)
    assert particles.status == Status.CONVERGED
    assert "1 particles: converged" in str(particles)


def test_vmap_over_keys_and_data(gaussian):
    """Particles are a function of key and data."""
    means = jnp.stack([MEAN, MEAN + UNITS])

    def solve(key, mean):
        start = {"loc": mean, "scale": jnp.asarray(UNITS)}
        return vi.solvers.svgd(
            gaussian, key, {"mean": mean}, init=start, num_particles=10, max_steps=50
        ).positions

    found = jax.vmap(solve)(jax.random.split(KEY, 2), means)
    np.testing.assert_allclose((found.mean(1) - means) / UNITS, np.zeros((2, 2)), atol=0.2)


def test_failures_are_told():
    """A density that is nowhere finite."""
    target = vi.target(lambda v, z, d: jnp.log(-1.0 - z["z"] ** 2), {"z": vi.Latent(())})
    start = {"loc": np.zeros(1), "scale": np.ones(1)}
    particles = vi.solvers.svgd(target, KEY, init=start, num_particles=3)
    assert particles.status == Status.INVALID_START
    assert "vi.check" in particles.message


@pytest.mark.parametrize(
    ("options", "kind", "fragment"),
    [
        ({"num_particles": 0}, ValueError, "num_particles"),
        ({"max_steps": 0}, ValueError, "max_steps"),
        ({"tolerance": 0.0}, ValueError, "tolerance"),
        ({"kernel": "rbf"}, TypeError, "Kernel"),
        ({"kernel": vi.solvers.rbf}, TypeError, "call it"),
        ({"init": {"y": 0.0}}, KeyError, "y"),
        ({"key": 0}, TypeError, "key"),
        ({"target": 3}, TypeError, "Target"),
    ],
)
def test_wrong_arguments_are_refused(gaussian, options, kind, fragment):
    with pytest.raises(kind, match=fragment):
        vi.solvers.svgd(**{"target": gaussian, "key": KEY} | options)


def test_a_bandwidth_is_positive():
    with pytest.raises(ValueError, match="bandwidth"):
        vi.solvers.rbf(-1.0)
