"""Batches from any Python iterable: the steps they make, and what happens when they end or fail."""

import re
import warnings
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest
from numpyro import distributions as dist

import vi_params as vi
from vi_params._tree import fold_in_name

KEY = jax.random.key(0)
Y = np.asarray(jax.random.normal(KEY, (20,))) + 1.0
BATCHES = [{"y": rows} for rows in Y.reshape(5, 4)]


def model(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 10.0))
    with numpyro.plate("rows", 20, subsample_size=y.shape[0]):
        numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)


OPTIMIZER = optax.adam(0.05)
STOP = vi.stopping.never(every=10)


@cache
def objective():
    target = vi.from_numpyro(model, Y[:4])
    return vi.elbo(target, vi.guides.mean_field(target))


def fit(data, num_steps=25, **options):
    options = {"key": KEY, "progress": False, "stop": STOP, **options}
    return vi.fit(objective(), OPTIMIZER, num_steps=num_steps, data=data, **options)


def test_a_plate_fed_from_outside_is_left_alone():
    """Data of a batch's size in a plate whose indices are not used count N / B times, at any
    batch size, and no rows are drawn."""
    target = objective().target
    assert target.subsample == {}
    for batch in (4, 2):
        found = target.log_density({}, {"mu": 0.5}, {"y": jnp.asarray(Y[:batch])})
        expected = dist.Normal(0.0, 10.0).log_prob(0.5)
        expected += 20 / batch * dist.Normal(0.5, 1.0).log_prob(Y[:batch]).sum()
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_batches_make_the_steps_that_svi_makes():
    """A list of batches, gone through again and again, gives the losses of svi.update on each."""
    found = fit(BATCHES)
    assert found.status is vi.Status.NUM_STEPS
    svi = vi.svi(objective(), OPTIMIZER)
    own = jax.random.fold_in(KEY, 0)
    start, steps = (fold_in_name(own, name) for name in ("start", "step"))
    state = svi.init(start, data=BATCHES[0])
    update = jax.jit(svi.update)
    for i in range(25):
        noise = svi.noise(jax.random.fold_in(steps, i))
        state, info = update(state, noise, BATCHES[i % 5])
        np.testing.assert_allclose(found.losses[i], info.loss, rtol=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), found.params, state.params
    )


class Tensor:
    """What JAX sees of an array of another library: a shape, and what NumPy makes of it."""

    def __init__(self, rows):
        self.rows, self.shape, self.dtype = rows, rows.shape, "another.float32"

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.rows, dtype)


class Loader:
    """What a data loader is: iterable again and again, its batches mappings of such arrays."""

    def __iter__(self):
        return iter([{"y": Tensor(batch["y"])} for batch in BATCHES])


def test_a_loader_of_another_library_s_arrays():
    """Batches of arrays that only NumPy understands are the same batches, epoch after epoch."""
    np.testing.assert_array_equal(fit(Loader(), 12).losses, fit(BATCHES, 12).losses)


def test_a_generator_that_ends_ends_the_fit():
    """What was reached is returned, and the status says that the data ended."""
    found = fit(iter(BATCHES), restarts=2)
    assert found.status is vi.Status.DATA_ENDED
    assert found.steps == 5
    assert "ended after 5 batches" in found.message


def _failing():
    yield from BATCHES[:3]
    raise OSError("the disk is gone")


@pytest.mark.parametrize(
    ("data", "fragments"),
    [
        (_failing, ["raised after 3 batches", "the disk is gone"]),
        (lambda: iter([*BATCHES[:3], {"x": Y[:4]}]), ["Batch 3", "unknown: 'x'"]),
        (
            lambda: iter([*BATCHES[:3], {"y": Y.reshape(10, 2)}]),
            ["batch 3, y", "(10, 2)"],
        ),
        (lambda: iter([*BATCHES[:3], {"y": np.arange(4)}]), ["batch 3, y", "int32"]),
        (lambda: iter([*BATCHES[:3], Y[:4]]), ["Batch 3", "structure of the data", "{'y': ...}"]),
        (lambda: iter([*BATCHES[:3], None]), ["Batch 3", "A batch is None"]),
        (lambda: iter([*BATCHES[:3], {"y": np.zeros(21, np.float32)}]), ["Batch 3", "'rows'"]),
    ],
)
def test_a_batch_that_fails_loses_nothing(data, fragments):
    """The three steps made before it are returned with a warning that names batch and leaf."""
    with pytest.warns(UserWarning, match=re.escape(fragments[0])):
        found = fit(data())
    assert found.status is vi.Status.DATA_FAILED
    assert found.steps == 3
    for fragment in fragments:
        assert fragment in found.message


def test_a_short_last_batch_counts_by_its_own_size():
    """Where the plate takes its batch size from the data a short last batch is a step too."""
    found = fit(iter([*BATCHES[:2], {"y": Y[:3]}]))
    assert found.steps == 3
    assert found.status is vi.Status.DATA_ENDED


def test_no_first_batch_is_an_error():
    """Nothing to start with raises: an empty list, a used-up generator, a batch of another kind."""
    with pytest.raises(ValueError, match=r"no batch to start with[\s\S]*ended after 0 batches"):
        fit([])
    for data in (iter([{"x": Y[:4]}]), [{"x": Y[:4]}]):
        with pytest.raises(ValueError, match=r"no batch to start with[\s\S]*unknown: 'x'"):
            fit(data)
    with pytest.raises(ValueError, match=r"name what a loader yields: \{'y': ...\}"):
        fit([(Y[:4],)])


def test_a_callback_and_a_stopping_rule_end_it():
    """True from a callback ends the fit at the next look; a level loss ends it by the rule."""
    found = fit(BATCHES, callbacks=[lambda told: told.step >= 20], num_steps=1000)
    assert (found.status, found.steps) == (vi.Status.INTERRUPTED, 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = fit(BATCHES, stop=vi.stopping.plateau(window=100, every=10), num_steps=3000)
    assert found.status is vi.Status.CONVERGED
    assert found.steps < 3000


def test_data_of_another_size_are_named():
    """Where a program fixes its sizes: plate and leaf."""

    def fixed(y):
        m = numpyro.sample("m", dist.Normal(0.0, 1.0))
        with numpyro.plate("rows", 6, subsample_size=2):
            numpyro.sample("y", dist.Normal(m, 1.0), obs=numpyro.subsample(y, 0))

    target = vi.from_numpyro(fixed, jnp.zeros(6))
    with pytest.raises(ValueError, match=r"(?s)y of shape \(6,\).*y of shape \(8,\).*rows"):
        target.log_density({}, {"m": jnp.zeros(())}, {"y": jnp.zeros(8)})
    objective = vi.elbo(target, vi.guides.mean_field(target))
    with pytest.raises(ValueError, match=r"(?s)y of shape \(8,\).*rows"):
        vi.fit(objective, key=KEY, data={"y": jnp.zeros(8)}, num_steps=1, progress=False)
