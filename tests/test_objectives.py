"""The ELBO: its value, its gradients, its estimators, against closed forms."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro import distributions as dist
from numpyro.distributions import constraints

import vi_params as vi

ESTIMATORS = {
    "pathwise": vi.estimators.pathwise(),
    "closed_form_entropy": vi.estimators.closed_form_entropy(),
    "sticking_the_landing": vi.estimators.sticking_the_landing(),
}
every_estimator = pytest.mark.parametrize("name", ESTIMATORS)

POINTS = np.array([(0.7, 0.5), (-1.0, 2.0), (0.0, 1.0)], np.float32)
MEAN, SCALE = 0.7, 0.5
LOG_SCALE = np.log(SCALE)


def standard_normal():
    return vi.target(lambda v, z, d: dist.Normal().log_prob(z["z"]).sum(), {"z": vi.Latent((1,))})


def at(objective, mean, scale):
    """The unconstrained parameters at which mean_field is N(mean, scale)."""
    values = {"guide": {"loc": jnp.full(1, mean), "scale": jnp.full(1, scale)}}
    return vi.unconstrain(objective.declared, values)


def divergence(mean, log_scale):
    """KL(N(mean, scale) || N(0, 1)), in nats."""
    return 0.5 * (mean**2 + np.e ** (2 * log_scale) - 1) - log_scale


@pytest.fixture(scope="module")
def gradients():
    """Per estimator, 100,000 single-draw gradients at each of three normals."""

    def of(estimator):
        target = standard_normal()
        objective = vi.elbo(target, vi.guides.mean_field(target), estimator=estimator)
        slope = jax.grad(lambda p, key: objective.loss(p, key)[0])
        keys = jax.random.split(jax.random.key(0), 100_000)

        def at_point(point):
            return jax.vmap(partial(slope, at(objective, *point)))(keys)["guide"]

        return jax.jit(partial(jax.lax.map, at_point))(POINTS)

    return {name: of(estimator) for name, estimator in ESTIMATORS.items()}


@every_estimator
def test_gradients_are_unbiased(gradients, name):
    """Each estimator's mean gradient is that of KL(N(m, s) || N(0, 1)) within four standard errors:
    m in the location and s^2 - 1 in log s (the scale is trained as its logarithm)."""
    means, scales = POINTS.T
    for leaf, exact in (("loc", means), ("scale", scales**2 - 1)):
        found = np.asarray(gradients[name][leaf], np.float64)[..., 0]
        error = found.std(axis=1) / np.sqrt(found.shape[1])
        assert np.all(abs(found.mean(axis=1) - exact) < 4 * error + 1e-6)


def test_estimators_differ_as_they_should(gradients):
    """At a draw z = m + s e of a Gaussian, log q = -e^2 / 2 - log s + const, so that the exact
    entropy changes no gradient; sticking the landing does."""
    exact, sampled, stuck = (
        gradients[name]["scale"][0]
        for name in ("closed_form_entropy", "pathwise", "sticking_the_landing")
    )
    np.testing.assert_allclose(exact, sampled, rtol=1e-5, atol=1e-5)
    assert np.mean(np.abs(stuck - sampled)) > 0.1


@every_estimator
def test_values_are_unbiased(name):
    """The ELBO of N(m, s) on N(0, 1) is minus their divergence, within four standard errors."""
    target = standard_normal()
    objective = vi.elbo(target, vi.guides.mean_field(target), estimator=ESTIMATORS[name])
    keys = jax.random.split(jax.random.key(1), 20_000)
    losses = jax.jit(jax.vmap(lambda k: objective.loss(at(objective, MEAN, SCALE), k)[0]))(keys)
    error = np.std(losses) / np.sqrt(losses.size)
    assert abs(np.mean(losses) - divergence(MEAN, LOG_SCALE)) < 4 * error


def test_sticking_the_landing_has_no_variance_at_the_optimum():
    """Where q equals the posterior, every single draw's gradient is zero to rounding; the pathwise
    one is not."""
    target = standard_normal()
    sizes = {}
    for name in ("sticking_the_landing", "pathwise"):
        guide = vi.guides.full_rank(target, init={"z": jnp.zeros(1)}, init_scale=1.0)
        objective = vi.elbo(target, guide, estimator=ESTIMATORS[name])
        params = vi.init_params(objective.declared, jax.random.key(0))
        slope = jax.grad(lambda p, key, objective=objective: objective.loss(p, key)[0])
        keys = jax.random.split(jax.random.key(2), 100)
        found = jax.jit(jax.vmap(slope, in_axes=(None, 0)))(params, keys)
        sizes[name] = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(found))
    assert sizes["sticking_the_landing"] < 1e-5
    assert sizes["pathwise"] > 0.1


def conjugate():
    """z ~ N(0, I), y_i ~ N(z_i, 0.5): the posterior and the evidence are known."""
    y = jnp.array([1.0, -0.5, 2.0])

    def log_density(values, latents, data):
        prior = dist.Normal().log_prob(latents["z"]).sum()
        return prior + dist.Normal(latents["z"], 0.5).log_prob(data["y"]).sum()

    evidence = dist.Normal(0.0, np.sqrt(1.25)).log_prob(y).sum()
    return vi.target(log_density, {"z": vi.Latent((3,))}, data={"y": y}), evidence


def test_elbo_at_the_posterior_is_the_evidence():
    """With q the exact posterior of a conjugate model, every draw's ELBO is log p(y)."""
    target, evidence = conjugate()
    objective = vi.elbo(target, vi.guides.mean_field(target))
    values = {"loc": target.data["y"] * 0.8, "scale": jnp.full(3, np.sqrt(0.2))}
    params = vi.unconstrain(objective.declared, {"guide": values})
    keys = jax.random.split(jax.random.key(0), 50)
    elbos = jax.jit(jax.vmap(lambda key: objective.loss(params, key)[1].elbo))(keys)
    np.testing.assert_allclose(elbos, evidence, rtol=1e-5)


