"""Regression on data read from disk batch by batch, against the exact posterior.

The rows lie in a file that is never read as a whole: a generator hands batches of it to `vi.fit`,
which sends the next batch to the device while a step computes. The plate has the size of all the
rows, so that a batch counts N / B times. For this conjugate model the exact posterior can be had
from sums over the file, and is compared.

    python examples/streaming.py
"""

import pathlib
import tempfile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax

import vi_params as vi

ROWS, COLUMNS, BATCH, STEPS = 200_000, 8, 1_000, 4_000


def model(x, y):
    """Rows come from outside: the plate knows how many there are in all."""
    weight = numpyro.sample("weight", dist.Normal(0.0, 1.0).expand([COLUMNS]).to_event(1))
    with numpyro.plate("rows", ROWS, subsample_size=x.shape[0]):
        numpyro.sample("y", dist.Normal(x @ weight, 1.0), obs=y)


def write(path):
    """A file of rows (x, y), written piece by piece."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=COLUMNS)
    shape = (ROWS, COLUMNS + 1)
    file = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    for first in range(0, ROWS, 10_000):
        x = rng.normal(size=(10_000, COLUMNS)) @ np.triu(np.full((COLUMNS, COLUMNS), 0.5))
        y = x @ weight + rng.normal(size=10_000)
        file[first : first + 10_000] = np.column_stack([x, y])
    file.flush()


def batches(path):
    """Batches without end, each epoch in another order of its blocks."""
    rng = np.random.default_rng(1)
    file = np.load(path, mmap_mode="r")
    while True:
        for first in rng.permutation(ROWS // BATCH) * BATCH:
            rows = np.asarray(file[first : first + BATCH])
            yield {"x": rows[:, :-1], "y": rows[:, -1]}


def exact(path):
    """Mean and covariance of the posterior, from sums over the file."""
    file = np.load(path, mmap_mode="r")
    precision, moment = np.eye(COLUMNS), np.zeros(COLUMNS)
    for first in range(0, ROWS, 10_000):
        rows = np.asarray(file[first : first + 10_000], np.float64)
        precision += rows[:, :-1].T @ rows[:, :-1]
        moment += rows[:, :-1].T @ rows[:, -1]
    return np.linalg.solve(precision, moment), np.linalg.inv(precision)


class Result(NamedTuple):
    """What was found.

    Attributes:
        error: the largest error of a posterior mean, in posterior standard deviations.
        scale: the largest factor between a standard deviation and the exact one.
        fit: the fit.
    """

    error: float
    scale: float
    fit: vi.Fit


def main():
    """Writes the file, fits, compares."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "rows.npy"
        write(path)
        first = next(batches(path))
        target = vi.from_numpyro(model, first["x"], first["y"])
        guide = vi.guides.full_rank(target, init={"weight": jnp.zeros(COLUMNS)}, init_scale=0.01)
        fit = vi.fit(
            vi.elbo(target, guide, num_particles=4, estimator=vi.estimators.closed_form_entropy()),
            optax.adam(optax.cosine_decay_schedule(0.02, STEPS)),
            key=jax.random.key(0),
            num_steps=STEPS,
            data=batches(path),
            stop=vi.stopping.never(),
            progress=False,
        )
        print(fit)
        mean, covariance = exact(path)
    draws = np.asarray(vi.draws(target, guide, fit.params, jax.random.key(1), 4000)["weight"])
    sd = np.sqrt(np.diag(covariance))
    ratio = draws.std(0) / sd
    result = Result(
        error=float(np.max(np.abs(draws.mean(0) - mean) / sd)),
        scale=float(np.max(np.maximum(ratio, 1 / ratio))),
        fit=fit,
    )
    print(f"{ROWS:,} rows, {BATCH:,} at a time, {STEPS:,} steps")
    print(f"means are off by at most {result.error:.2f} posterior standard deviations,")
    print(f"standard deviations by at most a factor of {result.scale:.2f}")
    return result


if __name__ == "__main__":
    main()
