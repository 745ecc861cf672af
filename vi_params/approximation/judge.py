"""What is thought of a guide: a batch of draws, their importance weights and the diagnosis.

Draws and log densities are a program; their weights are smoothed on the host, where a sort takes no
time to compile.
"""

from concurrent.futures import Executor
from typing import Any, NamedTuple

import jax
import numpy as np

from vi_params._cache import program
from vi_params._compile import Quick
from vi_params.diagnostics import Diagnosis
from vi_params.diagnostics.diagnose import judged
from vi_params.guide import Guide
from vi_params.importance import Weighted, at_once, compared, psis, psis_on_host
from vi_params.target import Target


class Judge(NamedTuple):
    """Judges a guide by batches of draws.

    Attributes:
        guide: the guide.
        draw: `(params, key, data) -> (latents, positions, log ratios)` of a batch.
    """

    guide: Guide
    draw: Quick

    def __call__(self, params: Any, key: jax.Array, data: Any) -> tuple[Weighted, Diagnosis]:
        """A batch, and what its weights say."""
        latents, position, log_ratios = self.draw(params, key, data)
        log_ratios = np.asarray(log_ratios)
        weighted = Weighted(latents, position, log_ratios, psis_on_host(log_ratios))
        with np.errstate(invalid="ignore", over="ignore"):  # the spread where some are -inf or huge
            return weighted, judged(self.guide, weighted, np)

    def ahead(self, pool: Executor, params: Any, key: jax.Array, data: Any) -> Weighted:
        """Has the program compiled by a thread of `pool`; gives the shapes of weighted draws."""
        latents, position, log_ratios = self.draw.ahead(pool, params, key, data)
        smoothed = jax.eval_shape(psis, log_ratios)
        return Weighted(latents, position, log_ratios, smoothed)


def judge(target: Target, guide: Guide, num_draws: int, data: Any) -> Judge:
    """The judge of a guide by so many draws at once, compiled once."""
    is_short = at_once(num_draws, target, data) == num_draws
    return Judge(guide, program(_draw, target, guide, num_draws, is_short))


def _draw(target: Target, guide: Guide, num_draws: int, is_short: bool) -> Quick:
    def draw(params: Any, key: jax.Array, data: Any) -> tuple[Any, Any, jax.Array]:
        noise = guide.noise(key, num_draws)
        size = at_once(num_draws, target, data)
        return compared(target, guide, params, noise, data, size, nan_is_outside=True)

    # A program of many numbers runs long enough for XLA's optimisations to pay.
    return Quick(draw) if is_short else Quick(draw, options={})
