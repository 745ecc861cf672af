"""Distances between samples: for models that can be simulated and have no density.

With k a kernel, x simulated and y observed,

    MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y),

estimated without bias by averages over pairs of different rows. It is zero in expectation exactly
where the two distributions are equal, for the kernels of `vi.kernels`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient

from vi_params._check import explain, require_count, require_instance
from vi_params._tree import abstract_key, strong
from vi_params.objectives.kernels import Kernel, gaussian, negative_distance
from vi_params.objectives.objective import Measure, Objective, objective
from vi_params.params import constrain
from vi_params.params.declare import Declared, normalise
from vi_params.params.maps import abstract_params

MEDIAN_ROWS = 100
"""How many observed rows, evenly spaced, the median heuristic looks at."""

Simulator = Callable[[Any, jax.Array], Any]
"""`(values, key) -> one observation`, `values` the constrained parameters."""


def mmd(
    declared: Declared,
    simulate: Simulator,
    data: Any,
    *,
    kernel: Kernel | None = None,
    num_simulations: int = 100,
    num_observations: int | None = None,
) -> Objective:
    """The squared maximum mean discrepancy between simulations and data as an objective.

    Fits the parameters of a simulator to data with no likelihood: gradients pass through the
    simulations. Unbiased, so that it can be negative near zero.

    Gretton, Borgwardt, Rasch, Scholkopf and Smola (2012), A kernel two-sample test, eq. 3;
    Dziugaite, Roy and Ghahramani (2015), Training generative neural networks via maximum mean
    discrepancy optimization.

    Args:
        declared: name -> `Param`, the simulator's parameters.
        simulate: `(values, key) -> observation`, one row of the data's structure; differentiable in
            the values.
        data: a pytree of arrays whose leading axis are the observed rows, at least two.
        kernel: one of `vi.kernels`; `gaussian()`, with the median heuristic, where None.
        num_simulations: rows to simulate for an evaluation, at least two.
        num_observations: rows of data to compare them with, a new choice for every evaluation; all
            where None, at a cost that grows with their square.

    Returns:
        An `Objective` whose loss is the squared MMD; aux is empty. It has no target and no guide.

    Raises:
        ValueError: a simulation is not like a row of the data, or too few rows.
        TypeError: an argument is of the wrong kind.

    Example:
        >>> def simulate(values, key):
        ...     return values["loc"] + jax.random.normal(key)
        >>> objective = vi.mmd({"loc": 0.0}, simulate, jnp.array([0.3, 1.2, 2.5]))
        >>> params = vi.init_params(objective.declared, jax.random.key(0))
        >>> loss, _ = objective.loss(params, jax.random.key(1))
        >>> loss.shape
        ()
    """
    kernel = kernel or gaussian()
    measure = Measure("squared MMD", 1, unit="units", tolerance=1e-4)
    return _between_samples(
        declared, simulate, data, kernel, num_simulations, num_observations, measure, "vi.mmd"
    )


def energy_distance(
    declared: Declared,
    simulate: Simulator,
    data: Any,
    *,
    num_simulations: int = 100,
    num_observations: int | None = None,
) -> Objective:
    """The energy distance between simulations and data as an objective.

        2 E |x - y| - E |x - x'| - E |y - y'|,

    the squared MMD of the kernel -|x - y|: there is nothing to tune, and it grows with the distance
    of far samples, where bounded kernels are flat. It is in the data's units; scale the columns.

    Szekely and Rizzo (2013), Energy statistics, eq. 2.1.

    Args:
        declared: name -> `Param`, the simulator's parameters.
        simulate: `(values, key) -> observation`, as in `vi.mmd`.
        data: a pytree of arrays whose leading axis are the observed rows, at least two.
        num_simulations: rows to simulate for an evaluation, at least two.
        num_observations: rows of data to compare them with, as in `vi.mmd`.

    Returns:
        An `Objective` whose loss is the energy distance; aux is empty.

    Raises:
        ValueError: a simulation is not like a row of the data, or too few rows.
        TypeError: an argument is of the wrong kind.

    Example:
        >>> def simulate(values, key):
        ...     return values["loc"] + jax.random.normal(key)
        >>> objective = vi.energy_distance({"loc": 0.0}, simulate, jnp.array([0.3, 1.2, 2.5]))
        >>> objective.measure.name
        'energy distance'
    """
    measure = Measure("energy distance", 1, unit="units of the data", tolerance=1e-4)
    return _between_samples(
        declared,
        simulate,
        data,
        negative_distance(),
        num_simulations,
        num_observations,
        measure,
        "vi.energy_distance",
    )


def _between_samples(
    declared: Declared,
    simulate: Simulator,
    data: Any,
    kernel: Kernel,
    num_simulations: int,
    num_observations: int | None,
    measure: Measure,
    where: str,
) -> Objective:
    require_instance(kernel, Kernel, "vi.kernels.gaussian()", f"{where}, kernel")
    require_count(num_simulations, "num_simulations", where, least=2)
    declared = normalise(declared)
    data = jax.tree.map(strong, data)
    num_rows = _require_rows(declared, simulate, data, where)
    if num_observations is not None:
        require_count(num_observations, "num_observations", where, least=2)
        num_observations = None if num_observations >= num_rows else num_observations

    def noise(key: jax.Array) -> Any:
        first, second = jax.random.split(key)
        keys = jax.random.split(first, num_simulations)
        if num_observations is None:
            return (keys,)
        return keys, jax.random.permutation(second, num_rows)[:num_observations]

    def evaluate(params: Any, noise: Any, data: Any) -> tuple[jax.Array, tuple]:
        values = constrain(declared, params)
        x = _rows(jax.vmap(lambda key: simulate(values, key))(noise[0]))
        y = _rows(data)
        unit = kernel.bandwidth if kernel.bandwidth is not None else median_distance(y)
        y = y[noise[1]] if len(noise) > 1 else y
        return _squared_mmd(kernel, x / unit, y / unit), ()

    return objective(declared, data, noise, evaluate, None, None, measure)


def median_distance(rows: jax.Array) -> jax.Array:
    """The median distance between (some of) the rows; 1 where that is zero."""
    some = rows[:: -(-rows.shape[0] // MEDIAN_ROWS)]
    i, j = np.triu_indices(some.shape[0], 1)
    median = jnp.median(distances(some, some)[i, j])
    return stop_gradient(jnp.where(median > 0, median, 1.0))


def distances(x: jax.Array, y: jax.Array) -> jax.Array:
    """The Euclidean distances of all rows of x (n, d) to all of y (m, d); gradient 0 at zero."""
    square = jnp.sum((x[:, None, :] - y[None, :, :]) ** 2, axis=-1)
    apart = square > 0
    return jnp.where(apart, jnp.sqrt(jnp.where(apart, square, 1.0)), 0.0)


def _squared_mmd(kernel: Kernel, x: jax.Array, y: jax.Array) -> jax.Array:
    def within(rows: jax.Array) -> jax.Array:
        n = rows.shape[0]
        k = jnp.where(jnp.eye(n, dtype=bool), 0.0, kernel.of(distances(rows, rows)))
        return jnp.sum(k) / (n * (n - 1))

    return within(x) + within(y) - 2 * jnp.mean(kernel.of(distances(x, y)))


def _rows(tree: Any) -> jax.Array:
    """The leaves as one matrix, a row an observation."""
    leaves = [jnp.asarray(leaf, jnp.result_type(float)) for leaf in jax.tree.leaves(tree)]
    return jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in leaves], axis=1)


def _require_rows(declared: Declared, simulate: Simulator, data: Any, where: str) -> int:
    """How many rows the data have; raises unless a simulation is like one of them."""
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(data)]
    lengths = {shape[0] if shape else 0 for shape in shapes}
    if len(lengths) != 1 or min(lengths) < 2:
        raise ValueError(
            explain(
                "The data are not rows of observations.",
                expected="arrays with one leading axis in common, of length 2 or more",
                received=f"shapes {shapes}",
                where=f"{where}, data",
            )
        )
    row = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), data)
    values = jax.eval_shape(lambda p: constrain(declared, p), abstract_params(declared))
    drawn = jax.eval_shape(simulate, values, abstract_key())
    like = [
        (jax.tree.structure(tree), [leaf.shape for leaf in jax.tree.leaves(tree)])
        for tree in (row, drawn)
    ]
    if like[0] != like[1]:
        raise ValueError(
            explain(
                "A simulation is not like a row of the data.",
                expected=f"{like[0][0]} of shapes {like[0][1]}",
                received=f"{like[1][0]} of shapes {like[1][1]}",
                where=f"{where}, simulate",
                hint="simulate gives one observation; it is vmapped over keys",
            )
        )
    return lengths.pop()
