"""Whether weighted draws show the spread of single latents.

In numpy, on the host: a program would compile for longer than all of this runs.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from vi_params.importance import Weighted
from vi_params.importance.psis import fit_pareto, tail_size

BLOCK = 2**22
"""How many numbers are looked at at once: of many latents only the suspects' are kept."""

SUSPECTS = 32
"""For how many numbers the tail is fitted: those whose variance owes most to one draw."""

HEAVY, HEAVIER = 0.7, 0.8
"""The k-hats of a second moment above which its standard error cannot be relied on (Vehtari et al.,
2024)."""

LIGHT = 0.3
"""The k-hat of a second moment up to which its standard error is known well, whatever the kurtosis:
the weighted draws have many from the tail."""

ERROR, HEAVY_ERROR, HEAVIER_ERROR = 0.045, 0.03, 0.02
"""The largest standard error of the logarithm of a standard deviation: three of them are less than
0.15; and the largest where the tail is that heavy, and the true error may be several times it."""

MANY, DRAWN_ERROR = 4000, ERROR
"""The largest standard error of one that is computed from so many draws of the posterior itself."""


class Spread(NamedTuple):
    """How well weighted draws show the standard deviation of one number.

    Attributes:
        name: as in "name[i, j]".
        k_hat: the Pareto k-hat of its second moment; 0 where the tail has no spread.
        error: the standard error of the logarithm of its standard deviation.
        drawn_error: that of one computed from 4000 draws of the posterior itself, by its kurtosis.
        shares: of its second moment, those of the draws; shape (num_draws,).
        column: the latent, and the column of its values.
        order: the column that draws are resampled in the order of: the one of which 4000 draws of
            the posterior would show the spread worst.
    """

    name: str
    k_hat: float
    error: float
    drawn_error: float = 0.0
    shares: Any = None
    column: tuple[str, int] | None = None
    order: tuple[str, int] | None = None

    @property
    def is_order(self) -> bool:
        """Whether resampled draws have this spread as the weighted draws have it."""
        return self.order is not None and self.column == self.order

    @property
    def is_shown(self) -> bool:
        """Whether it can be relied on."""
        is_kept = self.is_order and self.k_hat <= LIGHT
        return self.is_estimated and (is_kept or self.drawn_error <= DRAWN_ERROR)

    def __str__(self) -> str:
        if self.is_estimated:
            return (
                f"its tail is so heavy that {MANY} draws of the posterior itself would have the "
                f"logarithm of its standard deviation with a standard error of "
                f"{self.drawn_error:.3f} only"
            )
        return (
            f"the logarithm of its standard deviation has a standard error of {self.error:.3f}, "
            f"and its second moment a k-hat of {self.k_hat:.2f}"
        )

    @property
    def is_estimated(self) -> bool:
        """Whether these draws, with their weights, tell it."""
        if self.k_hat <= HEAVY:
            return self.error <= ERROR
        return self.error <= (HEAVY_ERROR if self.k_hat <= HEAVIER else HEAVIER_ERROR)

    @property
    def can_be_shown(self) -> bool:
        """Whether it is not shown, but may be by other draws: not where the posterior's own are too
        few."""
        return not self.is_estimated and self.drawn_error <= DRAWN_ERROR


def worst_spread(*batches: Weighted) -> Spread:
    """Of the numbers whose standard deviation does not show, or else of all, that with the heaviest
    tail.

    What k-hat of the weights w says of estimates of bounded functions, that of w (x - mean)^2 says
    of the variance of x: from 1 on there is no finite expectation to be estimated, and well below
    most draws know nothing of the few on which the variance depends. Vehtari, Simpson, Gelman, Yao
    and Gabry (2024), Pareto smoothed importance sampling, JMLR 25(72), sections 3.1 and 3.2.

    Args:
        *batches: draws of a guide, at least 25 each. One can be lucky: the worst counts.
    """
    return max((_worst(suspects) for suspects in _all_suspects(*batches)), key=_doubt)


