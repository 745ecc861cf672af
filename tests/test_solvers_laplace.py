"""The Laplace approximation, against closed forms, scipy's Newton and exact evidence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special
from numpyro import distributions as dist
from numpyro.distributions import constraints

import vi_params as vi

KEY = jax.random.key(0)
Status = vi.SolverStatus

MEAN = np.array([3.0, -200.0, 0.02])
UNITS = np.array([1.0, 50.0, 1e-3])
CORRELATION = np.array([[1.0, 0.8, 0.3], [0.8, 1.0, 0.1], [0.3, 0.1, 1.0]])
COVARIANCE = UNITS[:, None] * CORRELATION * UNITS


def values_of(solution, name="guide"):
    own = {name: solution.params[name]}
    return vi.constrain(solution.guide.declared, own)[name]


@pytest.fixture(scope="module")
def gaussian():
    """A correlated Gaussian whose units differ by a factor of 50,000."""
    covariance = jnp.asarray(COVARIANCE)

    def log_density(values, latents, data):
        return dist.MultivariateNormal(data["mean"], covariance).log_prob(latents["z"])

    return vi.target(log_density, {"z": vi.Latent((3,))}, data={"mean": jnp.asarray(MEAN)})


def test_a_gaussian_is_exact(gaussian):
    """Mode, covariance and log evidence (zero) are those of the target."""
    solution = vi.solvers.laplace(gaussian, KEY)
    found = values_of(solution)
    assert solution.info.status == Status.CONVERGED
    np.testing.assert_allclose((found["loc"] - MEAN) / UNITS, np.zeros(3), atol=2e-3)
    covariance = found["scale_tril"] @ found["scale_tril"].T
    np.testing.assert_allclose(covariance / UNITS / UNITS[:, None], CORRELATION, atol=2e-3)
    assert abs(float(solution.info.elbo)) < 1e-2


def test_vmap_over_keys_and_data_equals_the_loop(gaussian, compilations):
    """Many solutions are one program, equal to one at a time; a second one compiles nothing."""
    means = jnp.stack([MEAN, MEAN + UNITS])
    keys = jax.random.split(KEY, 2)

    def solve(key, mean):
        return vi.solvers.laplace(gaussian, key, {"mean": mean})[1:3]

    params, info = jax.vmap(solve)(keys, means)
    alone = [solve(*pair) for pair in zip(keys, means, strict=True)]
    key, data = keys[0], {"mean": means[1]}
    with compilations() as seen:
        vi.solvers.laplace(gaussian, key, data)
    assert seen == []
    for i, (one, _) in enumerate(alone):
        for leaf, other in zip(jax.tree.leaves(one), jax.tree.leaves(params), strict=True):
            np.testing.assert_allclose(leaf / leaf, other[i] / leaf, atol=2e-3)
    assert np.all(info.status == Status.CONVERGED)


@pytest.mark.slow
def test_poisson_regression_against_scipy():
    """The mode is scipy's, the covariance the inverse of the Fisher information X' diag(mu) X."""
    x = np.stack([np.ones(20), np.linspace(-1.0, 2.0, 20)], axis=1)
    y = np.random.default_rng(0).poisson(np.exp(x @ np.array([0.5, 0.8])))

    def loss(beta):
        return np.sum(np.exp(x @ beta) - y * (x @ beta)) + 0.5 * np.sum(beta**2) / 100.0

    target = vi.target(
        lambda v, z, d: (
            dist.Poisson(jnp.exp(d["x"] @ z["beta"])).log_prob(d["y"]).sum()
            + dist.Normal(0.0, 10.0).log_prob(z["beta"]).sum()
        ),
        {"beta": vi.Latent((2,))},
        data={"x": jnp.asarray(x), "y": jnp.asarray(y, float)},
    )
    solution = vi.solvers.laplace(target, KEY)
    mode = scipy.optimize.minimize(loss, np.zeros(2), tol=1e-10).x
    information = x.T @ (np.exp(x @ mode)[:, None] * x) + np.eye(2) / 100.0
    found = values_of(solution)
    np.testing.assert_allclose(found["loc"], mode, atol=1e-3)
    np.testing.assert_allclose(
        found["scale_tril"] @ found["scale_tril"].T, np.linalg.inv(information), rtol=1e-2
    )


def test_supports_are_followed():
    """Gamma(a, b) on its logarithm v: a v - b exp(v) has its mode at log(a / b), curvature a."""
    target = vi.target(
        lambda v, z, d: dist.Gamma(20.0, 4.0).log_prob(z["rate"]),
        {"rate": vi.Latent((), constraints.positive)},
    )
    found = values_of(vi.solvers.laplace(target, KEY, name="q"), "q")
    np.testing.assert_allclose(found["loc"], [np.log(5.0)], atol=1e-3)
    np.testing.assert_allclose(found["scale_tril"], [[20.0**-0.5]], rtol=1e-3)


@pytest.mark.slow
@pytest.mark.slow
def test_model_parameters_maximise_the_evidence():
    """y_i ~ N(z_i, 1), z_i ~ N(0, s): the evidence is N(y; 0, sqrt(1 + s^2)), largest at s^2 =
    mean(y^2) - 1. The joint density is largest at s = 0 instead."""
    y = jnp.array([0.5, 2.0, -1.0, 4.0])

    def log_density(values, latents, data):
        prior = dist.Normal(0.0, values["s"]).log_prob(latents["z"]).sum()
        return prior + dist.Normal(latents["z"], 1.0).log_prob(data).sum()

    declared = {"s": vi.Param(1.0, constraint=constraints.positive)}
    target = vi.target(log_density, {"z": vi.Latent((4,))}, declared=declared, data=y)
    solution = vi.solvers.laplace(target, KEY, lanes=2)
    s = vi.constrain(target.declared, {"s": solution.params["s"]})["s"]
    np.testing.assert_allclose(s**2, np.mean(y**2) - 1, rtol=1e-2)
    evidence = dist.Normal(0.0, np.sqrt(1 + s**2)).log_prob(y).sum()
    np.testing.assert_allclose(solution.info.elbo, evidence, atol=1e-3)
    assert solution.info.status == Status.CONVERGED


def one_latent(log_density):
    return vi.target(lambda v, z, d: log_density(z["z"]), {"z": vi.Latent(())})


def test_the_mode_with_more_mass_is_taken():
    """Two far modes: a tall narrow one with a tenth of the mass, a low wide one with the rest."""

    def log_density(z):
        return jnp.logaddexp(
            jnp.log(0.9) + dist.Normal(1.5, 1.0).log_prob(z),
            jnp.log(0.1) + dist.Normal(-3.0, 0.02).log_prob(z),
        )

    target = one_latent(log_density)
    solution = vi.solvers.laplace(target, KEY, lanes=8, init={"z": jnp.float32(-3.0)})
    np.testing.assert_allclose(values_of(solution)["loc"], [1.5], atol=0.1)
    np.testing.assert_allclose(solution.info.elbo, np.log(0.9), atol=0.05)
    np.testing.assert_allclose(np.nanmin(solution.info.lane_elbos), np.log(0.1), atol=0.05)


FAILURES = [
    (lambda z: jnp.log(-1.0 - z[0] ** 2), Status.INVALID_START, "vi.check"),
    (lambda z: -0.5 * z[0] ** 2, Status.INDEFINITE, "positive definite"),
    (lambda z: z[0], Status.MAX_STEPS, "max_steps"),
]


@pytest.fixture(scope="module")
def failing():
    """One target for all the failures, so that they are one program: its data choose among them."""
    densities = [log_density for log_density, _, _ in FAILURES]
    return vi.target(
        lambda v, z, d: jax.lax.switch(d, densities, z["z"]),
        {"z": vi.Latent((2,))},
        data=jnp.int32(0),
    )


@pytest.mark.parametrize("case", range(len(FAILURES)))
def test_failures_are_told(failing, case):
    """A density that is nowhere finite, one flat along a line, and one without a mode."""
    _, status, told = FAILURES[case]
    solution = vi.solvers.laplace(failing, KEY, jnp.int32(case), lanes=2, max_steps=10)
    assert solution.info.status == status
    assert told in str(solution)
    assert np.all(np.isfinite(values_of(solution)["scale_tril"]))


@pytest.mark.parametrize(
    ("options", "kind", "fragment"),
    [
        ({"lanes": 0}, ValueError, "lanes"),
        ({"max_steps": 0}, ValueError, "max_steps"),
        ({"init": {"y": 0.0}}, KeyError, "y"),
        ({"key": 0}, TypeError, "key"),
        ({"data": {"means": MEAN}}, KeyError, "means"),
        ({"target": 3}, TypeError, "Target"),
    ],
)
def test_wrong_arguments_are_refused(gaussian, options, kind, fragment):
    with pytest.raises(kind, match=fragment):
        vi.solvers.laplace(**{"target": gaussian, "key": KEY} | options)
