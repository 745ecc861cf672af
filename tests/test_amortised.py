"""Encoders inside plates: weights of any library, exact gradients, rows of parameters beside."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest
from numpyro import distributions as dist
from test_examples import load

import vi_params as vi

KEY = jax.random.key(0)
N, B = 6, 2
Y = jax.random.normal(jax.random.key(3), (N, 3))
NETWORKS = load("amortised").NETWORKS
MODULES = {"plain JAX": "jax", "Flax NNX": "flax", "Equinox": "equinox"}


def model(y):
    with numpyro.plate("rows", N, subsample_size=B):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        readings = dist.Normal(z[:, None], 1.0).to_event(1)
        numpyro.sample("y", readings, obs=numpyro.subsample(y, 1))


def prior(values, latents, data):
    return jnp.zeros(())


def per_row(values, latents, data):
    z = latents["z"]
    of_data = dist.Normal(z[:, None], 1.0).log_prob(data).sum(1)
    return dist.Normal(0.0, 1.0).log_prob(z) + of_data


def normal(network, values, y):
    """Rows refine what the network says."""
    loc, log_scale = network.apply(values["net"], y).T
    return dist.Normal(loc + values["shift"], jnp.exp(log_scale))


def as_program(network, declared):
    def program(values, y):
        with numpyro.plate("rows", N, subsample_size=B):
            numpyro.sample("z", normal(network, values, numpyro.subsample(y, 1)))

    return vi.from_numpyro(model, Y), vi.numpyro_guide(program, Y, declared=declared)


def as_distributions(network, declared):
    latents = {"z": vi.Latent((N,), plates=("rows",))}
    target = vi.target(prior, latents, per_row=per_row, data=vi.minibatch(Y, B))
    return target, vi.guide(declared, lambda values, y: {"z": normal(network, values, y)})


@pytest.mark.parametrize(
    ("build", "kind"),
    [(as_program, "plain JAX"), (as_program, "Flax NNX"), (as_distributions, "Equinox")],
)
def test_weights_inside_a_plate(build, kind):
    """The mean of log p - log q over the batches of an epoch is that of all data, and so are its
    gradients by the weights and the rows; a step moves all weights and the batch's rows alone; the
    trained encoder gives rows at new data."""
    pytest.importorskip(MODULES[kind])
    network = NETWORKS[kind](3, 4, 2)
    declared = {"net": vi.Param(network.init), "shift": vi.Param(jnp.zeros(N), plates=("rows",))}
    target, guide = build(network, declared)
    objective = vi.elbo(target, guide)
    guide, svi = objective.guide, vi.svi(objective, optax.adam(0.1))
    state = svi.init(KEY)
    z = jnp.linspace(-1.0, 1.0, N)

    @jax.jit
    @jax.value_and_grad
    def at(params, index):
        data = vi.Batch(target.data, {"rows": index})
        some = {"z": z[index]}
        log_p = target.log_density({}, some, data)
        return log_p - guide.log_prob(params, some, data)

    found = [at(state.params, rows) for rows in jnp.array([[4, 1], [0, 5], [3, 2]])]
    mean = jax.tree.map(lambda *x: jnp.mean(jnp.stack(x), 0), *found)
    whole = at(state.params, jnp.arange(N))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), mean, whole)

    new, _ = jax.jit(svi.step)(state, KEY, vi.Batch(target.data, {"rows": jnp.array([4, 1])}))
    moved = jax.tree.map(lambda a, b: np.all(a != b), new.params["net"], state.params["net"])
    assert all(jax.tree.leaves(moved))
    np.testing.assert_array_equal(np.flatnonzero(new.params["shift"]), [1, 4])

    other = jax.tree.map(lambda y: y + 1.0, target.data)
    drawn = [vi.draws(target, guide, new.params, KEY, 2, d)["z"] for d in (target.data, other)]
    assert np.all(drawn[0] != drawn[1])


def fed(y):
    with numpyro.plate("rows", N, subsample_size=y.shape[0]):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(z[:, None], 1.0).to_event(1), obs=y)


def test_an_encoder_on_batches_from_outside():
    """q(values, data) sees the rows of the batch as they come; with rows of parameters beside the
    network the batch says which rows they are."""
    network, y = NETWORKS["plain JAX"](3, 4, 2), np.asarray(Y)
    target = vi.from_numpyro(fed, Y[:B])
    parts = [np.array([4, 1]), np.array([0, 5])]
    rows = {"shift": vi.Param(jnp.zeros(N), plates=("rows",))}
    options = {"num_steps": 8, "progress": False, "stop": vi.stopping.never(every=4), "key": KEY}
    for local in ({}, rows):
        declared = {"net": vi.Param(network.init), **local}

        def q(values, data):
            return {"z": normal(network, {"shift": 0.0, **values}, data["y"])}

        batches = [{"y": y[i]} for i in parts]
        if local:
            batches = [vi.Batch(b, {"rows": i}) for b, i in zip(batches, parts, strict=True)]
        objective = vi.elbo(target, vi.guide(declared, q))
        fit = vi.fit(objective, optax.adam(0.1), data=batches, **options)
        assert fit.steps == 8
        assert fit.skipped == 0
        if local:
            moved = np.flatnonzero(fit.params["shift"])
            np.testing.assert_array_equal(moved, [0, 1, 4, 5])
