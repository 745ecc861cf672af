"""Averages of iterates: what they are, and that fits judge and return them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vi_params as vi

KEY = jax.random.key(0)
MEAN = jnp.array([1.0, -2.0])
TARGET = vi.target(lambda v, z, d: -0.5 * jnp.sum((z["z"] - MEAN) ** 2), {"z": vi.Latent((2,))})
OBJECTIVE = vi.elbo(TARGET, vi.guides.mean_field(TARGET))
OPTIONS = {"key": KEY, "num_steps": 400, "progress": False, "stop": vi.stopping.never()}
SCHEDULE_FREE = optax.contrib.schedule_free_sgd(0.05, b1=0.9)
NOISE = 0.5 * jax.random.normal(jax.random.key(1), (64, 500))


def descend(optimizer, noise, start=3.0):
    """Iterates and evaluated parameters of noisy descent on x^2 / 2."""

    def step(carry, e):
        x, state = carry
        updates, state = optimizer.update(x + e, state, x)
        x = optax.apply_updates(x, updates)
        return (x, state), (x, vi.evaluation_params(state, x))

    x = jnp.asarray(start)
    return jax.lax.scan(step, (x, optimizer.init(x)), noise)[1]


def polynomial_average(xs, eta):
    average = 0.0
    for t, x in enumerate(np.asarray(xs, float), 1):
        w = (eta + 1) / (t + eta)
        average = (1 - w) * average + w * x
    return average


def assert_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@pytest.mark.parametrize("eta", [0.0, 8.0])
def test_the_average_is_that_of_the_loop(eta):
    """The recursion of Shamir and Zhang in NumPy over the same iterates, the start left out; at
    eta = 0 it is their mean. The iterates are those of the optimiser alone."""
    xs, averages = jax.jit(lambda e: descend(vi.averaged(optax.sgd(0.3), eta=eta), e))(NOISE[0])
    alone, same = jax.jit(lambda e: descend(optax.sgd(0.3), e))(NOISE[0])
    np.testing.assert_array_equal(xs, alone)
    np.testing.assert_array_equal(same, alone)
    for t in (1, 2, 50, 500):
        np.testing.assert_allclose(averages[t - 1], polynomial_average(xs[:t], eta), atol=2e-6)
    if eta == 0:
        np.testing.assert_allclose(averages[-1], np.mean(xs), atol=2e-6)


def test_the_average_varies_less():
    """On a quadratic x' = (1 - a) x - a e: the last iterate has variance a s^2 / (2 - a), the
    average of n about s^2 times the sum of squared weights, (eta + 1)^2 / ((2 eta + 1) n)."""
    rate, n = 0.3, NOISE.shape[1]
    run = jax.jit(jax.vmap(lambda e: descend(vi.averaged(optax.sgd(rate)), e)))
    xs, averages = run(NOISE)
    last, mean = np.mean(xs[:, -1] ** 2), np.mean(averages[:, -1] ** 2)
    of_last, of_mean = 0.25 * rate / (2 - rate), 0.25 * 81 / (17 * n)
    spread = 4 * np.sqrt(2 / len(NOISE))  # four standard errors of a variance
    assert abs(last / of_last - 1) < spread
    assert abs(mean / of_mean - 1) < spread
    assert mean < last / 5


def test_what_follows_in_a_chain_is_averaged_too():
    """Iterates are averaged as they are, whatever changes the update after the optimiser."""
    chained = optax.chain(vi.averaged(optax.sgd(0.3)), optax.scale(0.5))
    xs, averages = descend(chained, NOISE[0, :20])
    np.testing.assert_allclose(averages[-1], polynomial_average(xs, 8.0), rtol=1e-5)


def test_a_fit_returns_and_judges_the_average():
    """fit.params is the average of what `vi.run` passes through, fit.state its last iterate;
    fit.elbo is that of fit.params, not that of the iterates, which is lower."""
    fit = vi.fit(OBJECTIVE, vi.averaged(optax.sgd(0.3)), **OPTIONS)
    plain = vi.fit(OBJECTIVE, optax.sgd(0.3), **OPTIONS)
    assert_close(fit.state.params, plain.params, rtol=1e-6)
    assert_close(fit.params, vi.evaluation_params(fit.state.opt_state, fit.state.params))

    def elbo(params):
        found = vi.diagnose(TARGET, OBJECTIVE.guide, params, KEY, num_draws=4000)
        return float(found.elbo)

    assert abs(fit.elbo - elbo(fit.params)) < 4 * fit.elbo_se
    assert elbo(fit.params) > elbo(plain.params) + 4 * fit.elbo_se
    np.testing.assert_array_equal(plain.params["guide"]["loc"], plain.state.params["guide"]["loc"])


@pytest.mark.slow
def test_restarts_and_sweeps_share_it():
    """The choice is made by averages: a rate at which iterates do not settle wins; every lane is
    the fit that it would be alone."""

    def make(rate):
        return vi.averaged(optax.inject_hyperparams(optax.sgd)(learning_rate=rate))

    sweep = {"learning_rate": [1e-3, 0.3]}
    fit = vi.fit(OBJECTIVE, make(0.1), restarts=2, sweep=sweep, **OPTIONS)
    assert fit.restarts.rows[0][1] == 0.3
    states = fit.all_states
    averages = jax.vmap(vi.evaluation_params)(states.opt_state, states.params)
    assert_close(fit.params, jax.tree.map(lambda leaf: leaf[fit.best], averages), rtol=1e-6)
    alone = vi.fit(OBJECTIVE, make(0.3), restarts=2, **OPTIONS)
    own = jax.vmap(vi.evaluation_params)(alone.all_states.opt_state, alone.all_states.params)
    assert_close(jax.tree.map(lambda leaf: leaf[2:], averages), own, rtol=1e-3, atol=1e-4)


def test_eta_can_be_swept_over():
    """Lanes that differ in eta alone have the same iterates and other averages."""
    optimizer = optax.inject_hyperparams(vi.averaged)(optax.sgd(0.3), eta=1.0)
    states = vi.fit(OBJECTIVE, optimizer, sweep={"eta": [0.0, 8.0]}, **OPTIONS).all_states
    averages = jax.vmap(vi.evaluation_params)(states.opt_state, states.params)
    iterates = states.params["guide"]["loc"]
    np.testing.assert_allclose(iterates[0], iterates[1], rtol=1e-5)
    assert np.all(averages["guide"]["loc"][0] != averages["guide"]["loc"][1])


def test_a_state_goes_on():
    """Two runs of n steps are one of 2 n, averages included."""
    svi = vi.svi(OBJECTIVE, vi.averaged(optax.adam(0.1)))
    run = jax.jit(lambda state, n: vi.run(svi, state, KEY, n)[0], static_argnums=1)
    state = svi.init(KEY)
    assert_close(run(run(state, 20), 20), run(state, 40), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("order", ["inside", "around"])
def test_frozen_parameters_stay(order):
    """Frozen parameters keep their bits, and the others are averaged."""
    sgd = optax.sgd(0.3)
    if order == "inside":
        optimizer = vi.freeze(vi.averaged(sgd), OBJECTIVE.declared, "scale")
    else:
        optimizer = vi.averaged(vi.freeze(sgd, OBJECTIVE.declared, "scale"))
    svi = vi.svi(OBJECTIVE, optimizer)
    start = svi.init(KEY)
    end, _ = jax.jit(lambda state: vi.run(svi, state, KEY, 30))(start)
    params = vi.evaluation_params(end.opt_state, end.params)["guide"]
    np.testing.assert_array_equal(params["scale"], start.params["guide"]["scale"])
    assert np.all(params["loc"] != end.params["guide"]["loc"])


@pytest.mark.parametrize("frozen", [False, True])
def test_schedule_free_is_evaluated_where_it_says(frozen):
    """With schedule-free optimisers fit.params is optax's own choice of parameters, and frozen ones
    stay."""
    optimizer = SCHEDULE_FREE
    if frozen:
        optimizer = vi.freeze(optimizer, OBJECTIVE.declared, "scale")
    fit = vi.fit(OBJECTIVE, optimizer, **OPTIONS)
    state, iterate = fit.state.opt_state, fit.state.params["guide"]
    if frozen:
        np.testing.assert_array_equal(fit.params["guide"]["scale"], iterate["scale"])
        state = state.inner_states["trained"].inner_state
    expected = optax.contrib.schedule_free_eval_params(
        state._replace(z=state.z["guide"]["loc"]), iterate["loc"]
    )
    np.testing.assert_allclose(fit.params["guide"]["loc"], expected, rtol=1e-6)
    assert np.all(fit.params["guide"]["loc"] != iterate["loc"])


def rows_objective():
    """Ten means with a latent each, two rows a batch."""
    latents = {"m": vi.Latent(()), "z": vi.Latent((10,), plates=("rows",))}
    target = vi.target(
        lambda v, z, d: -0.5 * z["m"] ** 2,
        latents,
        per_row=lambda v, z, d: -0.5 * (z["z"] - z["m"]) ** 2 - 0.5 * (d["y"] - z["z"]) ** 2,
        data={"y": vi.minibatch(jnp.arange(10.0), 2)},
    )
    return vi.elbo(target, vi.guides.mean_field(target))


def test_averages_of_rows_are_refused_or_dense():
    """A row that moves only with its batch has no average at every step: refused, with ways out
    that work."""
    objective = rows_objective()
    for optimizer in (vi.averaged(optax.sgd(0.1)), SCHEDULE_FREE):
        with pytest.raises(ValueError, match=r"not kept by row[\s\S]*/z[\s\S]*updates\.dense\(\)"):
            vi.svi(objective, optimizer)
        dense = vi.svi(objective, optimizer, updates=vi.updates.dense())
        _, info = jax.jit(dense.step)(dense.init(KEY), KEY)
        assert not info.skipped
    parts = {"row": optax.sgd(0.1), "shared": vi.averaged(optax.sgd(0.1))}
    which = vi.labels(objective.declared, {"/z/": "row", ".*": "shared"})
    svi = vi.svi(objective, optax.multi_transform(parts, which))
    state, info = jax.jit(svi.step)(svi.init(KEY), KEY)
    assert not info.skipped
    vi.evaluation_params(state.opt_state, state.params)


@pytest.mark.parametrize(
    ("build", "kind", "fragment"),
    [
        (lambda: vi.averaged(8.0), TypeError, "optax.GradientTransformation"),
        (lambda: vi.averaged(optax.sgd(0.1), eta="8"), TypeError, "eta must be a number"),
        (lambda: vi.averaged(optax.sgd(0.1), eta=None), TypeError, "eta must be a number"),
        (lambda: vi.averaged(optax.sgd(0.1), eta=-1.0), ValueError, "eta is out of range"),
        (lambda: vi.averaged(optax.sgd(0.1), eta=np.inf), ValueError, "eta is out of range"),
        (
            lambda: vi.svi(OBJECTIVE, vi.averaged(SCHEDULE_FREE)),
            ValueError,
            r"averaged twice[\s\S]*guide/loc",
        ),
        (
            lambda: vi.svi(OBJECTIVE, optax.chain(*[vi.averaged(optax.sgd(0.1))] * 2)),
            ValueError,
            "averaged twice",
        ),
        (
            lambda: vi.averaged(optax.sgd(0.1)).update(
                MEAN, vi.averaged(optax.sgd(0.1)).init(MEAN)
            ),
            ValueError,
            "needs the parameters",
        ),
    ],
)
def test_misuse_is_told(build, kind, fragment):
    with pytest.raises(kind, match=fragment):
        build()
