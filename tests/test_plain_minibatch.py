"""Minibatches of targets in plain JAX: a split density, or one that applies the scale itself."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpyro import distributions as dist

import vi_params as vi

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (6, 2))
SD = jnp.float32(1.5)


def prior(values, latents, data):
    return -0.5 * jnp.sum(latents["m"] ** 2)


def likelihood(values, latents, data):
    return -0.5 * jnp.sum((data["x"] - latents["m"]) ** 2, 1) / data["sd"] ** 2


def scaled(values, latents, data, scale):
    rows = likelihood(values, latents, data)
    return prior(values, latents, data) + scale["rows"] * jnp.sum(rows)


def whole(latents):
    data = {"x": X, "sd": SD}
    return prior({}, latents, data) + jnp.sum(likelihood({}, latents, data))


DATA = {"x": vi.minibatch(X, 2), "sd": SD}
LATENTS = {"m": vi.Latent((2,))}
TARGETS = {
    "split": vi.target(prior, LATENTS, per_row=likelihood, data=DATA),
    "split, by plate": vi.target(prior, LATENTS, per_row={"rows": likelihood}, data=DATA),
    "scale": vi.target(scaled, LATENTS, data=DATA),
}


@pytest.mark.parametrize("name", TARGETS)
def test_an_epoch_s_mean_is_the_full_density(name):
    """The mean over an epoch of density and gradient is that of all data; what is not marked is
    seen whole."""
    target = TARGETS[name]
    latents = {"m": jnp.array([0.3, -0.2])}

    @jax.jit
    @jax.value_and_grad
    def at(latents, index):
        return target.log_density({}, latents, vi.Batch(target.data, {"rows": index}))

    found = [at(latents, rows) for rows in jnp.array([[3, 0], [5, 1], [2, 4]])]
    mean = jax.tree.map(lambda *x: jnp.mean(jnp.stack(x), 0), *found)
    expected = jax.value_and_grad(whole)(latents)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), mean, expected)
    full = target.log_density({}, latents, target.data)
    np.testing.assert_allclose(full, expected[0], rtol=1e-6)


def test_a_run_sees_two_rows_at_a_time_and_finds_the_posterior():
    """Compiled steps gather their rows, and the guide's q(values, data) sees the same ones; after a
    run the mean is the conjugate one."""
    seen = []

    def q(values, data):
        seen.append(data["x"].shape)
        return {"m": dist.Normal(values["loc"], 0.5).to_event(1)}

    target = TARGETS["split"]
    objective = vi.elbo(target, vi.guide({"loc": jnp.zeros(2)}, q))
    svi = vi.svi(objective, optax.adam(optax.exponential_decay(0.05, 500, 0.3)))
    state = svi.init(KEY)
    assert set(seen) == {(6, 2), (2, 2)}
    state, _ = jax.jit(lambda state: vi.run(svi, state, KEY, 2000))(state)
    precision = 1 + 6 / SD**2
    np.testing.assert_allclose(state.params["loc"], X.sum(0) / SD**2 / precision, atol=0.05)


def test_a_batch_of_all_rows_is_no_batch():
    """batch_size = N subsamples nothing."""
    target = vi.target(prior, LATENTS, per_row=likelihood, data={"x": vi.minibatch(X, 6), "sd": SD})
    assert target.subsample == {}
    assert target.plates == {"rows": 6}


def test_misuse_is_explained():
    """Every misuse is an error that names plate and leaf."""
    with pytest.raises(ValueError, match=r"from 1 to 6[\s\S]*Received: 7[\s\S]*plate 'rows'"):
        vi.minibatch(X, 7)
    with pytest.raises(ValueError, match=r"leading axis[\s\S]*a: 6, b: 5[\s\S]*plate 'users'"):
        vi.minibatch({"a": X, "b": X[:5]}, 2, plate="users")
    with pytest.raises(ValueError, match=r"leading axis[\s\S]*no array"):
        vi.minibatch({}, 2)
    with pytest.raises(TypeError, match="batch_size must be an int"):
        vi.minibatch(X, 2.5)
    with pytest.raises(TypeError, match="plate needs a name"):
        vi.minibatch(X, 2, plate=0)
    with pytest.raises(ValueError, match=r"two ways[\s\S]*batches of 2[\s\S]*batches of 3"):
        vi.target(scaled, LATENTS, data={"x": vi.minibatch(X, 2), "y": vi.minibatch(X, 3)})
    with pytest.raises(ValueError, match=r"nothing says what[\s\S]*plate 'rows'[\s\S]*per_row"):
        vi.target(prior, LATENTS, data=DATA)
    with pytest.raises(KeyError, match=r"unknown plate[\s\S]*'rows'[\s\S]*'users'"):
        vi.target(prior, LATENTS, per_row={"users": likelihood}, data=DATA)
    with pytest.raises(ValueError, match=r"which plate its terms have"):
        vi.target(prior, LATENTS, per_row=likelihood, data=X)
    summed = vi.target(
        prior, LATENTS, per_row=lambda v, z, d: jnp.sum(likelihood(v, z, d)), data=DATA
    )
    with pytest.raises(ValueError, match=r"one term a row[\s\S]*\(6,\)[\s\S]*shape \(\)"):
        summed.log_density({}, {"m": jnp.zeros(2)}, summed.data)
    other = {"x": X[:4], "sd": SD}
    with pytest.raises(ValueError, match=r"size has changed[\s\S]*6[\s\S]*plate 'rows', data x"):
        TARGETS["split"].log_density({}, {"m": jnp.zeros(2)}, other)
    with pytest.raises(TypeError, match="plates must name leading axes"):
        vi.Latent((2,), plates=("rows", "columns"))


def streamed(first, latents=LATENTS, prior=prior, likelihood=likelihood):
    data = {"x": vi.minibatch(first, len(first), size=len(X)), "sd": SD}
    return vi.target(prior, latents, per_row=likelihood, data=data)


def test_batches_from_outside_average_to_the_full_density():
    """Batches of any length count N / B times, and a fit takes them as they come."""
    target = streamed(X[:2])
    latents = {"m": jnp.array([0.3, -0.2])}
    values = [
        target.log_density({}, latents, {"x": X[i : i + 2], "sd": SD}) for i in range(0, 6, 2)
    ]
    np.testing.assert_allclose(np.mean(values), whole(latents), rtol=1e-5)
    everything = target.log_density({}, latents, {"x": X, "sd": SD})
    np.testing.assert_allclose(everything, whole(latents), rtol=1e-5)
    objective = vi.elbo(target, vi.guides.mean_field(target))
    batches = [{"x": X[:4], "sd": SD}, {"x": X[4:], "sd": SD}]
    fit = vi.fit(objective, optax.sgd(1e-3), key=KEY, data=batches, num_steps=5, progress=False)
    assert fit.steps == 5


def test_batches_from_outside_that_say_which_rows_they_hold():
    """Local latents: the loss is that on resident data at the same rows and noise."""

    def shift(values, latents, data):
        return -0.5 * jnp.sum(latents["m"] ** 2)

    def local(values, latents, data):
        z = latents["z"]
        each = dist.Normal(z, 1.0).log_prob(data["x"][:, 0]) + dist.Normal().log_prob(z)
        return each

    latents = {**LATENTS, "z": vi.Latent((6,), plates=("rows",))}
    outside = streamed(X[:2], latents, shift, local)
    resident = vi.target(shift, latents, per_row=local, data=DATA)
    rows = jnp.array([4, 1])
    losses = []
    for target, data in (
        (outside, vi.Batch({"x": X[rows], "sd": SD}, {"rows": rows})),
        (resident, vi.Batch({"x": X, "sd": SD}, {"rows": rows})),
    ):
        objective = vi.elbo(target, vi.guides.mean_field(target))
        params = vi.init_params(objective.declared, KEY)
        noise = objective.guide.noise(jax.random.key(1), 1)
        if target is resident:
            noise = objective.noise(KEY)._replace(noise=noise)
        losses.append(objective.evaluate(params, noise, data)[0])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    objective = vi.elbo(outside, vi.guides.mean_field(outside))
    with pytest.raises(ValueError, match="which rows they hold"):
        objective.loss(params, jax.random.key(1), {"x": X[:2], "sd": SD})


def test_new_data_may_be_marked_as_the_first_were():
    objective = vi.elbo(TARGETS["split"], vi.guides.mean_field(TARGETS["split"]))
    run = {"key": KEY, "num_steps": 2, "progress": False}
    marked = vi.fit(objective, data={"x": vi.minibatch(2 * X, 2), "sd": SD}, **run)
    plain = vi.fit(objective, data={"x": 2 * X, "sd": SD}, **run)
    np.testing.assert_array_equal(marked.losses, plain.losses)
    with pytest.raises(ValueError, match="other batches"):
        vi.fit(objective, data={"x": vi.minibatch(2 * X, 3), "sd": SD}, **run)
    first = {"x": vi.minibatch(X[:2], 2, size=8), "sd": SD}
    with pytest.raises(ValueError, match="other batches"):
        vi.fit(objective, data=first, **run)


def test_mistakes_with_batches_from_outside():
    with pytest.raises(ValueError, match="one batch"):
        vi.minibatch(X, 2, size=6)
    with pytest.raises(ValueError, match="does not fit into its plate"):
        vi.minibatch(X, 6, size=4)
    with pytest.raises(ValueError, match="size=N"):
        TARGETS["split"].log_density({}, {"m": jnp.zeros(2)}, {"x": X[:2], "sd": SD})
    batch = vi.Batch({"x": X, "sd": SD}, {"rows": [1, 2]})
    with pytest.raises(TypeError, match="must be an array"):
        TARGETS["split"].log_density({}, {"m": jnp.zeros(2)}, batch)
    pair = {"x": vi.minibatch(X[:2], 2, size=6), "y": vi.minibatch(X[:2, 0], 2, size=6)}
    target = vi.target(prior, LATENTS, per_row=lambda v, z, d: d["y"], data=pair)
    with pytest.raises(ValueError, match="do not share"):
        target.log_density({}, {"m": jnp.zeros(2)}, {"x": X[:2], "y": X[:3, 0]})
