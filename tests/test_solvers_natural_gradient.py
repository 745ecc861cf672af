"""Natural gradients, against closed forms of the ELBO's optimum."""

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
import scipy.optimize
from numpyro import distributions as dist
from numpyro.distributions import constraints

import vi_params as vi
from vi_params.solvers.natural_gradient import natural_step

enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64

KEY = jax.random.key(0)
Status = vi.SolverStatus

MEAN = np.array([3.0, -200.0, 0.02])
UNITS = np.array([1.0, 50.0, 1e-3])
CORRELATION = np.array([[1.0, 0.8, 0.3], [0.8, 1.0, 0.1], [0.3, 0.1, 1.0]])
COVARIANCE = UNITS[:, None] * CORRELATION * UNITS
START = {"loc": MEAN + 3 * UNITS, "scale": 3 * UNITS}


def values_of(solution):
    own = {"guide": solution.params["guide"]}
    return vi.constrain(solution.guide.declared, own)["guide"]


@pytest.fixture(scope="module")
def gaussian():
    """A correlated Gaussian whose units differ by a factor of 50,000."""
    covariance = jnp.asarray(COVARIANCE)

    def log_density(values, latents, data):
        return dist.MultivariateNormal(data["mean"], covariance).log_prob(latents["z"])

    return vi.target(log_density, {"z": vi.Latent((3,))}, data={"mean": jnp.asarray(MEAN)})


