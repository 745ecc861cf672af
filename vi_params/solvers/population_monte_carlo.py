"""Population Monte Carlo: a mixture fitted to importance-weighted draws of itself.

Each round draws u_i from the current mixture, weights it by w_i = p(u_i) / q(u_i), Pareto-smoothed,
and moves the mixture by a few sweeps of the weighted EM algorithm (`weighted_em`), which lowers the
forward divergence KL(p || q) as far as the draws show it, but for a guard of fixed weight
(`mixture_families`) and the shrinkage that few draws need. Cappe, Douc, Guillin, Marin and Robert
(2008), Adaptive importance sampling in general mixture classes, Statistics and Computing 18,
section 3 (Student-t components as there, section 4).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from vi_params._cache import program
from vi_params._check import require_count, require_instance, require_key
from vi_params._compile import Quick
from vi_params._tree import pick, where_tree
from vi_params.guide import Guide
from vi_params.importance import Weighted, at_once, pick_draws, weigh
from vi_params.params import constrain
from vi_params.solvers.mixture_families import (
    Mixture,
    family,
    with_guard,
    without_guard,
)
from vi_params.solvers.slopes import GRADIENTS, slopes_at
from vi_params.solvers.solution import Solution, SolverInfo, SolverStatus
from vi_params.solvers.start import data_of
from vi_params.solvers.weighted_em import weighted_em
from vi_params.target import Target

DF = 20
"""The degrees of freedom of the components. Few, as 5, leave most draws of 10 to 30 dimensions
farther out than what they were fitted to; far tails are the guard's."""

RELIABLE = 0.7
"""The k-hat below which effective draws count as such."""

GOOD = 0.5, 0.5
"""The rounds end below this k-hat, with at least this share of effective draws."""


