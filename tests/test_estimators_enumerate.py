"""Sums over finite choices beside scores of the others, against the exact sum over all of them."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from numpyro import distributions as dist

import vi_params as vi

E = vi.estimators
Y = jnp.array([0.3, 2.1])


def model(y):
    """A switch, a count of any size, two rows of bits that follow both, and a normal latent."""
    switch = numpyro.sample("switch", dist.Bernoulli(0.4))
    n = numpyro.sample("n", dist.GeometricProbs(0.5))
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", 2):
        k = numpyro.sample("k", dist.Bernoulli(0.2 + 0.3 * switch))
        numpyro.sample("y", dist.Normal(x + k + 0.3 * n, 1.0), obs=y)


def program(v):
    """The count follows the switch, which must then be scored; the bits follow the count."""
    switch = numpyro.sample("switch", dist.Bernoulli(logits=v["switch"]))
    n = numpyro.sample("n", dist.GeometricProbs(jax.nn.sigmoid(v["n"] + v["follow"] * switch)))
    with numpyro.plate("rows", 2):
        numpyro.sample("k", dist.Bernoulli(logits=v["k"] + v["slope"] * n))
    numpyro.sample("x", dist.Normal(v["loc"], 0.6))


DECLARED = {
    "switch": 0.2,
    "n": 0.4,
    "follow": 0.8,
    "k": jnp.array([-0.4, 0.6]),
    "slope": 0.3,
    "loc": 0.5,
}


def exact_elbo(p):
    """All bits and counts up to 60 summed, the normal latent integrated in closed form."""
    half_log = 0.5 * jnp.log(2 * jnp.pi)
    n = jnp.arange(60.0)
    total = -(p["loc"] ** 2 + 0.6**2) / 2 + 0.5 + jnp.log(0.6)  # minus the divergence of x
    for switch, *bits in itertools.product([0, 1], repeat=3):
        k = jnp.array(bits)
        stop = jax.nn.sigmoid(p["n"] + p["follow"] * switch)
        log_q = dist.Bernoulli(logits=p["switch"]).log_prob(switch)
        log_q += n * jnp.log1p(-stop) + jnp.log(stop)
        logits = p["k"] + p["slope"] * n[:, None]
        log_q += dist.Bernoulli(logits=logits).log_prob(k).sum(axis=1)
        log_p = dist.Bernoulli(0.4).log_prob(switch) + (n + 1) * jnp.log(0.5)
        log_p += dist.Bernoulli(0.2 + 0.3 * switch).log_prob(k).sum()
        gap = Y - p["loc"] - k - 0.3 * n[:, None]
        log_p += (-half_log - (gap**2 + 0.6**2) / 2).sum(axis=1)
        total += jnp.sum(jnp.exp(log_q) * (log_p - log_q))
    return total


POINTS = jax.tree.map(
    lambda x: jnp.stack([jnp.float32(x), x + 0.5, 0.3 * jnp.float32(x) - 0.3]), DECLARED
)


@pytest.fixture(scope="module")
def gradients():
    """Estimator -> its gradients at three sets of parameters from 100,000 draws each."""
    target = vi.from_numpyro(model, Y)
    guide = vi.numpyro_guide(program, declared=DECLARED)

    @functools.cache
    def of(name):
        objective = vi.elbo(target, guide, num_particles=4, estimator=getattr(E, name)())
        slope = jax.grad(lambda p, key: -objective.loss(p, key)[0])
        over_keys = jax.vmap(slope, in_axes=(None, 0))
        keys = jax.random.split(jax.random.key(1), 25_000)
        found = jax.jit(lambda p: jax.lax.map(lambda one: over_keys(one, keys), p))(POINTS)
        return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), found)

    return of


@pytest.mark.slow
def test_sums_beside_scores_are_unbiased(gradients):
    """The mean gradient is that of the exact ELBO within four standard errors, at three sets of
    parameters: the bits summed, the count and the switch that it follows scored."""
    exact = jax.jit(jax.vmap(jax.grad(exact_elbo)))(POINTS)
    for leaf, truth in exact.items():
        found = gradients("enumerate")[leaf]
        error = found.std(axis=1) / np.sqrt(found.shape[1])
        assert np.all(np.abs(found.mean(axis=1) - truth) < 4 * error + 2e-5), leaf


@pytest.mark.slow
def test_sums_vary_less_than_scores(gradients):
    """In the parameters of the bits, which are summed, the gradient varies less than with every
    choice scored, at each set of parameters."""
    for leaf in ("k", "slope"):
        exact, scored = (
            gradients(name)[leaf].reshape(3, 25_000, -1).var(axis=1).sum(axis=1)
            for name in ("enumerate", "mixed")
        )
        assert np.all(1.2 * exact < scored)
