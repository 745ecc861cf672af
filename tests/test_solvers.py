"""Fixed draws, Newton steps and linear response, against closed forms and scipy."""

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
from vi_params.solvers.solution import MESSAGES
from vi_params.solvers.trust_region import matrix_free, minimise

enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64

KEY = jax.random.key(0)
Status = vi.SolverStatus

MEAN = np.array([3.0, -200.0, 0.02])
UNITS = np.array([1.0, 50.0, 1e-3])
CORRELATION = np.array([[1.0, 0.8, 0.3], [0.8, 1.0, 0.1], [0.3, 0.1, 1.0]])
COVARIANCE = UNITS[:, None] * CORRELATION * UNITS


def gaussian():
    """A correlated Gaussian whose units differ by a factor of 50,000."""
    covariance = jnp.asarray(COVARIANCE)

    def log_density(values, latents, data):
        return dist.MultivariateNormal(data["mean"], covariance).log_prob(latents["z"])

    return vi.target(log_density, {"z": vi.Latent((3,))}, data={"mean": jnp.asarray(MEAN)})


def values_of(solution):
    own = {"guide": solution.params["guide"]}
    return vi.constrain(solution.guide.declared, own)["guide"]


def test_mean_field_of_a_gaussian_is_exact():
    """The locations are the means, the scales 1 / sqrt(P_jj), and the ELBO is minus the divergence
    between the two Gaussians."""
    with enable_x64(True):
        solution = vi.solvers.deterministic(gaussian(), KEY, tolerance=1e-14)
        found = values_of(solution)
        precision = np.linalg.inv(COVARIANCE)
        np.testing.assert_allclose(found["loc"], MEAN, atol=1e-8 * UNITS[1])
        np.testing.assert_allclose(found["scale"], np.diagonal(precision) ** -0.5, rtol=1e-4)
        precision = np.linalg.inv(CORRELATION)
        divergence = 0.5 * np.linalg.slogdet(CORRELATION)[1]
        divergence += 0.5 * np.sum(np.log(np.diagonal(precision)))
        np.testing.assert_allclose(solution.info.elbo, -divergence, atol=1e-6)
    assert solution.info.status == Status.CONVERGED
    assert solution.noise.shape == (32, 3)


@pytest.mark.parametrize("scheme", [None, vi.noise.moment_matched()])
def test_linear_response_of_a_gaussian_is_exact(scheme):
    """The corrected covariance is the target's own, k-hat is small, the log evidence is zero."""
    target = gaussian()
    solution = vi.solvers.deterministic(target, KEY, noise=scheme)
    solution = vi.linear_response(target, solution)
    found = values_of(solution)
    np.testing.assert_allclose((found["loc"] - MEAN) / UNITS, np.zeros(3), atol=1e-2)
    covariance = found["scale_tril"] @ found["scale_tril"].T
    np.testing.assert_allclose(covariance / UNITS / UNITS[:, None], CORRELATION, atol=2e-3)
    diagnosis = vi.diagnose(target, solution.guide, solution.params, KEY)
    assert diagnosis.trustworthy
    assert abs(float(diagnosis.log_evidence)) < 1e-2
    assert solution.info.sampling_error < 1e-2


def regression(x, y):
    slope = numpyro.sample("slope", dist.Normal(0.0, 10.0).expand([2]).to_event(1))
    noise = numpyro.sample("noise", dist.HalfNormal(5.0))
    numpyro.sample("y", dist.Normal(x @ slope, noise), obs=y)


X = np.array(jax.random.normal(jax.random.key(7), (40, 2))) * np.array([1.0, 1000.0])
Y = X @ np.array([1.0, -0.002]) + 0.5 * np.array(jax.random.normal(jax.random.key(8), (40,)))


def test_a_regression_in_raw_units():
    """Columns a thousand apart: the slopes are those of least squares (the prior is wide), their
    standard errors too."""
    target = vi.from_numpyro(regression, X, Y)
    solution = vi.linear_response(target, vi.solvers.deterministic(target, KEY))
    assert solution.info.status == Status.CONVERGED
    draws = vi.draws(target, solution.guide, solution.params, KEY, 10_000)
    slope = np.linalg.lstsq(X, Y, rcond=None)[0]
    s2 = np.sum((Y - X @ slope) ** 2) / (len(Y) - 2)
    error = np.sqrt(s2 * np.diagonal(np.linalg.inv(X.T @ X)))
    np.testing.assert_allclose((draws["slope"].mean(0) - slope) / error, np.zeros(2), atol=0.1)
    np.testing.assert_allclose(draws["slope"].std(0), error, rtol=0.1)