def test_elbo_of_a_conjugate_model():
    """ELBO = log p(y) - KL(q || posterior), at any q, within four standard errors."""
    target, evidence = conjugate()
    objective = vi.elbo(target, vi.guides.mean_field(target), num_particles=20_000)
    params = vi.init_params(objective.declared, jax.random.key(5))
    q = vi.constrain(objective.declared, params)["guide"]
    ratio = q["scale"] / np.sqrt(0.2)
    gap = (target.data["y"] * 0.8 - q["loc"]) / np.sqrt(0.2)
    exact = evidence - jnp.sum(0.5 * (gap**2 + ratio**2 - 1) - jnp.log(ratio))
    loss = jax.jit(objective.loss)
    found = [float(loss(params, key)[1].elbo) for key in jax.random.split(jax.random.key(0), 8)]
    assert abs(np.mean(found) - exact) < 4 * np.std(found, ddof=1) / np.sqrt(8) + 1e-4


@every_estimator
def test_loss_is_minus_the_elbo(name):
    """loss == -aux.elbo to the last bit, for every estimator and number of draws."""
    target, _ = conjugate()
    for num_particles, batch_size in ((1, None), (4, None), (4, 2)):
        objective = vi.elbo(
            target,
            vi.guides.mean_field(target),
            num_particles=num_particles,
            batch_size=batch_size,
            estimator=ESTIMATORS[name],
        )
        params = vi.init_params(objective.declared, jax.random.key(0))
        loss, aux = jax.jit(objective.loss)(params, jax.random.key(1))
        assert loss == -aux.elbo
        assert loss.shape == ()


@pytest.mark.parametrize("batch_size", [1, 2, 3, 6, 100])
def test_batch_size_does_not_change_the_value(batch_size):
    """Draws evaluated in batches give the loss and gradient of all at once."""
    target, _ = conjugate()
    make = partial(vi.elbo, target, vi.guides.mean_field(target), num_particles=6)
    one, two = make(), make(batch_size=batch_size)
    params = vi.init_params(one.declared, jax.random.key(0))
    pair = [
        jax.jit(jax.value_and_grad(lambda p, o=o: o.loss(p, jax.random.key(1))[0]))(params)
        for o in (one, two)
    ]
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), *pair)


