"""The compiled programs of a fit: all restarts in step, each frozen when it has stopped."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from vi_params._over import over
from vi_params._tree import where_tree
from vi_params.averaging import average_paths, evaluation_params
from vi_params.batches import Scheme
from vi_params.fitting.stopping import Stopping
from vi_params.fitting.sweep import with_options
from vi_params.objectives.objective import Objective
from vi_params.params.maps import abstract_params
from vi_params.svi import BLOCK, Info, Start, State, accept, noise_of_steps, noise_size, svi
from vi_params.updates import Updates

RUNNING, CONVERGED, STUCK, INVALID = range(4)

CALL = 4096
"""How many steps one call makes at most; the length of its record of losses."""

EVALUATIONS = 1000
"""How many draws the final comparison of restarts takes at least."""

REPEATS = 10
"""How many evaluations it takes at least, for a standard error."""


class Lanes(NamedTuple):
    """All restarts; every leaf has them as its leading axis.

    Attributes:
        state: their `State`.
        memory: what the stopping rule remembers.
        outcome: RUNNING, CONVERGED, STUCK or INVALID.
        skipped: how many steps were not taken.
    """

    state: State
    memory: Any
    outcome: jax.Array
    skipped: jax.Array


class Programs(NamedTuple):
    """What the host loop calls, compiled.

    Attributes:
        begin: `(keys, params, data, options) -> Lanes`; `params` None or those of one start,
            `options` name -> value of a numeric option of the optimiser, one a lane.
        advance: `(lanes, keys, count, data) -> (lanes, losses, made)`: `count` more steps, at most
            `capacity`, or until all have stopped; `made` is how many. Losses have the shape
            `(restarts, capacity)`, NaN where a lane made no step.
        feed: `(lanes, keys, data) -> (lanes, losses, skipped)`: one step, on data of its own;
            losses and skipped have the shape `(restarts,)`.
        look: `(lanes, losses, skipped, count) -> lanes`: what `advance` does after a block of
            steps (losses `(restarts, stop.every)`, `count` of them made), for those of `feed`.
        compare: `(lanes, key, data) -> (elbos, ses, ses of differences, lost)` by common random
            numbers; NaN where a lane never began. `lost` is the share of draws left out.
        capacity: how many steps one call can make.
        averages: whether the parameters to evaluate are other than the iterates.
    """

    begin: Callable[..., Lanes]
    advance: Callable[..., tuple[Lanes, jax.Array, jax.Array]]
    feed: Callable[..., tuple[Lanes, jax.Array, jax.Array]]
    look: Callable[..., Lanes]
    compare: Callable[..., tuple[jax.Array, jax.Array, jax.Array, jax.Array]]
    capacity: int
    averages: bool


def programs(
    objective: Objective,
    restarts: int,
    optimizer: optax.GradientTransformation,
    stop: Stopping,
    batches: Scheme | None = None,
    updates: Updates | None = None,
) -> Programs:
    """The programs of a fit with that many restarts."""
    inference = svi(objective, optimizer, batches=batches, updates=updates)
    every = stop.every
    capacity = max(1, CALL // every) * every
    ahead = every * noise_size(inference) * restarts <= BLOCK
    lanewise = _all_lanes if restarts > 1 else _one_lane

    def noise_ahead(first: jax.Array, keys: jax.Array, length: int) -> Any:
        """The noise of `length` steps of every lane; leading axes (length, restarts)."""
        draw = partial(noise_of_steps, inference, length=length)
        return jax.vmap(draw, out_axes=1)(keys, first)

    def move(states: State, noise: Any, data: Any) -> tuple[State, Info]:
        """One step of every lane."""
        propose = inference.propose
        if propose is None:  # a choice between whole states would cost O(rows)
            return lanewise(lambda s, e: inference.update(s, e, data))(states, noise)
        new, info = lanewise(lambda s, e: propose(s, e, data))(states, noise)
        return _accept_all(states, new, info), info

    def steps(states: State, keys: jax.Array, count: jax.Array, data: Any) -> Any:
        """`count` <= `every` steps of every lane: their states, losses, numbers of skipped steps.

        The loop over steps is the outer one, so that a step reads its noise in one piece.
        """
        first = states.step
        drawn = noise_ahead(first, keys, every) if ahead else None

        def one(i: jax.Array, carry: Any) -> Any:
            states, losses, skipped = carry
            now, at = (noise_ahead(first + i, keys, 1), 0) if drawn is None else (drawn, i)
            noise = jax.tree.map(lambda leaf: leaf[at], now)
            states, info = move(states, noise, data)
            return states, losses.at[i].set(info.loss), skipped + info.skipped

        blank = jnp.full((every, restarts), jnp.nan)
        carry = states, blank, jnp.zeros(restarts, jnp.int32)
        states, losses, skipped = lax.fori_loop(0, count, one, carry)
        return states, losses.T, skipped

    def settle(
        lane: Lanes, state: State, losses: jax.Array, skipped: jax.Array, count: jax.Array
    ) -> tuple[Lanes, jax.Array]:
        """A lane after a block of steps: as it was if it had stopped before."""
        memory, level = stop.update(stop.options, lane.memory, losses)
        whole = count == every
        outcome = jnp.where(
            skipped == every, STUCK, jnp.where(whole & level, CONVERGED, lane.outcome)
        )
        memory = where_tree(whole, memory, lane.memory)
        new = Lanes(state, memory, outcome, lane.skipped + skipped)
        if restarts == 1:  # the loop ends where its only lane stops: nothing to hold back
            return new, losses
        running = lane.outcome == RUNNING
        return where_tree(running, new, lane), jnp.where(running, losses, jnp.nan)

    def advance(lanes: Lanes, keys: jax.Array, count: jax.Array, data: Any) -> Any:
        def go_on(carry: Any) -> jax.Array:
            done, lanes, _ = carry
            return (done < count) & jnp.any(lanes.outcome == RUNNING)

        def body(carry: Any) -> Any:
            done, lanes, record = carry
            n = jnp.minimum(every, count - done)
            after = steps(lanes.state, keys, n, data)
            lanes, losses = lanewise(partial(settle, count=n))(lanes, *after)
            return done + n, lanes, lax.dynamic_update_slice(record, losses, (done * 0, done))

        record = jnp.full((restarts, capacity), jnp.nan)
        made, lanes, record = lax.while_loop(go_on, body, (jnp.int32(0), lanes, record))
        return lanes, record, made

    def feed(lanes: Lanes, keys: jax.Array, data: Any) -> tuple[Lanes, jax.Array, jax.Array]:
        noise = jax.tree.map(lambda leaf: leaf[0], noise_ahead(lanes.state.step, keys, 1))
        states, info = move(lanes.state, noise, data)
        if restarts == 1:
            return lanes._replace(state=states), info.loss, info.skipped
        running = lanes.outcome == RUNNING
        states = jax.vmap(where_tree)(running, states, lanes.state)
        losses = jnp.where(running, info.loss, jnp.nan)
        return lanes._replace(state=states), losses, info.skipped & running

    def look(lanes: Lanes, losses: jax.Array, skipped: jax.Array, count: jax.Array) -> Lanes:
        settled = lanewise(partial(settle, count=count))
        return settled(lanes, lanes.state, losses, skipped)[0]

    def begin(keys: jax.Array, params: Any, data: Any, options: Any) -> Lanes:
        def one(key: jax.Array, options: Any) -> Lanes:
            start: Start = inference.start(key, params, data)
            state = start.state
            state = state._replace(opt_state=with_options(state.opt_state, options))
            memory = stop.init(stop.options)
            outcome = jnp.where(start.valid, RUNNING, INVALID).astype(jnp.int32)
            return Lanes(state, memory, outcome, jnp.int32(0))

        return lanewise(one)(keys, options)

    return Programs(
        jax.jit(begin),
        jax.jit(advance, donate_argnums=0),
        jax.jit(feed, donate_argnums=0),
        jax.jit(look, donate_argnums=0),
        jax.jit(_compare(objective)),
        capacity,
        bool(average_paths(jax.eval_shape(optimizer.init, abstract_params(objective.declared)))),
    )


def _accept_all(states: State, new: State, info: Info) -> State:
    """`accept` in every lane. On a CPU it costs a sixth of a step, and is left out where no lane
    skips; an accelerator would wait for the answer."""
    select = jax.vmap(accept)

    def branch(states: State, new: State, info: Info) -> State:
        return lax.cond(jnp.any(info.skipped), select, lambda *args: args[1], states, new, info)

    return lax.platform_dependent(states, new, info, cpu=branch, default=select)


def _compare(objective: Objective) -> Callable[..., tuple[jax.Array, ...]]:
    """The ELBO of every lane at the same noise, with standard errors.

    Evaluations that are not finite are left out, as the steps at such noise were, and counted.
    """

    def compare(lanes: Lanes, key: jax.Array, data: Any) -> tuple[jax.Array, ...]:
        noise = jax.eval_shape(objective.noise, key)
        particles = jax.tree.leaves(noise)[0].shape[0]
        repeats = max(REPEATS, -(-EVALUATIONS // particles))
        keys = jax.random.split(key, repeats)

        state = lanes.state
        params = jax.vmap(evaluation_params)(state.opt_state, state.params)

        def all_lanes(key: jax.Array) -> jax.Array:
            noise = objective.noise(key)
            return over(lambda p: -objective.evaluate(p, noise, data)[0], params)

        elbos = lax.map(all_lanes, keys).T
        began = (lanes.outcome != INVALID)[:, None]
        elbos = jnp.where(jnp.isfinite(elbos) & began, elbos, jnp.nan)
        means = jnp.nanmean(elbos, axis=1)
        lost = jnp.mean(jnp.isnan(elbos), axis=1)
        best = jnp.argmax(jnp.where(jnp.isnan(means), -jnp.inf, means))
        return means, _standard_error(elbos), _standard_error(elbos - elbos[best]), lost

    return compare


def _standard_error(x: jax.Array) -> jax.Array:
    """That of the mean of each row, NaN left out."""
    return jnp.nanstd(x, axis=1) / jnp.sqrt(jnp.sum(~jnp.isnan(x), axis=1))


def _all_lanes(f: Callable) -> Callable:
    """`vmap`, as far as side by side is safe (`over`)."""
    return lambda *args: over(lambda one: f(*one), args)


def _one_lane(f: Callable) -> Callable:
    """`vmap` over a leading axis of length one, without a batched program."""

    def lifted(*args: Any) -> Any:
        out = f(*jax.tree.map(lambda leaf: leaf[0], args))
        return jax.tree.map(lambda leaf: leaf[None], out)

    return lifted
