"""Steps and runs: pure, traced once, the same however they are cut; starts are valid."""

import importlib
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vi_params as vi

svi_module = importlib.import_module("vi_params.svi")
MEAN = jnp.array([1.0, -2.0])
KEY = jax.random.key(7)
START = {"guide": {"loc": jnp.array([3.0, 0.0]), "scale": jnp.zeros(2)}}


def gaussian(values, latents, data):
    return -0.5 * jnp.sum((latents["z"] - data) ** 2)


def objective_of(log_density, data=MEAN, *, num_particles=4, init=None):
    target = vi.target(log_density, {"z": vi.Latent((2,))}, data=data)
    guide = vi.guides.mean_field(target, init=init)
    return vi.elbo(target, guide, num_particles=num_particles)


@cache
def inference():
    return vi.svi(objective_of(gaussian), optax.adam(0.05))


@cache
def jitted_run():
    svi = inference()
    return jax.jit(lambda s, k, n, d: vi.run(svi, s, k, n, d), static_argnums=2)


def assert_same(a, b):
    """Bit for bit the same trees, dtypes included."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert jnp.result_type(x) == jnp.result_type(y)
        np.testing.assert_array_equal(x, y)


def test_a_step_is_traced_once_and_keeps_its_types():
    """The first and all later steps run one trace: the state comes back in strong, equal types."""
    traces = []

    def counted(values, latents, data):
        traces.append(1)
        return gaussian(values, latents, data)

    svi = vi.svi(objective_of(counted), optax.inject_hyperparams(optax.adam)(0.05))
    state = svi.init(KEY)
    step = jax.jit(svi.step)
    traces.clear()
    before = jax.tree.map(jax.typeof, state)
    state, _ = step(state, jax.random.key(0), MEAN)
    seen = len(traces)
    assert 0 < seen <= 2  # the loss, under value_and_grad
    for i in range(3):
        state, _ = step(state, jax.random.key(i), MEAN + i)
    assert len(traces) == seen
    assert step._cache_size() == 1
    assert jax.tree.map(jax.typeof, state) == before
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(state))


def test_a_step_is_pure():
    """The same state, key and data give the same step, and the state given is left as it was."""
    state, step = inference().init(KEY), jax.jit(inference().step)
    copy = jax.tree.map(np.array, state)
    first, again = step(state, KEY), step(state, KEY)
    assert_same(first, again)
    assert_same(jax.tree.map(np.asarray, state), copy)
    assert int(first[0].step) == 1
    assert float(first[1].loss) == pytest.approx(
        float(objective_of(gaussian).loss(state.params, KEY)[0]), rel=1e-6
    )


def test_the_gradient_norm_is_that_of_the_loss():
    """info.grad_norm = |d loss / d params|, over all leaves together."""
    svi, objective = inference(), objective_of(gaussian)
    state = svi.init(KEY)
    grads = jax.jit(jax.grad(lambda params: objective.loss(params, KEY)[0]))(state.params)
    norm = np.linalg.norm(jax.flatten_util.ravel_pytree(grads)[0])
    np.testing.assert_allclose(jax.jit(svi.step)(state, KEY)[1].grad_norm, norm, rtol=1e-5)


def test_two_runs_are_one():
    """run(2 n) = run(n) after run(n) with the same key: states and losses bit for bit."""
    state = inference().init(KEY)
    whole, losses = jitted_run()(state, KEY, 60, MEAN)
    half, first = jitted_run()(state, KEY, 30, MEAN)
    rest, second = jitted_run()(half, KEY, 30, MEAN)
    assert_same(rest, whole)
    np.testing.assert_array_equal(jnp.concatenate([first, second]), losses)
    assert losses.shape == (60,)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("numbers", [16, 80, 480])
def test_noise_ahead_of_the_loop_is_bounded_and_changes_nothing(monkeypatch, numbers):
    """However few numbers of noise may be drawn ahead, a run of 61 steps (a prime, 1 more than the
    blocks of 2, 10 and 60 steps) is the same bit for bit."""
    state = inference().init(KEY)
    _, expected = jitted_run()(state, KEY, 61, MEAN)
    monkeypatch.setattr(svi_module, "BLOCK", numbers)
    drawn = []
    ahead = svi_module.noise_of_steps

    def counted(svi, key, first, length):
        drawn.append(8 * length)
        return ahead(svi, key, first, length)

    monkeypatch.setattr(svi_module, "noise_of_steps", counted)
    _, losses = jax.jit(lambda s: vi.run(inference(), s, KEY, 61, MEAN))(state)
    np.testing.assert_array_equal(losses, expected)
    assert numbers / 2 < max(drawn) < 2 * numbers


def test_run_takes_its_steps_by_step():
    """run = svi.step iterated with the keys fold_in(key, step number)."""
    svi = inference()
    state = svi.init(KEY)
    by_run, losses = jitted_run()(state, KEY, 5, MEAN)
    step = jax.jit(svi.step)
    for i in range(5):
        state, info = step(state, jax.random.fold_in(KEY, i), MEAN)
        np.testing.assert_allclose(info.loss, losses[i], rtol=1e-5)
    np.testing.assert_allclose(
        state.params["guide"]["loc"], by_run.params["guide"]["loc"], rtol=1e-5
    )


def test_run_is_vmapped_over_keys_data_and_rates():
    """Lanes under vmap are the runs one by one: over keys, data sets and learning rates."""
    objective = objective_of(gaussian)
    svi = vi.svi(objective, optax.inject_hyperparams(optax.adam)(learning_rate=0.05))
    keys = jax.random.split(KEY, 2)
    data = jnp.stack([MEAN, MEAN + 3.0])
    rates = jnp.array([0.05, 0.2])

    @jax.jit
    def one(key, data, rate):
        state = svi.init(key, START, data)
        state.opt_state.hyperparams["learning_rate"] = rate
        state, losses = vi.run(svi, state, key, 100, data)
        return state.params["guide"]["loc"], losses

    locs, losses = jax.jit(jax.vmap(one))(keys, data, rates)
    for i in range(2):
        loc, loss = one(keys[i], data[i], rates[i])
        np.testing.assert_allclose(locs[i], loc, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(losses[i], loss, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(locs[1], data[1], atol=0.5)
    sweep, _ = jax.jit(jax.vmap(one, (None, None, 0)))(KEY, MEAN, jnp.array([0.0, 0.2]))
    assert np.linalg.norm(sweep[1] - MEAN) < 0.5 < np.linalg.norm(sweep[0] - MEAN)


def test_steps_that_are_not_finite_are_not_taken():
    """A density that is NaN for part of the noise: those steps are counted by `skipped`, leave
    parameters and optimiser state untouched, and the others go on to the optimum."""

    def broken(values, latents, data):
        z = latents["z"]
        return jnp.where(z[0] > data[0] + 1.0, jnp.nan, gaussian(values, latents, data))

    start = {"z": jnp.zeros(2)}
    svi = vi.svi(objective_of(broken, num_particles=1, init=start), optax.adam(0.05))
    state = svi.init(KEY)

    @jax.jit
    def trajectory(state):
        def body(state, key):
            new, info = svi.step(state, key, MEAN)
            same = jax.tree.map(lambda a, b: jnp.all(a == b), new[:2], state[:2])
            return new, (info, jnp.all(jnp.stack(jax.tree.leaves(same))))

        return jax.lax.scan(body, state, jax.random.split(KEY, 400))

    state, (info, untouched) = trajectory(state)
    skipped = np.asarray(info.skipped)
    assert 0 < skipped.sum() < 300
    np.testing.assert_array_equal(skipped, ~np.isfinite(info.loss))
    assert np.all(np.asarray(untouched)[skipped])
    assert not np.any(np.asarray(untouched)[~skipped])
    assert int(state.step) == 400
    assert np.all(np.isfinite(jax.flatten_util.ravel_pytree(state.params)[0]))
    np.testing.assert_allclose(state.params["guide"]["loc"][1], MEAN[1], atol=0.3)


def test_a_finite_loss_with_a_broken_gradient_is_not_a_step():
    """sqrt has an infinite gradient at 0 where its value is finite: the step is skipped."""

    def kink(values, latents, data):
        return -jnp.sqrt(jnp.abs(0.0 * latents["z"]).sum()) + gaussian(values, latents, data)

    svi = vi.svi(objective_of(kink, init={"z": jnp.zeros(2)}), optax.adam(0.05))
    start = svi.start(KEY)
    state, info = jax.jit(svi.step)(start.state, KEY)
    assert np.isfinite(info.loss)
    assert bool(info.skipped)
    assert not bool(start.valid)
    assert_same(state.params, start.state.params)


def test_starts_under_vmap_are_distinct_and_valid():
    """vmapped over keys, init gives another start for each, all finite, at step 0."""
    starts = jax.jit(jax.vmap(inference().start))(jax.random.split(KEY, 5))
    assert np.all(starts.valid)
    assert len(np.unique(np.asarray(starts.state.params["guide"]["loc"])[:, 0])) == 5
    np.testing.assert_array_equal(starts.state.step, np.zeros(5))


@pytest.mark.parametrize("bad", [-jnp.inf, jnp.nan])
def test_the_start_found_avoids_the_broken_half(bad):
    """Where the density is -inf or NaN on half the starts, every start is in the other half."""

    def half(values, latents, data):
        return jnp.where(latents["z"][0] < 0, bad, gaussian(values, latents, data))

    svi = vi.svi(objective_of(half), optax.adam(0.05))
    starts = jax.jit(jax.vmap(svi.start))(jax.random.split(KEY, 16))
    assert np.all(starts.valid)
    assert np.all(starts.state.params["guide"]["loc"][:, 0] > 0)
    tries = np.asarray(starts.tries)
    assert tries.min() == 1
    assert 1 < tries.max() < 20


def test_a_start_that_never_is_finite_says_so():
    """After 100 tries `start.valid` is False, and init still gives a state."""
    svi = vi.svi(objective_of(lambda v, z, d: jnp.nan * jnp.sum(z["z"])), optax.adam(0.05))
    start = svi.start(KEY)
    assert not bool(start.valid)
    assert int(start.tries) == svi_module.TRIES
    assert int(svi.init(KEY).step) == 0


def test_given_params_are_the_start():
    """params= is where the state begins, as strongly typed arrays, valid or not."""
    svi = inference()
    params = {"guide": {"loc": np.array([5.0, 6.0]), "scale": [0.1, 0.2]}}
    params["guide"]["scale"] = jnp.array(params["guide"]["scale"])
    start = svi.start(KEY, params)
    np.testing.assert_array_equal(start.state.params["guide"]["loc"], [5.0, 6.0])
    assert bool(start.valid)
    assert start.state.params["guide"]["loc"].dtype == jnp.float32
    nowhere = {"guide": {"loc": jnp.full(2, jnp.nan), "scale": jnp.ones(2)}}
    assert not bool(svi.start(KEY, nowhere).valid)


@pytest.mark.parametrize("kind", ["rbg", "unsafe_rbg"])
def test_other_kinds_of_keys_work(kind):
    """Keys of every implementation start, step and run; the run finds the optimum."""
    key = jax.random.key(3, impl=kind)
    svi = inference()
    state, losses = jax.jit(lambda key: vi.run(svi, svi.init(key), key, 300))(key)
    assert np.all(np.isfinite(losses))
    np.testing.assert_allclose(state.params["guide"]["loc"], MEAN, atol=0.3)


def test_lbfgs_on_paired_noise_needs_few_steps():
    """L-BFGS with antithetic, moment-matched noise of 64 draws is at the optimum after 15 steps."""
    target = vi.target(gaussian, {"z": vi.Latent((2,))}, data=MEAN)
    objective = vi.elbo(
        target,
        vi.guides.mean_field(target),
        num_particles=64,
        noise=vi.noise.moment_matched(),
    )
    svi = vi.svi(objective, optax.lbfgs())
    state, _ = jax.jit(lambda key: vi.run(svi, svi.init(key), key, 15))(KEY)
    values = vi.constrain(objective.declared, state.params)["guide"]
    np.testing.assert_allclose(values["loc"], MEAN, atol=1e-3)
    np.testing.assert_allclose(values["scale"], jnp.ones(2), rtol=1e-3)


def test_gradients_whose_squares_overflow_are_skipped():
    """At a gradient of 1e25 Adam's second moment would be infinite for good: the step is skipped,
    and such a start is no start."""
    target = vi.target(lambda v, z, d: -d * z["z"] ** 2, {"z": vi.Latent(())}, data=1e25)
    svi = vi.svi(vi.elbo(target, vi.guides.mean_field(target)), optax.adam(1e-2))
    start = svi.start(jax.random.key(0))
    assert not start.valid
    state, info = jax.jit(svi.step)(start.state, jax.random.key(1))
    assert info.skipped
    np.testing.assert_array_equal(state.params["guide"]["loc"], start.state.params["guide"]["loc"])
