"""Population Monte Carlo: a mixture fitted to importance-weighted draws of itself.

Each round draws u_i from the current mixture, weights it by w_i = p(u_i) / q(u_i), Pareto-smoothed,
and moves the mixture by a few sweeps of the weighted EM algorithm (`weighted_em`), which lowers the
forward divergence KL(p || q) as far as the draws show it. Cappe, Douc, Guillin, Marin and Robert
(2008), Adaptive importance sampling in general mixture classes, Statistics and Computing 18,
section 3 (Student-t components as there, section 4).

A guard of fixed weight, wider than the weighted draws, reaches tails that the other components have
not found yet (a defensive mixture: Hesterberg, 1995, Weighted average importance sampling and
defensive mixture distributions). The rounds need the log density alone; its gradient is asked for
once, for the directions along which a mixture in many dimensions is free.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from vi_params._cache import program
from vi_params._check import require_count, require_instance, require_key
from vi_params._compile import Quick
from vi_params._over import over
from vi_params._tree import all_finite, where_tree
from vi_params.guide import Guide
from vi_params.guides import active_mixture, mixture
from vi_params.guides.active_mixture import Across, Frame, Parts, parts_of
from vi_params.guides.mixture import Components, log_terms, require_gaussian
from vi_params.importance import Smoothed, Weighted, pick_draws, weigh
from vi_params.objectives.objective import resolve
from vi_params.params import constrain, unconstrain
from vi_params.solvers.solution import Solution, SolverInfo, SolverStatus
from vi_params.solvers.weighted_em import PRIOR, weighted_em
from vi_params.target import Target, flat

SPREAD = 0.8
"""The first scales of the components, in scales of the approximation they start from."""

GUARD, WIDE = 0.1, 2.0
"""The weight of the guard, and its scales in standard deviations of the weighted draws."""

GRADIENTS, AT_ONCE = 1000, 100
"""From how many gradients the active directions are found, and how many are computed at once."""

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
        the round with the smallest k-hat among those seen. `info.steps` counts rounds; CONVERGED
        says that the rounds ended early.

    Raises:
        ValueError: a number is too small, `num_active` exceeds the dimension, or `init` is no
            Gaussian or mixture (no Gaussian, with `num_active`).
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
    rounds = population(target, init.guide, num_components, df, num_draws, num_active)
    solve = program(_build, rounds, max_steps)
    params, info = solve(init.params, key, resolve(target, data))
    return Solution(rounds.guide, params, info, jnp.zeros((0, 0)))


class Population(NamedTuple):
    """The pieces of the algorithm, each pure.

    Attributes:
        guide: the mixture.
        first: `(params of the start, key, data) -> Weighted`, of the start's draws.
        begin: `(params of the start, key, its weighted draws, data) -> params` of the first
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
        family = _everywhere(target, start, num_components, df)
    else:
        family = _along(target, start, num_components, df, num_active)

    def guarded(params: Any, parts: Parts, drawn: Weighted) -> Any:
        y = family.coordinates(params, drawn.position)
        return family.wrap(params, with_guard(parts, y, drawn.smoothed))

    def begin(params: Any, key: jax.Array, drawn: Weighted, data: Any) -> Any:
        params, parts = family.begin(params, key, drawn, data)
        return guarded(params, parts, drawn)

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
        return guarded(params, parts, drawn)

    return Population(family.guide, first, begin, draw, refit)


class Family(NamedTuple):
    """What the rounds ask of a family of mixtures.

    Attributes:
        guide: the mixture, its guard included.
        coordinates: `(params, u) -> y`, the coordinates of its components.
        parts: `params -> Parts`, in these coordinates.
        wrap: `(params, Parts) -> params`.
        begin: `(params of the start, key, its weighted draws, data) -> (params, Parts)`: components
            at resampled draws, no guard yet.
    """

    guide: Guide
    coordinates: Callable[[Any, jax.Array], jax.Array]
    parts: Callable[[Any], Parts]
    wrap: Callable[[Any, Parts], Any]
    begin: Callable[..., tuple[Any, Parts]]


def _everywhere(target: Target, start: Guide, num_components: int, df: int) -> Family:
    """Mixtures free in all unconstrained coordinates."""
    (name,) = start.declared
    guide = mixture(target, num_components + 1, df=df, name=name)
    declared = guide.declared

    def parts(params: Any) -> Parts:
        along = Components(**constrain(declared, {name: params[name]})[name])
        return Parts(along, _nothing_across(len(along.weights)))

    def wrap(params: Any, parts: Parts) -> Any:
        return {**params, **unconstrain(declared, {name: parts.along._asdict()})}

    def begin(params: Any, key: jax.Array, drawn: Weighted, data: Any) -> tuple[Any, Parts]:
        own = constrain(start.declared, {name: params[name]})[name]
        chosen = drawn.position[pick_draws(key, drawn.smoothed.log_weights, num_components)]
        if set(own) == set(Components._fields):  # each has the scale of the part it came from
            before = Components(**own)
            shares = jax.vmap(lambda u: log_terms(before, u, df)[0])(chosen)
            scale_trils = before.scale_trils[jnp.argmax(shares, axis=1)]
        else:
            scale_tril = require_gaussian(own, "population_monte_carlo, init")[1]
            scale_trils = jnp.tile(scale_tril, (num_components, 1, 1))
        along = Components(_equal(num_components), chosen, SPREAD * scale_trils)
        return params, Parts(along, _nothing_across(num_components))

    return Family(guide, lambda params, u: u, parts, wrap, begin)


