"""Whether the rows of a plate go their own ways.

A plate says that its sites are independent row by row given what came before. It does not say that
row i of one site depends on row i of another alone: sum the rows of a latent, and every row of an
observation may depend on all of them. Whoever scores or sums row by row must know. So a few draws
are made when the objective is built: one row is changed, and the others are watched.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vi_params._tree import is_traced
from vi_params.batches import Batch
from vi_params.estimators.estimator import Problem
from vi_params.estimators.shares import Key, Shares, shares_of
from vi_params.matching import joint_data, joint_declared
from vi_params.params import init_params

PROBES = 16
"""How many pairs of draws are compared; a discrete row may come out the same in a few of them."""

TOLERANCE = 1e-4
"""Changes relative to a term's size that count as rounding."""


def joined_rows(problem: Problem) -> frozenset[tuple[Key, str]]:
    """The terms, with the plate, of which some row changes with another row of a latent.

    Nothing is known of data that are traced: there the rows are taken to be apart.
    """
    data = _few_rows(problem)
    if is_traced(data) or not problem.target.plates:
        return frozenset()
    pairs: list[tuple[Key, str]] = []

    def probe(key: jax.Array, data: Any) -> jax.Array:
        pairs.clear()
        of_params, *of_draws, of_row = jax.random.split(key, 4)
        params = init_params(joint_declared(problem.target, problem.guide), of_params)
        row = jax.random.bits(of_row)

        def at(key: jax.Array, given: Any = None) -> Shares:
            one = jax.tree.map(lambda leaf: leaf[0], problem.guide.noise(key, 1))
            return shares_of(problem, params, one, data, given=given)

        here, there = (at(key) for key in of_draws)
        answers = []
        for plate in sorted({name for site in here.guide.values() for name in site.plates}):
            given = {name: site.value for name, site in here.guide.items()}
            for name, site in here.guide.items():
                plates = site.plates
                if plate in plates:
                    axis = plates[plate] - site.distribution.event_dim
                    is_row = _is_row(row, jnp.shape(site.value), axis)
                    given[name] = jnp.where(is_row, there.guide[name].value, site.value)
            moved = at(of_draws[0], given)
            for term, found in here.terms.items():
                if plate in found.plates:
                    change = jnp.abs(found.value - moved.terms[term].value)
                    others = ~_is_row(row, jnp.shape(found.value), found.plates[plate])
                    large = change > TOLERANCE * (1 + jnp.abs(found.value))
                    pairs.append((term, plate))
                    answers.append(jnp.any(large & others))
        return jnp.stack(answers) if answers else jnp.zeros(0, bool)

    with jax.ensure_compile_time_eval():
        keys = jax.random.split(jax.random.key(0), PROBES)
        found = jnp.any(jax.jit(jax.vmap(probe, in_axes=(0, None)))(keys, data), axis=0)
    return frozenset(itertools.compress(pairs, found.tolist()))


def _few_rows(problem: Problem) -> Any:
    """The data, subsampled plates at one batch of at least two rows."""
    data, sizes = joint_data(problem.target, problem.guide), problem.target.sizes
    if not sizes:
        return data
    index = {plate: np.arange(min(n, max(batch, 2))) for plate, (n, batch) in sizes.items()}
    return Batch(data, index)


def _is_row(row: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    """Whether an entry is in a row (modulo their number), by an axis counted from the right."""
    index = jnp.arange(shape[axis], dtype=row.dtype) == row % shape[axis]
    return index.reshape((-1,) + (1,) * (-axis - 1))
