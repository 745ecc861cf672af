"""Estimators on programs: choices that depend on choices, scales, plates, discrete posteriors."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest
from numpyro import distributions as dist
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO

import vi_params as vi

E = vi.estimators
X = jnp.array([0.4, -1.0])


def chain(x):
    """A switch, a binary row that follows it, and a normal row that follows that."""
    switch = numpyro.sample("switch", dist.Bernoulli(0.3))
    with numpyro.plate("rows", 2), handlers.scale(scale=3.0):
        k = numpyro.sample("k", dist.Bernoulli(0.2 + 0.5 * switch))
        z = numpyro.sample("z", dist.Normal(1.0 * k, 1.0))
        numpyro.sample("x", dist.Normal(z, 0.5), obs=x)


def chain_guide(v):
    switch = numpyro.sample("switch", dist.Bernoulli(logits=v["switch"]))
    with numpyro.plate("rows", 2), handlers.scale(scale=3.0):
        k = numpyro.sample("k", dist.Bernoulli(logits=v["k"] + v["slope"] * switch))
        numpyro.sample("z", dist.Normal(v["loc"] + v["shift"] * k, jnp.exp(v["log_scale"])))


CHAIN = {
    "switch": 0.4,
    "k": jnp.array([-0.3, 0.8]),
    "slope": 0.5,
    "loc": jnp.array([0.1, -0.2]),
    "shift": 0.7,
    "log_scale": -0.4,
}


def exact_chain(p):
    """The scaled ELBO of `chain`, all bits summed and the normals integrated in closed form."""
    variance, half_log = jnp.exp(2 * p["log_scale"]), 0.5 * jnp.log(2 * jnp.pi)
    total = 0.0
    for switch, a, b in itertools.product([0, 1], repeat=3):
        k = jnp.array([a, b])
        log_q_switch = dist.Bernoulli(logits=p["switch"]).log_prob(switch)
        log_q = dist.Bernoulli(logits=p["k"] + p["slope"] * switch).log_prob(k)
        mean = p["loc"] + p["shift"] * k
        log_p = dist.Bernoulli(0.2 + 0.5 * switch).log_prob(k)
        log_p += -half_log - ((mean - k) ** 2 + variance) / 2
        log_p += -half_log - jnp.log(0.5) - ((X - mean) ** 2 + variance) / 0.5
        entropy = 0.5 + half_log + p["log_scale"]
        value = dist.Bernoulli(0.3).log_prob(switch) - log_q_switch
        value += 3.0 * jnp.sum(log_p - log_q + entropy)
        total += jnp.exp(log_q_switch + log_q.sum()) * value
    return total


@pytest.fixture(scope="module")
def chained():
    target = vi.from_numpyro(chain, X)
    guide = vi.numpyro_guide(chain_guide, declared=CHAIN)
    return target, guide, vi.init_params(guide.declared, jax.random.key(0))


def mean_gradient(objective, params, draws, key):
    """The mean of that many gradients of the ELBO, and its standard error."""
    slope = jax.grad(lambda p, key: -objective.loss(p, key)[0])
    keys = jax.random.split(key, draws)
    found = jax.jit(jax.vmap(slope, in_axes=(None, 0)))(params, keys)
    found = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), found)
    error = jax.tree.map(lambda leaf: leaf.std(axis=0) / np.sqrt(draws), found)
    return jax.tree.map(lambda leaf: leaf.mean(axis=0), found), error


@pytest.mark.parametrize("name", ["mixed", "enumerate"])
@pytest.mark.slow
def test_choices_after_choices_under_a_scale(chained, name):
    """Where later choices of the guide depend on earlier ones, and a plate is scaled, the gradient
    is that of the exact scaled ELBO: log q is scaled in the costs, never in the score."""
    target, guide, params = chained
    estimator, particles = {"mixed": (E.mixed(), 4), "enumerate": (E.enumerate(), 1)}[name]
    objective = vi.elbo(target, guide, num_particles=particles, estimator=estimator)
    found, error = mean_gradient(objective, params, 100_000 // particles, jax.random.key(1))
    exact = jax.grad(exact_chain)(params)
    for leaf, truth in exact.items():
        assert np.all(np.abs(found[leaf] - truth) < 4 * error[leaf] + 1e-4), leaf


@pytest.mark.slow
def test_costs_are_those_downstream():
    """The cost of a row's choice moves with its own observation and with nobody else's: scores of
    row 0 are the same under data that differ in row 1 only."""
    target = vi.from_numpyro(chain, X)
    guide = vi.guide(
        {"k": jnp.array([-0.3, 0.8])},
        lambda v: {
            "switch": dist.Bernoulli(0.4),
            "k": dist.Bernoulli(logits=v["k"]),
            "z": dist.Normal(jnp.zeros(2), 1.0),
        },
    )
    baseline = E.no_baseline()
    objective = vi.elbo(target, guide, estimator=E.mixed(baseline=baseline))
    params = vi.init_params(guide.declared, jax.random.key(0))
    slope = jax.jit(jax.grad(lambda p, data: objective.loss(p, jax.random.key(1), data)[0]))
    one, two = (slope(params, {"x": x})["k"] for x in (X, X.at[1].set(5.0)))
    np.testing.assert_allclose(one, two, rtol=1e-5)  # z, not k, stands between k and x
    whole = vi.elbo(target, guide, estimator=E.score(baseline=baseline))
    slope = jax.jit(jax.grad(lambda p, data: whole.loss(p, jax.random.key(1), data)[0]))
    one, two = (slope(params, {"x": x})["k"] for x in (X, X.at[1].set(5.0)))
    assert np.all(np.abs(one - two) > 1.0)


def joined(x):
    """Rows of bits whose sum every observation sees."""
    with numpyro.plate("rows", 2):
        k = numpyro.sample("k", dist.Bernoulli(0.3))
    total = k.sum()
    with numpyro.plate("rows", 2):
        numpyro.sample("x", dist.Normal(total, 1.0), obs=x)


def through(x):
    """Rows of bits that the observations see through one normal latent."""
    with numpyro.plate("rows", 2):
        k = numpyro.sample("k", dist.Bernoulli(0.3))
    z = numpyro.sample("z", dist.Normal(k.sum(), 1.0))
    with numpyro.plate("rows", 2):
        numpyro.sample("x", dist.Normal(z, 1.0), obs=x)


def through_guide(v):
    with numpyro.plate("rows", 2):
        k = numpyro.sample("k", dist.Bernoulli(logits=v["k"]))
    numpyro.sample("z", dist.Normal(k.sum(), 1.0))


def exact_joined(p, spread):
    """The ELBO of `joined` (spread 0), and of `through` (spread 1) with its guide at z ~ p."""
    total = 0.0
    for bits in itertools.product([0, 1], repeat=2):
        k = jnp.array(bits)
        log_q = dist.Bernoulli(logits=p["k"]).log_prob(k).sum()
        log_p = dist.Bernoulli(0.3).log_prob(k).sum()
        log_p += (dist.Normal(k.sum(), 1.0).log_prob(X) - spread / 2).sum()
        total += jnp.exp(log_q) * (log_p - log_q)
    return total


@pytest.mark.parametrize("name", ["mixed", "enumerate"])
@pytest.mark.parametrize("model", [joined, through])
def test_rows_that_meet_again(model, name):
    """A plate does not keep rows apart for ever: where one reaches another row's term by a sum
    over rows, or through a latent outside the plate, it answers for that term too."""
    target = vi.from_numpyro(model, X)
    declared = {"k": jnp.array([-0.3, 0.8])}
    if model is joined:
        guide = vi.guide(declared, lambda v: {"k": dist.Bernoulli(logits=v["k"])})
    else:
        guide = vi.numpyro_guide(through_guide, declared=declared)
    params = vi.init_params(guide.declared, jax.random.key(0))
    estimator = {"mixed": E.mixed(), "enumerate": E.enumerate()}[name]
    objective = vi.elbo(target, guide, num_particles=2, estimator=estimator)
    found, error = mean_gradient(objective, params, 50_000, jax.random.key(1))
    exact = jax.grad(exact_joined)(params, float(model is through))
    assert np.all(np.abs(found["k"] - exact["k"]) < 4 * error["k"] + 1e-5)


def test_divergence_is_sampled_where_its_prior_moves():
    """A guide that draws z's parent after z: KL(q(z) || p(z | parent)) is no part of the bound, and
    analytic_kl must see it. The gradient is that of the exact ELBO (closed form)."""

    def model():
        parent = numpyro.sample("parent", dist.Normal(0.0, 1.0))
        numpyro.sample("z", dist.Normal(parent, 1.0))

    def program(v):
        z = numpyro.sample("z", dist.Normal(v["loc"], 1.0))
        numpyro.sample("parent", dist.Normal(v["slope"] * z, 0.5))

    target = vi.from_numpyro(model)
    guide = vi.numpyro_guide(program, declared={"loc": 0.8, "slope": 0.3})
    params = vi.init_params(guide.declared, jax.random.key(0))
    objective = vi.elbo(target, guide, estimator=E.analytic_kl())
    found, error = mean_gradient(objective, params, 100_000, jax.random.key(2))

    def exact(p):
        second = p["loc"] ** 2 + 1.0  # E z^2
        return -(p["slope"] ** 2 * second) / 2 - ((1 - p["slope"]) ** 2 * second) / 2

    for leaf, truth in jax.grad(exact)(params).items():
        assert abs(found[leaf] - truth) < 4 * error[leaf]


def fit_logit(objective, steps=400):
    """The probability that a Bernoulli guide ends with."""
    svi = vi.svi(objective, optax.adam(0.05))
    key = jax.random.key(0)
    state, _ = jax.jit(lambda s, k: vi.run(svi, s, k, steps))(svi.init(key), key)
    return jax.nn.sigmoid(state.params["logit"])


def coin():
    """A Bernoulli latent of prior 0.5 and posterior 0.9: y = 1 is nine times as likely under it."""
    k = numpyro.sample("k", dist.Bernoulli(0.5))
    numpyro.sample("y", dist.Bernoulli(0.1 + 0.8 * k), obs=1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Currently, SVI with Trace_ELBO")
def test_a_discrete_posterior_that_plain_gradients_miss():
    """The exact posterior of `coin` is 0.9. The estimators that know of discrete latents find it;
    NumPyro's Trace_ELBO, whose gradient lacks the score term, ends elsewhere."""
    target = vi.from_numpyro(coin)
    guide = vi.guide({"logit": 0.1}, lambda v: dist.Bernoulli(logits=v["logit"]))
    for estimator, particles in ((E.mixed(), 16), (E.score(), 16), (E.enumerate(), 1)):
        objective = vi.elbo(target, guide, num_particles=particles, estimator=estimator)
        assert abs(fit_logit(objective) - 0.9) < 0.02

    def numpyro_guide():
        logit = numpyro.param("logit", 0.1)
        numpyro.sample("k", dist.Bernoulli(logits=logit))

    svi = SVI(coin, numpyro_guide, optax.adam(0.05), Trace_ELBO(num_particles=16))
    result = svi.run(jax.random.key(0), 400, progress_bar=False)
    assert abs(jax.nn.sigmoid(result.params["logit"]) - 0.9) > 0.05