def _along(target: Target, start: Guide, num_components: int, df: int, num_active: int) -> Family:
    """Mixtures free along the directions in which a target differs most from a Gaussian."""
    (name,) = start.declared
    guide = active_mixture(target, num_components + 1, num_active, df=df, name=name)
    declared = guide.declared

    def values(params: Any) -> Any:
        return constrain(declared, {name: params[name]})[name]

    def coordinates(params: Any, u: jax.Array) -> jax.Array:
        return Frame(**values(params)["frame"]).coordinates(u)

    def wrap(params: Any, parts: Parts) -> Any:
        own = {"along": parts.along._asdict(), "across": parts.across._asdict()}
        free = unconstrain(declared, {name: {**own, "frame": values(params)["frame"]}})
        return {**params, **free}

    def begin(params: Any, key: jax.Array, drawn: Weighted, data: Any) -> tuple[Any, Parts]:
        own = constrain(start.declared, {name: params[name]})[name]
        loc, scale_tril = require_gaussian(own, "population_monte_carlo, init, with num_active")
        rotation = active_directions(target, params, loc, scale_tril, drawn, data, num_active)
        frame = Frame(loc, scale_tril, rotation)
        chosen = drawn.position[pick_draws(key, drawn.smoothed.log_weights, num_components)]
        locs = frame.coordinates(chosen)[:, :num_active]
        scale_trils = SPREAD * jnp.tile(jnp.eye(num_active), (num_components, 1, 1))
        rest = num_components, loc.size - num_active
        parts = Parts(
            Components(_equal(num_components), locs, scale_trils),
            Across(jnp.zeros(rest), jnp.ones(rest)),
        )
        blank = {"along": parts.along._asdict(), "across": parts.across._asdict()}
        free = unconstrain(declared, {name: {**blank, "frame": frame._asdict()}})
        return {**params, **free}, parts

    return Family(guide, coordinates, lambda params: parts_of(values(params)), wrap, begin)


def active_directions(
    target: Target,
    params: Any,
    loc: jax.Array,
    scale_tril: jax.Array,
    drawn: Weighted,
    data: Any,
    num_active: int,
) -> jax.Array:
    """An orthogonal matrix whose first columns are the active directions of log p - log q.

    In units of the Gaussian, z = C^-1 (u - loc), the gradient of the log ratio is
    g = C' grad log p(u) + z; the directions are the leading eigenvectors of E_p[g g'], by weighted
    draws of the Gaussian.
    """
    values = constrain(target.declared, {key: params[key] for key in target.declared})

    def gradient(z: jax.Array) -> jax.Array:
        def log_ratio(z: jax.Array) -> jax.Array:
            u = loc + scale_tril @ z
            return flat(target).log_density(u, values, data) + 0.5 * z @ z

        return jax.grad(log_ratio)(z)

    identity = jnp.eye(loc.size, dtype=loc.dtype)
    frame = Frame(loc, scale_tril, identity)
    z = frame.coordinates(drawn.position[:GRADIENTS])
    g = over(gradient, z, AT_ONCE)
    usable = jnp.all(jnp.isfinite(g), axis=1)
    weights = jnp.where(usable, jnp.exp(drawn.smoothed.log_weights[:GRADIENTS]), 0.0)
    g = jnp.where(usable[:, None], g, 0.0)
    vectors = jnp.linalg.eigh((weights[:, None] * g).T @ g)[1]
    # The rest of the axes follow, made orthogonal to the directions.
    return jnp.linalg.qr(jnp.concatenate([vectors[:, -num_active:], identity], axis=1))[0]


def _equal(num_components: int) -> jax.Array:
    return jnp.full(num_components, 1 / num_components)


def _nothing_across(num_components: int) -> Across:
    return Across(jnp.zeros((num_components, 0)), jnp.ones((num_components, 0)))


def with_guard(parts: Parts, y: jax.Array, smoothed: Smoothed) -> Parts:
    """The components with the guard behind them."""
    weights = jnp.exp(smoothed.log_weights)
    along, across = parts
    num_active = along.locs.shape[1]
    mean = weights @ y
    a = y[:, :num_active] - mean[:num_active]
    covariance = (weights[:, None] * a).T @ a
    # Few effective draws can lie in a plane: some of the diagonal keeps the guard wide all around.
    covariance = 0.9 * covariance + 0.1 * jnp.diag(jnp.diagonal(covariance))
    root = WIDE * jnp.linalg.cholesky(covariance)
    known = smoothed.ess / (smoothed.ess + PRIOR)
    variance = known * (weights @ (y - mean) ** 2) + (1 - known)
    found = mean[:num_active], root, mean[num_active:], jnp.sqrt(variance[num_active:])
    instead = along.locs[0], WIDE * along.scale_trils[0], across.locs[0], across.scales[0]
    loc, root, centre, scale = where_tree(all_finite(found), found, instead)
    return Parts(
        Components(
            jnp.append((1 - GUARD) * along.weights, GUARD),
            jnp.concatenate([along.locs, loc[None]]),
            jnp.concatenate([along.scale_trils, root[None]]),
        ),
        Across(
            jnp.concatenate([across.locs, centre[None]]),
            jnp.concatenate([across.scales, scale[None]]),
        ),
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

        params = rounds.begin(start, keys[1], drawn, data)
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
