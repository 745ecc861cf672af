"""Row updates: only the batch's rows of parameters and optimiser state move."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpyro import distributions as dist
from numpyro.distributions import constraints

import vi_params as vi

KEY = jax.random.key(0)
N, B, STEPS = 6, 2, 7
Y = jnp.array([[0.3, -1.2], [0.7, 2.0], [-0.4, 1.1], [0.0, 0.5], [1.0, -2.0], [3.0, 0.1]])
LATENTS = {"m": vi.Latent((2,)), "z": vi.Latent((N, 2), plates=("rows",))}


def prior(values, latents, data):
    return -0.5 * jnp.sum(latents["m"] ** 2)


def likelihood(values, latents, data):
    z = latents["z"]
    return -0.5 * jnp.sum((z - latents["m"]) ** 2 + (data["y"] - z) ** 2, axis=1)


@cache
def objective():
    data = {"y": vi.minibatch(Y, B)}
    target = vi.target(prior, LATENTS, per_row=likelihood, data=data)
    declared = {
        "m_loc": jnp.zeros(2),
        "loc": vi.Param(lambda key: jax.random.normal(key, (N, 2)), plates=("rows",)),
        "scale": vi.Param(jnp.full((N, 2), 0.5), constraint=constraints.positive, plates=("rows",)),
    }
    guide = vi.guide(
        declared,
        lambda v: {
            "m": dist.Normal(v["m_loc"], 0.5).to_event(1),
            "z": dist.Normal(v["loc"], v["scale"]).to_event(1),
        },
    )
    return vi.elbo(target, guide)


def run(optimizer, **options):
    svi = vi.svi(objective(), optimizer, **options)
    start = svi.init(KEY)
    return start, jax.jit(lambda state: vi.run(svi, state, KEY, STEPS)[0])(start), svi


def assert_same(a, b, **tolerance):
    compare = np.testing.assert_allclose if tolerance else np.testing.assert_array_equal
    jax.tree.map(lambda x, y: compare(x, y, **tolerance), a, b)


@pytest.mark.parametrize("batches", ["shuffled", "with_replacement"])
def test_sgd_by_rows_is_dense_sgd(batches):
    """Without memory the rows outside a batch have nothing to do: rows and dense agree to the last
    bit, and to rounding where one row is in a batch twice."""
    scheme = getattr(vi.batches, batches)()
    _, by_rows, _ = run(optax.sgd(0.1), batches=scheme)
    _, dense, _ = run(optax.sgd(0.1), batches=scheme, updates=vi.updates.dense())
    assert_same(by_rows.params, dense.params, rtol=1e-5, atol=1e-6)
    exact = scheme.name == "shuffled"
    if exact:
        assert_same(by_rows.params["loc"], dense.params["loc"])


def test_adam_by_rows_is_the_reference_loop():
    """Adam by rows: m, v and the parameter of a row move when the row is in the batch, with the
    bias corrections of the step's number; a loop in NumPy says the same."""
    rate, b1, b2, eps = 0.05, 0.9, 0.999, 1e-8
    start, end, svi = run(optax.adam(rate, b1, b2, eps))
    gradient = jax.jit(jax.grad(lambda p, e: objective().evaluate(p, e, objective().data)[0]))
    params = jax.tree.map(np.array, start.params)
    m, v = (jax.tree.map(np.zeros_like, params) for _ in range(2))
    for t in range(STEPS):
        noise = svi.noise_at(KEY, jnp.int32(t))
        rows = np.asarray(noise.index["rows"])
        grads = gradient(params, noise)
        for name, x in params.items():
            at = slice(None) if name == "m_loc" else rows
            g = np.asarray(grads[name])[at]
            m[name][at] = b1 * m[name][at] + (1 - b1) * g
            v[name][at] = b2 * v[name][at] + (1 - b2) * g**2
            m_hat, v_hat = m[name][at] / (1 - b1 ** (t + 1)), v[name][at] / (1 - b2 ** (t + 1))
            x[at] -= rate * m_hat / (np.sqrt(v_hat) + eps)
    assert_same(end.params, params, rtol=2e-4, atol=1e-5)
    assert_same(end.opt_state[0].mu, m, rtol=2e-4, atol=1e-5)
    assert_same(end.opt_state[0].nu, v, rtol=2e-4, atol=1e-5)


def test_a_step_moves_the_batch_s_rows_alone():
    """Parameters and moments outside the batch are untouched by rows(), while dense() lets old
    moments move them."""
    svi = vi.svi(objective(), optax.adam(0.1))
    dense = vi.svi(objective(), optax.adam(0.1), updates=vi.updates.dense())
    state = svi.init(KEY)
    state, _ = jax.jit(svi.step)(state, KEY, vi.Batch(objective().data, {"rows": jnp.arange(N)}))
    data = vi.Batch(objective().data, {"rows": jnp.array([4, 1])})
    one, _ = jax.jit(svi.step)(state, KEY, data)
    other, _ = jax.jit(dense.step)(state, KEY, data)
    outside = np.array([0, 2, 3, 5])
    for new, old in ((one.params, state.params), (one.opt_state[0].mu, state.opt_state[0].mu)):
        for name in ("loc", "scale"):
            assert_same(new[name][outside], old[name][outside])
            assert np.all(new[name][data.index["rows"]] != old[name][data.index["rows"]])
    assert np.all(other.params["loc"][outside] != state.params["loc"][outside])
    assert_same(one.params["m_loc"], other.params["m_loc"], rtol=1e-6)