def test_two_state_mixture():
    """Component labels with known components: the fitted label probabilities are the exact
    posterior ones, by the sum over each row's label."""
    y = jnp.array([-1.5, 0.2, 0.9, 2.4, 3.1])

    def mixture(y):
        with numpyro.plate("rows", y.size):
            k = numpyro.sample("k", dist.Categorical(jnp.array([0.3, 0.7])))
            numpyro.sample("y", dist.Normal(jnp.array([0.0, 2.0])[k], 1.0), obs=y)

    target = vi.from_numpyro(mixture, y)
    guide = vi.guide(
        {"logits": jnp.zeros((5, 2))}, lambda v: {"k": dist.Categorical(logits=v["logits"])}
    )
    objective = vi.elbo(target, guide, estimator=E.enumerate())
    svi = vi.svi(objective, optax.adam(0.1))
    key = jax.random.key(0)
    state, losses = jax.jit(lambda s, k: vi.run(svi, s, k, 300))(svi.init(key), key)
    joint = jnp.log(jnp.array([0.3, 0.7])) + dist.Normal(jnp.array([0.0, 2.0]), 1.0).log_prob(
        y[:, None]
    )
    found = jax.nn.softmax(state.params["logits"])
    np.testing.assert_allclose(found, jax.nn.softmax(joint), atol=1e-3)
    evidence = jax.nn.logsumexp(joint, axis=1).sum()
    np.testing.assert_allclose(-losses[-1], evidence, rtol=1e-5)


