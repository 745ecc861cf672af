"""Estimators that look inside a guide: on mean-field families, batches and plain densities."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from numpyro import distributions as dist
from numpyro.distributions import constraints

import vi_params as vi

E = vi.estimators
Y = jnp.array([0.3, 2.2, 1.9, -0.4])


def mixed_supports(batch):
    """A real scalar, a simplex, a positive row and a row of vectors."""

    def model(y):
        numpyro.sample("a", dist.Normal(0.0, 1.0))
        numpyro.sample("p", dist.Dirichlet(jnp.ones(3)))
        with numpyro.plate("rows", 4, subsample_size=batch):
            s = numpyro.sample("s", dist.HalfNormal(1.0))
            w = numpyro.sample("w", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
            numpyro.sample("y", dist.Normal(w.sum(-1), s), obs=numpyro.subsample(y, 0))

    return vi.from_numpyro(model, Y)


@pytest.mark.parametrize("batch", [4, 2])
def test_sites_are_the_draw(batch):
    """The sites of a mean-field family are its draw at the same noise, and add up to its log q; at
    given values they are its log density there. At a batch, rows count N / B times."""
    target = mixed_supports(batch)
    guide = vi.guides.mean_field(target, init_scale=0.6)
    params = vi.init_params(guide.declared, jax.random.key(0))
    noise = jax.tree.map(lambda leaf: leaf[0], guide.noise(jax.random.key(1), 1))

    @jax.jit
    def look(data):
        draw, sites = guide.transform(params, noise, data), guide.sites(params, noise, data)
        given = {name: site.value for name, site in sites.items()}
        again = guide.sites(params, noise, data, given)
        totals = [
            sum(jnp.sum(site.scale * site.log_prob) for site in found.values())
            for found in (sites, again)
        ]
        return draw, given, totals

    whole = target.data
    for data in (whole, vi.Batch(whole, {"rows": jnp.array([3, 1])})):
        draw, values, totals = look(data)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), values, draw.latents)
        # Families over one vector know log q of all rows, whatever the batch.
        if batch == 2 or data is whole:
            np.testing.assert_allclose(totals, draw.log_prob, rtol=1e-4)
        assert values["s"].shape == (4,) if data is whole else (2,)


def test_closed_form_divergences_of_a_family():
    """Where all priors are normal and nothing is observed, the loss of `analytic_kl` is the
    divergence of the family from the prior, without variance, and so is its gradient."""

    def model():
        numpyro.sample("a", dist.Normal(1.0, 2.0))
        with numpyro.plate("rows", 3):
            numpyro.sample("b", dist.Normal(jnp.zeros(2), 0.5).to_event(1))

    target = vi.from_numpyro(model)
    objective = vi.elbo(target, vi.guides.mean_field(target), estimator=E.analytic_kl())
    params = vi.init_params(objective.declared, jax.random.key(0))

    def exact(params):
        q = vi.constrain(objective.declared, params)["guide"]
        mean, sd = jnp.append(1.0, jnp.zeros(6)), jnp.append(2.0, jnp.full(6, 0.5))
        gap, ratio = (q["loc"] - mean) / sd, q["scale"] / sd
        return jnp.sum(0.5 * (gap**2 + ratio**2 - 1) - jnp.log(ratio))

    expected = jax.value_and_grad(exact)(params)
    for key in jax.random.split(jax.random.key(1), 2):
        found = jax.jit(jax.value_and_grad(lambda p, k: objective.loss(p, k)[0]))(params, key)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), found, expected)


def test_entropies_of_a_program():
    """Where every site's entropy is known the bound has their sum, each given the sites before it:
    its gradient is that of the exact ELBO of two normals in a chain, within four standard errors,
    and the loss varies less than with sampled entropies."""

    def model():
        a = numpyro.sample("a", dist.Normal(0.0, 1.0))
        with numpyro.plate("rows", 2):
            numpyro.sample("b", dist.Normal(a, 1.0))

    def program(v):
        a = numpyro.sample("a", dist.Normal(v["loc"], 0.5))
        with numpyro.plate("rows", 2):
            numpyro.sample("b", dist.Normal(v["slope"] * a, jnp.exp(v["width"])))

    def exact(p):  # up to a constant
        second = p["loc"] ** 2 + 0.25
        gap = (1 - p["slope"]) ** 2 * second + jnp.exp(2 * p["width"])
        return -0.5 * second - gap + 2 * p["width"]

    guide = vi.numpyro_guide(program, declared={"loc": 0.4, "slope": 0.3, "width": -0.5})
    params = vi.init_params(guide.declared, jax.random.key(0))
    keys, spread = jax.random.split(jax.random.key(1), 20_000), {}
    for estimator in (E.closed_form_entropy(), E.pathwise()):
        objective = vi.elbo(vi.from_numpyro(model), guide, estimator=estimator)
        both = jax.value_and_grad(lambda p, key, o=objective: -o.loss(p, key)[0])
        values, slopes = jax.jit(jax.vmap(both, in_axes=(None, 0)))(params, keys)
        spread[estimator.name] = np.std(values)
        for leaf, truth in jax.grad(exact)(params).items():
            draws = np.asarray(slopes[leaf], np.float64)
            assert abs(draws.mean() - truth) < 4 * draws.std() / np.sqrt(len(keys)) + 1e-5
    assert spread["closed_form_entropy"] < spread["pathwise"]


def labels(y):
    """Rows of two known components."""
    with numpyro.plate("rows", 4, subsample_size=2):
        k = numpyro.sample("k", dist.Bernoulli(0.3))
        numpyro.sample("y", dist.Normal(2.0 * k, 1.0), obs=numpyro.subsample(y, 0))


def labels_by_row():
    """The same as a plain density with terms by row."""

    def row(v, z, d):
        return dist.Bernoulli(0.3).log_prob(z["k"]) + dist.Normal(2.0 * z["k"], 1.0).log_prob(d)

    return vi.target(
        lambda v, z, d: jnp.zeros(()),
        {"k": vi.Latent((4,), constraints.boolean, plates=("rows",))},
        per_row=row,
        data=vi.minibatch(Y, 2),
    )


LABELS = {"program": lambda: vi.from_numpyro(labels, Y), "plain": labels_by_row}


def label_guide():
    declared = {"logits": vi.Param(jnp.array([-1.0, 0.5, 1.0, 0.2]), plates=("rows",))}
    return vi.guide(declared, lambda v: {"k": dist.Bernoulli(logits=v["logits"])})


def exact_labels(params):
    """The ELBO of all rows, each label summed."""
    log_q = jax.nn.log_sigmoid(jnp.stack([-params["logits"], params["logits"]]))
    k = jnp.array([[0.0], [1.0]])
    log_p = dist.Normal(2.0 * k, 1.0).log_prob(Y) + jnp.log(jnp.array([[0.7], [0.3]]))
    return jnp.sum(jnp.exp(log_q) * (log_p - log_q))


@pytest.mark.parametrize("kind", LABELS)
def test_sums_over_a_batch_average_to_the_whole(kind):
    """The exact sums of two batches that make up the data average to that of all rows, value and
    gradient, for a program and for a plain density with terms by row."""
    objective = vi.elbo(LABELS[kind](), label_guide(), estimator=E.enumerate())
    params = vi.init_params(objective.declared, jax.random.key(0))
    both = jax.jit(jax.value_and_grad(lambda p, d: -objective.loss(p, jax.random.key(1), d)[0]))
    halves = [
        both(params, vi.Batch(objective.data, {"rows": jnp.array(rows)}))
        for rows in ([0, 2], [3, 1])
    ]
    found = jax.tree.map(lambda a, b: (a + b) / 2, *halves)
    expected = jax.value_and_grad(exact_labels)(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), found, expected)


def test_a_batch_counts_in_every_estimator():
    """At the same batch and draws of a guide by distributions, `mixed`, `analytic_kl` and `score`
    give the ELBO's value, the rows of log q counted N / B times: written out by hand."""

    def model(y):
        with numpyro.plate("rows", 4, subsample_size=2):
            k = numpyro.sample("k", dist.Bernoulli(0.3))
            z = numpyro.sample("z", dist.Normal(2.0 * k, 1.0))
            numpyro.sample("y", dist.Normal(z, 1.0), obs=numpyro.subsample(y, 0))

    rows = jnp.array([-1.0, 0.5, 1.0, 0.2])
    declared = {name: vi.Param(rows, plates=("rows",)) for name in ("logits", "loc")}

    def q(v):
        return {"k": dist.Bernoulli(logits=v["logits"]), "z": dist.Normal(v["loc"], 0.7)}

    target = vi.from_numpyro(model, Y)
    guide = vi.guide(declared, q)
    params = vi.init_params(declared, jax.random.key(0))
    batch = vi.Batch(target.data, {"rows": jnp.array([2, 0])})
    found = []
    for estimator in (E.score(), E.mixed(), E.analytic_kl()):
        objective = vi.elbo(target, guide, num_particles=2, estimator=estimator)
        noise = objective.noise(jax.random.key(1))
        found.append(jax.jit(objective.evaluate)(params, noise, batch)[0])
        if estimator.name == "score":
            draws = [guide.transform(params, n, batch).latents for n in noise.noise]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)
    expected = 0.0
    for latents in draws:
        for i, row in enumerate((2, 0)):
            k, z = latents["k"][i], latents["z"][i]
            log_w = dist.Bernoulli(0.3).log_prob(k) + dist.Normal(2.0 * k, 1.0).log_prob(z)
            log_w += dist.Normal(z, 1.0).log_prob(Y[row]) - dist.Normal(rows[row], 0.7).log_prob(z)
            log_w -= dist.Bernoulli(logits=rows[row]).log_prob(k)
            expected -= 2.0 * log_w / 2
    np.testing.assert_allclose(found[0], expected, rtol=1e-4)
    assert np.isfinite(found[2])
