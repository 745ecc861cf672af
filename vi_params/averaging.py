"""Averages of an optimiser's iterates: what to report, beside what to go on from.

At a constant rate the iterates of stochastic gradients do not settle: they move about the optimum
in a cloud that shrinks with the rate. Their average settles, at the rate that an optimal decreasing
schedule would have, without one having to be chosen (Polyak and Juditsky 1992). `averaged` keeps it
beside any optimiser, and `evaluation_params` finds it in the optimiser's state. Optimisers that
bring an average of their own, `optax.contrib.schedule_free`, are read in the same place.

Averages are those of unconstrained parameters: that of a scale is geometric where its constraint is
the exponential map, that of a triangular factor is triangular.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from vi_params._check import explain, require_optimizer
from vi_params._tree import is_traced, leaves_by_path


class Average(NamedTuple):
    """The state of an averaged optimiser.

    Attributes:
        inner: that of the optimiser itself.
        average: of the iterates before the current one, in the structure of the parameters.
        weight: that of the current one against them; a scalar.
        count: how many steps were made; an int32 scalar.
    """

    inner: Any
    average: Any
    weight: jax.Array
    count: jax.Array


def averaged(
    optimizer: optax.GradientTransformation, *, eta: float = 8.0
) -> optax.GradientTransformationExtraArgs:
    """The optimiser, with an average of its iterates beside it: the steps stay as they are.

    The average forgets the way to the optimum polynomially:

        average_t = (1 - w_t) average_{t-1} + w_t x_t,    w_t = (eta + 1) / (t + eta),

    so that x_s counts in proportion to about s^eta, and the last tenth of a long run for about 60 %
    at eta = 8. At eta = 0 it is the plain mean of all iterates but the start.

    `vi.fit` judges, compares and returns the average (`fit.params`); `fit.state` holds the iterate,
    to go on from. After `vi.run`, or in a loop of your own, `vi.evaluation_params` gives it. The
    stopping rule looks at the losses of the iterates. It may be part of a chain, frozen
    (`vi.freeze`), or given to some parameters only (`optax.multi_transform`).

    Args:
        optimizer: any optax transformation.
        eta: how fast the past is forgotten, >= 0; no unit.

    Returns:
        An optax transformation with extra arguments.

    Raises:
        TypeError: `optimizer` is not an optax transformation, or `eta` no number.
        ValueError: `eta` is negative or not finite.

    Example:
        >>> target = vi.target(lambda v, z, d: -0.5 * jnp.sum(z["z"] ** 2), {"z": vi.Latent((2,))})
        >>> objective = vi.elbo(target, vi.guides.mean_field(target))
        >>> fit = vi.fit(
        ...     objective, vi.averaged(optax.adam(0.05)), key=jax.random.key(0), progress=False
        ... )
        >>> bool(jnp.all(jnp.abs(fit.params["guide"]["loc"]) < 0.05))
        True

    Source: Shamir and Zhang (2013), "Stochastic gradient descent for non-smooth optimization",
    section 3.2.
    """
    require_optimizer(optimizer, "vi.averaged, optimizer")
    _require_eta(eta)
    rule = optax.with_extra_args_support(optimizer)

    def init(params: Any) -> Average:
        # Copies, so that parameters and state can both be donated.
        average = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), params)
        return Average(rule.init(params), average, jnp.ones(()), jnp.int32(0))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        if params is None:
            raise ValueError(
                explain(
                    "An averaged optimiser needs the parameters.",
                    expected="update(gradient, state, params)",
                    received="params=None",
                    where="vi.averaged",
                )
            )
        # The iterate that comes in is averaged, not the one that this update would lead to: what
        # follows in a chain may still change the update.
        average = _blend(state, params)
        updates, inner = rule.update(updates, state.inner, params, **extra)
        count = state.count + 1
        weight = ((eta + 1) / (count + eta)).astype(state.weight.dtype)
        return updates, Average(inner, average, weight, count)

    return optax.GradientTransformationExtraArgs(init, update)


def evaluation_params(opt_state: Any, params: Any) -> Any:
    """The parameters to evaluate: averages where the optimiser keeps them, else the iterates.

    Averages are those of `vi.averaged` and of `optax.contrib.schedule_free`, wherever in the
    optimiser's state they are. Parameters that are frozen, or whose optimiser keeps no average, are
    handed back as they are.

    Args:
        opt_state: an optimiser's state, such as `state.opt_state` of a `vi.State`.
        params: the unconstrained parameters beside it, `state.params`.

    Returns:
        A pytree like `params`.

    Raises:
        ValueError: a parameter is averaged twice.

    Example:
        >>> target = vi.target(lambda v, z, d: -0.5 * jnp.sum(z["z"] ** 2), {"z": vi.Latent((2,))})
        >>> objective = vi.elbo(target, vi.guides.mean_field(target))
        >>> svi = vi.svi(objective, vi.averaged(optax.adam(0.05)))
        >>> state, _ = vi.run(svi, svi.init(jax.random.key(0)), jax.random.key(1), 500)
        >>> params = vi.evaluation_params(state.opt_state, state.params)

    Source: for schedule-free optimisers Defazio et al. (2024), "The road less scheduled".
    """
    average_paths(opt_state)
    for state in _found(opt_state):
        seen = _own(_held(state), params)
        if isinstance(state, Average):
            seen = _blend(state, seen)
        else:
            seen = optax.contrib.schedule_free_eval_params(state, seen)
        params = jax.tree.map(
            lambda mean, x: x if _is_masked(mean) else mean, seen, params, is_leaf=_is_masked
        )
    return params


def average_paths(opt_state: Any) -> set[str]:
    """The paths of the parameters whose averages an optimiser's state keeps.

    Raises:
        ValueError: a parameter is averaged twice.
    """
    paths: set[str] = set()
    for state in _found(opt_state):
        new = set(leaves_by_path(_held(state)))
        inner = state.inner if isinstance(state, Average) else state.base_optimizer_state
        twice = new & (paths | average_paths(inner))
        if twice:
            raise ValueError(
                explain(
                    "A parameter's iterates are averaged twice.",
                    expected="one average for each parameter",
                    received=", ".join(sorted(twice)),
                    where="optimiser state",
                    hint="vi.averaged once, and not around or inside of a schedule-free optimiser, "
                    "which averages by itself",
                )
            )
        paths |= new
    return paths


def _found(opt_state: Any) -> list[Any]:
    """The outermost states in it that keep an average."""

    def is_average(node: Any) -> bool:
        return isinstance(node, (Average, optax.contrib.ScheduleFreeState))

    return [node for node in jax.tree.leaves(opt_state, is_leaf=is_average) if is_average(node)]


def _held(state: Any) -> Any:
    """What such a state keeps for each of its parameters."""
    return state.average if isinstance(state, Average) else state.z


def _own(held: Any, params: Any) -> Any:
    """The parameters, those that another optimiser looks after masked."""
    return jax.tree.map(
        lambda kept, x: kept if _is_masked(kept) else x, held, params, is_leaf=_is_masked
    )


def _blend(state: Average, params: Any) -> Any:
    """The average with the current iterate in it. What does not move keeps its bits."""
    return jax.tree.map(
        lambda mean, x: mean + state.weight.astype(mean.dtype) * (x - mean), state.average, params
    )


def _is_masked(node: Any) -> bool:
    """Whether another optimiser looks after these parameters."""
    return isinstance(node, optax.MaskedNode)


def _require_eta(eta: Any) -> None:
    if is_traced(eta):  # swept over
        return
    problem = {"expected": "a number >= 0, such as 8.0", "received": repr(eta)}
    where = "vi.averaged, eta"
    if isinstance(eta, (str, bool)) or not hasattr(eta, "__float__"):
        raise TypeError(explain("eta must be a number.", where=where, **problem))
    if not (math.isfinite(float(eta)) and float(eta) >= 0):
        raise ValueError(explain("eta is out of range.", where=where, **problem))
