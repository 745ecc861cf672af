"""Gradient estimators on discrete and mixed latents, against exact enumeration."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from numpyro import distributions as dist

import vi_params as vi

Y = jnp.array([0.3, 2.2, 1.9])
E = vi.estimators


def model(y):
    """Which of two components a row is from; how common the second is; where the first lies."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
    common = numpyro.sample("common", dist.Bernoulli(0.4))
    with numpyro.plate("rows", y.shape[0]):
        k = numpyro.sample("k", dist.Bernoulli(0.3 + 0.2 * common))
        numpyro.sample("y", dist.Normal(mu + 2.0 * k, 1.0), obs=y)


DECLARED = {"loc": 0.1, "log_scale": -0.5, "rows": jnp.array([-1.0, 0.5, 1.0]), "logit": 0.3}


def q(values):
    return {
        "mu": dist.Normal(values["loc"], jnp.exp(values["log_scale"])),
        "k": dist.Bernoulli(logits=values["rows"]),
        "common": dist.Bernoulli(logits=values["logit"]),
    }


def exact_elbo(params):
    """Every assignment of the four bits summed, the normal latent integrated in closed form."""
    loc, variance = params["loc"], jnp.exp(2 * params["log_scale"])
    half_log = 0.5 * jnp.log(2 * jnp.pi)
    total = 0.5 + half_log + params["log_scale"]
    total += -half_log - jnp.log(2.0) - (loc**2 + variance) / 8
    for *bits, common in itertools.product([0, 1], repeat=4):
        k = jnp.array(bits)
        log_q = dist.Bernoulli(logits=params["rows"]).log_prob(k).sum()
        log_q += dist.Bernoulli(logits=params["logit"]).log_prob(common)
        log_p = dist.Bernoulli(0.3 + 0.2 * common).log_prob(k).sum()
        log_p += dist.Bernoulli(0.4).log_prob(common)
        log_p += (-half_log - ((Y - loc - 2 * k) ** 2 + variance) / 2).sum()
        total += jnp.exp(log_q) * (log_p - log_q)
    return total


def points(params):
    """The declared parameters, and two more sets; not at logits of 0, where numpyro's Bernoulli has
    a wrong gradient."""
    other = {"loc": 0.6, "log_scale": 0.1, "rows": jnp.array([0.2, 1.5, -0.5]), "logit": -1.0}
    third = {"loc": -0.4, "log_scale": -1.0, "rows": jnp.array([-2.0, 2.0, 1.0]), "logit": 0.2}
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), params, other, third)


DRAWS = 100_000
MANY = {
    "score": (E.score(), 4),
    "score, no baseline": (E.score(baseline=E.no_baseline()), 4),
    "mixed": (E.mixed(), 4),
    "mixed, no baseline": (E.mixed(baseline=E.no_baseline()), 4),
    "mixed, own baseline": (E.mixed(baseline=E.learned_baseline({}, lambda v, d: -2.0)), 4),
    "analytic_kl": (E.analytic_kl(), 4),
    "enumerate": (E.enumerate(), 4),
}


@pytest.fixture(scope="module")
def problem():
    target = vi.from_numpyro(model, Y)
    guide = vi.guide(DECLARED, q)
    return target, guide, vi.init_params(guide.declared, jax.random.key(0))


@pytest.fixture(scope="module")
def gradients(problem):
    """Per estimator, gradients at three sets of parameters from 100,000 draws each."""
    target, guide, params = problem

    def of(estimator, particles):
        objective = vi.elbo(target, guide, num_particles=particles, estimator=estimator)
        slope = jax.grad(lambda p, key: -objective.loss(p, key)[0])
        keys = jax.random.split(jax.random.key(1), DRAWS // particles)
        over_keys = jax.vmap(slope, in_axes=(None, 0))
        found = jax.jit(lambda p: jax.lax.map(lambda one: over_keys(one, keys), p))(points(params))
        return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), found)

    return {name: of(*options) for name, options in MANY.items()}


@pytest.mark.parametrize("name", MANY)
def test_gradients_are_unbiased(problem, gradients, name):
    """The mean gradient is that of the ELBO by exact enumeration, within four standard errors, at
    three sets of parameters (and to rounding, where it has no variance)."""
    exact = jax.vmap(jax.grad(exact_elbo))(points(problem[2]))
    for leaf, truth in exact.items():
        found = gradients[name][leaf]
        error = found.std(axis=1) / np.sqrt(found.shape[1])
        assert np.all(np.abs(found.mean(axis=1) - truth) < 4 * error + 2e-5), leaf


