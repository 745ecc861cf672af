"""The weighted ELBO, point estimates with model parameters, and memory."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest
from numpyro import distributions as dist
from numpyro.distributions import constraints

import vi_params as vi

E = vi.estimators
Y = jnp.array([1.0, 2.5, 0.4])


def model(y):
    with numpyro.plate("rows", y.size):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(z, 0.5), obs=y)


@pytest.fixture(scope="module")
def target():
    return vi.from_numpyro(model, Y)


def normal_guide():
    declared = {"loc": jnp.array([0.3, -0.2, 0.1]), "log_scale": jnp.zeros(3)}
    return vi.guide(declared, lambda v: {"z": dist.Normal(v["loc"], jnp.exp(v["log_scale"]))})


ESTIMATORS = {
    "pathwise": E.pathwise(),
    "sticking_the_landing": E.sticking_the_landing(),
    "score": E.score(),
    "mixed": E.mixed(),
    "analytic_kl": E.analytic_kl(),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_weight_on_the_divergence(target, name):
    """With a weight b the gradient is that of E log p(y | z) - b KL(q || prior), here in closed
    form, within four standard errors; `aux.elbo` stays an estimate of the ELBO itself."""
    weight, guide = 0.3, normal_guide()
    objective = vi.elbo(
        target, guide, num_particles=50, estimator=ESTIMATORS[name], kl_weight=weight
    )

    def exact(p, weight):
        second = p["loc"] ** 2 + jnp.exp(2 * p["log_scale"])
        fit = dist.Normal(p["loc"], 0.5).log_prob(Y) - 2 * jnp.exp(2 * p["log_scale"])
        return jnp.sum(fit - weight * (0.5 * (second - 1) - p["log_scale"]))

    params = vi.init_params(guide.declared, jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), 2000)
    slopes = jax.vmap(jax.value_and_grad(objective.loss, has_aux=True), in_axes=(None, 0))
    (losses, aux), found = jax.jit(slopes)(params, keys)
    for draws, truth in (
        (-losses, exact(params, weight)),
        (aux.elbo, exact(params, 1.0)),
        *((-found[leaf], jax.grad(exact)(params, weight)[leaf]) for leaf in found),
    ):
        error = np.std(draws, axis=0) / np.sqrt(len(keys))
        assert np.all(np.abs(np.mean(draws, axis=0) - truth) < 4 * error + 1e-4)


def test_schedule_follows_the_step(target):
    """Step n of a run takes the weight of step n: a run under a schedule is the loop of single
    steps at constant weights, and a loss without a step is at the schedule's end."""
    guide, schedule = normal_guide(), optax.linear_schedule(0.0, 1.0, 3)
    scheduled = vi.elbo(target, guide, kl_weight=schedule)
    svi = vi.svi(scheduled, optax.sgd(0.1))
    key = jax.random.key(0)
    state = first = svi.init(key)
    _, losses = jax.jit(lambda s, k: vi.run(svi, s, k, 5))(first, key)
    for step in range(5):
        constant = vi.elbo(target, guide, kl_weight=float(schedule(step)))
        noise = constant.noise(jax.random.fold_in(key, step))
        state, info = jax.jit(vi.svi(constant, optax.sgd(0.1)).update)(state, noise, target.data)
        np.testing.assert_allclose(info.loss, losses[step], rtol=1e-5)
    plain, params = vi.elbo(target, guide), first.params
    assert scheduled.loss(params, key)[0] == plain.loss(params, key)[0]


def test_weighted_posterior(target):
    """The optimum under a constant weight b is the posterior with the prior and entropy tempered:
    of y | z ~ N(z, 0.5), z ~ N(0, 1) the normal of precision 1 + 4 / b around 4 y / (4 + b)."""
    weight = 0.5
    objective = vi.elbo(
        target, vi.guides.mean_field(target), kl_weight=weight, estimator=E.sticking_the_landing()
    )
    svi = vi.svi(objective, optax.adam(optax.exponential_decay(0.1, 100, 0.5)))
    key = jax.random.key(0)
    state, _ = jax.jit(lambda s, k: vi.run(svi, s, k, 1000))(svi.init(key), key)
    found = vi.constrain(objective.declared, state.params)["guide"]
    np.testing.assert_allclose(found["loc"], 4 * Y / (4 + weight), rtol=1e-2)
    np.testing.assert_allclose(found["scale"], (1 + 4 / weight) ** -0.5, rtol=1e-2)