def towards_spreads(*batches: Weighted) -> Weighted:
    """The batch with the worst spread, which is not shown, half of its weights those that the draws
    have in second moments that are not shown: what is fitted to it draws where they come from."""
    suspects, weighted = max(
        zip(_all_suspects(*batches), batches, strict=True), key=lambda pair: _doubt(_worst(pair[0]))
    )
    unshown = [one.shares for one in suspects if not one.is_shown]
    smoothed = weighted.smoothed
    weights = 0.5 * np.exp(np.asarray(smoothed.log_weights, float)) + 0.5 * np.mean(unshown, axis=0)
    with np.errstate(divide="ignore"):
        smoothed = smoothed._replace(log_weights=np.log(weights), ess=1 / np.sum(weights**2))
    return weighted._replace(smoothed=smoothed)


def _worst(suspects: list[Spread]) -> Spread:
    return max(suspects, key=_doubt)


def _doubt(spread: Spread) -> tuple[bool, float]:
    return not spread.is_shown, spread.k_hat


def _drawn_error(spread: Spread) -> float:
    return float(np.nan_to_num(spread.drawn_error, nan=np.inf))


def _all_suspects(*batches: Weighted) -> list[list[Spread]]:
    """Those of each batch; the heaviest of the first one gives the draws their order."""
    found = [_suspects(weighted) for weighted in batches]
    order = max(found[0], key=_drawn_error).column
    return [[one._replace(order=order) for one in suspects] for suspects in found]


def _suspects(weighted: Weighted) -> list[Spread]:
    """The spreads that owe most to a single draw."""
    weights = np.exp(np.asarray(weighted.smoothed.log_weights, float))
    counts = weights > np.finfo(np.float32).tiny  # of less weight, a value may be infinite
    weights = weights[counts, None]
    at_once = max(1, BLOCK // len(weights))
    suspects: list[tuple[float, str, np.ndarray, tuple[str, int]]] = []
    for name, values in weighted.latents.items():
        values = np.asarray(values)
        columns = values.reshape(len(values), -1)
        for begin in range(0, columns.shape[1], at_once):
            x = columns[counts, begin : begin + at_once].astype(float)
            terms = weights * (x - np.sum(weights * x, axis=0)) ** 2
            terms = terms / np.maximum(terms.sum(0), np.finfo(float).tiny)
            largest = np.nan_to_num(terms.max(0), nan=np.inf)  # values beyond the dtype
            for i in np.argsort(-largest)[:SUSPECTS]:
                place = np.unravel_index(begin + i, values.shape[1:])
                label = f"{name}[{', '.join(map(str, place))}]" if place else name
                column = name, int(begin + i)
                suspects.append((float(largest[i]), label, terms[:, i].copy(), column))
            suspects = sorted(suspects, key=lambda one: -one[0])[:SUSPECTS]
    found = []
    for _, label, terms, column in suspects:
        error = 0.5 * math.sqrt(np.sum((terms - weights[:, 0]) ** 2))
        kurtosis = np.sum(terms**2 / weights[:, 0])
        drawn_error = 0.5 * math.sqrt(max(kurtosis - 1, 0.0) / MANY)
        shares = np.zeros(len(counts))
        shares[counts] = terms
        found.append(Spread(label, _k_hat(terms), error, drawn_error, shares, column))
    return found


def _k_hat(terms: np.ndarray) -> float:
    tail = tail_size(len(terms))
    ranked = np.sort(np.partition(terms, len(terms) - tail - 1)[-tail - 1 :])
    excess = ranked[1:] - ranked[0]
    if np.isnan(excess[-1]):
        return math.inf
    if not excess[-1] > 0.01 * ranked[0]:
        return 0.0
    # Some points of its grid have no such distribution: their NaN does not count.
    return float(fit_pareto(np.maximum(excess, np.finfo(float).tiny), np)[0])