def test_flat_priors_on_data_in_dollars():
    """Ordinary least squares tells the posterior: coefficients normal about theirs, given noise
    whose square is inverse gamma. The start is 10^5 times as far away as the answer is wide."""
    rng = np.random.default_rng(0)
    height = np.round(rng.normal(66.6, 3.8, 1192))
    earnings = np.maximum(0, -60000 + 1250 * height + 19000 * rng.normal(size=1192))

    def model(height, earnings):
        flat = dist.ImproperUniform(constraints.real_vector, (), (2,))
        beta = numpyro.sample("beta", flat)
        sigma = numpyro.sample("sigma", dist.ImproperUniform(constraints.positive, (), ()))
        mean = beta[0] + beta[1] * height
        numpyro.sample("earnings", dist.Normal(mean, sigma).to_event(1), obs=earnings)

    design = np.stack([np.ones_like(height), height], 1)
    beta, (residuals,), *_ = np.linalg.lstsq(design, earnings, rcond=None)
    noise = np.sqrt(residuals / 1189)  # where the density of log sigma is largest
    errors = noise * np.sqrt(np.diagonal(np.linalg.inv(design.T @ design)))
    with enable_x64(True):
        target = vi.from_numpyro(model, height, earnings)
        solution = vi.linear_response(target, vi.solvers.deterministic(target, KEY))
        found = jax.device_get(values_of(solution))
        spread = np.sqrt(np.sum(np.square(found["scale_tril"]), axis=1))
    assert solution.info.status == Status.CONVERGED
    np.testing.assert_allclose((found["loc"][:2] - beta) / errors, np.zeros(2), atol=0.02)
    np.testing.assert_allclose(spread[:2], errors, rtol=0.01)
    np.testing.assert_allclose(found["loc"][2], np.log(noise), atol=1e-3)
    np.testing.assert_allclose(spread[2], 1 / np.sqrt(2 * 1192), rtol=0.01)


def test_model_parameters_are_optimised_along():
    """y_i ~ N(z_i, 1), z_i ~ N(mu, 1): the mean mu that maximises the evidence is that of y."""
    y = jnp.array([0.5, 2.0, -1.0, 4.0])

    def log_density(values, latents, data):
        prior = dist.Normal(values["mu"], 1.0).log_prob(latents["z"]).sum()
        return prior + dist.Normal(latents["z"], 1.0).log_prob(data).sum()

    target = vi.target(log_density, {"z": vi.Latent((4,))}, declared={"mu": 0.0}, data=y)
    solution = vi.linear_response(target, vi.solvers.deterministic(target, KEY))
    np.testing.assert_allclose(solution.params["mu"], y.mean(), atol=1e-3)
    evidence = dist.Normal(y.mean(), np.sqrt(2.0)).log_prob(y).sum()
    np.testing.assert_allclose(solution.info.elbo, evidence, atol=1e-3)
    np.testing.assert_allclose(values_of(solution)["loc"], (y + y.mean()) / 2, atol=1e-3)


def test_vmap_over_keys_and_data():
    """A solution is a function of key and data: many are one program, equal to one at a time."""
    target = gaussian()

    def solve(key, mean):
        solution = vi.solvers.deterministic(target, key, {"mean": mean})
        return vi.linear_response(target, solution, {"mean": mean})[1:3]

    means = jnp.stack([MEAN + i * UNITS for i in range(3)])
    params, info = jax.vmap(solve)(jax.random.split(KEY, 3), means)
    np.testing.assert_allclose(
        (params["guide"]["loc"] - means) / UNITS, np.zeros((3, 3)), atol=2e-2
    )
    assert np.all(info.status == Status.CONVERGED)
    assert info.message == f"3 x {MESSAGES[Status.CONVERGED]}"