@pytest.mark.slow
def test_frozen_stays_and_thaws():
    """A frozen parameter keeps its bits, rows and all, beside a schedule and another optimiser for
    the rest; a fit that goes on from there without the freeze moves it."""
    parts = {
        "local": optax.adam(optax.exponential_decay(0.1, 3, 0.5)),
        "rest": optax.sgd(0.01, momentum=0.9),
    }
    labelled = optax.multi_transform(
        parts, vi.labels(objective().declared, {"^loc|^scale": "local", ".*": "rest"})
    )
    frozen = vi.freeze(labelled, objective().declared, "^loc$")
    start, end, _ = run(frozen)
    assert_same(end.params["loc"], start.params["loc"])
    assert np.all(end.params["scale"] != start.params["scale"])
    assert np.all(end.params["m_loc"] != start.params["m_loc"])
    svi = vi.svi(objective(), labelled)
    state = svi.init(KEY, params=end.params)
    assert_same(state.params, end.params)
    thawed = jax.jit(lambda state: vi.run(svi, state, KEY, STEPS)[0])(state)
    assert np.all(thawed.params["loc"] != end.params["loc"])


def test_a_batch_that_is_not_finite_changes_nothing():
    """A step whose rows give no finite loss is skipped: parameters and optimiser state keep their
    bits."""
    svi = vi.svi(objective(), optax.adam(0.1))
    state = svi.init(KEY)
    bad = vi.Batch({"y": Y.at[3].set(jnp.nan)}, {"rows": jnp.array([3, 0])})
    new, info = jax.jit(svi.step)(state, KEY, bad)
    assert info.skipped
    assert_same(new._replace(step=state.step), state)
    fine, info = jax.jit(svi.step)(state, KEY, vi.Batch(bad.data, {"rows": jnp.array([1, 0])}))
    assert not info.skipped
    assert np.all(fine.params["loc"][:2] != state.params["loc"][:2])


@pytest.mark.slow
def test_fit_with_restarts_takes_row_updates():
    """Restarts in lanes make the steps that each of them makes alone."""
    options = {"key": KEY, "num_steps": 30, "stop": vi.stopping.never(every=10), "progress": False}
    two = vi.fit(objective(), optax.adam(0.05), restarts=2, **options)
    one = vi.fit(objective(), optax.adam(0.05), **options)
    first = jax.tree.map(lambda x: x[0], two.all_states.params)
    assert_same(first, one.params, rtol=1e-4, atol=1e-5)
    assert one.losses.shape == (30,)


def test_optimisers_without_rows_are_refused():
    """L-BFGS keeps a history that has no rows: an error that says so, and the dense way works."""
    with pytest.raises(ValueError, match=r"has no rows[\s\S]*plate 'rows'[\s\S]*dense\(\)"):
        vi.svi(objective(), optax.lbfgs())
    dense = vi.svi(objective(), optax.lbfgs(), updates=vi.updates.dense())
    _, info = jax.jit(dense.step)(dense.init(KEY), KEY)
    assert not info.skipped
    with pytest.raises(TypeError, match=r"vi\.updates\.rows\(\)"):
        vi.svi(objective(), optax.sgd(0.1), updates="dense")
    with pytest.raises(TypeError, match=r"vi\.batches\.shuffled\(\)"):
        vi.svi(objective(), optax.sgd(0.1), batches=vi.batches.shuffled)


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adafactor(0.05),
        optax.sm3(0.05),
        optax.novograd(0.05),
        optax.contrib.prodigy(),
        optax.MultiSteps(optax.adam(0.05), 2).gradient_transformation(),
        optax.chain(optax.clip_by_global_norm(0.5), optax.inject_hyperparams(optax.adam)(0.05)),
    ],
    ids=["adafactor", "sm3", "novograd", "prodigy", "multi_steps", "chain"],
)
def test_a_batch_of_all_rows_is_the_dense_step(optimizer):
    """Whatever an optimiser keeps, row by row or not: with all rows in the batch, in another order,
    the steps by rows are the dense ones."""
    data = vi.Batch(objective().data, {"rows": jnp.array([3, 0, 1, 5, 2, 4])})
    reached = []
    for updates in (vi.updates.rows(), vi.updates.dense()):
        svi = vi.svi(objective(), optimizer, updates=updates)
        state, step = svi.init(KEY), jax.jit(svi.step)
        for i in range(3):
            state, _ = step(state, jax.random.fold_in(KEY, i), data)
        reached.append(state.params)
    assert_same(*reached, rtol=1e-5, atol=1e-6)


def test_an_axis_that_is_not_the_plate_s_size_is_refused():
    """A parameter or latent whose leading axis is not its plate's size is named."""
    target = objective().target
    short = vi.guide(
        {"loc": vi.Param(jnp.zeros((5, 2)), plates=("rows",))},
        lambda v: {"z": dist.Normal(v["loc"], 1.0).to_event(1), "m": dist.Normal(jnp.zeros(2))},
    )
    with pytest.raises(ValueError, match=r"6 along axis 0, plate 'rows'[\s\S]*declared, loc"):
        vi.elbo(target, short)
    wrong = {**LATENTS, "z": vi.Latent((5, 2), plates=("rows",))}
    with pytest.raises(ValueError, match=r"6 along axis 0, plate 'rows'[\s\S]*latents, z"):
        vi.target(prior, wrong, per_row=likelihood, data={"y": vi.minibatch(Y, B)})
