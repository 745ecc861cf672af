"""A table of draws."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vi_params._check import explain
from vi_params._table import Table


def summary(draws: Mapping[str, Any], *, quantiles: Sequence[float] = (0.05, 0.5, 0.95)) -> Table:
    """Mean, standard deviation and quantiles of every number among the draws.

    Args:
        draws: name -> array with leading axis the draws, as `vi.draws` gives.
        quantiles: probabilities, each between 0 and 1.

    Returns:
        A `Table`, one row a number: "theta[3]" is entry 3 of theta.

    Raises:
        ValueError: a quantile outside [0, 1], or an array without a leading axis.

    Example:
        >>> print(vi.summary({"z": jnp.array([1.0, 2.0, 3.0])}))
        name   mean      sd     5%    50%    95%
        z     2.000  0.8165  1.100  2.000  2.900
    """
    if not all(0 <= q <= 1 for q in quantiles):
        raise ValueError(
            explain(
                "A quantile lies outside [0, 1].",
                expected="probabilities between 0 and 1",
                received=str(tuple(quantiles)),
                where="vi.summary",
            )
        )
    rows = []
    for name, array in draws.items():
        array = np.asarray(array)
        if array.ndim == 0:
            raise ValueError(
                explain(
                    "Draws need a leading axis.",
                    expected="shape (num_draws, ...)",
                    received="shape ()",
                    where=repr(name),
                )
            )
        for index in np.ndindex(array.shape[1:]):
            column = array[(slice(None), *index)]
            label = f"{name}[{', '.join(map(str, index))}]" if index else name
            spread = [float(q) for q in np.quantile(column, quantiles)]
            rows.append((label, float(column.mean()), float(column.std()), *spread))
    head = ("name", "mean", "sd", *(f"{100 * q:g}%" for q in quantiles))
    return Table(head, tuple(rows))
