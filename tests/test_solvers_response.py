"""Linear response without the Hessian as a matrix, against closed forms and the dense one."""

import importlib

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.distributions import constraints

import vi_params as vi
from vi_params.solvers import fixed_draws

enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64

KEY = jax.random.key(0)
DIM, FACTORS = 30, 2
Status = vi.SolverStatus


def factor_gaussian():
    """A Gaussian in 30 dimensions, whose precision is a diagonal minus two directions."""
    rng = np.random.default_rng(0)
    units = np.exp(rng.normal(size=DIM))
    loadings = 2.0 * rng.normal(size=(DIM, FACTORS))
    covariance = units[:, None] * (np.eye(DIM) + loadings @ loadings.T) * units
    mean = rng.normal(size=DIM)

    def log_density(values, latents, data):
        centred = latents["z"] - data["mean"]
        return -0.5 * centred @ data["precision"] @ centred

    data = {"mean": jnp.asarray(mean), "precision": jnp.asarray(np.linalg.inv(covariance))}
    return vi.target(log_density, {"z": vi.Latent((DIM,))}, data=data), mean, covariance


def counts():
    """A posterior with a positive latent and two normal ones, not Gaussian."""

    def log_density(values, latents, data):
        rate, z = latents["rate"], latents["z"]
        prior = -rate - 0.5 * jnp.sum(z**2)
        means = rate * jnp.exp(0.3 * z[0] + 0.3 * z[1] * data["x"])
        return prior + jnp.sum(data["y"] * jnp.log(means) - means)

    latents = {"rate": vi.Latent((), constraints.positive), "z": vi.Latent((2,))}
    data = {"x": jnp.linspace(-1.0, 1.0, 6), "y": jnp.array([2.0, 4.0, 3.0, 5.0, 6.0, 9.0])}
    return vi.target(log_density, latents, data=data)


def values_of(solution):
    return vi.constrain(solution.guide.declared, solution.params)["guide"]


def covariance_of(solution):
    """That of a low-rank family, or of a full-rank one."""
    own = values_of(solution)
    if "scale_tril" in own:
        return own["scale_tril"] @ own["scale_tril"].T
    scaled = own["scale"][:, None] * own["factor"]
    return np.diag(own["scale"] ** 2) + scaled @ scaled.T


def test_the_largest_directions_of_a_gaussian_are_found():
    """In units of the mean-field scales: the largest eigenvalues and the sum of all."""
    with enable_x64(True):
        target, mean, covariance = factor_gaussian()
        solution = vi.solvers.deterministic(target, KEY, tolerance=1e-10)
        found = vi.linear_response(target, solution, rank=FACTORS)
        approximate = covariance_of(found)
        # Compared in units where mean-field is the identity: the eigenvalues of S.
        unit = np.asarray(values_of(solution)["scale"])
        exact = np.linalg.eigvalsh(covariance / unit / unit[:, None])
        near = np.linalg.eigvalsh(approximate / unit / unit[:, None])
        np.testing.assert_allclose(values_of(found)["loc"], mean, atol=1e-5)
        np.testing.assert_allclose(near[-FACTORS:], exact[-FACTORS:], rtol=1e-2)
        np.testing.assert_allclose(near.sum(), exact.sum(), rtol=2e-2)
        assert found.info.status == Status.CONVERGED
        assert found.info.sampling_error < 1e-3


@pytest.mark.slow
def test_all_directions_are_the_dense_covariance():
    with enable_x64(True):
        target, _, covariance = factor_gaussian()
        solution = vi.solvers.deterministic(target, KEY)
        found = vi.linear_response(target, solution, rank=DIM)
        approximate = covariance_of(found)
        units = np.sqrt(np.diagonal(covariance))
        np.testing.assert_allclose(
            approximate / units / units[:, None], covariance / units / units[:, None], atol=5e-3
        )


def test_quantities_of_a_gaussian_are_exact():
    with enable_x64(True):
        target, mean, covariance = factor_gaussian()
        solution = vi.solvers.deterministic(target, KEY)
        weights = np.random.default_rng(1).normal(size=(2, DIM))

        def quantity(latents):
            return {"first": weights[0] @ latents["z"], "both": weights @ latents["z"]}

        found = vi.quantity_response(target, solution, quantity)
        exact = weights @ covariance @ weights.T
        np.testing.assert_allclose(found.mean["both"], weights @ mean, rtol=1e-4)
        np.testing.assert_allclose(found.sd["first"], exact[0, 0] ** 0.5, rtol=1e-3)
        # Flattened: "both" comes before "first".
        np.testing.assert_allclose(found.covariance[:2, :2], exact, rtol=5e-3)
        assert found.sampling_error["both"].shape == (2,)
        assert found.status == Status.CONVERGED