def population_monte_carlo(
    target: Target,
    key: jax.Array,
    data: Any = None,
    *,
    init: Solution,
    num_components: int = 16,
    num_active: int | None = None,
    df: int = DF,
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
        init: a Gaussian `Solution`, such as `vi.linear_response` gives, a mixture's or, with
            `num_active`, one by `vi.solvers.conditional_gaussian` or `vi.solvers.nested_laplace`.
        num_components: of the mixture, beside the guard.
        num_active: along how many directions the components are free; None for all. Across them
            they have locations and scales of their own. The directions are the leading
            eigenvectors of E[g g'], g the gradient of the log ratio of posterior and Gaussian, at
            draws by a power of their weights; how what is across follows them, and is skewed, these
            gradients tell, too, as for `vi.solvers.conditional_gaussian`. The directions of a
            conditional Gaussian or a nested approximation, and what it has across, stay as they
            are.
        df: the components' degrees of freedom, a whole number.
        num_draws: draws a round, at least 25.
        max_steps: how many rounds at most; they end earlier where k-hat is below 0.5 and more than
            half of the draws are effective.

    Returns:
        A `Solution` with a `vi.guides.mixture` guide (`active_mixture` with `num_active`), that of
        the round with the most effective draws among those with a k-hat below 0.7, else of the one
        with the smallest; where none had one, the first, with `info.elbo` NaN. `info.steps` counts
        rounds; CONVERGED says that they ended early.

    Raises:
        ValueError: a number is too small, `num_active` exceeds the dimension or is not that of
            `init`, or `init` is no Gaussian or mixture (neither Gaussian nor conditional one, with
            `num_active`); data that are a batch of rows.
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
    for name, count, least in [
        ("num_components", num_components, 1),
        ("df", df, 1),
        ("num_draws", num_draws, 25),
        ("max_steps", max_steps, 1),
    ]:
        require_count(count, name, "solvers.population_monte_carlo", least=least)
    guide, solve = program(
        _build, target, init.guide, num_components, num_active, df, num_draws, max_steps
    )
    params, info = solve(init.params, key, data)
    return Solution(guide, params, info, jnp.zeros((0, 0)))


class Population(NamedTuple):
    """The pieces of the algorithm, each pure, in programs or on the host.

    Attributes:
        guide: the mixture.
        begin: `(constrained parameters of the start, one of its draws for every component, chosen
            by weight, its weighted draws, slopes, xp) -> Mixture`, the first.
        refit: `(Mixture, its weighted draws, xp) -> Mixture`, the next.
        params: `Mixture -> params`, the guide's own.
    """

    guide: Guide
    begin: Callable[..., Mixture]
    refit: Callable[..., Mixture]
    params: Callable[[Mixture], Any]


def population(
    target: Target, start: Guide, num_components: int, df: int, num_active: int | None = None
) -> Population:
    """The pieces for one target, kept for the next call."""
    return program(_population, target, start, num_components, df, num_active)


def _population(
    target: Target, start: Guide, num_components: int, df: int, num_active: int | None
) -> Population:
    mixtures = family(target, start, num_components, df, num_active, "population_monte_carlo, init")

    def begin(own: Any, chosen: Any, drawn: Weighted, slopes: Any, xp: Any = jnp) -> Mixture:
        first = mixtures.begin(own, chosen, slopes, xp)
        return with_guard(first, first.coordinates(drawn.position, xp), drawn.smoothed, xp)

    def refit(now: Mixture, drawn: Weighted, xp: Any = jnp) -> Mixture:
        y = now.coordinates(drawn.position, xp)
        now = without_guard(now, xp)
        parts = weighted_em(now.parts, y, xp.exp(drawn.smoothed.log_weights), df, xp)
        return with_guard(now._replace(parts=parts), y, drawn.smoothed, xp)

    return Population(mixtures.guide, begin, refit, mixtures.params)


def is_good(drawn: Weighted) -> jax.Array:
    """Whether there is nothing left to gain."""
    smoothed = drawn.smoothed
    share = smoothed.ess / len(drawn.log_ratios)
    return (smoothed.k_hat < GOOD[0]) & (share > GOOD[1])


def _merit(drawn: Weighted) -> jax.Array:
    """The share of effective draws where k-hat lets it be relied on; below zero elsewhere."""
    smoothed = drawn.smoothed
    share = smoothed.ess / len(drawn.log_ratios)
    return jnp.where(smoothed.k_hat < RELIABLE, share, -smoothed.k_hat)


def _build(
    target: Target,
    start: Guide,
    num_components: int,
    num_active: int | None,
    df: int,
    num_draws: int,
    max_steps: int,
) -> tuple[Guide, Quick]:
    rounds = population(target, start, num_components, df, num_active)
    (name,) = start.declared

    @Quick
    def solve(start_params: Any, key: jax.Array, data: Any) -> tuple[Any, SolverInfo]:
        keys = jax.random.split(key, max_steps + 2)
        model = pick(start_params, target.declared)

        def drawn_from(guide: Guide, params: Any, key: jax.Array) -> Weighted:
            """Weighted draws; one at which the log density is not a number has no weight."""
            noise, size = guide.noise(key, num_draws), at_once(num_draws, target, data)
            return weigh(target, guide, params, noise, data, size, nan_is_outside=True)

        def params_of(now: Mixture) -> Any:
            return {**model, **rounds.params(now)}

        def body(carry: Any) -> Any:
            i, now, drawn, best, best_drawn = carry
            now = rounds.refit(now, drawn)
            drawn = drawn_from(rounds.guide, params_of(now), keys[i + 2])
            # Never where k-hat is NaN.
            better = is_good(drawn) | (_merit(drawn) > _merit(best_drawn))
            best, best_drawn = where_tree(better, (now, drawn), (best, best_drawn))
            return i + 1, now, drawn, best, best_drawn

        drawn = drawn_from(start, start_params, keys[0])
        weights = drawn.smoothed.log_weights
        own = constrain(start.declared, pick(start_params, start.declared))[name]
        slopes = None
        if num_active is not None and "frame" not in own:
            values = constrain(target.declared, model)
            few = slice(GRADIENTS)
            slopes = slopes_at(target, values, drawn.position[few], weights[few], data)
        chosen = drawn.position[pick_draws(keys[1], weights, num_components)]
        first = rounds.begin(own, chosen, drawn, slopes)
        worst = jnp.full_like(drawn.smoothed.k_hat, jnp.inf)
        unseen = drawn._replace(smoothed=drawn.smoothed._replace(k_hat=worst))
        steps, _, _, best, drawn = lax.while_loop(
            lambda carry: (carry[0] < max_steps) & ~is_good(carry[4]),
            body,
            (jnp.int32(0), first, drawn, first, unseen),
        )
        status = jnp.where(is_good(drawn), SolverStatus.CONVERGED, SolverStatus.MAX_STEPS)
        elbo = jnp.mean(drawn.log_ratios)
        nothing = jnp.full((), jnp.nan, elbo.dtype)
        elbo = jnp.where(drawn.smoothed.k_hat < jnp.inf, elbo, nothing)
        info = SolverInfo(status, elbo, steps, elbo[None], status[None], nothing)
        return params_of(best), info

    return rounds.guide, solve