def total_variance(found, leaves=("rows", "logit")):
    return sum(found[leaf].var(axis=1).reshape(3, -1).sum(axis=1) for leaf in leaves)


@pytest.mark.parametrize(
    ("better", "worse", "factor"),
    [
        ("score", "score, no baseline", 3.0),
        ("mixed", "mixed, no baseline", 1.2),
        ("mixed", "score", 1.2),
        ("enumerate", "mixed", 2.0),
    ],
)
def test_what_lowers_the_variance(gradients, better, worse, factor):
    """Leave-one-out is below plain REINFORCE, downstream costs below all costs, and the exact sum
    below both, at each of three sets of parameters."""
    assert np.all(factor * total_variance(gradients[better]) < total_variance(gradients[worse]))


def test_enumeration_of_finite_latents_has_no_variance(gradients):
    """The gradient in the logit of a latent that no continuous one depends on is exact."""
    assert np.all(gradients["enumerate"]["logit"].std(axis=1) < 1e-6)


def test_closed_form_divergence_lowers_the_variance(gradients):
    """With the divergence of `mu` from its prior in closed form, its location's and scale's
    gradients vary less than with the sampled one."""
    leaves = ("loc", "log_scale")
    exact, sampled = gradients["analytic_kl"], gradients["mixed"]
    assert np.all(total_variance(exact, leaves) < total_variance(sampled, leaves))


def test_loss_is_minus_the_elbo_in_batches_too(problem):
    """loss == -aux.elbo, whatever correction carries the gradient, and batches of draws give the
    loss and the gradient of all at once."""
    target, guide, params = problem
    for estimator in (E.score(), E.mixed(baseline=E.decaying_average())):
        pair = []
        for batch_size in (None, 3):
            objective = vi.elbo(
                target, guide, num_particles=5, estimator=estimator, batch_size=batch_size
            )
            full = {**vi.init_params(objective.declared, jax.random.key(0)), **params}
            evaluate = jax.jit(jax.value_and_grad(objective.loss, has_aux=True))
            (loss, aux), slope = evaluate(full, jax.random.key(3))
            assert loss == -aux.elbo
            pair.append((loss, slope))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *pair)


def test_leave_one_out_is_the_log_variance_loss():
    """VarGrad: the leave-one-out gradient is that of half the sample variance of log q - log p, the
    draws held fixed (Richter et al., 2020)."""
    target = vi.target(
        lambda v, z, d: dist.Normal(1.0, 2.0).log_prob(z["z"]).sum(), {"z": vi.Latent((2,))}
    )
    declared = {"loc": jnp.zeros(2), "log_scale": jnp.ones(2)}
    guide = vi.guide(declared, lambda v: dist.Normal(v["loc"], jnp.exp(v["log_scale"])))
    objective = vi.elbo(target, guide, num_particles=4, estimator=E.score())
    params = vi.init_params(objective.declared, jax.random.key(0))
    noise = objective.noise(jax.random.key(1))

    def half_variance(params):
        def gap(e):
            draw = jax.lax.stop_gradient(guide.transform(params, e))
            log_p = target.log_density({}, {"z": draw.latents}, None)
            return guide.rescore(params, draw) - log_p

        return 0.5 * jnp.var(jax.vmap(gap)(noise), ddof=1)

    found = jax.jit(jax.grad(lambda p: objective.evaluate(p, noise, None)[0]))(params)
    expected = jax.jit(jax.grad(half_variance))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), found, expected)


def test_decaying_average_is_what_its_name_says(problem):
    """Under sgd(1 - decay), the baseline's parameters follow b <- decay b + (1 - decay) f."""
    target, guide, params = problem
    objective = vi.elbo(target, guide, estimator=E.score(baseline=E.decaying_average("level")))
    state = {**params, "level": {"latents": jnp.array(2.0)}}
    slopes = jax.jit(jax.value_and_grad(objective.loss, has_aux=True))
    for step in range(3):
        (loss, _), slope = slopes(state, jax.random.key(step))
        before = state["level"]["latents"]
        after = before - 0.1 * slope["level"]["latents"]
        np.testing.assert_allclose(after, 0.9 * before + 0.1 * -loss, rtol=1e-5)
        state = {**state, "level": {"latents": after}}