def test_a_second_solution_compiles_nothing(compilations):
    """The same target with other data of the same shapes: the programs are there."""
    target = gaussian()
    vi.linear_response(target, vi.solvers.deterministic(target, KEY))
    key, other = jax.random.key(3), {"mean": jnp.asarray(MEAN + UNITS)}
    with compilations() as seen:
        solution = vi.solvers.deterministic(target, key, other)
        vi.linear_response(target, solution, other)
    assert seen == []
    np.testing.assert_allclose((values_of(solution)["loc"] - MEAN) / UNITS, np.ones(3), atol=2e-2)


def rosenbrock(x):
    return jnp.sum(100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (1.0 - x[:-1]) ** 2)


@pytest.mark.parametrize("unit", [1.0, 1e-3])
def test_minimum_of_rosenbrock(unit):
    """A curved valley, as scipy's trust-ncg finds it, whatever the units of x."""
    start = jnp.array([-1.2, 1.0, 0.5, -0.7])
    found = jax.jit(
        lambda x: minimise(
            matrix_free(lambda x: rosenbrock(x / unit)),
            x[None],
            lambda x: jnp.full(4, unit),
            tolerance=1e-6,
            max_steps=200,
        )
    )(start * unit)
    slope, curvature = jax.grad(rosenbrock), jax.hessian(rosenbrock)
    reference = scipy.optimize.minimize(
        rosenbrock, start, method="trust-ncg", jac=slope, hess=curvature
    )
    assert found.status == Status.CONVERGED
    np.testing.assert_allclose(found.x / unit, reference.x, atol=1e-2)
    assert found.steps < 60


def one_latent(log_density):
    return vi.target(lambda v, z, d: log_density(z["z"]), {"z": vi.Latent(())})


def test_invalid_starts_are_told():
    """A log density that is finite nowhere has no solution, and the message says where to look."""
    solution = vi.solvers.deterministic(one_latent(lambda z: jnp.log(-1.0 - z**2)), KEY)
    assert solution.info.status == Status.INVALID_START
    assert np.all(np.isnan(solution.info.lane_elbos))
    assert "vi.check" in solution.info.message


def test_too_few_steps_are_told():
    solution = vi.solvers.deterministic(gaussian(), KEY, max_steps=2)
    assert solution.info.status == Status.MAX_STEPS
    assert "max_steps" in str(solution)


def test_indefinite_hessians_are_told():
    """On a flat density no scale is best: what comes back is mean-field's, and is called so."""
    target = one_latent(lambda z: 0.0 * z)
    solution = vi.solvers.deterministic(target, KEY, max_steps=5)
    response = vi.linear_response(target, solution)
    assert response.info.status == Status.INDEFINITE
    np.testing.assert_allclose(
        values_of(response)["scale_tril"][0, 0], values_of(solution)["scale"][0], rtol=1e-5
    )


def test_the_best_of_several_optima_is_taken():
    """Two far modes, one with nine times the mass: lanes that end in the other are not chosen."""

    def log_density(z):
        return jnp.logaddexp(
            jnp.log(0.9) + dist.Normal(4.0, 0.5).log_prob(z),
            jnp.log(0.1) + dist.Normal(-4.0, 0.5).log_prob(z),
        )

    solutions = [
        vi.solvers.deterministic(one_latent(log_density), jax.random.key(i), lanes=8)
        for i in range(3)
    ]
    for solution in solutions:
        np.testing.assert_allclose(solution.info.elbo, np.nanmax(solution.info.lane_elbos))
        np.testing.assert_allclose(values_of(solution)["loc"], [4.0], atol=0.05)
    assert any(np.ptp(s.info.lane_elbos) > 1.0 for s in solutions)


@pytest.mark.parametrize(
    ("options", "kind", "fragment"),
    [
        ({"lanes": 0}, ValueError, "lanes"),
        ({"max_steps": 0}, ValueError, "max_steps"),
        ({"num_draws": 0}, ValueError, "num_draws"),
        ({"num_draws": 7}, ValueError, "even"),
        ({"init": {"y": 0.0}}, KeyError, "y"),
        ({"num_draws": 7, "noise": vi.noise.iid()}, ValueError, "even"),
        ({"tolerance": -1.0}, ValueError, "tolerance"),
        ({"key": 0}, TypeError, "key"),
        ({"target": 3}, TypeError, "Target"),
        ({"data": {"means": MEAN}}, KeyError, "means"),
        ({"data": vi.Batch({"mean": MEAN}, {"rows": np.arange(2)})}, ValueError, "all data"),
    ],
)
def test_wrong_arguments_are_refused(options, kind, fragment):
    with pytest.raises(kind, match=fragment):
        vi.solvers.deterministic(**{"target": gaussian(), "key": KEY} | options)


