"""Discrete latents summed out: density, gradient, draws and maxima are those of the sum over all
assignments, written out."""

import functools
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from numpyro import distributions as dist
from numpyro.contrib.control_flow import cond, scan
from numpyro.infer.util import log_density

import vi_params as vi
from vi_params.interop.numpyro.contraction import Factor, Graph, contract, log_sum_exp

funsor = pytest.importorskip("numpyro.contrib.funsor")

Y = jnp.array([0.3, -1.2, 0.7, 2.0])
NUM_DRAWS = 2000


def mixture(y):
    weights = numpyro.sample("weights", dist.Dirichlet(jnp.ones(3)))
    mean = numpyro.sample("mean", dist.Normal(jnp.zeros(3), 2.0))  # a batch axis without a plate
    with numpyro.plate("rows", len(y)):
        z = numpyro.sample("z", dist.Categorical(weights))
        numpyro.sample("y", dist.Normal(mean[z], 1.0), obs=y)
    numpyro.deterministic("spread", mean.max() - mean.min())
    numpyro.deterministic("label", 2 * z)


def nested(y):
    """A global discrete latent, one a row and one a cell, none of whose values start alike."""
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    shift = numpyro.sample("shift", dist.DiscreteUniform(2, 3))
    with numpyro.plate("groups", 2, dim=-2):
        on = numpyro.sample("on", dist.Bernoulli(0.3))
        with numpyro.plate("cells", 2, dim=-1):
            count = numpyro.sample("count", dist.Binomial(2, 0.3))
            numpyro.sample("y", dist.Normal(shift + on * count, scale), obs=y.reshape(2, 2))


def chain(y):
    """A hidden Markov model whose emissions are mixtures."""
    transition = numpyro.sample("transition", dist.Dirichlet(jnp.ones((2, 2))).to_event(1))
    mean = numpyro.sample("mean", dist.Normal(0, 1).expand([2]).to_event(1))

    def step(x, y):
        x = numpyro.sample("x", dist.Categorical(transition[x]))
        outlier = numpyro.sample("outlier", dist.Bernoulli(0.3))
        numpyro.sample("y", dist.Normal(mean[x] + outlier, 1.0), obs=y)
        return x, None

    scan(step, 0, y)


def second_order(y):
    """The state depends on the two before it and decides the law of a continuous latent."""
    transition = numpyro.sample("transition", dist.Dirichlet(jnp.ones((2, 2, 2))).to_event(2))

    def step(states, y):
        x = numpyro.sample("x", dist.Categorical(transition[states]))
        level = numpyro.sample("level", dist.Normal(2.0 * x, 1.0))
        numpyro.sample("y", dist.Normal(level, 1.0), obs=y)
        return (states[1], x), None

    scan(step, (0, 1), jnp.concatenate([y, y[:2]]), history=2)


def chains_in_a_plate(y):
    """Two series, several measurements of each state, and a discrete latent common to all."""
    transition = numpyro.sample("transition", dist.Dirichlet(jnp.ones((2, 2))).to_event(1))
    common = numpyro.sample("common", dist.Bernoulli(0.3))

    def step(x, y):
        with numpyro.plate("series", 2):
            x = numpyro.sample("x", dist.Categorical(transition[x]))
            with numpyro.plate("measurements", 2):
                numpyro.sample("y", dist.Normal(1.0 * x + common, 1.0), obs=y)
        return x, None

    scan(step, jnp.zeros(2, int), jnp.arange(12.0).reshape(3, 2, 2) / 5)


def markov_loop(y):
    transition = numpyro.sample("transition", dist.Dirichlet(jnp.ones((2, 2))).to_event(1))
    x = 0
    for t in funsor.markov(range(len(y))):
        x = numpyro.sample(f"x{t}", dist.Categorical(transition[x]))
        numpyro.sample(f"y{t}", dist.Normal(1.0 * x, 1.0), obs=y[t])