def test_quantities_agree_with_the_dense_response():
    """The locations are quantities too: their covariances are those of the dense Gaussian."""
    with enable_x64(True):
        target = counts()
        solution = vi.solvers.deterministic(target, KEY)
        dense = vi.linear_response(target, solution)

        def quantity(latents):
            return jnp.log(latents["rate"]), latents["z"]

        found = vi.quantity_response(target, solution, quantity)
        np.testing.assert_allclose(found.covariance, covariance_of(dense), rtol=1e-2, atol=1e-4)
        larger = jnp.max(jnp.concatenate([jnp.ravel(e) for e in found.sampling_error]))
        sd = jnp.max(jnp.concatenate([jnp.ravel(e) for e in found.sd]))
        assert 0 < larger < sd * dense.info.sampling_error * 3


@pytest.mark.slow
def test_it_is_pure():
    """Under jit and vmap over data."""
    target = counts()

    @jax.jit
    @jax.vmap
    def sds(y):
        data = {**target.data, "y": y}
        solution = vi.solvers.deterministic(target, KEY, data)
        found = vi.quantity_response(target, solution, lambda z: z["rate"], data)
        low = vi.linear_response(target, solution, data, rank=1)
        return found.sd, low.info.status

    ys = jnp.stack([target.data["y"], 2 * target.data["y"]])
    sd, status = sds(ys)
    assert sd[1] > sd[0] > 0
    assert list(status) == [Status.CONVERGED, Status.CONVERGED]


@pytest.mark.parametrize(
    ("quantity", "message"),
    [(lambda z: {}, "floating-point"), (lambda z: z["rate"] > 1.0, "floating-point")],
)
def test_a_quantity_has_numbers(quantity, message):
    target = counts()
    solution = vi.solvers.deterministic(target, KEY)
    with pytest.raises(ValueError, match=message):
        vi.quantity_response(target, solution, quantity)


def test_the_rank_is_checked():
    target = counts()
    solution = vi.solvers.deterministic(target, KEY)
    with pytest.raises(ValueError, match="rank"):
        vi.linear_response(target, solution, rank=4)
    with pytest.raises(ValueError, match="mean-field"):
        vi.quantity_response(target, vi.linear_response(target, solution), lambda z: z["rate"])


def test_hessians_at_few_draws():
    """Of a Gaussian they give the exact covariances; else those of all draws roughly, and exactly
    where as many are asked for. Gradients are those of all draws."""
    with enable_x64(True):
        target, _, covariance = factor_gaussian()
        solution = vi.solvers.deterministic(target, KEY)._replace(response=None)
        found = vi.linear_response(target, solution, num_hessians=2)
        units = np.sqrt(np.diagonal(covariance))
        np.testing.assert_allclose(
            covariance_of(found) / units / units[:, None],
            covariance / units / units[:, None],
            atol=1e-3,
        )
        solution = vi.solvers.deterministic(counts(), KEY)._replace(response=None)
        of_all = vi.linear_response(counts(), solution)
        of_more = vi.linear_response(counts(), solution, num_hessians=100)
        of_few = vi.linear_response(counts(), solution, num_hessians=8)
        np.testing.assert_allclose(covariance_of(of_more), covariance_of(of_all), rtol=1e-12)
        error = np.abs(covariance_of(of_few) - covariance_of(of_all))
        sd = np.sqrt(np.diagonal(covariance_of(of_all)))
        assert 1e-6 < np.max(error / sd / sd[:, None]) < 0.1
        np.testing.assert_allclose(of_few.slopes.gradient, of_all.slopes.gradient, rtol=1e-10)
        np.testing.assert_allclose(of_few.info.sampling_error, of_all.info.sampling_error, rtol=0.5)