@pytest.mark.parametrize(
    "scheme", [vi.noise.antithetic(), vi.noise.moment_matched(), vi.noise.orthogonal()]
)
def test_paired_noise_leaves_no_error_in_odd_terms(scheme):
    """On a Gaussian target, the mean gradient in the location is exact from any pairs of draws."""
    target, _ = conjugate()
    objective = vi.elbo(
        target,
        vi.guides.mean_field(target),
        num_particles=8,
        noise=scheme,
        estimator=vi.estimators.closed_form_entropy(),
    )
    params = vi.init_params(objective.declared, jax.random.key(0))
    slope = jax.jit(jax.grad(lambda p: objective.loss(p, jax.random.key(1))[0]))(params)
    exact = 5.0 * params["guide"]["loc"] - 4.0 * target.data["y"]
    np.testing.assert_allclose(slope["guide"]["loc"], exact, rtol=1e-4, atol=1e-4)


def test_building_inside_a_transformation():
    """An objective built under jit, on numbers that are traced, has the loss of one built outside;
    its guide's supports are checked where they can be."""

    def loss(centre):
        target = vi.target(
            lambda v, z, d: -((z["rate"] - centre) ** 2),
            {"rate": vi.Latent((), constraints.positive)},
        )
        guide = vi.guide({"loc": centre}, lambda v: dist.LogNormal(v["loc"], 1.0))
        objective = vi.elbo(target, guide)
        params = vi.init_params(objective.declared, jax.random.key(0))
        return objective.loss(params, jax.random.key(1))[0]

    centres = jnp.array([0.5, 1.5])
    expected = [loss(centre) for centre in centres]
    np.testing.assert_allclose(jax.jit(jax.vmap(loss))(centres), jnp.stack(expected), rtol=1e-5)


def test_loss_is_evaluate_after_noise():
    """objective.loss(params, key) is objective.evaluate(params, objective.noise(key), data)."""
    target, _ = conjugate()
    objective = vi.elbo(target, vi.guides.mean_field(target), num_particles=3)
    params = vi.init_params(objective.declared, jax.random.key(0))
    key = jax.random.key(1)
    composed = objective.evaluate(params, objective.noise(key), objective.data)
    assert objective.loss(params, key)[0] == composed[0]


def test_model_parameters_are_learnt_through_the_bound():
    """The gradient of the ELBO in a model's own parameter is that of E_q[log p]."""
    target = vi.target(
        lambda v, z, d: dist.Normal(v["shift"], 1.0).log_prob(z["z"]),
        {"z": vi.Latent(())},
        declared={"shift": vi.Param(2.0)},
    )
    guide = vi.guide({"loc": 0.5}, lambda v: {"z": dist.Normal(v["loc"], 1.0)})
    objective = vi.elbo(target, guide, num_particles=40_000)
    params = vi.init_params(objective.declared, jax.random.key(0))
    slope = jax.grad(lambda p: objective.loss(p, jax.random.key(1))[0])(params)
    np.testing.assert_allclose(slope["shift"], 1.5, atol=4 / np.sqrt(40_000))


@every_estimator
def test_estimators_on_a_constrained_latent(name):
    """On Gamma(3, 2), every estimator's mean gradient is that of the exact ELBO of a log-normal:
    E[3 log z - 2 z] + log s + const = 3 m - 2 exp(m + s^2 / 2) + log s."""
    target = vi.target(
        lambda v, z, d: dist.Gamma(3.0, 2.0).log_prob(z["rate"]),
        {"rate": vi.Latent((), constraints.positive)},
    )
    objective = vi.elbo(target, vi.guides.mean_field(target), estimator=ESTIMATORS[name])
    params = at(objective, 0.2, 0.4)
    slope = jax.grad(lambda p, key: objective.loss(p, key)[0])
    found = jax.jit(jax.vmap(partial(slope, params)))(jax.random.split(jax.random.key(0), 50_000))
    moment = np.exp(0.2 + 0.4**2 / 2)
    for leaf, exact in (("loc", 2 * moment - 3), ("scale", 0.4 * (2 * 0.4 * moment) - 1)):
        draws = np.asarray(found["guide"][leaf], np.float64)[:, 0]
        assert abs(draws.mean() - exact) < 4 * draws.std() / np.sqrt(draws.size)
