"""Permutations that are never written down, and the schemes that draw batches from them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import vi_params as vi
from vi_params.batches.permutation import permute

KEY = jax.random.key(0)


@partial(jax.jit, static_argnums=1)
def permutations(keys, size):
    return jax.vmap(lambda key: permute(key, size, jnp.arange(size)))(keys)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 97])
def test_it_is_a_permutation(size):
    """Every row has exactly one position, whatever the size."""
    rows = permutations(jax.random.split(KEY, 20), size)
    np.testing.assert_array_equal(np.sort(rows, axis=1), np.tile(np.arange(size), (20, 1)))


def test_rows_of_the_largest_plates_are_distinct_and_inside():
    """At 2**31 - 1 rows nothing overflows."""
    size = 2**31 - 1
    position = jnp.concatenate([jnp.arange(500), size - 1 - jnp.arange(500)])
    rows = np.asarray(jax.jit(lambda key: permute(key, size, position))(KEY))
    assert rows.min() >= 0
    assert rows.max() < size
    assert len(np.unique(rows)) == 1000
    assert rows.max() > 0.9 * size


def test_permutations_are_uniform():
    """All 24 permutations of four rows are equally likely, and pairs of positions of ten rows are
    uniform on distinct pairs: chi-square at the 0.1 % level."""
    rows = np.asarray(permutations(jax.random.split(KEY, 24_000), 4))
    counts = np.unique(rows, axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-3
    rows = np.asarray(permutations(jax.random.split(jax.random.key(1), 45_000), 10))
    pairs = np.bincount(rows[:, 0] * 10 + rows[:, 7], minlength=100).reshape(10, 10)
    assert np.all(np.diag(pairs) == 0)
    assert stats.chisquare(pairs[~np.eye(10, dtype=bool)]).pvalue > 1e-3


@partial(jax.jit, static_argnames=("scheme", "sizes"))
def drawn(scheme, key, steps, sizes):
    """Plate -> indices of shape (steps, batch)."""
    draw = {"shuffled": vi.batches.shuffled, "with_replacement": vi.batches.with_replacement}
    draw |= {"in_order": vi.batches.in_order}
    return jax.vmap(lambda step: draw[scheme]().draw(key, step, dict(sizes)))(steps)


def test_an_epoch_sees_every_row_once_and_epochs_differ():
    """Shuffled batches partition the rows; the next epoch is another permutation."""
    index = np.asarray(drawn("shuffled", KEY, jnp.arange(8), (("rows", (12, 3)),))["rows"])
    for epoch in index.reshape(2, 12):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(12))
    assert not np.array_equal(index[:4], index[4:])


def test_rows_left_out_are_not_always_the_same():
    """Where B does not divide N an epoch leaves N mod B rows out, each as often as another."""
    index = np.asarray(drawn("shuffled", KEY, jnp.arange(6000), (("rows", (7, 2)),))["rows"])
    for epoch in index.reshape(2000, 6)[:50]:
        assert len(set(epoch)) == 6
    assert stats.chisquare(np.bincount(index.ravel(), minlength=7)).pvalue > 1e-3


def test_plates_are_shuffled_independently():
    """All pairs of rows of two plates meet equally often."""
    sizes = (("a", (4, 1)), ("b", (4, 1)))
    index = drawn("shuffled", KEY, jnp.arange(16_000), sizes)
    # Every fourth step: within an epoch rows exclude each other.
    pairs = np.asarray(4 * index["a"][:, 0] + index["b"][:, 0])[::4]
    assert stats.chisquare(np.bincount(pairs, minlength=16)).pvalue > 1e-3


def test_with_replacement_is_uniform_and_repeats():
    """Rows are uniform, and some batches hold one twice."""
    index = np.asarray(
        drawn("with_replacement", KEY, jnp.arange(4000), (("rows", (5, 3)),))["rows"]
    )
    assert stats.chisquare(np.bincount(index.ravel(), minlength=5)).pvalue > 1e-3
    assert any(len(set(batch)) < 3 for batch in index[:100])
    assert vi.batches.with_replacement().repeats


def test_in_order_goes_through_all_rows_and_all_pairs_of_batches():
    """Each row once in N / gcd(N, B) batches of N / gcd rounds; two plates go through all pairs."""
    rows = np.asarray(drawn("in_order", KEY, jnp.arange(5), (("rows", (5, 2)),))["rows"])
    np.testing.assert_array_equal(rows.ravel(), np.tile(np.arange(5), 2))
    index = drawn("in_order", KEY, jnp.arange(6), (("a", (4, 2)), ("b", (3, 1))))
    pairs = {(int(a[0]), int(b[0])) for a, b in zip(index["a"], index["b"], strict=True)}
    assert len(pairs) == 6
    with pytest.raises(ValueError, match="plate 'rows'"):
        vi.batches.in_order().draw(KEY, 0, {"rows": (2**30 - 1, 100)})
