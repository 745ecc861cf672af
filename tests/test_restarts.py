"""Restarts side by side: each is its own fit, the best is found, and their agreement is told."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vi_params as vi

KEY = jax.random.key(1)
ADAM = optax.adam(0.05)


def two_modes(values, latents, data):
    """Normals at -5 and 5 of scale 0.5 with masses 1 and 3."""
    z = latents["z"]
    logits = jnp.stack([-2.0 * (z + 5.0) ** 2, jnp.log(3.0) - 2.0 * (z - 5.0) ** 2])
    return jax.nn.logsumexp(logits)


@cache
def objective():
    target = vi.target(two_modes, {"z": vi.Latent(())})
    return vi.elbo(target, vi.guides.mean_field(target), num_particles=10)


def fitted(objective, restarts, **options):
    options = {"key": KEY, "progress": False, "num_steps": 1500} | options
    return vi.fit(objective, ADAM, restarts=restarts, **options)


@cache
def four():
    return fitted(objective(), 4)


def test_the_better_of_two_modes_is_picked_and_the_other_told():
    """Where restarts end in modes of masses 1 and 3, the best is at the heavier one, log 3 nats
    above, and the message says that they disagree."""
    fit = four()
    locs = np.asarray(fit.all_states.params["guide"]["loc"])[:, 0]
    assert {-1.0, 1.0} == set(np.sign(locs))  # both modes were found
    np.testing.assert_allclose(fit.params["guide"]["loc"], 5.0, atol=0.1)
    np.testing.assert_array_equal(fit.params["guide"]["loc"][0], locs[fit.best])
    elbos = dict(zip(fit.restarts["restart"], fit.restarts["elbo"], strict=True))
    low, high = (np.mean([elbos[i] for i in range(4) if locs[i] * s > 0]) for s in (-1, 1))
    assert high - low == pytest.approx(np.log(3.0), abs=0.03)
    assert fit.elbo == elbos[fit.best] == max(elbos.values())
    assert "DISAGREE" in fit.message
    assert f"{int((locs > 0).sum())} of 4 restarts agree" in fit.message
    assert fit.message in str(fit)
    assert "restart" in str(fit)


@pytest.mark.parametrize("restarts", [1, 2])
def test_a_restart_does_not_depend_on_how_many_there_are(restarts):
    """Restart r of 1, 2 or 4 has the same losses (batched kernels round differently)."""
    fit = fitted(objective(), restarts, num_steps=200)
    for r in range(restarts):
        np.testing.assert_allclose(
            fit.all_losses[r], four().all_losses[r, :200], rtol=1e-3, atol=1e-3
        )


def test_restarts_of_one_optimum_agree():
    """On a Gaussian all restarts end at one ELBO, and the message says so."""
    target = vi.target(lambda v, z, d: -0.5 * jnp.sum(z["z"] ** 2), {"z": vi.Latent((2,))})
    fit = fitted(vi.elbo(target, vi.guides.mean_field(target), num_particles=10), 3)
    assert fit.message == "3 of 3 restarts agree on the best ELBO."
    assert fit.elbo == pytest.approx(np.log(2 * np.pi), abs=0.02)


def test_stopped_restarts_are_frozen():
    """A restart that stopped earlier than another keeps the state it stopped at: its losses are NaN
    from there on, its step number stays, and going on longer changes nothing of it."""
    stop = vi.stopping.plateau(window=100, every=50)
    told = []
    fit = fitted(objective(), 4, stop=stop, num_steps=3000, callbacks=(told.append,))
    steps = np.asarray(fit.all_states.step)
    assert len(set(steps.tolist())) > 1
    for r in range(4):
        made = np.isfinite(fit.all_losses[r])
        assert made[: steps[r]].all()
        assert not made[steps[r] :].any()
    first = int(np.argmin(steps))
    cut = fitted(objective(), 4, stop=stop, num_steps=int(steps[first]))
    for a, b in zip(jax.tree.leaves(cut.all_states), jax.tree.leaves(fit.all_states), strict=True):
        np.testing.assert_array_equal(a[first], b[first])
    assert told[-1].step == steps.max() == fit.all_losses.shape[1]
    assert len(fit.losses) == fit.steps == steps[fit.best]


def test_some_starts_may_be_invalid():
    """Restarts with no valid start among 100 are told of as INVALID_START and fail the comparison;
    the others are fitted."""

    def rarely(values, latents, data):
        return jnp.where(latents["z"] < 1.97, jnp.nan, -((latents["z"] - 5.0) ** 2))

    target = vi.target(rarely, {"z": vi.Latent(())})
    guide = vi.guides.mean_field(target, init_scale=1e-3)
    fit = fitted(vi.elbo(target, guide), 8, num_steps=300)
    statuses = dict(zip(fit.restarts["restart"], fit.restarts["status"], strict=True))
    invalid = [r for r, status in statuses.items() if status == "INVALID_START"]
    assert 0 < len(invalid) < 8
    assert fit.best not in invalid
    assert f"{len(invalid)} failed" in fit.message
    np.testing.assert_array_equal(np.asarray(fit.all_states.step)[invalid], 0)
    assert np.isnan(np.asarray(fit.restarts["elbo"])[-len(invalid) :]).all()
    assert np.isfinite(fit.losses).sum() > 250


def test_a_density_that_is_nan_at_some_draws_still_has_a_best():
    """The comparison leaves out draws that are not finite, as the steps did."""

    def holed(values, latents, data):
        z = latents["z"]
        return jnp.where(jnp.abs(z) > 6.3, jnp.nan, two_modes(values, latents, data))

    target = vi.target(holed, {"z": vi.Latent(())})
    fit = fitted(vi.elbo(target, vi.guides.mean_field(target)), 4)
    assert fit.skipped > 0
    assert np.isfinite(fit.elbo)
    assert "not finite" in fit.message
    assert float(fit.params["guide"]["loc"][0]) > 4.0
