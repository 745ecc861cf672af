"""A search for mean-field optima at fixed draws from several starts: at few draws, then those
of distinct optima at all draws.

A lane at few draws costs little, and it strays less: the average over many draws about a start that
is far off has optima of its own, at large scales. The lanes are searched one after the other, as it
is best on a CPU, by one program for both stages; lanes that the first stage led to the same optimum
take no step in the second one but for the best of them. An accelerator evaluates all draws of all
lanes in the time of few: there is one stage there.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vi_params._over import lanes_at_once, over_lanes
from vi_params._tree import all_finite, where_tree
from vi_params.noise import moment_matched
from vi_params.solvers.fixed_draws import FEW, LogDensity, fixed_draws
from vi_params.solvers.layout import Layout
from vi_params.solvers.optima import FAR
from vi_params.solvers.trust_region import LAST, Minimum, minimise, not_begun

FAR_BELOW = 20.0
"""A lane that is this many nats worse than the best one after the first stage ends there; half a
nat more for every latent, since few draws flatter."""


def search(
    layout: Layout,
    log_density: LogDensity,
    size: int,
    draws: jax.Array,
    key: jax.Array,
    radii: jax.Array,
    *,
    tolerance: float,
    max_steps: int,
    start: Any = None,
) -> Minimum:
    """Where the lanes end, with leading axis (lanes,).

    Args:
        layout: of the parameters.
        log_density: `(u, theta) -> scalar`.
        size: how many numbers one evaluation handles.
        draws: shape (num_draws, dim).
        key: a typed random key, of the starts and the few draws.
        radii: how far from zero each lane starts, shape (lanes,).
        tolerance: as `minimise` takes it.
        max_steps: as `minimise` takes it, in either stage.
        start: parameters at which the first lane starts, at all draws at once.
    """
    (lanes,) = radii.shape
    num_draws, dim = draws.shape
    keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(key, i)))(jnp.arange(lanes))
    staged = lanes_at_once(lanes) == 1 and num_draws > FEW and num_draws % FEW == 0
    few = None
    if staged:
        few = jax.vmap(lambda key: moment_matched().draw(key, FEW, dim))(keys[:, 1])
    f = fixed_draws(log_density, draws, lanes_at_once(lanes) * size, layout.num_model, few)

    def lane(i: jax.Array, stage: Any, x: jax.Array, enabled: Any) -> Minimum:
        starts = layout.starts(keys[i, 0], radii[i])
        return minimise(
            f,
            starts.at[0].set(jnp.where(all_finite(x), x, starts[0])),
            layout.units,
            tolerance=tolerance,
            max_steps=max_steps,
            stage=stage,
            enabled=enabled,
        )

    blank = not_begun(f, jnp.full(layout.length, jnp.nan, draws.dtype))
    begun = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (lanes, *leaf.shape)), blank)
    if start is not None:
        x, value = begun.x.at[0].set(layout.vector(start)), begun.value.at[0].set(-jnp.inf)
        begun = begun._replace(x=x, value=value)
    if staged:
        return in_two_stages(lane, begun, dim, num_ready=int(start is not None))
    return over_lanes(lambda at: lane(at[0], LAST, at[1], True), (jnp.arange(lanes), begun.x))


def in_two_stages(
    lane: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], Minimum],
    begun: Minimum,
    dim: int,
    num_ready: int = 0,
) -> Minimum:
    """Where the lanes ended; those of one optimum all have the results of the lane that went on.

    Args:
        lane: `(number, stage, x, enabled) -> Minimum`, from x, or from the lane's own starts where
            x or the loss there is not finite. The first stage of lane i is stage i.
        begun: one for every lane, x NaN but for those of the ready ones.
        dim: x is (m, w, theta), so many locations, as many log scales.
        num_ready: how many lanes, the first ones, skip the first stage.
    """
    lanes = len(begun.value)
    before = lanes - num_ready
    tasks = np.concatenate([np.arange(num_ready, lanes), np.arange(lanes)])

    def task(carry: tuple[Minimum, jax.Array], number: jax.Array) -> tuple[tuple, None]:
        found, leaders = carry
        i, is_first = jnp.asarray(tasks, jnp.int32)[number], number < before
        leaders = lax.cond(number == before, lambda: led(found, dim), lambda: leaders)
        mine = jax.tree.map(lambda leaf: leaf[i], found)
        enabled = is_first | (leaders[i] == i)
        new = lane(i, jnp.where(is_first, i, LAST), mine.x, enabled)
        new = new._replace(steps=mine.steps + new.steps)
        now = where_tree(enabled, new, mine)
        return (jax.tree.map(lambda old, leaf: old.at[i].set(leaf), found, now), leaders), None

    start = begun, jnp.full(lanes, -1)
    (found, leaders), _ = lax.scan(task, start, jnp.arange(len(tasks)))
    source = jnp.where(leaders < 0, jnp.arange(lanes), leaders)
    return jax.tree.map(lambda leaf: leaf[source], found)


def led(found: Minimum, dim: int) -> jax.Array:
    """For every lane the best lane at the same optimum; -1 for those not worth a second stage.

    Few draws can lie in several modes at once: distances count in the smaller of two scales, lest
    such a broad optimum hides true ones.
    """
    locs, scales = found.x[:, :dim], jnp.exp(found.x[:, dim : 2 * dim])
    spans = jnp.minimum(scales[:, None], scales[None])
    near = jnp.max(jnp.abs(locs[:, None] - locs[None]) / spans, axis=-1, initial=0.0) <= FAR
    best = jnp.min(found.value, where=jnp.isfinite(found.value), initial=jnp.inf)
    usable = found.value < jnp.inf
    usable &= ~(found.value > best + FAR_BELOW + 0.5 * dim)
    numbers = jnp.arange(len(found.value))

    def follow(leaders: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
        at_mine = near[i] & (leaders == numbers)
        leader = jnp.where(jnp.any(at_mine), jnp.argmax(at_mine), i)
        return leaders.at[i].set(jnp.where(usable[i], leader, -1)), None

    return lax.scan(follow, jnp.full(len(numbers), -1), jnp.argsort(found.value))[0]
