"""Batch and match and Gaussian score matching, against their equations, quadrature and closed
forms."""

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from numpyro import distributions as dist
from numpyro.distributions import constraints

import vi_params as vi
from vi_params.solvers.score_updates import (
    LowRank,
    factor_analysis,
    low_rank_rule,
    match,
    score_match,
    solve_full,
    solve_small,
)

enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64

KEY = jax.random.key(0)
Status = vi.SolverStatus

MEAN = np.array([3.0, -200.0, 0.02])
UNITS = np.array([1.0, 50.0, 1e-3])
CORRELATION = np.array([[1.0, 0.8, 0.3], [0.8, 1.0, 0.1], [0.3, 0.1, 1.0]])
COVARIANCE = UNITS[:, None] * CORRELATION * UNITS
STANDARD = {"loc": np.zeros(3), "scale": np.ones(3)}
UNIT_STARTS = {"loc": MEAN + UNITS, "scale": UNITS}


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


def test_the_matched_covariance_solves_its_equation():
    """S U S + S = V, in the form for large batches and in that for small ones."""
    with enable_x64(True):
        a, b = jax.random.normal(KEY, (2, 5, 5))
        v, columns = a @ a.T + jnp.eye(5), b[:, :3]
        u = columns @ columns.T
        for s in (solve_full(u, v), solve_small(columns, v)):
            np.testing.assert_allclose(s @ u @ s + s, v, atol=1e-10)
            assert np.linalg.eigvalsh(s)[0] > 0


@pytest.mark.parametrize("batch", [3, 9])
def test_the_step_minimises_the_divergence(batch):
    """No other Gaussian nearby has a smaller score divergence plus (2 / lambda) KL(old, new)."""
    with enable_x64(True):
        e, h = jax.random.normal(jax.random.key(batch), (2, batch, 4))
        weight = 0.7

        def loss(mean, covariance):
            inverse = jnp.linalg.inv(covariance)
            r = (e - mean) @ inverse + h
            divergence = jnp.mean(jnp.sum((r @ covariance) * r, axis=1))
            old, new = dist.MultivariateNormal(0.0, jnp.eye(4)), dist.MultivariateNormal
            kl = dist.kl_divergence(old.expand(()), new(mean, covariance))
            return divergence + 2 / weight * kl

        mean, covariance = match(e, h, jnp.float64(weight))
        slope = jax.jit(jax.grad(loss, (0, 1)))(mean, covariance)
        np.testing.assert_allclose(slope[0], np.zeros(4), atol=1e-10)
        np.testing.assert_allclose(slope[1] + slope[1].T, np.zeros((4, 4)), atol=1e-10)


def test_score_matching_is_the_limit_of_batch_and_match():
    """A batch of one and lambda to infinity: the score at the draw is then matched exactly."""
    with enable_x64(True):
        e, h = jax.random.normal(KEY, (2, 1, 4))
        mean, covariance = score_match(e, h, jnp.float64(jnp.inf).clip(max=1e12))
        limit, spread = match(e, h, jnp.float64(1e10))
        np.testing.assert_allclose(mean, limit, atol=1e-6)
        np.testing.assert_allclose(covariance, spread, atol=1e-6)
        np.testing.assert_allclose(jnp.linalg.solve(covariance, mean - e[0]), h[0], atol=1e-6)


@pytest.mark.parametrize("solver", ["batch_and_match", "score_matching"])
def test_a_gaussian_is_exact(gaussian, solver):
    """From a standard normal 200,000 of its units away, without tuning."""
    with enable_x64(True):
        solution = getattr(vi.solvers, solver)(gaussian, KEY, init=STANDARD, max_steps=3000)
        found = jax.tree.map(np.asarray, values_of(solution))
    assert solution.info.status == Status.CONVERGED
    np.testing.assert_allclose((found["loc"] - MEAN) / UNITS, np.zeros(3), atol=0.03)
    covariance = found["scale_tril"] @ found["scale_tril"].T
    np.testing.assert_allclose(covariance / UNITS / UNITS[:, None], CORRELATION, atol=0.05)
    assert float(solution.info.details.residual) < 1e-2


@pytest.mark.slow
def test_the_units_do_not_matter_in_float32(gaussian):
    """A first Gaussian from Newton steps, exact covariances from one batch, and a small k-hat."""
    solution = vi.solvers.batch_and_match(gaussian, KEY)
    found = values_of(solution)
    covariance = found["scale_tril"] @ found["scale_tril"].T
    np.testing.assert_allclose(covariance / UNITS / UNITS[:, None], CORRELATION, atol=5e-3)
    assert vi.diagnose(gaussian, solution.guide, solution.params, KEY).trustworthy