def test_the_step_follows_the_natural_gradient():
    """To first order in the step size the precision moves by the negative Hessian plus itself, and
    the mean by the gradient: for a Gaussian target, known in closed form from any draws."""
    with enable_x64(True):
        precision = np.linalg.inv(CORRELATION)
        e = vi.noise.orthogonal().draw(KEY, 8, 3)
        h = -(e - 0.3) @ precision
        small = 1e-6
        mean, covariance = natural_step(e, h, jnp.float64(small))
        np.testing.assert_allclose(mean / small, 0.3 * precision.sum(0), atol=1e-5)
        moved = (np.linalg.inv(covariance) - np.eye(3)) / small
        np.testing.assert_allclose(moved, precision - np.eye(3), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weight", [0.1, 1.0, 1e3])
def test_the_covariance_stays_positive(weight):
    """Whatever the draws and scores are."""
    e, h = 5.0 * jax.random.normal(jax.random.key(1), (2, 6, 3))
    _, covariance = natural_step(e, h, jnp.float32(weight))
    assert np.linalg.eigvalsh(covariance)[0] > 0


def test_full_rank_of_a_gaussian_is_exact(gaussian):
    """The ELBO's optimum is the target: no variance is left in the steps there."""
    solution = vi.solvers.natural_gradient(gaussian, KEY, init=START)
    found = values_of(solution)
    assert solution.info.status == Status.CONVERGED
    np.testing.assert_allclose((found["loc"] - MEAN) / UNITS, np.zeros(3), atol=0.03)
    covariance = found["scale_tril"] @ found["scale_tril"].T
    np.testing.assert_allclose(covariance / UNITS / UNITS[:, None], CORRELATION, atol=0.05)


def test_mean_field_of_a_gaussian(gaussian):
    """Locations are the means, scales 1 / sqrt(P_jj), within the stated sampling error."""
    solution = vi.solvers.natural_gradient(
        gaussian, KEY, family=vi.guides.mean_field, init=START, max_steps=2000
    )
    found = values_of(solution)
    assert solution.info.status == Status.CONVERGED
    precision = np.linalg.inv(COVARIANCE)
    np.testing.assert_allclose((found["loc"] - MEAN) / UNITS, np.zeros(3), atol=0.08)
    np.testing.assert_allclose(found["scale"], np.diagonal(precision) ** -0.5, rtol=0.1)


def test_the_optimum_for_a_gamma_posterior():
    """On its logarithm the ELBO of N(m, s^2) is a m - b exp(m + s^2 / 2) + log s: largest where
    b exp(m + s^2 / 2) = a and s^2 = 1 / a."""
    target = vi.target(
        lambda v, z, d: dist.Gamma(3.0, 2.0).log_prob(z["rate"]),
        {"rate": vi.Latent((), constraints.positive)},
    )
    start = {"loc": np.zeros(1), "scale": np.ones(1)}
    solution = vi.solvers.natural_gradient(target, KEY, init=start, tolerance=0.005, max_steps=3000)
    found = values_of(solution)
    assert solution.info.status == Status.CONVERGED
    s = 3.0**-0.5
    np.testing.assert_allclose(found["loc"], [np.log(1.5) - s**2 / 2], atol=0.02 * s)
    np.testing.assert_allclose(found["scale_tril"], [[s]], rtol=0.03)


@pytest.mark.slow
def test_a_logistic_regression_reaches_the_best_elbo():
    """Its ELBO is not below the one that scipy finds over locations and a diagonal's scales."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(20, 2)))
    y = (x[:, 0] > 0).astype(float)

    def log_density(values, latents, data):
        logits = x @ latents["beta"]
        prior = dist.Normal(0.0, 2.0).log_prob(latents["beta"]).sum()
        return jnp.sum(y * logits - jnp.logaddexp(0.0, logits)) + prior

    target = vi.target(log_density, {"beta": vi.Latent((2,))})
    start = {"loc": np.zeros(2), "scale": np.ones(2)}
    solution = vi.solvers.natural_gradient(target, KEY, family=vi.guides.mean_field, init=start)
    e = vi.noise.sobol().draw(KEY, 512, 2)

    @jax.jit
    @jax.value_and_grad
    def loss(p):
        z = p[:2] + jnp.exp(p[2:]) * e
        return -jnp.mean(jax.vmap(lambda b: log_density({}, {"beta": b}, None))(z)) - p[2:].sum()

    reference = scipy.optimize.minimize(
        lambda p: [np.asarray(v, float) for v in loss(p)], np.zeros(4), jac=True
    )
    found = values_of(solution)
    ours = loss(jnp.concatenate([found["loc"], jnp.log(found["scale"])]))[0]
    assert ours < reference.fun + 0.01


@pytest.mark.parametrize(
    ("options", "kind", "fragment"),
    [
        ({"family": vi.guides.delta}, TypeError, "two families"),
        ({"batch": 1}, ValueError, "batch"),
        ({"tolerance": -1.0}, ValueError, "tolerance"),
        ({"init": {"y": 0.0}}, KeyError, "y"),
        ({"key": 0}, TypeError, "key"),
        ({"target": 3}, TypeError, "Target"),
    ],
)
def test_wrong_arguments_are_refused(gaussian, options, kind, fragment):
    with pytest.raises(kind, match=fragment):
        vi.solvers.natural_gradient(**{"target": gaussian, "key": KEY} | options)


def test_it_does_not_fall_into_the_neck_of_a_funnel():
    """Centred eight schools, whose density has no upper bound where the scale vanishes: the
    full-rank optimum is at least that of mean-field, which is one of its family."""

    def schools(sigma, y):
        mu = numpyro.sample("mu", dist.Normal(0, 5))
        tau = numpyro.sample("tau", dist.HalfCauchy(5))
        with numpyro.plate("schools", len(sigma)):
            theta = numpyro.sample("theta", dist.Normal(mu, tau))
            numpyro.sample("y", dist.Normal(theta, sigma), obs=y)

    y = jnp.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = jnp.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    target = vi.from_numpyro(schools, sigma, y)
    narrow = vi.solvers.deterministic(target, jax.random.key(0))
    wide = vi.solvers.natural_gradient(target, jax.random.key(0))
    elbos = [
        float(vi.diagnose(target, found.guide, found.params, jax.random.key(1)).elbo)
        for found in (narrow, wide)
    ]
    assert elbos[1] > elbos[0] - 0.1
