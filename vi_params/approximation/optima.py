"""The mean-field optima that `vi.approximate` goes on from."""

from typing import Any

import jax

from vi_params.solvers.deterministic import deterministic
from vi_params.solvers.optima import apart
from vi_params.solvers.solution import ENDED, Solution
from vi_params.target import Target

TOLERANCE = 0.01
"""How many nats a Newton step may still promise at the end: the error of fixed draws, and what
linear response corrects, are larger."""

HESSIANS = 8
"""At how many fixed draws Hessians are computed for the linear response of many latents: importance
weights judge its covariances, and what follows corrects them."""


def optima(target: Target, key: jax.Array, data: Any, fixed: Any, lanes: int) -> list[Solution]:
    """A mean-field solution for every distinct optimum, the best first.

    Args:
        target: what is approximated, no plate of it subsampled.
        key: a typed random key.
        data: the data.
        fixed: the parameters of the target that stay as they are.
        lanes: from how many starts.
    """
    found = deterministic(target, key, data, lanes=lanes, fixed=fixed, tolerance=TOLERANCE)
    return apart(found, ended=ENDED)
