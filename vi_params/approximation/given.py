"""What follows where no few latents leave a Gaussian, but several do: one given these, found from
gradients at its own draws."""

from typing import Any

import jax
import numpy as np

from vi_params.approximation.candidate import Candidate, best_of, misses, once
from vi_params.approximation.conditional import looked_at
from vi_params.approximation.judge import BATCH, judge_of_proposal
from vi_params.approximation.proposals import mixture
from vi_params.approximation.structure import Structure
from vi_params.importance import Weighted
from vi_params.solvers.conditional_gaussian import conditional
from vi_params.solvers.mixture_families import Mixture
from vi_params.solvers.slopes import evened
from vi_params.solvers.solution import Slopes
from vi_params.solvers.third_derivative import LITTLE, fixed_directions
from vi_params.target import Target

GIVEN = "Gaussian given latents"
"""What it is called."""

SEVERAL = 12
"""How many latents are fixed at most."""

LEFT = 0.1
"""As many are fixed as leave less than this share of the squared third derivatives; where too many
would be, those few that nested Laplace approximations fix."""

GOOD = 0.65, 0.2
"""The k-hat below which, and the share of effective draws above which, rounds gain nothing."""

LARGER = 8000, 64000
"""By how many draws it is judged where a batch does not show all, by the last only where densities
are quick: these take less time than rounds, and the tails of many scales show by them."""

GRADIENTS, PASSES = 2000, 3
"""At how many draws gradients are computed for each fit, and how many fits there are."""


def given_latents(
    target: Target,
    response: Candidate,
    structure: Structure,
    others: list[Candidate],
    key: jax.Array,
    data: Any,
) -> list[Candidate]:
    """A Gaussian given the latents without which third derivatives are small, the best of a few
    fits to gradients, at draws of a linear response and then at its own; none where there are no
    such latents.

    Args:
        target: what is approximated.
        response: the linear response.
        structure: seen from there.
        others: mixtures of several optima.
        key: a typed random key.
        data: the data.
    """
    directions, is_gaussian = _directions(structure)
    if directions.shape[1] == 0:
        return []
    own = {"loc": structure.loc, "scale_tril": structure.scale_tril}

    def fitted(drawn: Weighted) -> Mixture:
        position = np.asarray(drawn.position[:GRADIENTS], float)
        weights = evened(np.asarray(drawn.smoothed.log_weights[:GRADIENTS], float), np)
        slopes = Slopes(position, structure.gradient(position), weights)
        return conditional(own, slopes, directions.shape[1], np, directions)

    begun, keys = response.solution, jax.random.split(key, PASSES + 1)
    fits, tried, drawn = [], [], response.batches[0]
    for i in range(PASSES):
        fits.append(fitted(drawn))
        judge = judge_of_proposal(target, mixture(fits[-1], None), begun.params, data, BATCH)
        tried.append(once(GIVEN, begun, judge, keys[i], GOOD))
        drawn = tried[-1].batches[0]
    best = best_of(tried)
    found = fits[[one is best for one in tried].index(True)]
    larger = LARGER if best.judge.block == BATCH else LARGER[:-1]
    candidate = looked_at(GIVEN, target, begun, found, keys[-1], data, GOOD, larger)
    if not candidate.is_trustworthy:
        return [candidate]
    is_partial = any(misses(candidate, other, None) for other in others)
    is_spare = candidate.is_spare and not is_gaussian
    return [candidate._replace(is_spare=is_spare, is_partial=is_partial)]


def _directions(structure: Structure) -> tuple[np.ndarray, bool]:
    """Those that fix the latents, columns in units of the Gaussian, and whether what is left of the
    third derivatives is little: its tails across are light then."""
    most = min(SEVERAL, len(structure.loc) - 1)
    if structure.left[0] > LITTLE:
        several, left = fixed_directions(structure.third, structure.scale_tril, most, np)
        is_little = left < LEFT * left[0]
        if is_little.any():
            return several[:, : int(np.argmax(is_little))], True
    return structure.few, False
