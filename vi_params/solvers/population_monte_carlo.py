"""Population Monte Carlo: a mixture fitted to importance-weighted draws of itself.

Each round draws u_i from the current mixture, weights it by w_i = p(u_i) / q(u_i), Pareto-smoothed,
and moves the mixture by a few sweeps of the weighted EM algorithm, which lowers the forward
divergence KL(p || q) as far as the draws show it. Cappe, Douc, Guillin, Marin and Robert (2008),
Adaptive importance sampling in general mixture classes, Statistics and Computing 18, section 3,
(Student-t components as there, section 4). With rho_ik the share of component k in q(u_i),
gamma_ik = (df + dim) / (df + |C_k^-1 (u_i - loc_k)|^2):

    weight_k = sum_i w_i rho_ik
    loc_k    = sum_i w_i rho_ik gamma_ik u_i / sum_i w_i rho_ik gamma_ik
    cov_k    = sum_i w_i rho_ik gamma_ik (u_i - loc_k)(u_i - loc_k)' / weight_k

A guard of fixed weight, wider than the weighted draws, reaches tails that the other components have
not found yet (a defensive mixture: Hesterberg, 1995, Weighted average importance sampling and
defensive mixture distributions). It needs the log density alone, no gradient.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from vi_params._cache import program
from vi_params._check import require_count, require_instance, require_key
from vi_params._compile import Quick
from vi_params._tree import all_finite, where_tree
from vi_params.guide import Guide
from vi_params.guides import mixture
from vi_params.guides.mixture import Components, log_terms, require_gaussian
from vi_params.importance import Smoothed, Weighted, pick_draws, weigh
from vi_params.objectives.objective import resolve
from vi_params.params import constrain, unconstrain
from vi_params.solvers.solution import Solution, SolverInfo, SolverStatus
from vi_params.target import Target

SWEEPS = 10
"""How many EM sweeps a round makes."""

SPREAD = 0.8
"""The first scales of the components, in scales of the approximation they start from."""

RARE = 1e-3
"""A component of less weight than this stays where it is."""

GUARD, WIDE = 0.1, 2.0
"""The weight of the guard, and its scales in standard deviations of the weighted draws."""

GOOD_K_HAT, GOOD_SHARE = 0.5, 0.5
"""The rounds end below this k-hat, with at least this share of effective draws."""


def population_monte_carlo(
    target: Target,
    key: jax.Array,
    data: Any = None,
    *,
    init: Solution,
    num_components: int = 8,
    df: int = 7,
    num_draws: int = 4000,
    max_steps: int = 10,
) -> Solution:
    """A mixture of Student-t distributions by population Monte Carlo, from another approximation.

    Where one Gaussian is near a posterior but cannot follow its shape (skew, funnels, several
    modes), in up to about 30 dimensions. Pure in key and data.

    Args:
        target: what to approximate; its own parameters, if any, stay as `init` has them.
        key: a typed random key.
        data: the data; the target's own where None.
        init: a Gaussian `Solution`, such as `vi.linear_response` gives, or a mixture's.
        num_components: of the mixture, beside the guard.
        df: the components' degrees of freedom, a whole number.
        num_draws: draws a round, at least 25.
        max_steps: how many rounds at most; they end earlier where k-hat is below 0.5 and more than
            half of the draws are effective.

    Returns:
        A `Solution` with a `vi.guides.mixture` guide, that of the round with the smallest k-hat
        among those seen. `info.steps` counts rounds; CONVERGED says that the rounds ended early.

    Raises:
        ValueError: a number is too small, or `init` is no Gaussian or mixture.
        TypeError: `key` is not a typed key, or `init` is no `Solution`.

    Example:
        >>> def banana(values, latents, data):
        ...     x, y = latents["z"]
        ...     return -0.5 * x**2 - 0.5 * ((y - 0.5 * x**2) / 0.5) ** 2
        >>> target = vi.target(banana, {"z": vi.Latent((2,))})
        >>> start = vi.solvers.deterministic(target, jax.random.key(0))
        >>> found = vi.solvers.population_monte_carlo(target, jax.random.key(1), init=start)
        >>> bool(vi.diagnose(target, found.guide, found.params, jax.random.key(2)).k_hat < 0.5)
        True
    """
    require_key(key, "solvers.population_monte_carlo")
    require_instance(init, Solution, "vi.solvers.deterministic(target, key)", "init")
    for name, count, least in [
        ("num_components", num_components, 1),
        ("df", df, 1),
        ("num_draws", num_draws, 25),
        ("max_steps", max_steps, 1),
    ]:
        require_count(count, name, "solvers.population_monte_carlo", least=least)
    rounds = population(target, init.guide, num_components, df, num_draws)
    solve = program(_build, rounds, max_steps)
    params, info = solve(init.params, key, resolve(target, data))
    return Solution(rounds.guide, params, info, jnp.zeros((0, 0)))


class Population(NamedTuple):
    """The pieces of the algorithm, each pure.

    Attributes:
        guide: the mixture.
        first: `(params of the start, key, data) -> Weighted`, of the start's draws.
        begin: `(params of the start, key, its weighted draws) -> params` of the first mixture.
        draw: `(params, key, data) -> Weighted`.
        refit: `(params, weighted draws) -> params`.
    """

    guide: Guide
    first: Any
    begin: Any
    draw: Any
    refit: Any


def population(
    target: Target, start: Guide, num_components: int, df: int, num_draws: int
) -> Population:
    """The pieces for one target, kept for the next call."""
    return program(_population, target, start, num_components, df, num_draws)


def _population(
    target: Target, start: Guide, num_components: int, df: int, num_draws: int
) -> Population:
    (name,) = start.declared
    guide = mixture(target, num_components + 1, df=df, name=name)

    def wrap(params: Any, components: Components) -> Any:
        rest = {key: params[key] for key in params if key != name}
        values = {name: components._asdict()}
        return {**rest, **unconstrain(guide.declared, values)}

    def unwrap(params: Any) -> Components:
        return Components(**constrain(guide.declared, {name: params[name]})[name])

    def begin(params: Any, key: jax.Array, drawn: Weighted) -> Any:
        """Components at resampled draws, each with the scale of the part that it came from."""
        own = constrain(start.declared, {name: params[name]})[name]
        chosen = drawn.position[pick_draws(key, drawn.smoothed.log_weights, num_components)]
        if set(own) == set(Components._fields):
            parts = Components(**own)
            shares = jax.vmap(lambda u: log_terms(parts, u, df)[0])(chosen)
            scale_trils = parts.scale_trils[jnp.argmax(shares, axis=1)]
        else:
            scale_tril = require_gaussian(own, "population_monte_carlo, init")[1]
            scale_trils = jnp.tile(scale_tril, (num_components, 1, 1))
        weights = jnp.full(num_components, 1 / num_components)
        parts = Components(weights, chosen, SPREAD * scale_trils)
        return wrap(params, guarded(parts, drawn.position, drawn.smoothed))

    def first(params: Any, key: jax.Array, data: Any) -> Weighted:
        return _weigh(target, start, params, start.noise(key, num_draws), data)

    def draw(params: Any, key: jax.Array, data: Any) -> Weighted:
        return _weigh(target, guide, params, guide.noise(key, num_draws), data)

    def refit(params: Any, drawn: Weighted) -> Any:
        parts = jax.tree.map(lambda leaf: leaf[:-1], unwrap(params))
        parts = parts._replace(weights=parts.weights / jnp.sum(parts.weights))
        parts = weighted_em(parts, drawn.position, drawn.smoothed, df)
        return wrap(params, guarded(parts, drawn.position, drawn.smoothed))

    return Population(guide, first, begin, draw, refit)


def weighted_em(components: Components, u: jax.Array, smoothed: Smoothed, df: int) -> Components:
    """Sweeps of EM on weighted draws.

    The covariance of a component that few draws speak for is drawn towards the one it had.
    """
    weights = jnp.exp(smoothed.log_weights)
    dim = u.shape[1]

    def sweep(_: int, now: Components) -> Components:
        terms, squared = jax.vmap(lambda u: log_terms(now, u, df))(u)
        rho = weights[:, None] * jax.nn.softmax(terms, axis=1)
        gamma = rho * (df + dim) / (df + squared)

        def one(rho: jax.Array, gamma: jax.Array, loc: jax.Array, scale_tril: jax.Array) -> Any:
            weight = jnp.sum(rho)
            new = gamma @ u / jnp.sum(gamma)
            x = u - new
            covariance = (gamma[:, None] * x).T @ x / weight
            effective = weight**2 / jnp.sum(rho**2)
            kept = jnp.minimum(1.0, dim / effective)
            covariance = (1 - kept) * covariance + kept * scale_tril @ scale_tril.T
            root = jnp.linalg.cholesky(covariance)
            usable = (weight > RARE) & all_finite(new, root)
            loc, scale_tril = where_tree(usable, (new, root), (loc, scale_tril))
            return jnp.maximum(weight, jnp.finfo(u.dtype).tiny), loc, scale_tril

        weight, locs, scale_trils = jax.vmap(one, in_axes=(1, 1, 0, 0))(
            rho, gamma, now.locs, now.scale_trils
        )
        weight = jnp.maximum(weight, jnp.finfo(u.dtype).eps)
        return Components(weight / jnp.sum(weight), locs, scale_trils)

    new = lax.fori_loop(0, SWEEPS, sweep, components)
    return where_tree(all_finite(new), new, components)


def guarded(components: Components, u: jax.Array, smoothed: Smoothed) -> Components:
    """The components with the guard behind them."""
    weights = jnp.exp(smoothed.log_weights)
    loc = weights @ u
    covariance = (weights[:, None] * (u - loc)).T @ (u - loc)
    # Few effective draws can lie in a plane: some of the diagonal keeps the guard wide all around.
    covariance = 0.9 * covariance + 0.1 * jnp.diag(jnp.diagonal(covariance))
    root = WIDE * jnp.linalg.cholesky(covariance)
    usable = all_finite(loc, root)
    loc, root = where_tree(
        usable, (loc, root), (components.locs[0], WIDE * components.scale_trils[0])
    )
    return Components(
        jnp.append((1 - GUARD) * components.weights, GUARD),
        jnp.concatenate([components.locs, loc[None]]),
        jnp.concatenate([components.scale_trils, root[None]]),
    )


def is_good(drawn: Weighted) -> jax.Array:
    """Whether there is nothing left to gain."""
    smoothed = drawn.smoothed
    share = smoothed.ess / len(drawn.log_ratios)
    return (smoothed.k_hat < GOOD_K_HAT) & (share > GOOD_SHARE)


def _weigh(target: Target, guide: Guide, params: Any, noise: Any, data: Any) -> Weighted:
    """Weighted draws; one at which the log density is not a number has no weight."""
    return weigh(target, guide, params, noise, data, None, nan_is_outside=True)


def _build(rounds: Population, max_steps: int) -> Any:
    @Quick
    def solve(start: Any, key: jax.Array, data: Any) -> tuple[Any, SolverInfo]:
        keys = jax.random.split(key, max_steps + 2)
        drawn = rounds.first(start, keys[0], data)

        def body(carry: Any) -> Any:
            i, params, drawn, best, best_drawn = carry
            params = rounds.refit(params, drawn)
            drawn = rounds.draw(params, keys[i + 2], data)
            better = ~(drawn.smoothed.k_hat >= best_drawn.smoothed.k_hat)
            best, best_drawn = where_tree(better, (params, drawn), (best, best_drawn))
            return i + 1, params, drawn, best, best_drawn

        params = rounds.begin(start, keys[1], drawn)
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
        return params, SolverInfo(status, elbo, steps, elbo[None], status[None], nothing)

    return solve
