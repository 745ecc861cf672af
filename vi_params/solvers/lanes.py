"""A search for mean-field optima from several starts: at few draws, then the distinct ones at all,
and where these are too few for the ELBO, at many.

A lane at few draws costs little, and it strays less: the average over many draws about a start that
is far off has optima of its own, at large scales. The lanes are searched one after the other, as it
is best on a CPU, by one program for all stages; lanes that the first stage led to the same optimum
take no step in the second one but for the best of them. The optimum at fixed draws is short of the
ELBO's by as much again as its value there is too high; one Newton step at fresh draws promises both
together, and says whether to go on. An accelerator evaluates all draws of all lanes in the time of
few: there is one stage there.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from vi_params._over import lanes_at_once, lanes_in_turn, over_lanes
from vi_params._tree import all_finite, where_tree
from vi_params.noise import moment_matched
from vi_params.solvers.fixed_draws import FEW, FRESH, MANY, LogDensity, fixed_draws
from vi_params.solvers.layout import Layout
from vi_params.solvers.optima import FAR
from vi_params.solvers.solution import ENDED, SolverStatus
from vi_params.solvers.start import lane_radii
from vi_params.solvers.trust_region import (
    LARGEST,
    LAST,
    RADIUS,
    Minimum,
    minimise,
    not_begun,
)

ROUGH = 0.1
"""How many nats a Newton step may still promise at the end of the first stage: the optima of few
draws are further from that of all."""

SHORT = 0.05
"""How many nats an ELBO may be short of the best one since its draws are few. A Newton step at as
many others promises twice that: half of it since the optimum is that of the first ones, and half
since it would be that of the others."""

SAME_MODEL = 0.1
"""How far apart the target's own parameters may be at the same optimum; they have no scale."""


def search(
    layout: Layout,
    log_density: LogDensity,
    size: int,
    draws: jax.Array,
    key: jax.Array,
    numbers: jax.Array,
    *,
    tolerance: float,
    max_steps: int,
    start: Any = None,
    fresh: jax.Array | None = None,
) -> tuple[Minimum, jax.Array, jax.Array]:
    """Where the lanes end, with leading axis (lanes,), which is the best one, and whether that went
    on at fresh draws.

    Args:
        layout: of the parameters.
        log_density: `(u, theta) -> scalar`.
        size: how many numbers one evaluation handles.
        draws: shape (num_draws, dim).
        key: a typed random key, of the starts and the few draws.
        numbers: of the lanes, shape (lanes,): each has its own starts and few draws.
        tolerance: as `minimise` takes it.
        max_steps: as `minimise` takes it, in every stage.
        start: parameters at which the first lane starts, at all draws at once.
        fresh: more draws, shape (sets, num_draws, dim), at which a lane that was searched at all
            draws goes on where a Newton step at the first set promises more than twice `SHORT`;
            where lanes are searched in stages.
    """
    (lanes,) = numbers.shape
    num_draws, dim = draws.shape
    radii = lane_radii(numbers)
    keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(key, i)))(numbers)
    staged = lanes_in_turn() and num_draws > FEW and num_draws % FEW == 0
    few = None
    if staged:
        few = jax.vmap(lambda key: moment_matched().draw(key, FEW, dim))(keys[:, 1])
    fresh = fresh if staged else None
    f = fixed_draws(log_density, draws, lanes_at_once(lanes) * size, layout.num_model, few, fresh)

    def lane(i: jax.Array, stage: Any, x: jax.Array, enabled: Any) -> Minimum:
        starts = layout.starts(keys[i, 0], radii[i])
        # Few draws can end at scales too large for all of them: next its locations at small scales.
        drawn_in = starts[0].at[:dim].set(x[:dim])
        known = jnp.where(all_finite(x), jnp.stack([x, drawn_in]), starts[:2])
        starts = jnp.where((stage == FRESH) | (stage == MANY), x, starts.at[:2].set(known))
        return minimise(
            f,
            starts,
            layout.units,
            tolerance=jnp.select(
                [stage >= 0, stage == FRESH],
                [max(tolerance, ROUGH), tolerance + 2 * SHORT],
                tolerance,
            ),
            max_steps=jnp.where(stage == FRESH, 1, max_steps),
            # What a whole Newton step promises is asked there, as accurate as steps are.
            radius=jnp.where(stage == FRESH, LARGEST, RADIUS),
            stage=stage,
            enabled=enabled,
        )

    blank = not_begun(f, jnp.full(layout.length, jnp.nan, draws.dtype))
    begun = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (lanes, *leaf.shape)), blank)
    if start is not None:
        x, value = begun.x.at[0].set(layout.vector(start)), begun.value.at[0].set(-jnp.inf)
        begun = begun._replace(x=x, value=value)
    if staged:
        ready = int(start is not None)
        return in_stages(lane, begun, dim, num_ready=ready, goes_on=fresh is not None)
    found = over_lanes(lambda at: lane(at[0], LAST, at[1], True), (jnp.arange(lanes), begun.x))
    return found, jnp.argmin(found.value), jnp.bool_(False)