def test_few_hessians_of_collinear_latents():
    """Strong correlations average out over many draws only; few leave covariances exact, too."""
    with enable_x64(True):
        precision = jnp.eye(40) + jnp.ones((40, 40))
        target = vi.target(
            lambda v, z, d: -0.5 * z["z"] @ precision @ z["z"], {"z": vi.Latent((40,))}
        )
        solution = vi.solvers.deterministic(target, KEY)
        found = vi.linear_response(target, solution, num_hessians=4)
        assert found.info.status == Status.CONVERGED
        np.testing.assert_allclose(covariance_of(found), np.linalg.inv(precision), atol=1e-3)


def steep():
    """Forty latents that are no Gaussian: the solver holds no Hessian of them."""
    return vi.target(
        lambda v, z, d: jnp.sum(2.0 * z["z"] - jnp.exp(z["z"])), {"z": vi.Latent((40,))}
    )


@pytest.mark.parametrize("number", [2, 4, 6, 8])
def test_few_hessians_are_computed_by_draws(number, monkeypatch):
    """However many, a part has whole pairs: by columns they take twice as many products."""
    seen = []

    def exists(*args):
        seen.append(fixed_draws.exists(*args))
        return seen[-1]

    # The package has a function of the module's name.
    module = importlib.import_module("vi_params.solvers.linear_response")
    monkeypatch.setattr(module, "exists", exists)
    target = steep()
    vi.linear_response(target, vi.solvers.deterministic(target, KEY), num_hessians=number)
    assert seen
    assert all(seen)


def test_few_hessians_within_another_program():
    """Of a solution that is an argument, and of one that is known."""
    with enable_x64(True):
        target = steep()
        solution = vi.solvers.deterministic(target, KEY)

        def respond(params, noise):
            given = solution._replace(params=params, noise=noise)
            return vi.linear_response(target, given, num_hessians=8).params

        expected = respond(solution.params, solution.noise)
        for found in (
            jax.jit(respond)(solution.params, solution.noise),
            jax.jit(lambda x: respond(solution.params, solution.noise))(0.0),
        ):
            jax.tree.map(
                lambda got, wanted: np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-9),
                found,
                expected,
            )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_hessians": 0}, ">= 2"),
        ({"num_hessians": 3}, "num_hessians=3, rank=None"),
        ({"num_hessians": 2, "rank": 1}, "num_hessians=2, rank=1"),
    ],
)
def test_the_number_of_hessians_is_checked(options, message):
    target = counts()
    solution = vi.solvers.deterministic(target, KEY)
    with pytest.raises(ValueError, match=message):
        vi.linear_response(target, solution, **options)
    with pytest.raises(ValueError, match=message):
        vi.solvers.refine(target, KEY, init=solution, **options)


@jax.custom_vjp
def once_only(x):
    """A log density with a gradient and no forward derivative."""
    return -0.5 * jnp.sum((x - 1.0) ** 2 / jnp.array([1.0, 1e-2])) - 0.1 * x[0] * x[1]


def _forward(x):
    return once_only(x), x


def _backward(x, cotangent):
    scaled = (x - 1.0) / jnp.array([1.0, 1e-2])
    return (-cotangent * (scaled + 0.1 * x[::-1]),)


once_only.defvjp(_forward, _backward)


def test_densities_without_second_derivatives():
    """A Gaussian, solved by differences of its gradients, densely and by directions."""
    with enable_x64(True):
        target = vi.target(lambda v, z, d: once_only(z["z"]), {"z": vi.Latent((2,))})
        with pytest.raises(TypeError):
            jax.hessian(once_only)(jnp.zeros(2))
        precision = np.array([[1.0, 0.1], [0.1, 100.0]])
        mean = np.linalg.solve(precision, np.array([1.0, 100.0]))
        covariance = np.linalg.inv(precision)
        solution = vi.solvers.deterministic(target, KEY)
        dense = vi.linear_response(target, solution)
        np.testing.assert_allclose(covariance_of(dense), covariance, rtol=1e-3)
        of_few = vi.linear_response(target, solution, num_hessians=2)
        np.testing.assert_allclose(covariance_of(of_few), covariance, rtol=1e-3)
        found = vi.quantity_response(target, solution, lambda z: z["z"])
        np.testing.assert_allclose(found.mean, mean, rtol=1e-5)
        np.testing.assert_allclose(found.covariance, covariance, rtol=1e-3)
        laplace = vi.solvers.laplace(target, KEY)
        np.testing.assert_allclose(covariance_of(laplace), covariance, rtol=1e-3)
        assert solution.info.status == dense.info.status == laplace.info.status == Status.CONVERGED