def gamma():
    return vi.target(
        lambda v, z, d: dist.Gamma(3.0, 2.0).log_prob(z["rate"]),
        {"rate": vi.Latent((), constraints.positive)},
    )


def test_the_fixed_point_of_a_gamma_posterior():
    """On its logarithm v the score is a - b exp(v): the fixed point has E[score] = 0 and
    Var(score) = 1 / s^2 under N(m, s^2), both known in closed form."""
    a, b = 3.0, 2.0

    def equations(x):
        mean, s = x[0], np.exp(x[1])
        first = b * np.exp(mean + s**2 / 2)
        return [a - first, s**2 * first**2 * np.expm1(s**2) - 1]

    mean, log_s = scipy.optimize.root(equations, [0.3, -0.5]).x
    target = gamma()
    first = {"loc": np.zeros(1), "scale": np.ones(1)}
    solution = vi.solvers.batch_and_match(target, KEY, init=first, tolerance=0.004, max_steps=4000)
    found = values_of(solution)
    assert solution.info.status == Status.CONVERGED
    assert solution.info.sampling_error < 0.004
    assert abs(found["loc"][0] - mean) < 4 * 0.004 * np.exp(log_s)
    np.testing.assert_allclose(np.log(found["scale_tril"][0, 0]), log_s, atol=0.03)


W = jnp.array([[1.0, -2.0, 0.5, 1.5, 0.0]]).T
PSI = jnp.array([1.0, 0.5, 2.0, 1.0, 0.3])


def test_factor_analysis_finds_a_factor_model():
    """A covariance of low rank plus diagonal is its own projection."""
    dense = jnp.diag(PSI) + W @ W.T
    f, psi = factor_analysis(
        lambda y: dense @ y,
        jnp.diagonal(dense),
        0.1 * jax.random.normal(KEY, (5, 1)),
        jnp.ones(5),
        sweeps=500,
    )
    np.testing.assert_allclose(f @ f.T + jnp.diag(psi), dense, atol=2e-2)


def test_the_patch_is_the_dense_step_projected():
    """One low-rank update has the location of the dense one, and its marginal variances."""
    with enable_x64(True):
        e, h = jax.random.normal(KEY, (2, 6, 3))
        scale, factor = jnp.array([1.0, 10.0, 0.1]), jax.random.normal(KEY, (3, 3))
        q = LowRank(jnp.zeros(3), scale, factor)
        c = jax.vmap(lambda e: low_rank_rule(3, 3).push(q, e))(jnp.eye(3)).T
        g = h / scale
        mean, covariance = match(e, g @ c, jnp.float64(1.0))
        new = low_rank_rule(3, 3).update(q, e, g, jnp.float64(1.0))
        np.testing.assert_allclose(new.loc / scale, c @ mean / scale, atol=1e-9)
        wide = new.scale[:, None] * new.factor
        found = wide @ wide.T + jnp.diag(new.scale**2)
        np.testing.assert_allclose(
            np.diagonal(found) / scale**2, np.diagonal(c @ covariance @ c.T) / scale**2, rtol=0.02
        )


@pytest.mark.slow
def test_low_rank_reaches_a_factor_model():
    """A Gaussian of the family itself: location and covariance are found."""
    dense = jnp.diag(PSI) + W @ W.T
    target = vi.target(
        lambda v, z, d: dist.MultivariateNormal(jnp.ones(5), dense).log_prob(z["z"]),
        {"z": vi.Latent((5,))},
    )
    start = {"loc": np.zeros(5), "scale": np.ones(5)}
    solution = vi.solvers.batch_and_match(target, KEY, rank=1, init=start)
    found = values_of(solution)
    assert solution.info.status == Status.CONVERGED
    wide = found["scale"][:, None] * found["factor"]
    np.testing.assert_allclose(found["loc"], np.ones(5), atol=0.05)
    np.testing.assert_allclose(wide @ wide.T + jnp.diag(found["scale"] ** 2), dense, atol=0.1)