def documents(words, topics, vocabulary):
    """Latent Dirichlet allocation: a topic for every word of every document."""
    weights = dist.Dirichlet(jnp.full(topics, 0.5))
    with numpyro.plate("topics", topics):
        phi = numpyro.sample("phi", dist.Dirichlet(jnp.full(vocabulary, 0.5)))
    with numpyro.plate("documents", words.shape[1]):
        theta = numpyro.sample("theta", weights)
        with numpyro.plate("words", words.shape[0]):
            topic = numpyro.sample("topic", dist.Categorical(theta))
            numpyro.sample("word", dist.Categorical(phi[topic]), obs=words)


@pytest.mark.slow
def test_latent_dirichlet_allocation():
    """Documents from two topics on disjoint halves of six words: the fitted topics put their mass
    on one half each. The topics of words are summed out in the guide, side by side."""
    rng = np.random.default_rng(0)
    mixing = rng.beta(0.4, 0.4, size=12)
    first = rng.uniform(size=(20, 12)) < mixing
    words = jnp.asarray(np.where(first, 0, 3) + rng.integers(3, size=(20, 12)))
    target = vi.from_numpyro(documents, words, 2, 6)
    positive = dist.constraints.positive
    guide = vi.guide(
        {
            "phi": vi.Param(
                lambda key: jnp.exp(0.5 * jax.random.normal(key, (2, 6))), constraint=positive
            ),
            "theta": vi.Param(jnp.ones((12, 2)), constraint=positive),
            "topic": vi.Param(lambda key: 0.1 * jax.random.normal(key, (20, 12, 2))),
        },
        lambda v: {
            "phi": dist.Dirichlet(v["phi"]),
            "theta": dist.Dirichlet(v["theta"]),
            "topic": dist.Categorical(logits=v["topic"]),
        },
    )
    objective = vi.elbo(target, guide, num_particles=2, estimator=E.enumerate())
    svi = vi.svi(objective, optax.adam(0.1))
    key = jax.random.key(0)
    state, _ = jax.jit(lambda s, k: vi.run(svi, s, k, 400))(svi.init(key), key)
    phi = vi.constrain(guide.declared, state.params)["phi"]
    halves = (phi / phi.sum(axis=1, keepdims=True)).reshape(2, 2, 3).sum(axis=2)
    assert np.all(halves.max(axis=1) > 0.9)
    assert np.argmax(halves[0]) != np.argmax(halves[1])
