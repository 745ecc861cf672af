"""What an optimisation hands from step to step, and the protocol of its functions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vi_params._check import explain
from vi_params._tree import flatten_like, strong, where_tree
from vi_params.objectives.objective import Objective
from vi_params.params.maps import abstract_params


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
        propose: `(state, noise, data) -> (State, Info)`: the step, also where it is to be skipped;
            None where `update` works on rows alone and holds back what is to be skipped itself.
        data: the default data.
        noise_at: `(key, step) -> noise` of a step of `vi.run`, from the key of the run and the
            number of the step; `noise` of the key with the number folded in where None.
    """

    init: Callable[..., State]
    step: Callable[..., tuple[State, Info]]
    start: Callable[..., Start]
    noise: Callable[[jax.Array], Any]
    update: Callable[[State, Any, Any], tuple[State, Info]]
    propose: Callable[[State, Any, Any], tuple[State, Info]] | None
    data: Any
    noise_at: Callable[[jax.Array, jax.Array], Any] | None = None


def accept(state: State, new: State, info: Info) -> State:
    """The state after a proposed step: `new`, or where it is to be skipped `state`, a step on."""
    stay = state._replace(step=new.step)
    return where_tree(info.skipped, stay, new)


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