def test_vmap_over_keys_and_data_equals_the_loop(gaussian, compilations):
    """Many solutions are one program, equal to one at a time; a second one compiles nothing."""
    means = jnp.stack([MEAN, MEAN + UNITS])
    keys = jax.random.split(KEY, 2)

    def solve(key, mean):
        return vi.solvers.batch_and_match(gaussian, key, {"mean": mean}, init=UNIT_STARTS)[1:3]

    params, info = jax.vmap(solve)(keys, means)
    assert np.all(info.status == Status.CONVERGED)
    for i in range(2):
        one, _ = solve(keys[i], means[i])
        for leaf, other in zip(jax.tree.leaves(one), jax.tree.leaves(params), strict=True):
            np.testing.assert_allclose(leaf, other[i], rtol=2e-2, atol=2e-3)
    key, data = keys[0], {"mean": means[1]}
    given = jax.tree.map(jnp.asarray, UNIT_STARTS)
    vi.solvers.batch_and_match(gaussian, keys[1], data, init=given)
    with compilations() as seen:
        vi.solvers.batch_and_match(gaussian, key, data, init=given)
    assert seen == []


FAILURES = [
    (lambda z: jnp.log(-1.0 - z[0] ** 2), 500, Status.INVALID_START, "vi.check"),
    (lambda z: 0.0 * z[0], 500, Status.DIVERGED, "improper"),
    (lambda z: -jnp.cosh(z[0]) - z[1] ** 2, 3, Status.MAX_STEPS, "max_steps"),
]


@pytest.fixture(scope="module")
def failing():
    """One target for all the failures: its data choose among them."""
    densities = [log_density for log_density, *_ in FAILURES]
    return vi.target(
        lambda v, z, d: jax.lax.switch(d, densities, z["z"]),
        {"z": vi.Latent((2,))},
        data=jnp.int32(0),
    )


@pytest.mark.parametrize("case", range(len(FAILURES)))
def test_failures_are_told(failing, case):
    """A density that is nowhere finite, an improper one, and too few steps."""
    _, max_steps, status, told = FAILURES[case]
    start = {"loc": np.zeros(2), "scale": np.ones(2)}
    solution = vi.solvers.batch_and_match(
        failing, KEY, jnp.int32(case), init=start, max_steps=max_steps
    )
    assert solution.info.status == status
    assert told in str(solution)


@pytest.mark.slow
def test_parameters_of_the_model_are_kept():
    """They come with a solution; without one there is nothing to keep them at."""
    target = vi.target(
        lambda v, z, d: dist.Normal(v["mu"], 1.0).log_prob(z["z"]).sum(),
        {"z": vi.Latent((2,))},
        declared={"mu": 2.5},
    )
    with pytest.raises(ValueError, match="init=, a Solution"):
        vi.solvers.batch_and_match(target, KEY)
    guide = vi.guides.mean_field(target)
    params = vi.init_params({**target.declared, **guide.declared}, KEY)
    first = vi.Solution(guide, params, None, jnp.zeros((0, 2)))
    solution = vi.solvers.batch_and_match(target, KEY, init=first)
    assert solution.params["mu"] == 2.5
    np.testing.assert_allclose(values_of(solution)["loc"], [2.5, 2.5], atol=1e-2)


@pytest.mark.parametrize(
    ("options", "kind", "fragment"),
    [
        ({"batch": 1}, ValueError, "batch"),
        ({"max_steps": 0}, ValueError, "max_steps"),
        ({"rank": 4}, ValueError, "rank"),
        ({"rank": 0}, ValueError, "rank"),
        ({"tolerance": 0.0}, ValueError, "tolerance"),
        ({"init": {"y": 0.0}}, KeyError, "y"),
        ({"init": {"loc": np.zeros(3), "scal": np.ones(3)}}, KeyError, "scale"),
        ({"init": {"loc": np.zeros(2), "scale": np.ones(2)}}, ValueError, "wrong shape"),
        ({"init": {"loc": np.zeros(3), "scale": -np.ones(3)}}, ValueError, "positive"),
        ({"init": {"loc": np.full(3, np.nan), "scale": np.ones(3)}}, ValueError, "finite"),
        ({"init": {"loc": np.zeros(3), "scale_tril": np.ones((3, 3))}}, ValueError, "cholesky"),
        ({"init": 3}, TypeError, "start strategy"),
        ({"key": 0}, TypeError, "key"),
        ({"data": {"means": MEAN}}, KeyError, "means"),
        ({"target": 3}, TypeError, "Target"),
    ],
)
def test_wrong_arguments_are_refused(gaussian, options, kind, fragment):
    with pytest.raises(kind, match=fragment):
        vi.solvers.batch_and_match(**{"target": gaussian, "key": KEY} | options)


def test_a_latent_may_be_called_loc():
    target = vi.target(
        lambda v, z, d: dist.Normal(3.0, 1.0).log_prob(z["loc"]), {"loc": vi.Latent(())}
    )
    solution = vi.solvers.batch_and_match(target, KEY, init={"loc": 2.0})
    np.testing.assert_allclose(values_of(solution)["loc"], [3.0], atol=0.05)
