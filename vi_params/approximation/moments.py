"""Moments of weighted draws, on the host."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from vi_params.importance import Weighted, psis_on_host

BLOCK = 2**20
"""About how many numbers are squared at once."""


class Moments(NamedTuple):
    """Means and standard deviations of a posterior.

    Attributes:
        mean: name -> posterior mean, of the shape of the latent or deterministic site.
        sd: name -> posterior standard deviation, likewise.
        error: name -> standard error of that mean, of the draws being so few: of a weighted mean,
            sqrt(sum_i w_i^2 (x_i - mean)^2).
        num_effective: of how many independent draws the weighted ones are worth.
    """

    mean: dict[str, Any]
    sd: dict[str, Any]
    error: dict[str, Any]
    num_effective: float


Parts = Sequence[tuple[np.ndarray, dict[str, np.ndarray]]]
"""Batches of draws: their weights, which add up to one over all batches, and their values."""


def parts_of(
    batches: Sequence[Weighted],
    complete: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]],
    *,
    are_weighted: bool,
) -> Parts:
    """Batches with the Pareto-smoothed weights of all their draws together, or equal ones.

    Args:
        batches: of one guide.
        complete: latents -> these and whatever else has moments.
        are_weighted: whether the importance weights count.
    """
    weights = np.full(sum(len(one.log_ratios) for one in batches), 1.0)
    if are_weighted:
        ratios = np.concatenate([one.log_ratios for one in batches])
        weights = np.exp(np.asarray(psis_on_host(ratios).log_weights, float))
    weights /= np.sum(weights)
    parts, end = [], 0
    for one in batches:
        begin, end = end, end + len(one.log_ratios)
        # Of less weight, a value may be infinite.
        counts = ~(weights[begin:end] <= np.finfo(np.float32).tiny)
        if counts.any():
            latents = {n: x if counts.all() else x[counts] for n, x in one.latents.items()}
            parts.append((weights[begin:end][counts], complete(latents)))
    return parts


def moments_of(parts: Parts) -> Moments:
    """The moments of weighted draws."""
    mean, sd, error = {}, {}, {}
    for name in parts[0][1]:
        mean[name] = _total((w, x) for w, x in _blocks(parts, name))
        squares = ((w, (x - mean[name]) ** 2) for w, x in _blocks(parts, name))
        variance, of_mean = _total((np.stack([w, w**2]), x) for w, x in squares)
        sd[name], error[name] = np.sqrt(variance), np.sqrt(of_mean)
    return Moments(mean, sd, error, float(1 / sum(np.sum(w**2) for w, _ in parts)))


def _total(terms: Iterable[tuple[np.ndarray, np.ndarray]]) -> Any:
    """The sum over draws of weights, shape (..., n), and values, shape (n, ...)."""
    return sum(np.tensordot(w, x, 1) for w, x in terms)


def _blocks(parts: Parts, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Weights and values of one site, in float64, of some draws after the other."""
    for weights, values in parts:
        x = values[name]
        size = max(1, BLOCK * len(x) // max(x.size, 1))
        for begin in range(0, len(x), size):
            rows = slice(begin, begin + size)
            yield weights[rows], np.asarray(x[rows], float)