def test_an_array_that_gives_the_start_may_change():
    """Two optima, and the array that says which of them is near is written into."""
    target = one_latent(
        lambda z: jnp.logaddexp(
            dist.Normal(6.0, 0.5).log_prob(z), dist.Normal(-6.0, 0.5).log_prob(z)
        )
    )
    start = np.array(-5.0)
    for at in (-5.0, 5.0):
        start[...] = at
        solution = vi.solvers.deterministic(target, KEY, init={"z": start}, lanes=1)
        np.testing.assert_allclose(values_of(solution)["loc"], [1.2 * at], atol=0.01)


def test_one_pair_tells_no_sampling_error():
    target = gaussian()
    solution = vi.solvers.deterministic(target, KEY, num_draws=2)
    assert np.isnan(vi.linear_response(target, solution).info.sampling_error)


def test_linear_response_wants_a_mean_field_solution():
    target = gaussian()
    response = vi.linear_response(target, vi.solvers.deterministic(target, KEY))
    with pytest.raises(ValueError, match="mean-field solution at antithetic draws"):
        vi.linear_response(target, response)
    with pytest.raises(TypeError, match="Solution"):
        vi.linear_response(target, (1, 2))
    solution = vi.solvers.deterministic(target, KEY)
    with pytest.raises(KeyError, match="means"):
        vi.linear_response(target, solution, {"means": MEAN})


def test_supports_are_kept():
    """A gamma posterior on its logarithm: the mean of the draws is that of the closed form."""
    target = vi.target(
        lambda v, z, d: dist.Gamma(20.0, 4.0).log_prob(z["rate"]),
        {"rate": vi.Latent((), constraints.positive)},
    )
    solution = vi.linear_response(target, vi.solvers.deterministic(target, KEY))
    draws = vi.draws(target, solution.guide, solution.params, KEY, 20_000)
    np.testing.assert_allclose(draws["rate"].mean(), 5.0, rtol=0.02)
    np.testing.assert_allclose(draws["rate"].std(), np.sqrt(20.0) / 4.0, rtol=0.05)


def hierarchy():
    """Two latents, and a parameter of the model beside them."""

    def log_density(values, latents, data):
        prior = dist.Normal(values["shift"], 1.0).log_prob(latents["z"])
        return prior.sum() + dist.Normal(latents["z"], 0.5).log_prob(data).sum()

    return vi.target(
        log_density,
        {"z": vi.Latent((2,))},
        declared={"shift": vi.Param(jnp.zeros(()))},
        data=jnp.array([1.0, 3.0]),
    )


def test_fixed_parameters_stay():
    """The optimum of a conjugate model at a shift held; a free one is the mean of the data."""
    target = hierarchy()
    held = {"shift": jnp.float32(-1.0)}
    solution = vi.solvers.deterministic(target, KEY, fixed=held)
    np.testing.assert_array_equal(solution.params["shift"], -1.0)
    expected = (-1.0 + 4.0 * target.data) / 5.0
    np.testing.assert_allclose(values_of(solution)["loc"], expected, atol=1e-4)
    free = vi.solvers.deterministic(target, KEY)
    np.testing.assert_allclose(free.params["shift"], 2.0, atol=1e-2)
    response = vi.linear_response(target, solution)
    np.testing.assert_array_equal(response.params["shift"], -1.0)


def test_unknown_fixed_parameters_are_refused():
    with pytest.raises(KeyError, match="fixed"):
        vi.solvers.deterministic(hierarchy(), KEY, fixed={"shfit": jnp.zeros(())})


def test_a_solution_is_a_start():
    """From the optimum at few draws the one at more is a few steps away, and the same as from
    afar."""
    target = gaussian()
    few = vi.solvers.deterministic(target, KEY, num_draws=4, noise=vi.noise.moment_matched())
    warm = vi.solvers.deterministic(target, KEY, init=few, lanes=1)
    cold = vi.solvers.deterministic(target, KEY)
    assert warm.info.status == Status.CONVERGED
    assert warm.info.steps < cold.info.steps
    np.testing.assert_allclose(warm.info.elbo, cold.info.elbo, atol=1e-3)