def test_penalised_likelihood_is_the_delta_case():
    """With a point guide the ELBO is the penalised log likelihood: its maximum over weights and
    noise variance together is that of ridge regression, in closed form given the variance."""
    x = np.array([[1.0, 0.2], [0.3, -1.0], [-0.7, 0.5], [1.2, 1.0], [0.1, -0.4]], np.float32)
    y = np.array([1.2, -0.9, 0.1, 1.9, -0.5], np.float32)
    target = vi.target(
        lambda v, z, d: (
            dist.Normal(0.0, 2.0).log_prob(z["w"]).sum()
            + dist.Normal(d["x"] @ z["w"], v["sigma"]).log_prob(d["y"]).sum()
        ),
        {"w": vi.Latent((2,))},
        declared={"sigma": vi.Param(1.0, constraint=constraints.positive)},
        data={"x": x, "y": y},
    )
    guide = vi.guides.delta(target, init={"w": jnp.zeros(2)})
    svi = vi.svi(vi.elbo(target, guide), optax.adam(optax.exponential_decay(0.05, 300, 0.5)))
    key = jax.random.key(0)
    state, _ = jax.jit(lambda s, k: vi.run(svi, s, k, 3000))(svi.init(key), key)
    w = np.asarray(state.params["guide"]["loc"])
    sigma = float(vi.constrain(target.declared, {"sigma": state.params["sigma"]})["sigma"])
    ridge = np.linalg.solve(x.T @ x + sigma**2 / 4 * np.eye(2), x.T @ y)
    np.testing.assert_allclose(w, ridge, atol=2e-3)
    np.testing.assert_allclose(sigma**2, np.mean((y - x @ w) ** 2), rtol=2e-2)


@pytest.mark.parametrize("name", ["score", "analytic_kl"])
def test_empirical_bayes(name):
    """A model parameter beside a family that holds the posterior is learnt at its maximum of the
    evidence: for z_i ~ N(m, 1), y_i ~ N(z_i, 0.5) the mean of y."""

    def with_parameter(y):
        m = numpyro.param("m", 0.0)
        with numpyro.plate("rows", y.size):
            z = numpyro.sample("z", dist.Normal(m, 1.0))
            numpyro.sample("y", dist.Normal(z, 0.5), obs=y)

    objective = vi.elbo(
        vi.from_numpyro(with_parameter, Y),
        normal_guide(),
        num_particles=8,
        estimator=ESTIMATORS[name],
    )
    svi = vi.svi(objective, optax.adam(optax.exponential_decay(0.1, 200, 0.5)))
    key = jax.random.key(0)
    state, _ = jax.jit(lambda s, k: vi.run(svi, s, k, 1500))(svi.init(key), key)
    assert abs(state.params["m"] - Y.mean()) < 0.05


@pytest.mark.parametrize("name", ["pathwise", "score"])
def test_batches_of_draws_bound_the_memory(name):
    """The gradient at 2,000 draws in batches of 10 needs less than a tenth of the memory that all
    at once need."""
    wide = vi.target(
        lambda v, z, d: -jnp.sum(jnp.tanh(d @ z["z"]) ** 2),
        {"z": vi.Latent((8,))},
        data=jnp.ones((300, 8)),
    )
    declared = {"loc": jnp.zeros(8)}
    guide = vi.guide(declared, lambda v: dist.Normal(v["loc"], 1.0))
    sizes = []
    for batch_size in (None, 10):
        objective = vi.elbo(
            wide, guide, num_particles=2000, batch_size=batch_size, estimator=ESTIMATORS[name]
        )
        params = vi.init_params(declared, jax.random.key(0))
        slope = jax.jit(jax.grad(lambda p, key, o=objective: o.loss(p, key)[0]))
        compiled = slope.lower(params, jax.random.key(0)).compile()
        sizes.append(compiled.memory_analysis().temp_size_in_bytes)
    assert sizes[1] < sizes[0] / 10
