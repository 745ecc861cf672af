"""Stochastic variational inference as pure functions: init, step, run."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from vi_params._check import require_count, require_instance, require_key, require_optimizer
from vi_params._tree import abstract_key, all_finite, fold_in_name, strong
from vi_params.averaging import average_paths
from vi_params.batches import Scheme, shuffled
from vi_params.objectives.objective import Objective, resolve
from vi_params.params import init_params
from vi_params.params.maps import abstract_params
from vi_params.state import (
    SVI,
    Info,
    Start,
    State,
    accept,
    require_params,
    strong_number,
)
from vi_params.updates import Updates, rows

TRIES = 100
"""How many starts are drawn until one has a finite loss and gradient."""

BLOCK = 2**18
"""How many numbers of noise are drawn ahead of a loop, to a factor of two."""


def svi(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    batches: Scheme | None = None,
    updates: Updates | None = None,
) -> SVI:
    """Gradient steps of an optax transformation on an objective.

    A step whose loss, gradient norm or update is not finite is not taken: parameters and optimiser
    state stay as they were, and `info.skipped` says so. (A norm that overflows counts too: squares
    of such a gradient would stay in the memory of an optimiser like Adam for good.)

    Where the target has subsampled plates a step looks at a batch of their rows. In `vi.run` and
    `vi.fit` the rows follow from the run's key and the number of the step, so that `batches` hold
    over the whole run; `svi.step` draws by its own key and the state's step number.

    Args:
        objective: what to minimise.
        optimizer: any `optax.GradientTransformation`. Those with extra arguments get `value`,
            `grad` and `value_fn` (the loss at the step's own noise), as `optax.lbfgs` needs. With
            iterate averaging (`vi.averaged`, `optax.contrib.schedule_free`) the state's params are
            the iterates, and `vi.evaluation_params` gives the averages.
        batches: how rows are drawn: `vi.batches.shuffled()` (the default), ...
        updates: whether a step updates the rows of its batch alone, `vi.updates.rows()` (the
            default), or all of them, `vi.updates.dense()`. It matters to parameters declared with a
            subsampled plate only.

    Returns:
        An `SVI`.

    Raises:
        TypeError: `optimizer` is not an optax transformation.
        ValueError: the optimiser keeps state that has no rows, or averages parameters that have
            rows, under `vi.updates.rows()`; or it averages a parameter twice.

    Example:
        >>> target = vi.target(lambda v, z, d: -0.5 * jnp.sum(z["z"] ** 2), {"z": vi.Latent((2,))})
        >>> svi = vi.svi(vi.elbo(target, vi.guides.mean_field(target)), optax.adam(1e-2))
        >>> state = svi.init(jax.random.key(0))
        >>> state, info = jax.jit(svi.step)(state, jax.random.key(1))
        >>> int(state.step), bool(info.skipped)
        (1, False)
    """
    require_optimizer(optimizer, "optimizer")
    batches, updates = batches or shuffled(), updates or rows()
    require_instance(batches, Scheme, "vi.batches.shuffled()", "vi.svi, batches")
    require_instance(updates, Updates, "vi.updates.rows()", "vi.svi, updates")
    rule = optax.with_extra_args_support(optimizer)
    average_paths(jax.eval_shape(rule.init, abstract_params(objective.declared)))  # none twice
    sizes = objective.sizes
    plates = {**sizes, **objective.fed}
    lens = updates.bind(objective.declared, rule.init, plates, not batches.repeats)

    def evaluate(params: Any, noise: Any, data: Any) -> tuple[jax.Array, jax.Array]:
        """The loss and its gradient's norm, of the batch's rows alone where these are updated."""
        see = _as_they_are
        if lens is not None:
            at = lens(noise, data)
            params, data, see = at.take_params(params), at.batch, at.see

        def loss(params: Any) -> tuple[jax.Array, Any]:
            return objective.evaluate(see(params), noise, data)

        (value, _), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return value, _norm(grads)

    def propose(state: State, noise: Any, data: Any, see: Any = _as_they_are) -> Any:
        def loss_of(params: Any) -> tuple[jax.Array, Any]:
            return objective.evaluate(see(params), noise, data, state.step)

        (loss, _), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        norm = _norm(grads)
        updates, opt_state = rule.update(
            grads,
            state.opt_state,
            state.params,
            value=loss,
            grad=grads,
            value_fn=lambda params: loss_of(params)[0],
        )
        params = optax.apply_updates(state.params, updates)
        finite = all_finite(loss, norm, params)
        return State(params, opt_state, state.step + 1), Info(loss, norm, ~finite)

    def update(state: State, noise: Any, data: Any) -> tuple[State, Info]:
        if lens is None:
            new, info = propose(state, noise, data)
            return accept(state, new, info), info
        at = lens(noise, data)
        params, opt_state = at.take((state.params, state.opt_state))
        some = State(params, opt_state, state.step)
        new, info = propose(some, noise, at.batch, at.see)
        new = accept(some, new, info)
        params, opt_state = at.put((state.params, state.opt_state), (new.params, new.opt_state))
        return State(params, opt_state, new.step), info

    def noise_at(key: jax.Array, step: jax.Array) -> Any:
        noise = objective.noise(jax.random.fold_in(key, step))
        return _with_rows(noise, batches, key, step, sizes)

    def step(state: State, key: jax.Array, data: Any = None) -> tuple[State, Info]:
        require_key(key, "svi.step")
        noise = _with_rows(objective.noise(key), batches, key, state.step, sizes)
        return update(state, noise, resolve(objective, data))

    def begin(params: Any) -> State:
        params = jax.tree.map(strong, params)
        return State(params, jax.tree.map(strong_number, rule.init(params)), jnp.int32(0))

    @jax.jit
    def search(key: jax.Array, data: Any) -> Start:
        def attempt(carry: tuple) -> tuple:
            tries, _, _ = carry
            params = init_params(objective.declared, jax.random.fold_in(key, 2 * tries))
            noise = objective.noise(jax.random.fold_in(key, 2 * tries + 1))
            loss, norm = evaluate(params, noise, data)
            return tries + 1, params, all_finite(loss, norm)

        blank = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract_params(objective.declared)
        )
        tries, params, valid = lax.while_loop(
            lambda carry: (carry[0] < TRIES) & ~carry[2],
            attempt,
            (jnp.int32(0), blank, jnp.bool_(False)),
        )
        return Start(begin(params), valid, tries)

    @jax.jit
    def resume(key: jax.Array, params: Any, data: Any) -> Start:
        loss, norm = evaluate(params, objective.noise(key), data)
        return Start(begin(params), all_finite(loss, norm), jnp.int32(1))

    def start(key: jax.Array, params: Any = None, data: Any = None) -> Start:
        require_key(key, "svi.init")
        data = resolve(objective, data)
        if params is None:
            return search(key, data)
        require_params(objective, params)
        return resume(key, jax.tree.map(strong, params), data)

    def init(key: jax.Array, params: Any = None, data: Any = None) -> State:
        return start(key, params, data).state

    return SVI(
        init,
        step,
        start,
        objective.noise,
        update,
        propose if lens is None else None,
        objective.data,
        noise_at if sizes else None,
    )


def _as_they_are(params: Any) -> Any:
    """All rows, or those of a batch, each once."""
    return params


def _norm(grads: Any) -> jax.Array:
    """The Euclidean norm of a gradient, finite only if all its entries are."""
    return jnp.sqrt(sum(jnp.sum(jnp.abs(g) ** 2) for g in jax.tree.leaves(grads)))


def _with_rows(noise: Any, batches: Scheme, key: jax.Array, step: jax.Array, sizes: Any) -> Any:
    """A step's noise with the rows of its batch."""
    if not sizes:
        return noise
    return noise._replace(index=batches.draw(fold_in_name(key, "rows"), step, sizes))


def run(
    svi: SVI, state: State, key: jax.Array, num_steps: int, data: Any = None
) -> tuple[State, jax.Array]:
    """`num_steps` steps in one `lax.scan`: pure, for `jit` and `vmap`.

    The key of a step is folded in from its number, so that two runs of n steps are one run of 2n,
    bit for bit with JAX's default keys (other key implementations draw otherwise under `vmap`).

    Args:
        svi: what `vi.svi` gives.
        state: where to begin.
        key: a typed random key, the same for all parts of a run.
        num_steps: how many steps; static.
        data: the data; the objective's own where None.

    Returns:
        `(State, losses)`, `losses` of shape `(num_steps,)`.

    Raises:
        ValueError: num_steps < 1.
        TypeError: `key` is not a typed key.

    Example:
        >>> target = vi.target(lambda v, z, d: -0.5 * jnp.sum(z["z"] ** 2), {"z": vi.Latent((2,))})
        >>> svi = vi.svi(vi.elbo(target, vi.guides.mean_field(target)), optax.adam(1e-2))
        >>> keys = jax.random.split(jax.random.key(0), 3)
        >>> states = jax.vmap(svi.init)(keys)
        >>> states, losses = jax.vmap(lambda s, k: vi.run(svi, s, k, 100))(states, keys)
        >>> losses.shape
        (3, 100)
    """
    require_key(key, "run")
    require_count(num_steps, "num_steps", "run")
    data = svi.data if data is None else jax.tree.map(strong, data)
    block = _block(svi, num_steps)

    def some(length: int) -> Callable:
        def body(state: State, _: None) -> tuple[State, jax.Array]:
            noise = noise_of_steps(svi, key, state.step, length)

            def one(state: State, noise: Any) -> tuple[State, jax.Array]:
                state, info = svi.update(state, noise, data)
                return state, info.loss

            return lax.scan(one, state, noise)

        return body

    blocks, rest = divmod(num_steps, block)
    if not rest:
        state, losses = lax.scan(some(block), state, None, length=blocks)
        return state, losses.reshape(-1)
    # The rest joins the last block: XLA inlines a loop of one step, which then rounds differently.
    state, losses = lax.scan(some(block), state, None, length=blocks - 1)
    state, last = some(block + rest)(state, None)
    return state, jnp.concatenate([losses.reshape(-1), last])


def noise_of_steps(svi: SVI, key: jax.Array, first: jax.Array, length: int) -> Any:
    """The noise of `length` steps from number `first`, drawn at once."""
    at = svi.noise_at or (lambda key, step: svi.noise(jax.random.fold_in(key, step)))
    return jax.vmap(lambda i: at(key, first + i))(jnp.arange(length))


def noise_size(svi: SVI) -> int:
    """How many numbers a step's noise holds."""
    leaves = jax.tree.leaves(jax.eval_shape(svi.noise, abstract_key()))
    return max(1, sum(math.prod(leaf.shape) for leaf in leaves))


def _block(svi: SVI, num_steps: int) -> int:
    """How many steps' noise to draw at once: a divisor of `num_steps` if one is near the limit."""
    limit = max(1, min(num_steps, BLOCK // noise_size(svi)))
    divisors = (n for n in range(limit, limit // 2, -1) if num_steps % n == 0)
    return next(divisors, limit)