def unchained(y):
    """A scan whose steps do not depend on each other, beside one whose data span two steps."""
    mean = numpyro.sample("mean", dist.Normal(0, 1))

    def alone(carry, y):
        on = numpyro.sample("on", dist.Bernoulli(0.3))
        numpyro.sample("y", dist.Normal(on * mean, 1.0), obs=y)
        return carry, None

    def overlapping(before, y):
        now = numpyro.sample("now", dist.Bernoulli(0.4))
        numpyro.sample("sum", dist.Normal(mean * (before + now), 1.0), obs=y)
        return now, None

    scan(alone, 0, y)
    scan(overlapping, 0, y)


MODELS = {
    "mixture": mixture,
    "nested plates": nested,
    "hidden Markov": chain,
    "second order": second_order,
    "chains in a plate": chains_in_a_plate,
    "markov": markov_loop,
    "scans without a chain": unchained,
}
SLOW = ("second order", "chains in a plate")
NAMES = [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in MODELS]
SHAPES = {
    "mixture": {"z": (3, (4,))},
    "nested plates": {"shift": (2, ()), "on": (2, (2, 1)), "count": (3, (2, 2))},
    "hidden Markov": {"x": (2, (4,)), "outlier": (2, (4,))},
    "second order": {"x": (2, (6,))},
    "chains in a plate": {"common": (2, ()), "x": (2, (3, 2))},
    "markov": {f"x{t}": (2, ()) for t in range(4)},
    "scans without a chain": {"on": (2, (4,)), "now": (2, (4,))},
}
OFFSETS = {"shift": 2}


def assignments(shapes):
    """All values of the discrete latents, along a leading axis."""
    radix = [k for k, shape in shapes.values() for _ in range(int(np.prod(shape, dtype=int)))]
    table = np.array(list(itertools.product(*map(range, radix))), np.int32)
    sizes = [int(np.prod(shape, dtype=int)) for _, shape in shapes.values()]
    columns = np.split(table, np.cumsum(sizes)[:-1], axis=1)
    return {
        name: columns[i].reshape(-1, *shape) + OFFSETS.get(name, 0)
        for i, (name, (_, shape)) in enumerate(shapes.items())
    }


def position(shapes, values):
    """The place of values, along a leading axis, among all assignments."""
    code = 0
    for name, (k, _) in shapes.items():
        for digit in (values[name].reshape(len(values[name]), -1) - OFFSETS.get(name, 0)).T:
            code = code * k + digit
    return code


@functools.cache
def results(name):
    """Everything that the tests ask of a model: ours, and by the sum over all assignments."""
    model, every = MODELS[name], assignments(SHAPES[name])
    target = vi.from_numpyro(model, Y, enumerate=True)
    flat = vi.flat(target)

    @jax.jit
    def compute(u):
        def joint(u, discrete):
            latents, log_det = flat.constrain_with_log_det(u)
            return log_density(model, (Y,), {}, {**latents, **discrete})[0] + log_det

        def summed(u):
            each = jax.vmap(joint, (None, 0))(u, every)
            return jax.nn.logsumexp(each), each

        (_, each), gradient = jax.value_and_grad(summed, has_aux=True)(u)

        def by_terms(u):
            latents, log_det = flat.constrain_with_log_det(u)
            terms = target.terms({}, latents, target.data)
            return sum(map(jnp.sum, terms.values())) + log_det

        latents = flat.constrain(u)
        keys = jax.random.split(jax.random.key(1), NUM_DRAWS)
        drawn = jax.vmap(lambda key: target.infer_discrete({}, latents, key, target.data))(keys)
        best = target.infer_discrete({}, latents, None, target.data)
        expected = jax.nn.logsumexp(each), gradient
        return expected, jax.value_and_grad(by_terms)(u), each, drawn, best

    u = 0.7 * jax.random.normal(jax.random.key(3), (flat.dim,))
    return target, jax.device_get(compute(u))


