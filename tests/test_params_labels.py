"""Labels by path, and the optax combinators that take them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vi_params as vi

DECLARED = {
    "encoder": vi.Param([{"w": jnp.ones((2, 2)), "b": jnp.ones(2)}, {"w": jnp.ones(2)}]),
    "guide": {"loc": vi.Param(jnp.zeros(2)), "scale": vi.Param(1.0)},
}
PARAMS = vi.init_params(DECLARED, jax.random.key(0))


def train(optimizer, steps=3):
    """Steps down the sum of squares of (x - 3)."""

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: sum(jnp.sum((x - 3) ** 2) for x in jax.tree.leaves(p)))(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, optimizer.init(PARAMS)
    for _ in range(steps):
        params, state = step(params, state)
    return params


def test_labels_follow_the_first_pattern_found_in_a_path():
    """Patterns reach into the subtree of a network; the first that is found decides."""
    got = vi.labels(
        DECLARED, {r"encoder/\d/b": "bias", "^encoder/0": "first", "w$|loc": "rest"}, default=0
    )
    assert got == {
        "encoder": [{"w": "first", "b": "bias"}, {"w": "rest"}],
        "guide": {"loc": "rest", "scale": 0},
    }


def test_labels_choose_the_optimiser_of_each_parameter():
    """Two learning rates of plain gradient descent move parameters in their ratio."""
    which = vi.labels(DECLARED, {"encoder": "slow", ".*": "fast"})
    rates = {"slow": optax.sgd(0.01), "fast": optax.sgd(0.1)}
    params = train(optax.multi_transform(rates, which), steps=1)
    np.testing.assert_allclose(params["encoder"][0]["w"], 1 + 0.01 * 4, rtol=1e-6)
    np.testing.assert_allclose(params["guide"]["loc"], 0.1 * 6, rtol=1e-6)


def test_labels_can_be_a_mask():
    """Labels of True and False are what optax.masked takes."""
    mask = vi.labels(DECLARED, {"guide": True}, default=False)
    params = train(optax.chain(optax.sgd(0.1), optax.masked(optax.set_to_zero(), mask)))
    jax.tree.map(np.testing.assert_array_equal, params["guide"], PARAMS["guide"])
    assert np.all(params["encoder"][1]["w"] != 1)


def test_a_frozen_parameter_does_not_move():
    """Under Adam with weight decay the frozen leaves are bit for bit where they started."""
    params = train(vi.freeze(optax.adamw(0.1, weight_decay=0.1), DECLARED, "encoder/0|scale"))
    jax.tree.map(np.testing.assert_array_equal, params["encoder"][0], PARAMS["encoder"][0])
    np.testing.assert_array_equal(params["guide"]["scale"], PARAMS["guide"]["scale"])
    assert np.all(params["encoder"][1]["w"] != PARAMS["encoder"][1]["w"])
    assert np.all(params["guide"]["loc"] != PARAMS["guide"]["loc"])


def test_a_frozen_parameter_has_no_optimiser_state():
    """The optimiser sees only what is trained: Adam keeps moments for those leaves alone."""
    everything = optax.adam(0.1).init(PARAMS)
    state = vi.freeze(optax.adam(0.1), DECLARED, "encoder").init(PARAMS)

    def count(tree):
        return sum(x.size for x in jax.tree.leaves(tree))

    assert count(everything) - count(state) == 2 * (4 + 2 + 2)


def test_a_pattern_that_is_no_regular_expression():
    declared = {"loc": vi.Param(jnp.zeros(2))}
    with pytest.raises(ValueError, match=r"no regular expression[\s\S]*\[x"):
        vi.labels(declared, {"[x": "a"}, default="b")
