"""What is thought of a guide: a batch of draws, their importance weights and the diagnosis.

Log densities are a program. What else there is happens on the host, where it takes no time to
compile: a sort, and where a `Proposal` is known, draws and their density under the guide.
"""

from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, NamedTuple

import jax
import numpy as np

from vi_params._arrays import by_threads, on_host
from vi_params._cache import program
from vi_params._compile import Quick
from vi_params._over import over
from vi_params._tree import pick
from vi_params.approximation.proposals import Proposal
from vi_params.diagnostics import Diagnosis
from vi_params.diagnostics.diagnose import judged
from vi_params.guide import Guide
from vi_params.importance import Weighted, at_once, compared, psis_on_host
from vi_params.params import constrain
from vi_params.target import Target, flat

BATCH = 4000
"""By how many draws a Gaussian is judged, and at how many at once a quick density is computed."""

FEWER = 1000
"""At how many at once where it takes longer, and by how many a clear case is judged then."""

QUICK = 8
"""A log density is quick where so many batches fit into the memory side by side (`at_once`): where
latents and data are up to about 500 numbers."""


class Judge(NamedTuple):
    """Judges a guide at its parameters by batches of draws.

    Attributes:
        num_draws: of a batch.
        block: a batch can be of fewer draws, a multiple of this.
        draw: `(key, num_draws) -> (latents, positions, log ratios)` of a batch.
    """

    num_draws: int
    block: int
    draw: Callable[[jax.Array, int], tuple[Any, Any, np.ndarray]]

    def __call__(self, key: jax.Array, num_draws: int | None = None) -> tuple[Weighted, Diagnosis]:
        """A batch, and what its weights say."""
        with on_host():
            return _weighed(*self.draw(key, num_draws or self.num_draws))


def pooled(one: Weighted, other: Weighted) -> tuple[Weighted, Diagnosis]:
    """Two batches of one guide as one, and what its weights say."""
    parts = [(batch.latents, batch.position, batch.log_ratios) for batch in (one, other)]
    with on_host():
        return _weighed(*joined(parts, len(one.log_ratios) + len(other.log_ratios)))


def _weighed(latents: Any, position: Any, log_ratios: np.ndarray) -> tuple[Weighted, Diagnosis]:
    # A density that is not a number is outside the support.
    log_ratios = np.where(np.isnan(log_ratios), -np.inf, log_ratios)
    weighted = Weighted(latents, position, log_ratios, psis_on_host(log_ratios))
    return weighted, judged(weighted, np)


def judge_of_guide(target: Target, guide: Guide, params: Any, data: Any, num_draws: int) -> Judge:
    """Judges any guide, by a program of its own."""
    is_short = at_once(num_draws, target, data) == num_draws
    drawn = program(_drawn, target, guide, num_draws, is_short)
    return Judge(num_draws, num_draws, lambda key, _: jax.device_get(drawn(params, key, data)))


def judge_of_proposal(
    target: Target, proposal: Proposal, params: Any, data: Any, num_draws: int
) -> Judge:
    """Judges what is drawn on the host: nothing is compiled but the density of the target.

    Args:
        target: what the draws are weighted towards.
        proposal: what draws.
        params: holds the target's own parameters.
        data: the data.
        num_draws: of a batch, a multiple of `BATCH`.
    """
    density, own = _density_of(target, data), pick(params, target.declared)
    size = _rows(target, data)

    def draw(key: jax.Array, num_draws: int) -> tuple[Any, Any, np.ndarray]:
        parts, number = [], num_draws // size  # a part of a block would not be a sample
        proposed = by_threads(lambda random: proposal(random, size), generator(key).spawn(number))
        for position, log_q in proposed:
            u = position.astype(_dtype())
            # One density at a time: several could wait for each other (`_over`).
            latents, log_p = jax.device_get(density(own, u, data))
            parts.append((latents, u, log_p.astype(float) - log_q))
        return joined(parts, number * size)

    return Judge(num_draws, size, draw)


def compile_density(pool: Executor, target: Target, params: Any, data: Any) -> Any:
    """Has the density compiled by a thread of `pool`; gives the shapes of the latents."""
    u = jax.ShapeDtypeStruct((_rows(target, data), flat(target).dim), _dtype())
    return _density_of(target, data).ahead(pool, pick(params, target.declared), u, data)[0]


def generator(key: jax.Array) -> np.random.Generator:
    """Numpy's random numbers for a key."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def joined(parts: list[Any], num_rows: int) -> Any:
    """The first rows of several trees of arrays, one after the other."""
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:num_rows], *parts)


def _dtype() -> Any:
    return jax.dtypes.canonicalize_dtype(float)


def _density_of(target: Target, data: Any) -> Quick:
    return program(_density, target, at_once(BATCH, target, data) == BATCH)


def _rows(target: Target, data: Any) -> int:
    """At how many draws the density of a target is computed by one call of the program."""
    return BATCH if at_once(QUICK * BATCH, target, data) == QUICK * BATCH else FEWER


def _density(target: Target, is_short: bool) -> Quick:
    def density(params: Any, u: jax.Array, data: Any) -> tuple[Any, jax.Array]:
        """Constrained latents, and the log density over unconstrained ones."""
        values = constrain(target.declared, params)

        def one(u: jax.Array) -> tuple[Any, jax.Array]:
            latents, log_abs_det = flat(target).constrain_with_log_det(u, values, data)
            return latents, target.log_density(values, latents, data) + log_abs_det

        return over(one, u, at_once(len(u), target, data))

    return _quick(density, is_short)


def _drawn(target: Target, guide: Guide, num_draws: int, is_short: bool) -> Quick:
    def drawn(params: Any, key: jax.Array, data: Any) -> tuple[Any, Any, jax.Array]:
        noise = guide.noise(key, num_draws)
        return compared(target, guide, params, noise, data, at_once(num_draws, target, data))

    return _quick(drawn, is_short)


def _quick(f: Callable[..., Any], is_short: bool) -> Quick:
    """A program of many numbers runs long enough for XLA's optimisations to pay."""
    return Quick(f) if is_short else Quick(f, options={})