def in_stages(
    lane: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], Minimum],
    begun: Minimum,
    dim: int,
    *,
    num_ready: int = 0,
    goes_on: bool = False,
) -> tuple[Minimum, jax.Array, jax.Array]:
    """Where the lanes ended; those of one optimum have the results of the best of them, which alone
    went on, unless it came to no end. And which is the best one, by values at the same draws, and
    whether it ended at many.

    After the two stages, `goes_on`, those that went on take one step at fresh draws, and where that
    does not converge, go on at many from where they were.

    Args:
        lane: `(number, stage, x, enabled) -> Minimum`, from x, or from the lane's own starts where
            x or the loss there is not finite. The first stage of lane i is stage i.
        begun: one for every lane, x NaN but for those of the ready ones.
        dim: x is (m, w, theta), so many locations, as many log scales.
        num_ready: how many lanes, the first ones, skip the first stage; their values are -inf.
        goes_on: whether there are stages after these two.
    """
    lanes = len(begun.value)
    firsts = lanes - num_ready
    numbers = jnp.arange(lanes, dtype=jnp.int32)

    def task(carry: tuple, number: jax.Array) -> tuple[tuple, None]:
        found, values, plan, short, many = carry
        plan = lax.cond(number == firsts, lambda: planned(found, dim), lambda: plan)
        order, leaders = plan
        turn, place = (number - firsts) // lanes, (number - firsts) % lanes
        is_first, is_second, is_check = turn < 0, turn == 0, turn == 1
        i = jnp.where(is_first, num_ready + number, order[place])
        stage = jnp.select([is_first, is_second, is_check], [i, LAST, FRESH], MANY)
        mine = jax.tree.map(lambda leaf: leaf[i], found)
        leader = leaders[i]
        ended = has_ended(found.status[leader])
        alone = (leader == i) | ~ended
        enabled = jnp.select(
            [is_first, is_second, is_check],
            [True, alone & (leader >= 0), ended & (leader == i)],
            short[i],
        )
        new = lane(i, stage, mine.x, enabled)
        steps = mine.steps + jnp.where(enabled, new.steps, 0)
        # Later stages take no other starts: a check leaves x, and what failed at many draws does.
        is_many = enabled & (turn == 2) & jnp.isfinite(new.value)
        taken = (enabled & (is_first | is_second)) | is_many
        now = where_tree(taken, new, mine)._replace(steps=steps)
        found = jax.tree.map(lambda old, leaf: old.at[i].set(leaf), found, now)
        values = values.at[i].set(jnp.where(is_first | is_second, now.value, values[i]))
        leaders = leaders.at[i].set(jnp.where(enabled & ~is_first, i, leader))
        is_short = enabled & is_check & (new.status != SolverStatus.CONVERGED)
        short, many = short.at[i].set(short[i] | is_short), many.at[i].set(many[i] | is_many)
        return (found, values, (order, leaders), short, many), None

    plan = numbers, jnp.full_like(numbers, -1)
    none = jnp.zeros(lanes, bool)
    start = begun, begun.value, plan, none, none
    tasks = jnp.arange(firsts + (3 if goes_on else 1) * lanes, dtype=jnp.int32)
    (found, values, (_, leaders), _, many), _ = lax.scan(task, start, tasks)
    source = jnp.where(leaders < 0, numbers, leaders)
    best = jnp.argmin(values[source])
    return jax.tree.map(lambda leaf: leaf[source], found), best, many[source][best]


def has_ended(status: jax.Array) -> jax.Array:
    """Whether a search came to an end."""
    return jnp.isin(status, jnp.array(ENDED))


def planned(found: Minimum, dim: int) -> tuple[jax.Array, jax.Array]:
    """The lanes from the best one on, and for every lane the best one at the same optimum; -1 for
    those that have not found any.

    Few draws can lie in several modes at once: distances count in the smaller of two scales, lest
    such a broad optimum hides true ones.
    """
    locs, scales = found.x[:, :dim], jnp.exp(found.x[:, dim : 2 * dim])
    spans = jnp.minimum(scales[:, None], scales[None])
    model = found.x[:, 2 * dim :]
    near = jnp.max(jnp.abs(locs[:, None] - locs[None]) / spans, axis=-1, initial=0.0) <= FAR
    near &= jnp.max(jnp.abs(model[:, None] - model[None]), axis=-1, initial=0.0) <= SAME_MODEL
    numbers = jnp.arange(len(found.value), dtype=jnp.int32)
    order = jnp.argsort(found.value).astype(jnp.int32)

    def follow(leaders: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
        at_mine = near[i] & (leaders == numbers)
        best = jnp.argmin(jnp.where(at_mine, found.value, jnp.inf)).astype(jnp.int32)
        leader = jnp.where(jnp.any(at_mine), best, i)
        return leaders.at[i].set(jnp.where(found.value[i] < jnp.inf, leader, -1)), None

    return order, lax.scan(follow, jnp.full_like(numbers, -1), order)[0]
