"""Stochastic variational inference as pure functions: init, step, run."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from vi_params._check import explain, require_count, require_key
from vi_params._tree import abstract_key, all_finite, flatten_like, strong, where_tree
from vi_params.objectives.objective import Objective, resolve
from vi_params.params import init_params
from vi_params.params.maps import abstract_params

TRIES = 100
"""How many starts are drawn until one has a finite loss and gradient."""

BLOCK = 2**18
"""How many numbers of noise are drawn ahead of a loop, to a factor of two."""


class State(NamedTuple):
    """What the next step needs.

    Attributes:
        params: the unconstrained parameters.
        opt_state: the optimiser's state.
        step: how many steps were made; an int32 scalar.
    """

    params: Any
    opt_state: Any
    step: jax.Array


class Info(NamedTuple):
    """What a reader wants to know of a step.

    Attributes:
        loss: the loss before the step.
        grad_norm: the Euclidean norm of its gradient.
        skipped: whether the step was not taken because something in it was not finite.
    """

    loss: jax.Array
    grad_norm: jax.Array
    skipped: jax.Array


class Start(NamedTuple):
    """A starting state and how good it is.

    Attributes:
        state: the state at step 0.
        valid: whether loss and gradient are finite there.
        tries: how many starts were drawn.
    """

    state: State
    valid: jax.Array
    tries: jax.Array


class SVI(NamedTuple):
    """An optimisation as pure functions, for `jit`, `vmap` and `lax.scan`.

    Attributes:
        init: `(key, params=None, data=default) -> State`: from the first valid start, or `params`.
        step: `(state, key, data=default) -> (State, Info)`; `update` at `noise(key)`.
        start: `(key, params=None, data=default) -> Start`: `init` that says whether it is valid.
        noise: `key -> noise`, the randomness of a step.
        update: `(state, noise, data) -> (State, Info)`: `accept` of what `propose` gives.
        propose: `(state, noise, data) -> (State, Info)`: the step, also where it is to be skipped.
        data: the default data.
    """

    init: Callable[..., State]
    step: Callable[..., tuple[State, Info]]
    start: Callable[..., Start]
    noise: Callable[[jax.Array], Any]
    update: Callable[[State, Any, Any], tuple[State, Info]]
    propose: Callable[[State, Any, Any], tuple[State, Info]]
    data: Any


def svi(objective: Objective, optimizer: optax.GradientTransformation) -> SVI:
    """Gradient steps of an optax transformation on an objective.

    A step whose loss, gradient norm or update is not finite is not taken: parameters and optimiser
    state stay as they were, and `info.skipped` says so. (A norm that overflows counts too: squares
    of such a gradient would stay in the memory of an optimiser like Adam for good.)

    Args:
        objective: what to minimise.
        optimizer: any `optax.GradientTransformation`. Those with extra arguments get `value`,
            `grad` and `value_fn` (the loss at the step's own noise), as `optax.lbfgs` needs.

    Returns:
        An `SVI`.

    Raises:
        TypeError: `optimizer` is not an optax transformation.

    Example:
        >>> target = vi.target(lambda v, z, d: -0.5 * jnp.sum(z["z"] ** 2), {"z": vi.Latent((2,))})
        >>> svi = vi.svi(vi.elbo(target, vi.guides.mean_field(target)), optax.adam(1e-2))
        >>> state = svi.init(jax.random.key(0))
        >>> state, info = jax.jit(svi.step)(state, jax.random.key(1))
        >>> int(state.step), bool(info.skipped)
        (1, False)
    """
    ours = hasattr(optimizer, "init") and hasattr(optimizer, "update")
    if not ours or hasattr(optimizer, "eval_and_update"):  # numpyro's optimisers have that
        raise TypeError(
            explain(
                "An optimiser was expected.",
                expected="an optax.GradientTransformation, such as optax.adam(1e-2)",
                received=f"{optimizer!r} ({type(optimizer).__name__})",
                where="optimizer",
            )
        )
    rule = optax.with_extra_args_support(optimizer)

    def evaluate(params: Any, noise: Any, data: Any, at: Any = None) -> tuple:
        """The loss, its gradient and the gradient's norm, finite only if all its entries are."""
        slope = jax.value_and_grad(objective.evaluate, has_aux=True)
        (loss, _), grads = slope(params, noise, data, at)
        norm = jnp.sqrt(sum(jnp.sum(jnp.abs(g) ** 2) for g in jax.tree.leaves(grads)))
        return loss, grads, norm

    def propose(state: State, noise: Any, data: Any) -> tuple[State, Info]:
        loss, grads, norm = evaluate(state.params, noise, data, state.step)
        updates, opt_state = rule.update(
            grads,
            state.opt_state,
            state.params,
            value=loss,
            grad=grads,
            value_fn=lambda params: objective.evaluate(params, noise, data, state.step)[0],
        )
        params = optax.apply_updates(state.params, updates)
        finite = all_finite(loss, norm, params)
        return State(params, opt_state, state.step + 1), Info(loss, norm, ~finite)

    def update(state: State, noise: Any, data: Any) -> tuple[State, Info]:
        new, info = propose(state, noise, data)
        return accept(state, new, info), info

    def step(state: State, key: jax.Array, data: Any = None) -> tuple[State, Info]:
        require_key(key, "svi.step")
        return update(state, objective.noise(key), resolve(objective, data))

    def begin(params: Any) -> State:
        params = jax.tree.map(strong, params)
        return State(params, jax.tree.map(strong_number, rule.init(params)), jnp.int32(0))

    @jax.jit
    def search(key: jax.Array, data: Any) -> Start:
        def attempt(carry: tuple) -> tuple:
            tries, _, _ = carry
            params = init_params(objective.declared, jax.random.fold_in(key, 2 * tries))
            noise = objective.noise(jax.random.fold_in(key, 2 * tries + 1))
            loss, _, norm = evaluate(params, noise, data)
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
        loss, _, norm = evaluate(params, objective.noise(key), data)
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

    return SVI(init, step, start, objective.noise, update, propose, objective.data)


def accept(state: State, new: State, info: Info) -> State:
    """The state after a proposed step: `new`, or where it is to be skipped `state`, a step on."""
    stay = state._replace(step=new.step)
    return where_tree(info.skipped, stay, new)


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
    return jax.vmap(lambda i: svi.noise(jax.random.fold_in(key, first + i)))(jnp.arange(length))


def noise_size(svi: SVI) -> int:
    """How many numbers a step's noise holds."""
    leaves = jax.tree.leaves(jax.eval_shape(svi.noise, abstract_key()))
    return max(1, sum(math.prod(leaf.shape) for leaf in leaves))


def _block(svi: SVI, num_steps: int) -> int:
    """How many steps' noise to draw at once: a divisor of `num_steps` if one is near the limit."""
    limit = max(1, min(num_steps, BLOCK // noise_size(svi)))
    divisors = (n for n in range(limit, limit // 2, -1) if num_steps % n == 0)
    return next(divisors, limit)


def strong_number(leaf: Any) -> Any:
    """A leaf of an optimiser's state as an array of strong dtype."""
    return strong(leaf) if isinstance(leaf, (jax.Array, int, float)) else leaf


def require_params(objective: Objective, params: Any) -> None:
    """Raises unless `params` have the declared names, structure and shapes."""
    expected = abstract_params(objective.declared)
    subtrees, paths, _ = flatten_like(expected, params, what="params", where="init")
    for path, leaf, like in zip(paths, subtrees, jax.tree.leaves(expected), strict=True):
        if jnp.shape(leaf) != like.shape:
            raise ValueError(
                explain(
                    "A parameter has the wrong shape.",
                    expected=f"shape {like.shape}",
                    received=f"shape {jnp.shape(leaf)}",
                    where=path,
                    hint="params are unconstrained: vi.unconstrain(objective.declared, values)",
                )
            )
