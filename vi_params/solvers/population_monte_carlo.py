"""Population Monte Carlo: a mixture fitted to importance-weighted draws of itself.

Each round draws u_i from the current mixture, weights it by w_i = p(u_i) / q(u_i), Pareto-smoothed,
and moves the mixture by a few sweeps of the weighted EM algorithm (`weighted_em`), which lowers the
forward divergence KL(p || q) as far as the draws show it, but for a guard of fixed weight
(`mixture_families`) and the shrinkage that few draws need. Cappe, Douc, Guillin, Marin and Robert
(2008), Adaptive importance sampling in general mixture classes, Statistics and Computing 18,
section 3 (Student-t components as there, section 4).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from vi_params._cache import program
from vi_params._check import require_count, require_instance, require_key
from vi_params._compile import Quick
from vi_params._tree import where_tree
from vi_params.guide import Guide
from vi_params.guides.active_mixture import Parts
from vi_params.importance import Weighted, at_once, weigh
from vi_params.solvers.mixture_families import along_few, everywhere, slopes_at, with_guard
from vi_params.solvers.solution import Slopes, Solution, SolverInfo, SolverStatus, own_name
from vi_params.solvers.start import data_of
from vi_params.solvers.weighted_em import weighted_em
from vi_params.target import Target

GOOD_K_HAT, GOOD_SHARE = 0.5, 0.5
"""The rounds end below this k-hat, with at least this share of effective draws."""


def population_monte_carlo(
    target: Target,
    key: jax.Array,
    data: Any = None,
    *,
    init: Solution,
    num_components: int = 16,
    num_active: int | None = None,
    df: int = 7,
    num_draws: int = 16000,
    max_steps: int = 16,
) -> Solution:
    """A mixture of Student-t distributions by population Monte Carlo, from another approximation.

    Where one Gaussian is near a posterior but cannot follow its shape (skew, funnels, several
    modes): in all directions in up to about 30 dimensions; in more, along the few in which
    posterior and Gaussian differ most (`num_active`). Pure in key and data.

    Args:
        target: what to approximate; its own parameters, if any, stay as `init` has them.
        key: a typed random key.
        data: the data; the target's own where None.
        init: a Gaussian `Solution`, such as `vi.linear_response` gives, or a mixture's.
        num_components: of the mixture, beside the guard.
        num_active: along how many directions the components are free; None for all. Across them
            they are normal, with locations and scales of their own. The directions are the leading
            eigenvectors of E[g g'], g the gradient of the log ratio of posterior and Gaussian.
        df: the components' degrees of freedom, a whole number.
        num_draws: draws a round, at least 25.
        max_steps: how many rounds at most; they end earlier where k-hat is below 0.5 and more than
            half of the draws are effective.

    Returns:
        A `Solution` with a `vi.guides.mixture` guide (`active_mixture` with `num_active`), that of
        the round with the smallest k-hat among those seen; where none had one, the first, with
        `info.elbo` NaN. `info.steps` counts rounds; CONVERGED says that they ended early.

    Raises:
        ValueError: a number is too small, `num_active` exceeds the dimension, or `init` is no
            Gaussian or mixture (no Gaussian, with `num_active`); data that are a batch of rows.
        TypeError: `key` is not a typed key, or `init` is no `Solution`.

    Example:
        >>> def banana(values, latents, data):
        ...     x, y = latents["z"]
        ...     return -0.5 * x**2 - 0.5 * ((y - 0.5 * x**2) / 0.5) ** 2
        >>> target = vi.target(banana, {"z": vi.Latent((2,))})
        >>> start = vi.solvers.deterministic(target, jax.random.key(0))
        >>> found = vi.solvers.population_monte_carlo(target, jax.random.key(1), init=start)
        >>> bool(vi.diagnose(target, found.guide, found.params, jax.random.key(2)).k_hat < 0.7)
        True
    """
    data = data_of(target, data)
    require_key(key, "solvers.population_monte_carlo")
    require_instance(init, Solution, "vi.solvers.deterministic(target, key)", "init")
    own_name(init.guide, "population_monte_carlo, init")
    for name, count, least in [
        ("num_components", num_components, 1),
        ("df", df, 1),
        ("num_draws", num_draws, 25),
        ("max_steps", max_steps, 1),
    ]:
        require_count(count, name, "solvers.population_monte_carlo", least=least)
    rounds = population(target, init.guide, num_components, df, num_draws, num_active)
    solve = program(_build, target, rounds, num_active is not None, max_steps)
    params, info = solve(init.params, key, data)
    return Solution(rounds.guide, params, info, jnp.zeros((0, 0)))


class Population(NamedTuple):
    """The pieces of the algorithm, each pure.

    Attributes:
        guide: the mixture.
        first: `(params of the start, key, data) -> Weighted`, of the start's draws.
        begin: `(params of the start, key, its weighted draws, slopes) -> params` of the first
            mixture.
        draw: `(params, key, data) -> Weighted`.
        refit: `(params, weighted draws) -> params`.
    """

    guide: Guide
    first: Any
    begin: Any
    draw: Any
    refit: Any


def population(
    target: Target,
    start: Guide,
    num_components: int,
    df: int,
    num_draws: int,
    num_active: int | None = None,
) -> Population:
    """The pieces for one target, kept for the next call."""
    return program(_population, target, start, num_components, df, num_draws, num_active)


def _population(
    target: Target,
    start: Guide,
    num_components: int,
    df: int,
    num_draws: int,
    num_active: int | None,
) -> Population:
    if num_active is None:
        family = everywhere(target, start, num_components, df)
    else:
        family = along_few(target, start, num_components, df, num_active)

    def guarded(params: Any, parts: Parts, y: jax.Array, drawn: Weighted) -> Any:
        return family.wrap(params, with_guard(parts, y, drawn.smoothed))

    def begin(params: Any, key: jax.Array, drawn: Weighted, slopes: Slopes | None) -> Any:
        params, parts = family.begin(params, key, drawn, slopes)
        return guarded(params, parts, family.coordinates(params, drawn.position), drawn)

    def first(params: Any, key: jax.Array, data: Any) -> Weighted:
        return _weigh(target, start, params, start.noise(key, num_draws), data)

    def draw(params: Any, key: jax.Array, data: Any) -> Weighted:
        noise = family.guide.noise(key, num_draws)
        return _weigh(target, family.guide, params, noise, data)

    def refit(params: Any, drawn: Weighted) -> Any:
        along, across = jax.tree.map(lambda leaf: leaf[:-1], family.parts(params))
        parts = Parts(along._replace(weights=along.weights / jnp.sum(along.weights)), across)
        y = family.coordinates(params, drawn.position)
        parts = weighted_em(parts, y, jnp.exp(drawn.smoothed.log_weights), df)
        return guarded(params, parts, y, drawn)

    return Population(family.guide, first, begin, draw, refit)


def is_good(drawn: Weighted) -> jax.Array:
    """Whether there is nothing left to gain."""
    smoothed = drawn.smoothed
    share = smoothed.ess / len(drawn.log_ratios)
    return (smoothed.k_hat < GOOD_K_HAT) & (share > GOOD_SHARE)


def _weigh(target: Target, guide: Guide, params: Any, noise: Any, data: Any) -> Weighted:
    """Weighted draws; one at which the log density is not a number has no weight."""
    size = at_once(len(jax.tree.leaves(noise)[0]), target, data)
    return weigh(target, guide, params, noise, data, size, nan_is_outside=True)


def _build(target: Target, rounds: Population, has_directions: bool, max_steps: int) -> Any:
    @Quick
    def solve(start: Any, key: jax.Array, data: Any) -> tuple[Any, SolverInfo]:
        keys = jax.random.split(key, max_steps + 2)
        drawn = rounds.first(start, keys[0], data)
        slopes = slopes_at(target, start, drawn, data) if has_directions else None

        def body(carry: Any) -> Any:
            i, params, drawn, best, best_drawn = carry
            params = rounds.refit(params, drawn)
            drawn = rounds.draw(params, keys[i + 2], data)
            better = drawn.smoothed.k_hat < best_drawn.smoothed.k_hat  # never where it is NaN
            best, best_drawn = where_tree(better, (params, drawn), (best, best_drawn))
            return i + 1, params, drawn, best, best_drawn

        params = rounds.begin(start, keys[1], drawn, slopes)
        worst = jnp.full_like(drawn.smoothed.k_hat, jnp.inf)
        unseen = drawn._replace(smoothed=drawn.smoothed._replace(k_hat=worst))
        steps, _, _, params, drawn = lax.while_loop(
            lambda carry: (carry[0] < max_steps) & ~is_good(carry[4]),
            body,
            (jnp.int32(0), params, drawn, params, unseen),
        )
        status = jnp.where(is_good(drawn), SolverStatus.CONVERGED, SolverStatus.MAX_STEPS)
        elbo = jnp.mean(drawn.log_ratios)
        nothing = jnp.full((), jnp.nan, elbo.dtype)
        elbo = jnp.where(drawn.smoothed.k_hat < jnp.inf, elbo, nothing)
        return params, SolverInfo(status, elbo, steps, elbo[None], status[None], nothing)

    return solve
