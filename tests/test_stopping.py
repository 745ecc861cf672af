"""Stopping rules on losses made up for the purpose."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vi_params as vi
from vi_params.fitting import stopping

EVERY = 100
KEY = jax.random.key(0)


@cache
def driver(rule):
    @jax.jit
    def drive(losses):
        def look(memory, some):
            memory, stop = rule.update(rule.options, memory, some)
            return memory, (stop, memory)

        return jax.lax.scan(look, rule.init(rule.options), losses.reshape(-1, rule.every))[1]

    return drive


PLATEAU = vi.stopping.plateau()


def first_stop(losses, rule=PLATEAU):
    """The step at which the rule first says stop, or None."""
    stops = np.asarray(driver(rule)(losses)[0])
    return (int(np.argmax(stops)) + 1) * rule.every if stops.any() else None


def noisy(mean, scale=1.0, seed=0):
    return mean + scale * jax.random.normal(jax.random.key(seed), mean.shape)


@pytest.mark.parametrize("seed", range(3))
def test_a_steadily_falling_loss_goes_on(seed):
    """A loss that falls by 2 noise sds each 1,000 steps is not stopped in 20,000."""
    assert first_stop(noisy(-2e-3 * jnp.arange(20_000.0), seed=seed)) is None


@pytest.mark.parametrize("seed", range(8))
def test_a_level_loss_stops(seed):
    """On flat noise it stops within sixteen windows, and never before four are seen."""
    assert 4000 <= first_stop(noisy(jnp.zeros(20_000), seed=seed)) <= 16_000


def test_it_stops_after_the_fall():
    """A loss that falls for 10,000 steps and is level from there is stopped after the fall."""
    falling = jnp.maximum(10.0 - 1e-3 * jnp.arange(40_000.0), 0.0)
    assert 10_000 < first_stop(noisy(falling, 0.1)) < 40_000


def test_an_exactly_constant_loss_stops_as_soon_as_may_be():
    """With no noise at all a constant loss is level: four windows and no more."""
    assert first_stop(jnp.ones(20_000)) == 4000


def test_a_fall_below_the_tolerance_is_none():
    """A slow fall without noise is level for a tolerance above it, not for one below."""
    losses = -1e-4 * jnp.arange(20_000.0)  # 0.1 and 0.2 nats at the two widths
    assert first_stop(losses, vi.stopping.plateau(tolerance=0.01)) is None
    assert first_stop(losses, vi.stopping.plateau(tolerance=0.5)) == 4000


def test_spikes_and_gaps_decide_nothing():
    """Huge, infinite or missing losses now and then change neither verdict."""
    wild = jnp.where(jnp.arange(20_000) % 37 == 5, 1e8, 0.0)
    wild = jnp.where(jnp.arange(20_000) % 41 == 3, jnp.nan, wild)
    wild = jnp.where(jnp.arange(20_000) % 43 == 3, jnp.inf, wild)
    assert 4000 <= first_stop(wild + noisy(jnp.zeros(20_000))) <= 16_000
    assert first_stop(wild + noisy(-2e-3 * jnp.arange(20_000.0))) is None


def test_merged_memory_keeps_the_averages():
    """After any number of looks the entries are the means of consecutive groups of their medians,
    and they fill half the memory at least."""
    losses = noisy(jnp.linspace(5.0, 0.0, 300 * EVERY))
    _, memories = driver(PLATEAU)(losses)
    medians = np.median(np.asarray(losses).reshape(300, EVERY), axis=1)
    for look in (0, 62, 63, 64, 65, 127, 128, 200, 299):
        memory = jax.tree.map(lambda leaf, look=look: np.asarray(leaf[look]), memories)
        size, complete = int(memory.looks_per_entry), int(memory.complete)
        groups = medians[: size * complete].reshape(complete, size).mean(axis=1)
        np.testing.assert_allclose(memory.averages[:complete], groups, rtol=1e-5)
        assert complete == (look + 1) // size < stopping.CAPACITY
        assert size == 1 or complete >= stopping.CAPACITY // 2
        left = medians[size * complete : look + 1]
        np.testing.assert_allclose(memory.pending, left.sum(), rtol=1e-5, atol=1e-5)
        assert memory.pending_looks == len(left)


def test_never_never_stops():
    """No loss, level, falling or NaN, stops it."""
    rule = vi.stopping.never(every=50)
    for losses in (jnp.zeros(5000), -jnp.arange(5000.0), jnp.full(5000, jnp.nan)):
        assert first_stop(losses, rule) is None


def test_the_rule_keeps_its_types():
    """The memory comes back in the shapes and strong dtypes it had, also under vmap."""
    memory = PLATEAU.init(PLATEAU.options)
    lanes = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), memory)
    update = jax.vmap(lambda m, x: PLATEAU.update(PLATEAU.options, m, x))
    after, stop = jax.eval_shape(update, lanes, jnp.zeros((2, EVERY)))
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, lanes)
    assert stop.shape == (2,)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: vi.stopping.plateau(window=0), "window"),
        (lambda: vi.stopping.plateau(every=0), "every"),
        (lambda: vi.stopping.never(every=-1), "every"),
    ],
)
def test_rules_refuse_what_makes_no_sense(make, name):
    """Windows and looks are at least one step long."""
    with pytest.raises(ValueError, match=name):
        make()
