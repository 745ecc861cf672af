"""Objectives that are functions of K log importance weights, with three gradients.

A `Combination` takes log w_k = log p(x, z_k) - log q(z_k), k = 1 .. K, to one number
B(log w_1, .., log w_K). With a_k = dB / d log w_k, the gradient of E[B] in the guide's parameters
is estimated

- `pathwise`: by differentiating B through everything;
- `doubly_reparameterised`: by sum_k c_k (d log w_k / d z_k) (d z_k / d params), where
  c_k = a_k - d a_k / d log w_k: the score term -a_k d log q / d params is reparameterised once more
  (Tucker et al., 2019, eq. 7 and 8);
- `vimco`: by sum_k (B - B_k) d log q(z_k) + a_k d log w_k, both at fixed draws, with B_k the value
  where log w_k is replaced by the average of the others (Mnih and Rezende, 2016, eq. 10).

All three have the gradient of a model's own parameters from sum_k a_k d log p(x, z_k; theta), where
B is a lower bound of the evidence. Divergences and upper bounds are minimised by the guide alone,
and the model ascends the bound log(1/K sum_k w_k) of the same draws, as in reweighted wake-sleep.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jax.scipy.special import logsumexp

from vi_params._check import explain, require_instance
from vi_params.estimators import Estimator, pathwise
from vi_params.objectives.objective import Measure, Objective, objective
from vi_params.objectives.pair import (
    Pair,
    Route,
    Scored,
    at_fixed_draws,
    path,
    require_reparameterised,
    scored,
    through_model,
    total,
)
from vi_params.objectives.row_scores import scored_rows, scored_shared
from vi_params.objectives.rows import require_reparameterised_shared

DOUBLY = "doubly_reparameterised"


class Combination(NamedTuple):
    """A function of K log weights that is bounded or minimised.

    Attributes:
        value: `log_weights (K,) -> scalar`.
        path_weights: `log_weights (K,) -> (K,)`: the c_k of double reparameterisation.
        measure: what the value is called, and whether it is maximised (sign -1) or minimised.
    """

    value: Callable[[jax.Array], jax.Array]
    path_weights: Callable[[jax.Array], jax.Array]
    measure: Measure


class WeightAux(NamedTuple):
    """What an evaluation of an importance-weighted loss tells besides.

    Attributes:
        value: the estimate of what the objective is named after; the loss up to its sign.
        elbo: the average log weight: an estimate of the evidence lower bound, in nats.
        ess: the effective number of the K draws, (sum w)^2 / sum w^2, averaged over the particles.
    """

    value: jax.Array
    elbo: jax.Array
    ess: jax.Array


def importance_weighted(
    pair: Pair, combination: Combination, estimator: Estimator | None, where: str
) -> Objective:
    """The objective of a combination, averaged over the pair's particles.

    Args:
        pair: a target and a guide.
        combination: what is made of the weights.
        estimator: how the gradient is taken; `pathwise()` where None.
        where: the objective's name, for messages.

    Raises:
        ValueError: the estimator is not one of these three, or the guide lacks what it needs.
    """
    estimator = estimator or pathwise()
    require_instance(estimator, Estimator, "vi.estimators.pathwise()", f"{where}, estimator")
    gradients = {"pathwise": _pathwise, DOUBLY: _doubly, "vimco": _vimco}
    if estimator.name not in gradients:
        raise ValueError(
            explain(
                "The estimator is not one of importance-weighted objectives.",
                expected=" or ".join(f"vi.estimators.{name}()" for name in gradients),
                received=f"vi.estimators.{estimator.name}()",
                where=f"{where}, estimator",
                hint="sticking the landing is biased here; doubly_reparameterised() is its "
                "unbiased relative"
                if estimator.name == "sticking_the_landing"
                else None,
            )
        )
    if estimator.name != "pathwise" and pair.num_importance > 1:
        _require_independent(pair, f"{where}, estimator {estimator.name}")
    if estimator.name == "vimco":
        _require_several(pair, where)
        if pair.plate is not None:
            require_reparameterised_shared(pair, f"{where}, estimator vimco")
    else:
        require_reparameterised(
            pair,
            f"{where}, estimator {estimator.name}",
            "use a reparameterised distribution, or vi.estimators.vimco()",
        )
    gradient = gradients[estimator.name]

    def evaluate(params: Any, noise: Any, data: Any) -> tuple[jax.Array, WeightAux]:
        model = jnp.zeros(())
        if combination.measure.sign > 0:  # no lower bound of the evidence
            params, model = model_apart(pair, params, noise, data)
        values, log_weights = gradient(pair, combination, params, noise, data)
        # With weights row by row the bound is the sum over rows, those of a batch N / B times.
        count, shared = 1, jnp.zeros(())
        if pair.plate is not None:
            count, landing = pair.target.plates[pair.plate], estimator.name == DOUBLY
            shared = jnp.mean(scored_shared(pair, params, noise, data, landing=landing))
        value = count * jnp.mean(values) + shared
        aux = weight_aux(value, log_weights)
        elbo = count * aux.elbo + stop_gradient(shared)
        return combination.measure.sign * value + model, aux._replace(elbo=elbo)

    return objective(
        pair.declared,
        pair.data,
        pair.noise,
        evaluate,
        pair.target,
        pair.guide,
        combination.measure,
    )


def model_apart(pair: Pair, params: Any, noise: Any, data: Any) -> tuple[Any, jax.Array]:
    """What lets a model learn beside a loss that says nothing of its evidence.

    Returns:
        The parameters with the model's own held fixed, and a zero whose gradient in these is that
        of minus the importance-weighted bound at the same draws.
    """
    own = pair.target.declared
    if not own:
        return params, jnp.zeros(())
    held = {**params, **stop_gradient({name: params[name] for name in own})}
    loss = -jnp.mean(model_bound(scored(pair, through_model, params, noise, data)))
    return held, loss - stop_gradient(loss)


def model_bound(draws: Scored) -> jax.Array:
    """log(1/K sum_k w_k) of every particle, differentiable through the target alone."""
    log_weights = draws.log_density - stop_gradient(draws.log_prob)
    return logsumexp(log_weights, axis=1) - math.log(log_weights.shape[1])


def weight_aux(value: jax.Array, log_weights: jax.Array) -> WeightAux:
    """The report on log weights of shape (num_particles, num_importance)."""
    log_weights = stop_gradient(log_weights)
    ess = jnp.exp(2 * logsumexp(log_weights, 1) - logsumexp(2 * log_weights, 1))
    return WeightAux(value, jnp.mean(log_weights), jnp.mean(ess))


def weighted_sum(weights: jax.Array, terms: jax.Array) -> jax.Array:
    """The sum over the last axis of weights times terms; weight zero makes a term of -inf zero."""
    none = weights == 0
    return jnp.sum(jnp.where(none, 0.0, weights * jnp.where(none, 0.0, terms)), axis=-1)


def with_gradient_of(value: jax.Array, surrogate: jax.Array) -> jax.Array:
    """`value`, with the gradient of `surrogate`."""
    return stop_gradient(value) + (surrogate - stop_gradient(surrogate))


Values = tuple[jax.Array, jax.Array]
"""The values of all particles, shape (num_particles,), and their log weights."""


def _scored(pair: Pair, route: Route, params: Any, noise: Any, data: Any) -> Scored:
    """The scores that share a combination along the last axis, one row a combination."""
    of = scored if pair.plate is None else scored_rows
    return of(pair, route, params, noise, data)


def _pathwise(pair: Pair, combination: Combination, params: Any, noise: Any, data: Any) -> Values:
    log_weights = _scored(pair, total, params, noise, data).log_weight
    return jax.vmap(combination.value)(log_weights), log_weights


def _doubly(pair: Pair, combination: Combination, params: Any, noise: Any, data: Any) -> Values:
    along = _scored(pair, path, params, noise, data).log_weight
    log_weights = stop_gradient(along)
    surrogate = weighted_sum(jax.vmap(combination.path_weights)(log_weights), along)
    if pair.target.declared or pair.plate is not None:
        slopes = jax.vmap(jax.grad(combination.value))(log_weights)
        model = _scored(pair, through_model, params, noise, data)
        surrogate += weighted_sum(slopes, model.log_weight)
    value = jax.vmap(combination.value)(log_weights)
    return with_gradient_of(value, surrogate), log_weights


def _vimco(pair: Pair, combination: Combination, params: Any, noise: Any, data: Any) -> Values:
    fixed = _scored(pair, at_fixed_draws, params, noise, data)
    log_weights = stop_gradient(fixed.log_weight)

    def gains(log_weights: jax.Array) -> jax.Array:
        num = log_weights.size
        own = jnp.eye(num, dtype=bool)
        others = jnp.sum(jnp.where(own, 0.0, log_weights), axis=1) / (num - 1)
        swapped = jnp.where(own, others[:, None], log_weights)
        return combination.value(log_weights) - jax.vmap(combination.value)(swapped)

    surrogate = weighted_sum(jax.vmap(gains)(log_weights), fixed.log_prob)
    value = jax.vmap(combination.value)(fixed.log_weight)
    return with_gradient_of(value, value + surrogate), log_weights


def _require_several(pair: Pair, where: str) -> None:
    if pair.num_importance < 2:
        raise ValueError(
            explain(
                "VIMCO compares each draw with the others.",
                expected="num_importance >= 2",
                received=str(pair.num_importance),
                where=f"{where}, estimator vimco",
            )
        )


def _require_independent(pair: Pair, where: str) -> None:
    """Raises where a draw depends on the others: both gradients average over it given them."""
    if not pair.scheme.is_iid:
        raise ValueError(
            explain(
                "This gradient is biased where draws depend on each other.",
                expected="vi.noise.iid()",
                received=f"vi.noise.{pair.scheme.name}()",
                where=where,
                hint="vi.estimators.pathwise() takes any noise",
            )
        )
