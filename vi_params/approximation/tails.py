"""How heavy the tails of single latents are: whether weighted draws show their spread.

In numpy, on the host: a program would compile for longer than all of this runs.
"""

import jax
import numpy as np

from vi_params.importance import Weighted
from vi_params.importance.psis import fit_pareto, tail_size

BLOCK = 2**22
"""How many numbers are looked at at once: of many latents only the suspects' are kept."""

SUSPECTS = 32
"""For how many numbers the tail is fitted: those whose variance owes most to one draw."""


def heaviest(weighted: Weighted) -> tuple[str, float]:
    """The number of the latents with the heaviest second moment, and its Pareto k-hat.

    It is that of w (x - mean)^2. What k-hat of the weights w says of estimates of bounded
    functions, this says of the variance of x: from 1 on there is no finite expectation to be
    estimated. Vehtari, Simpson, Gelman, Yao and Gabry (2024), Pareto smoothed importance sampling,
    JMLR 25(72), section 3.

    Args:
        weighted: draws of a guide, at least 25.

    Returns:
        `("name[i, j]", k_hat)`; 0 where a tail has no spread.
    """
    latents, log_weights = jax.device_get((weighted.latents, weighted.smoothed.log_weights))
    weights = np.exp(log_weights.astype(float))
    counts = weights > 0
    weights = weights[counts, None]
    at_once = max(1, BLOCK // len(weights))
    suspects: list[tuple[float, str, np.ndarray]] = []
    for name, values in latents.items():
        columns = values.reshape(len(values), -1)
        for begin in range(0, columns.shape[1], at_once):
            x = columns[counts, begin : begin + at_once]
            terms = weights * (x - np.sum(weights * x, axis=0)) ** 2
            shares = terms.max(0) / np.maximum(terms.sum(0), np.finfo(float).tiny)
            for i in np.argsort(-shares)[:SUSPECTS]:
                place = np.unravel_index(begin + i, values.shape[1:])
                label = f"{name}[{', '.join(map(str, place))}]" if place else name
                suspects.append((shares[i], label, terms[:, i].copy()))
            suspects = sorted(suspects, key=lambda one: -one[0])[:SUSPECTS]
    return max(((label, _k_hat(terms)) for _, label, terms in suspects), key=lambda one: one[1])


def _k_hat(terms: np.ndarray) -> float:
    tail = tail_size(len(terms))
    ranked = np.sort(np.partition(terms, len(terms) - tail - 1)[-tail - 1 :])
    excess = ranked[1:] - ranked[0]
    if not excess[-1] > 0.01 * ranked[0]:
        return 0.0
    with np.errstate(all="ignore"):  # points of its grid at which there is no such distribution
        return float(fit_pareto(np.maximum(excess, np.finfo(float).tiny), np)[0])
