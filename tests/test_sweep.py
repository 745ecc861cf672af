"""Restarts over options of the optimiser: each lane is the fit that it would be alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpyro import distributions as dist

import vi_params as vi

KEY = jax.random.key(0)
TARGET = vi.target(
    lambda v, z, d: dist.Normal(3.0, 2.0).log_prob(z["z"]).sum(), {"z": vi.Latent((2,))}
)
OBJECTIVE = vi.elbo(TARGET, vi.guides.mean_field(TARGET), num_particles=4)
RATES = [1e-3, 1e-2, 1e-1]
OPTIONS = {"key": KEY, "num_steps": 300, "progress": False, "stop": vi.stopping.never()}


def adam(rate=0.5):
    return optax.inject_hyperparams(optax.adam)(learning_rate=rate)


@pytest.mark.slow
def test_every_lane_is_a_fit_of_its_own():
    """A sweep of three rates from two starts: lane by lane the losses of separate fits."""
    swept = vi.fit(OBJECTIVE, adam(), restarts=2, sweep={"learning_rate": RATES}, **OPTIONS)
    assert swept.all_losses.shape == (6, 300)
    for i, rate in enumerate(RATES):
        alone = vi.fit(OBJECTIVE, adam(rate), restarts=2, **OPTIONS)
        np.testing.assert_allclose(
            swept.all_losses[2 * i : 2 * i + 2], alone.all_losses, rtol=1e-3, atol=1e-3
        )


def test_the_best_rate_wins_and_is_told():
    """After 300 steps only the largest rate has arrived: the table says which rate that was."""
    fit = vi.fit(OBJECTIVE, adam(), sweep={"learning_rate": RATES}, **OPTIONS)
    assert fit.best == 2
    assert fit.restarts.columns[:2] == ("restart", "learning_rate")
    assert fit.restarts.rows[0][:2] == (2, 0.1)
    np.testing.assert_allclose(fit.state.opt_state.hyperparams["learning_rate"], 0.1, rtol=1e-6)


def test_all_combinations():
    optimizer = optax.inject_hyperparams(optax.adam)(learning_rate=0.1, b1=0.9)
    sweep = {"learning_rate": [0.01, 0.1], "b1": [0.5, 0.9]}
    fit = vi.fit(OBJECTIVE, optimizer, sweep=sweep, **OPTIONS)
    pairs = {row[1:3] for row in fit.restarts.rows}
    assert pairs == {(0.01, 0.5), (0.01, 0.9), (0.1, 0.5), (0.1, 0.9)}


def test_other_values_compile_nothing(compilations):
    """The values are arguments of the program."""
    vi.fit(OBJECTIVE, adam(), sweep={"learning_rate": [0.01, 0.02]}, **OPTIONS)
    with compilations() as seen:
        vi.fit(OBJECTIVE, adam(), sweep={"learning_rate": [0.03, 0.05]}, **OPTIONS)
    assert seen == []


@pytest.mark.parametrize(
    ("optimizer", "sweep", "kind", "fragment"),
    [
        (optax.adam(0.1), {"learning_rate": RATES}, ValueError, "inject_hyperparams"),
        (adam(), {"rate": RATES}, ValueError, "'learning_rate'"),
        (adam(), {"learning_rate": []}, ValueError, "at least one number"),
        (adam(), {"learning_rate": [jnp.nan]}, ValueError, "finite"),
        (adam(), {"learning_rate": 0.1}, TypeError, "sequence|values of each"),
        (adam(), RATES, TypeError, "mapping"),
    ],
)
def test_wrong_sweeps_are_refused(optimizer, sweep, kind, fragment):
    with pytest.raises(kind, match=fragment):
        vi.fit(OBJECTIVE, optimizer, sweep=sweep, **OPTIONS)