@pytest.mark.parametrize("name", NAMES)
def test_density_is_the_sum_over_all_assignments(name):
    """The terms of log p(x, z) add up to log sum_k p(x, z, k), k over all assignments, and so does
    the gradient; the latents are the continuous ones."""
    target, (expected, ours, _, _, _) = results(name)
    assert not SHAPES[name].keys() & target.latents.keys()
    np.testing.assert_allclose(ours[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(ours[1], expected[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_draws_have_the_posterior_of_the_assignments(name):
    """The frequencies of all assignments, jointly, are p(k | z, x): Pearson's chi-square is within
    4 of its standard deviations of its mean."""
    _, (_, _, each, drawn, _) = results(name)
    drawn = {n: drawn[n] for n in SHAPES[name]}
    assert {n: x.shape[1:] for n, x in drawn.items()} == {
        n: s for n, (_, s) in SHAPES[name].items()
    }
    probability = np.exp(np.float64(each) - np.logaddexp.reduce(np.float64(each)))
    seen = np.bincount(position(SHAPES[name], drawn), minlength=len(each))
    often = NUM_DRAWS * probability >= 5
    expected = NUM_DRAWS * np.append(probability[often], probability[~often].sum())
    counts = np.append(seen[often], seen[~often].sum())
    freedom = len(expected) - 1
    statistic = np.sum((counts - expected) ** 2 / np.maximum(expected, 1e-3))
    assert freedom >= 3
    assert abs(statistic - freedom) < 4 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("name", NAMES)
def test_maximum_is_the_best_assignment(name):
    """At temperature zero: the assignment of highest joint density."""
    _, (_, _, each, _, best) = results(name)
    at = position(SHAPES[name], {n: best[n][None] for n in SHAPES[name]})[0]
    assert at == np.argmax(each)


def test_long_chain_is_the_forward_algorithm():
    """Over 60 steps of 3 states, some moves impossible: the forward algorithm's likelihood."""
    y = np.asarray(jax.random.normal(jax.random.key(0), (60,)))
    moves = np.array([[0.9, 0.1, 0.0], [0.0, 0.5, 0.5], [0.2, 0.0, 0.8]], np.float32)

    def model(y):
        mean = numpyro.sample("mean", dist.Normal(0, 1).expand([3]).to_event(1))

        def step(x, y):
            x = numpyro.sample("x", dist.Categorical(jnp.array(moves)[x]))
            numpyro.sample("y", dist.Normal(mean[x], 1.0), obs=y)
            return x, None

        scan(step, 0, y)

    target = vi.from_numpyro(model, y, enumerate=True)
    mean = np.array([-1.0, 0.2, 1.1])
    value = jax.jit(target.log_density)({}, {"mean": jnp.array(mean)}, target.data)
    alpha, expected = np.array([1.0, 0.0, 0.0]), -0.5 * np.sum(mean**2) - 1.5 * np.log(2 * np.pi)
    for now in y:
        alpha = alpha @ moves * np.exp(-0.5 * (now - mean) ** 2) / np.sqrt(2 * np.pi)
        expected, alpha = expected + np.log(alpha.sum()), alpha / alpha.sum()
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_density_is_numpyro_s():
    """numpyro.contrib.funsor.log_density gives the same for a chain."""
    latents = {"transition": jnp.array([[0.2, 0.8], [0.6, 0.4]]), "mean": jnp.array([-1.0, 1.0])}
    target = vi.from_numpyro(chain, Y, enumerate=True)
    enumerated = funsor.enum(funsor.config_enumerate(chain), first_available_dim=-1)
    theirs, _ = jax.jit(lambda z: (funsor.log_density(enumerated, (Y,), {}, z)[0], 0))(latents)
    ours = jax.jit(target.log_density)({}, latents, target.data)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_impossible_values_have_gradient_zero():
    """Where every value is impossible the sum is -inf, and no gradient is NaN."""
    table = jnp.array([[-jnp.inf, -jnp.inf], [0.0, 1.0]])
    np.testing.assert_allclose(log_sum_exp(table, 1, ()), [-jnp.inf, jnp.logaddexp(0.0, 1.0)])
    gradient = jax.grad(lambda t: log_sum_exp(t, 1, ())[1])(table)
    np.testing.assert_allclose(gradient, [[0, 0], jax.nn.softmax(table[1])])


def test_scale_of_a_subsampled_plate_acts_after_the_sum():
    """Rows standing for N / B rows each: N / B times log sum exp, not log sum exp of the scaled."""
    table = jax.random.normal(jax.random.key(0), (3, 5))
    factor = Factor(table, ("z", "rows"), ("z",))
    (part,) = contract(Graph([factor], {"z": frozenset({"rows"})}, {"rows": 4.0}, ()))
    np.testing.assert_allclose(part.table, 4 * jax.nn.logsumexp(table, 0).sum(), rtol=1e-6)


def subsampled(y):
    mean = numpyro.sample("mean", dist.Normal(jnp.zeros(2), 2.0).to_event(1))
    with numpyro.plate("rows", len(y), subsample_size=2):
        z = numpyro.sample("z", dist.Bernoulli(0.3))
        numpyro.sample("y", dist.Normal(mean[z], 1.0), obs=numpyro.subsample(y, 0))


def test_batches_of_enumerated_rows_average_to_the_whole():
    """The density at all rows is the mean over the batches of an epoch."""
    target = vi.from_numpyro(subsampled, Y, enumerate=True)
    density, mean = jax.jit(target.log_density), {"mean": jnp.array([-0.5, 1.0])}
    batches = [vi.Batch(target.data, {"rows": jnp.array(rows)}) for rows in ([2, 0], [1, 3])]
    average = np.mean([density({}, mean, batch) for batch in batches])
    np.testing.assert_allclose(average, density({}, mean, target.data), rtol=1e-6)


def series(y):
    """Hidden Markov chains in a subsampled plate, made before the scan."""
    mean = numpyro.sample("mean", dist.Normal(0, 1).expand([2]).to_event(1))
    rows = numpyro.plate("rows", y.shape[1], subsample_size=2)
    with rows:
        some = numpyro.subsample(y, 0)

    def body(k, y):
        with rows:
            k = numpyro.sample("k", dist.Categorical(jnp.array([[0.9, 0.1], [0.2, 0.8]])[k]))
            numpyro.sample("y", dist.Normal(mean[k], 1.0), obs=y)
        return k, None

    scan(body, jnp.zeros(some.shape[1], int), some)


@pytest.mark.slow
def test_batches_of_chains_average_to_the_whole():
    """So it is along a scan: each row by the forward algorithm, drawn for a batch as for all."""
    y, mean = jnp.stack([Y, Y[::-1], 0.5 * Y]), jnp.array([-0.5, 1.0])
    target = vi.from_numpyro(series, y, enumerate=True)
    move = jnp.log(jnp.array([[0.9, 0.1], [0.2, 0.8]]))

    def forward(y):
        alpha = jnp.array([0.0, -jnp.inf])
        for one in y:
            alpha = jax.nn.logsumexp(alpha[:, None] + move, 0) + dist.Normal(mean, 1).log_prob(one)
        return jax.nn.logsumexp(alpha)

    expected = jax.vmap(forward)(y.T).sum() + dist.Normal().log_prob(mean).sum()
    batches = [vi.Batch(target.data, {"rows": jnp.array(rows)}) for rows in ([2, 0], [1, 3])]
    density = jax.jit(target.log_density)
    average = np.mean([density({}, {"mean": mean}, batch) for batch in batches])
    np.testing.assert_allclose(average, expected, rtol=1e-5)
    drawn = vi.infer_discrete(target, {"mean": mean}, jax.random.key(0), batches[0])
    assert drawn["k"].shape == (3, 2)


def with_missing_labels(x, label, known):
    """Labels of which some are known: numpyro masks the others, and the likelihood of the known."""
    mean = numpyro.sample("mean", dist.Normal(0, 1).expand([2]).to_event(1))
    with numpyro.plate("rows", len(x)):
        z = numpyro.sample("label", dist.Bernoulli(0.3), obs=label, obs_mask=known)
        numpyro.sample("x", dist.Normal(mean[z], 1.0), obs=x)


def test_masked_discrete_sites_add_nothing():
    """Half the labels known: the sum over the unknown ones alone."""
    label, known = jnp.array([0, 1, 1, 0]), jnp.array([True, False, True, False])
    target = vi.from_numpyro(with_missing_labels, Y, label, known, enumerate=True)
    mean = jnp.array([-0.5, 1.0])
    each = dist.Normal(mean, 1.0).log_prob(Y[:, None]) + jnp.log(jnp.array([0.7, 0.3]))
    rows = jnp.where(known, each[jnp.arange(4), label], jax.nn.logsumexp(each, 1))
    expected = rows.sum() + dist.Normal().log_prob(mean).sum()
    ours = jax.jit(target.log_density)({}, {"mean": mean}, target.data)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


def test_one_latent_for_a_vector_of_data():
    """Data without a plate: one discrete latent for all of them, not one a row."""

    def model(y):
        z = numpyro.sample("z", dist.Bernoulli(0.3))
        numpyro.sample("y", dist.Normal(numpyro.sample("m", dist.Normal()) + z, 1.0), obs=y)

    target = vi.from_numpyro(model, Y, enumerate=True)
    each = [dist.Normal(0.5 + z, 1.0).log_prob(Y).sum() for z in (0, 1)]
    expected = jnp.logaddexp(each[0] + jnp.log(0.7), each[1] + jnp.log(0.3))
    ours = jax.jit(target.log_density)({}, {"m": jnp.array(0.5)}, target.data)
    np.testing.assert_allclose(ours, expected + dist.Normal().log_prob(0.5), rtol=1e-5)


def test_without_discrete_latents():
    """A model that has none is what it is without enumerate, and funsor is not asked for."""

    def model(y):
        numpyro.sample("y", dist.Normal(numpyro.sample("z", dist.Normal()), 1.0), obs=y)

    one, other = (vi.from_numpyro(model, Y, enumerate=flag) for flag in (True, False))
    z = {"z": jnp.array(0.3)}
    assert one.infer_discrete is None
    assert one.log_density({}, z, one.data) == other.log_density({}, z, other.data)


def two_states(y):
    """Means that cannot change places, and a point-estimated spread."""
    gap = numpyro.sample("gap", dist.HalfNormal(3.0))
    spread = numpyro.param("spread", 1.0, constraint=dist.constraints.positive)
    with numpyro.plate("rows", len(y)):
        z = numpyro.sample("z", dist.Bernoulli(0.4))
        numpyro.sample("y", dist.Normal(gap * z, spread), obs=y)
    numpyro.deterministic("double", 2 * gap)
    numpyro.deterministic("above", jnp.sum(z))


@pytest.fixture(scope="module")
def fitted():
    """A target, its solution, and data drawn from it."""
    rng = np.random.default_rng(0)
    z = rng.random(60) < 0.4
    y = np.where(z, 3.0, 0.0) + 0.7 * rng.standard_normal(60)
    target = vi.from_numpyro(two_states, y, enumerate=True)
    guide = vi.guides.mean_field(target)
    fit = vi.fit(vi.elbo(target, guide), key=jax.random.key(0), num_steps=2000, progress=False)
    return target, guide, fit.params, z


def test_a_fit_recovers_gap_spread_and_states(fitted):
    """A mean-field guide over the gap: the truth within 4 standard errors, states mostly right;
    draws leave out what depends on the states, infer_discrete brings it."""
    target, guide, params, z = fitted
    draws = vi.draws(target, guide, params, jax.random.key(1), 200)
    assert draws.keys() == {"gap", "double"}
    found = vi.infer_discrete(target, draws, jax.random.key(2), params=params)
    assert found.keys() == {"z", "above"}
    assert found["z"].shape == (200, 60)
    np.testing.assert_array_equal(found["above"], found["z"].sum(1))
    assert abs(draws["gap"].mean() - 3.0) < 4 * 0.7 * np.sqrt(1 / z.sum() + 1 / (~z).sum())
    assert abs(vi.constrain(target.declared, {"spread": params["spread"]})["spread"] - 0.7) < 0.3
    assert np.mean((found["z"].mean(0) > 0.5) == z) > 0.9


def test_infer_discrete_follows_leading_axes(fitted, compilations):
    """One draw, many and grids of draws; batches change nothing; a second call compiles nothing."""
    target, _, params, _ = fitted
    gap, key = jnp.array([[2.0, 3.0, 4.0], [2.5, 3.5, 4.5]]), jax.random.key(0)
    grid = vi.infer_discrete(target, {"gap": gap}, key, params=params)
    assert grid["z"].shape == (2, 3, 60)
    for batch_size in (2, 6):
        again = vi.infer_discrete(
            target, {"gap": gap.ravel()}, key, params=params, batch_size=batch_size
        )
        np.testing.assert_array_equal(again["z"], grid["z"].reshape(6, 60))
    assert vi.infer_discrete(target, {"gap": gap[0, 0]}, key, params=params)["z"].shape == (60,)
    vi.infer_discrete(target, {"gap": gap + 1}, key, params=params)
    with compilations() as seen:
        vi.infer_discrete(target, {"gap": gap + 2}, key, params=params)
    assert not seen


def test_other_data(fitted):
    """The same target at fewer rows: the draws have their number, the density is a new target's."""
    target, _, params, _ = fitted
    y = jnp.array([0.1, 2.9, 3.2])
    gap, data = {"gap": jnp.array(3.0)}, {"y": y}
    values = vi.constrain(target.declared, {"spread": params["spread"]})
    new = vi.from_numpyro(two_states, y, enumerate=True)
    ours, theirs = (jax.jit(t.log_density)(values, gap, data) for t in (target, new))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    found = vi.infer_discrete(target, gap, jax.random.key(0), data, params=params, temperature=0)
    np.testing.assert_array_equal(found["z"], [0, 1, 1])


def poisson(y):
    numpyro.sample("y", dist.Normal(numpyro.sample("k", dist.Poisson(2.0)), 1.0), obs=y)


def vector(y):
    k = numpyro.sample("k", dist.Bernoulli(0.5).expand([4]).to_event(1))
    numpyro.sample("y", dist.Normal(k, 1.0), obs=y)


def batch(y):
    k = numpyro.sample("k", dist.Bernoulli(0.5 * jnp.ones(4)))
    numpyro.sample("y", dist.Normal(k, 1.0), obs=y)


def uneven(y):
    with numpyro.plate("rows", 4):
        k = numpyro.sample("k", dist.Binomial(np.array([1, 2, 3, 4]), 0.5))
        numpyro.sample("y", dist.Normal(k, 1.0), obs=y)


def outside(y):
    with numpyro.plate("rows", 4):
        k = numpyro.sample("k", dist.Bernoulli(0.5))
    numpyro.sample("y", dist.Normal(k, 1.0), obs=y)


def crossed(y):
    rows, columns = numpyro.plate("rows", 2, dim=-1), numpyro.plate("columns", 2, dim=-2)
    with rows:
        k = numpyro.sample("k", dist.Bernoulli(0.5))
    with columns:
        m = numpyro.sample("m", dist.Bernoulli(0.5))
    with rows, columns:
        numpyro.sample("y", dist.Normal(k + m, 1.0), obs=y.reshape(2, 2))


def reshaped(y):
    mean = numpyro.sample("mean", dist.Normal(0, 1))
    with numpyro.plate("rows", 4):
        k = numpyro.sample("k", dist.Bernoulli(0.5))
        numpyro.sample("y", dist.Normal(mean * k.reshape(4), 1.0), obs=y)


def moving_support(y):
    k = numpyro.sample("k", dist.Bernoulli(0.5))
    z = numpyro.sample("z", dist.Uniform(0.0, 1.0 + k))
    numpyro.sample("y", dist.Normal(z, 1.0), obs=y)


def backwards(y):
    def step(x, y):
        x = numpyro.sample("k", dist.Bernoulli(0.2 + 0.5 * x))
        numpyro.sample("y", dist.Normal(1.0 * x, 1.0), obs=y)
        return x, None

    scan(step, 0, y, reverse=True)


def branching(y):
    k = numpyro.sample("k", dist.Bernoulli(0.5))
    cond(y[0] > 0, lambda _: None, lambda _: None, None)
    numpyro.sample("y", dist.Normal(k, 1.0), obs=y)


def reduced(y):
    """A sum over all axes, that of the values among them."""
    k = numpyro.sample("k", dist.Bernoulli(0.3))
    with numpyro.plate("rows", 4):
        numpyro.sample("y", dist.Normal(jnp.sum(k), 1.0), obs=y)


def picked(y):
    """The first of the values, for all of them, in a deterministic site on the way."""
    with numpyro.plate("rows", 4):
        k = numpyro.sample("k", dist.Categorical(jnp.array([0.5, 0.3, 0.2])))
    first = numpyro.deterministic("first", jnp.ravel(k)[0])
    numpyro.factor("term", -1.0 * first)


REFUSED = {
    "reduced over its values": (reduced, ["not on each of its values", "site 'y'", "'k'"]),
    "picked from its values": (picked, ["not on each of its values", "site 'term'", "'k'"]),
    "infinite support": (poisson, ["no finite support", "Poisson", "'k'", "Categorical"]),
    "vector": (vector, ["event shape (4,)", "'k'", "numpyro.plate"]),
    "batch without plate": (batch, ["batch axis that is no plate", "[-1]", "'k'"]),
    "uneven support": (uneven, ["not known", "Binomial", "'k'", "Inhomogeneous"]),
    "dependence from outside": (outside, ["from outside", "plate 'rows'", "site 'y'", "'k'"]),
    "crossed plates": (crossed, ["different plates", "'k' in ['rows']", "'m' in ['columns']"]),
    "support of a latent": (moving_support, ["support", "latents ['z']"]),
    "reverse": (backwards, ["runs backwards", "'k'", "jnp.flip"]),
    "cond": (branching, ["Only numpyro's scan", "cond", "jnp.where"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_programs(name):
    """What cannot be summed out is refused when the target is built, by the name of its site."""
    model, fragments = REFUSED[name]
    with pytest.raises(ValueError, match="Expected") as caught:
        vi.from_numpyro(model, Y, enumerate=True)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_errors_of_the_program_say_what_it_sees():
    """An error that the extra axis causes inside the program comes with a note about that axis."""
    with pytest.raises(TypeError) as caught:
        vi.from_numpyro(reshaped, Y, enumerate=True)
    assert "to the left of all plates" in "".join(caught.value.__notes__)


def test_without_enumerate_the_message_names_it():
    """What needs continuous latents refuses discrete ones, and the message names enumerate."""
    with pytest.raises(ValueError, match="enumerate=True"):
        vi.guides.mean_field(vi.from_numpyro(mixture, Y))
    with pytest.raises(TypeError, match="True or False"):
        vi.from_numpyro(mixture, Y, enumerate="z")


def test_without_funsor_the_extra_is_named(monkeypatch):
    """Without funsor: an ImportError that names the extra to install."""
    for module in [m for m in sys.modules if m.startswith("numpyro.contrib.funsor")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delattr(numpyro.contrib, "funsor", raising=False)
    monkeypatch.setitem(sys.modules, "funsor", None)
    with pytest.raises(ImportError, match=r"vi_params\[enumerate\]"):
        vi.from_numpyro(mixture, Y, enumerate=True)


Z = {"z": vi.Latent()}
MISUSE = {
    "no discrete latents": (
        lambda t, key: vi.infer_discrete(
            vi.target(lambda v, z, d: z["z"], {"z": vi.Latent()}), {}, key
        ),
        *(ValueError, "sums no discrete latents out"),
    ),
    "temperature": (
        lambda t, key: vi.infer_discrete(t, {"gap": 1.0}, key, temperature=0.5),
        *(ValueError, "0 for the most probable"),
    ),
    "parameters": (lambda t, key: vi.infer_discrete(t, {"gap": 1.0}, key), ValueError, "'spread'"),
    "name": (
        lambda t, key: vi.infer_discrete(t, {"gab": 1.0}, key, params={"spread": 0.0}),
        *(KeyError, "did you mean 'gap'"),
    ),
    "shape": (
        lambda t, key: vi.infer_discrete(
            vi.from_numpyro(mixture, Y, enumerate=True), {"weights": jnp.ones(2), "mean": 0.0}, key
        ),
        *(ValueError, "latent 'weights'"),
    ),
    "leading axes": (
        lambda t, key: vi.infer_discrete(
            vi.from_numpyro(mixture, Y, enumerate=True),
            {"weights": jnp.ones((2, 3)), "mean": jnp.ones(3)},
            key,
        ),
        *(ValueError, "different leading axes"),
    ),
    "key": (lambda t, key: vi.infer_discrete(t, {"gap": 1.0}, 0), TypeError, "jax.random.key"),
}


@pytest.mark.parametrize("name", MISUSE)
def test_misuse_of_infer_discrete(name, fitted):
    """Wrong arguments are refused by name."""
    call, kind, fragment = MISUSE[name]
    with pytest.raises(kind) as caught:
        call(fitted[0], jax.random.key(0))
    assert fragment in str(caught.value)