def test_a_start_of_another_family_is_refused():
    target = gaussian()
    solution = vi.linear_response(target, vi.solvers.deterministic(target, KEY))
    with pytest.raises(ValueError, match="mean-field solution"):
        vi.solvers.deterministic(target, KEY, init=solution)


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"fixed": {"shift": jnp.zeros(2)}}, "fixed"),
        ({"init": vi.solvers.deterministic(gaussian(), KEY)}, "init"),
    ],
)
def test_parameters_of_other_shapes_are_refused(options, fragment):
    with pytest.raises(ValueError, match=rf"wrong shapes(.|\n)*{fragment}"):
        vi.solvers.deterministic(hierarchy(), KEY, **options)


def test_draws_are_doubled_while_they_are_too_few():
    """The mean-field optimum of log p = a'z - sum exp(b z): scales (a b)^-1/2 and locations
    (log(a / b) - b / 2 a) / b, exactly."""
    a, b = jnp.array([1.0, 2.0, 0.5, 3.0]), jnp.array([1.5, 1.0, 2.0, 3.0])
    target = vi.target(
        lambda values, latents, data: a @ latents["z"] - jnp.sum(jnp.exp(b * latents["z"])),
        {"z": vi.Latent((4,))},
    )
    exact = (jnp.log(a / b) - b / (2 * a)) / b
    rough = vi.solvers.deterministic(target, KEY, num_draws=4)
    known = vi.linear_response(target, rough)
    same = vi.solvers.refine(target, KEY, init=rough, tolerable=1e3)
    jax.tree.map(
        np.testing.assert_array_equal, (same.params, same.info), (known.params, known.info)
    )

    fine = vi.solvers.refine(target, KEY, init=rough, tolerable=0.01, doublings=6)
    assert len(fine.noise) == 256
    few = vi.solvers.refine(target, KEY, init=rough, tolerable=1e-6, doublings=1)
    assert len(few.noise) == 8
    some = vi.solvers.refine(target, KEY, init=rough, tolerable=0.06, doublings=6)
    assert 4 < len(some.noise) < 256
    assert some.info.sampling_error <= 0.06
    off = [np.abs(values_of(one)["loc"] - exact) * np.sqrt(a * b) for one in (known, fine)]
    assert off[0].max() > 0.3
    assert off[1].max() < 0.15
    # The scales that these four draws end at are out of proportion: at others they lead nowhere.
    key = jax.random.key(3)
    lost = vi.solvers.deterministic(target, key, num_draws=4, name="q")
    found = vi.solvers.refine(target, key, init=lost, tolerable=1e-6, doublings=1)
    assert found.info.status == Status.CONVERGED
    assert set(found.params) == {"q"}
    with pytest.raises(ValueError, match="tolerable > 0"):
        vi.solvers.refine(target, KEY, init=rough, tolerable=0.0)
    with pytest.raises(TypeError, match="init"):
        vi.solvers.refine(target, KEY, init=rough.params)
    with pytest.raises(TypeError, match="cannot depend on values that are traced"):
        jax.jit(lambda key: vi.solvers.refine(target, key, init=rough).params)(KEY)


def _responded(target, key):
    return vi.linear_response(target, vi.solvers.deterministic(target, key))


@pytest.mark.parametrize(
    "solve",
    [
        vi.solvers.deterministic,
        vi.solvers.laplace,
        vi.solvers.batch_and_match,
        vi.solvers.natural_gradient,
        vi.solvers.pathfinder,
        _responded,
    ],
)
def test_a_program_may_be_the_first_to_ask(solve):
    """What a solver keeps for the next call holds nothing of the program that it was built in."""
    target = vi.target(lambda v, z, d: -0.5 * jnp.sum(z["z"] ** 2), {"z": vi.Latent((2,))})
    inside = jax.jit(lambda key: solve(target, key).params)(jax.random.key(0))
    outside = solve(target, jax.random.key(0)).params
    jax.tree.map(lambda *leaves: np.testing.assert_allclose(*leaves, atol=1e-3), inside, outside)
