"""Mixtures that population Monte Carlo fits: where they begin, in which coordinates they are free.

A guard of fixed weight, wider than the weighted draws, reaches tails that the other components have
not found yet (a defensive mixture: Hesterberg, 1995, Weighted average importance sampling and
defensive mixture distributions).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vi_params._over import over
from vi_params._tree import all_finite, where_tree
from vi_params.guide import Guide
from vi_params.guides import active_mixture, mixture
from vi_params.guides.active_mixture import Across, Frame, Parts, parts_of
from vi_params.guides.location_scale import require_gaussian
from vi_params.guides.mixture import Components, log_terms
from vi_params.importance import Smoothed, Weighted, at_once, pick_draws
from vi_params.params import constrain, unconstrain
from vi_params.solvers.solution import Slopes
from vi_params.solvers.weighted_em import PRIOR
from vi_params.target import Target, flat

SPREAD = 0.8
"""The first scales of the components, in scales of the approximation they start from."""

GUARD, WIDE = 0.1, 3.0
"""The weight of the guard, and its scales in standard deviations of the weighted draws, where it
is wider (across active directions it has their own)."""

GRADIENTS, SIDE_BY_SIDE = 1000, 100
"""From how many gradients the active directions are found, and how many are computed at once."""


class Family(NamedTuple):
    """What the rounds ask of a family of mixtures.

    Attributes:
        guide: the mixture, its guard included.
        coordinates: `(params, u) -> y`, the coordinates of its components.
        parts: `params -> Parts`, in these coordinates.
        wrap: `(params, Parts) -> params`.
        begin: `(params of the start, key, its weighted draws, slopes) -> (params, Parts)`:
            components at resampled draws, no guard yet. `Slopes` are what directions come from.
    """

    guide: Guide
    coordinates: Callable[[Any, jax.Array], jax.Array]
    parts: Callable[[Any], Parts]
    wrap: Callable[[Any, Parts], Any]
    begin: Callable[..., tuple[Any, Parts]]


def everywhere(target: Target, start: Guide, num_components: int, df: int) -> Family:
    """Mixtures free in all unconstrained coordinates."""
    (name,) = start.declared
    guide = mixture(target, num_components + 1, df=df, name=name)
    declared = guide.declared

    def parts(params: Any) -> Parts:
        along = Components(**constrain(declared, {name: params[name]})[name])
        return Parts(along, _nothing_across(len(along.weights)))

    def wrap(params: Any, parts: Parts) -> Any:
        return {**params, **unconstrain(declared, {name: parts.along._asdict()})}

    def begin(params: Any, key: jax.Array, drawn: Weighted, slopes: Any) -> tuple[Any, Parts]:
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


def along_few(
    target: Target, start: Guide, num_components: int, df: int, num_active: int
) -> Family:
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

    def begin(params: Any, key: jax.Array, drawn: Weighted, slopes: Any) -> tuple[Any, Parts]:
        own = constrain(start.declared, {name: params[name]})[name]
        loc, scale_tril = require_gaussian(own, "population_monte_carlo, init, with num_active")
        rotation = active_directions(loc, scale_tril, slopes, num_active)
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
    loc: jax.Array, scale_tril: jax.Array, slopes: Slopes, num_active: int
) -> jax.Array:
    """An orthogonal matrix whose first columns are the active directions of log p - log q.

    In units of the Gaussian, z = C^-1 (u - loc), the gradient of the log ratio is
    g = C' grad log p(u) + z; the directions are the leading eigenvectors of E[g g'] over the
    places where it is known.
    """
    identity = jnp.eye(loc.size, dtype=loc.dtype)
    z = Frame(loc, scale_tril, identity).coordinates(slopes.position)
    g = slopes.gradient @ scale_tril + z
    usable = jnp.all(jnp.isfinite(g), axis=1) & jnp.isfinite(slopes.weights)
    weights = jnp.where(usable, slopes.weights, 0.0)
    g = jnp.where(usable[:, None], g, 0.0)
    vectors = jnp.linalg.eigh((weights[:, None] * g).T @ g)[1]
    # The rest of the axes follow, made orthogonal to the directions.
    return jnp.linalg.qr(jnp.concatenate([vectors[:, -num_active:], identity], axis=1))[0]


def slopes_at(target: Target, params: Any, drawn: Weighted, data: Any) -> Slopes:
    """The gradients at some weighted draws, as many as directions need."""
    values = constrain(target.declared, {key: params[key] for key in target.declared})
    position, weights = drawn.position[:GRADIENTS], drawn.smoothed.log_weights[:GRADIENTS]
    size = min(SIDE_BY_SIDE, at_once(len(position), target, data))
    gradient = jax.grad(lambda u: flat(target).log_density(u, values, data))
    return Slopes(position, over(gradient, position, size), jax.nn.softmax(weights))


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
