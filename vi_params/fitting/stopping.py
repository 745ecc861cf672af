"""When to stop: rules over the losses, as values; pure, so that each restart has its own."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vi_params._check import require_count

CAPACITY = 64
"""How many block averages a plateau rule remembers; even."""


class Stopping(NamedTuple):
    """A stopping rule.

    Attributes:
        every: how many steps lie between two looks at the losses.
        init: `options -> memory`.
        update: `(options, memory, losses) -> (memory, stop)`, `losses` those of the last `every`
            steps.
        options: what the rule's functions take.
    """

    every: int
    init: Callable[[Any], Any]
    update: Callable[[Any, Any, jax.Array], tuple[Any, jax.Array]]
    options: Any = None


class Plateau(NamedTuple):
    """The options of `plateau`."""

    window: float
    noise: float
    tolerance: float


class Memory(NamedTuple):
    """Averages of the losses so far, ever coarser.

    Attributes:
        averages: shape `(CAPACITY,)`, one entry for `2**level` looks each; the last may be partial.
        complete: how many entries are complete.
        pending: sum of the looks that do not fill an entry yet.
        pending_looks: how many those are.
        looks_per_entry: 2**level.
    """

    averages: jax.Array
    complete: jax.Array
    pending: jax.Array
    pending_looks: jax.Array
    looks_per_entry: jax.Array


def never(*, every: int = 100) -> Stopping:
    """All steps are made.

    Example:
        >>> vi.stopping.never().every
        100
    """
    require_count(every, "every", "vi.stopping.never")
    return Stopping(every, _never_init, _never_update)


def plateau(
    *, window: int = 1000, every: int = 100, noise: float = 1.0, tolerance: float = 0.01
) -> Stopping:
    """Stop when the loss has ceased to fall, measured against its own noise.

    The last w steps are compared with the w before them, and the last 2 w with the 2 w before, w
    being the larger of `window` and an eighth of all steps. The loss is level at a width if the
    average fell by less than `noise` standard errors of the difference, or by less than
    `tolerance`. It stops where it is level at both.

    The comparison of adjacent blocks at two horizons is that of PyMC's plateau rule (pymc-extras,
    pull request 733); the averages here are of medians of `every` losses each, so that a few wild
    draws decide nothing.

    Args:
        window: the smallest width w, in steps.
        every: steps between two looks.
        noise: how many standard errors of improvement count as none.
        tolerance: what improvement counts as none, in nats.

    Returns:
        A `Stopping`.

    Raises:
        ValueError: window < 1, every < 1.

    Example:
        >>> fitted = vi.stopping.plateau(window=500)
    """
    require_count(window, "window", "vi.stopping.plateau")
    require_count(every, "every", "vi.stopping.plateau")
    options = Plateau(window / every, noise, tolerance)
    return Stopping(every, _plateau_init, _plateau_update, options)


def _never_init(options: Any) -> Any:
    return ()


def _never_update(options: Any, memory: Any, losses: jax.Array) -> tuple[Any, jax.Array]:
    return memory, jnp.bool_(False)


def _plateau_init(options: Plateau) -> Memory:
    return Memory(jnp.zeros(CAPACITY), jnp.int32(0), jnp.zeros(()), jnp.int32(0), jnp.int32(1))


def _plateau_update(
    options: Plateau, memory: Memory, losses: jax.Array
) -> tuple[Memory, jax.Array]:
    memory = _remember(memory, jnp.nanmedian(jnp.where(jnp.isfinite(losses), losses, jnp.nan)))
    looks = memory.complete * memory.looks_per_entry
    width = jnp.maximum(options.window, looks / 8) / memory.looks_per_entry
    width = jnp.ceil(width).astype(jnp.int32)
    level = [_is_level(options, memory, n * width) for n in (1, 2)]
    return memory, level[0] & level[1] & (memory.complete >= 4 * width)


def _remember(memory: Memory, average: jax.Array) -> Memory:
    """One more look; entries are merged in pairs where there is no room left."""
    pending, pending_looks = memory.pending + average, memory.pending_looks + 1
    full = pending_looks >= memory.looks_per_entry
    averages = memory.averages.at[memory.complete].set(
        jnp.where(full, pending / pending_looks, memory.averages[memory.complete])
    )
    complete = memory.complete + full
    crowded = complete >= CAPACITY
    merged = jnp.concatenate([averages.reshape(-1, 2).mean(axis=1), jnp.zeros(CAPACITY // 2)])
    return Memory(
        averages=jnp.where(crowded, merged, averages),
        complete=jnp.where(crowded, CAPACITY // 2, complete).astype(jnp.int32),
        pending=jnp.where(full, 0.0, pending),
        pending_looks=jnp.where(full, 0, pending_looks).astype(jnp.int32),
        looks_per_entry=jnp.where(crowded, 2, 1) * memory.looks_per_entry,
    )


def _is_level(options: Plateau, memory: Memory, width: jax.Array) -> jax.Array:
    """Whether the last `width` entries are no lower than the `width` before them."""
    at = jnp.arange(CAPACITY)
    age = memory.complete - 1 - at
    recent = (age >= 0) & (age < width)
    before = (age >= width) & (age < 2 * width)
    both = recent | before

    def mean(mask: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(mask, x, 0.0)) / jnp.maximum(jnp.sum(mask), 1)

    improvement = mean(before, memory.averages) - mean(recent, memory.averages)
    # Successive differences see the noise and not the trend.
    steps = jnp.diff(memory.averages, append=memory.averages[-1:])
    variance = 0.5 * mean(both & (age >= 1), steps**2)
    standard_error = jnp.sqrt(2 * variance / jnp.maximum(width, 1))
    return improvement < jnp.maximum(options.noise * standard_error, options.tolerance)
