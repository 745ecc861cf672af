"""f-divergences of normalised importance weights, and the tail-adaptive one."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jax.scipy.special import logsumexp

from vi_params._check import explain, require_instance
from vi_params.estimators import Estimator
from vi_params.guide import Guide
from vi_params.noise import Noise
from vi_params.objectives.divergences import Divergence
from vi_params.objectives.importance import (
    Combination,
    importance_weighted,
    model_apart,
    weight_aux,
    weighted_sum,
)
from vi_params.objectives.objective import Measure, Objective, objective
from vi_params.objectives.pair import (
    pair,
    path,
    require_apart,
    require_reparameterised,
    scored,
)
from vi_params.target import Target


def f_divergence(
    target: Target,
    guide: Guide,
    divergence: Divergence,
    *,
    num_importance: int = 10,
    num_particles: int = 1,
    estimator: Estimator | None = None,
    noise: Noise | None = None,
    batch_size: int | None = None,
) -> Objective:
    """An f-divergence between posterior and guide as an objective.

        D_f(p || q) = E_q f(p(z | x) / q(z)),

    estimated by the average of f over K draws whose weights are normalised to mean one, since
    p(z | x) is known up to a factor only. That costs a bias of order 1 / K, and where no draw falls
    into a part of the posterior, nothing is seen of it. Gradients hold the factor fixed, as it is:
    for KL(q || p) they are those of the ELBO, without bias.

    A model's own parameters ascend log(1/K sum_k w_k), the importance-weighted bound of the same
    draws: a divergence from the posterior says nothing of the evidence.

    With `doubly_reparameterised` the gradient is that of Wang, Liu and Liu (2018), Variational
    inference with tail-adaptive f-divergence, eq. 5: -E f''(w) w^2 d log w / dz . dz / dparams.

    Args:
        target: what to approximate.
        guide: by what.
        divergence: one of `vi.divergences`, or your own `Divergence`.
        num_importance: K, draws whose weights are normalised together; at least 2.
        num_particles: how many such estimates are averaged.
        estimator: `vi.estimators.pathwise()` (the default), `doubly_reparameterised()`, or
            `vimco()` for guides that are not reparameterised.
        noise: how the draws depend on each other: `vi.noise.iid()` (the default), or with the
            pathwise gradient others, whose bound is another one.
        batch_size: how many draws are evaluated at once; all where None.

    Returns:
        An `Objective`; `aux.value`, the loss, is the divergence, `aux.elbo` the average log weight.

    Raises:
        ValueError: the divergence is not smooth where the estimator needs it, model and guide share
            a parameter, target and guide do not fit, or num_importance < 2.
        TypeError: an argument is of the wrong kind.

    Example:
        >>> target = vi.target(lambda v, z, d: -0.5 * jnp.sum(z["z"] ** 2), {"z": vi.Latent((2,))})
        >>> guide = vi.guides.mean_field(target)
        >>> objective = vi.f_divergence(target, guide, vi.divergences.hellinger())
        >>> objective.measure.name
        'squared Hellinger distance'
    """
    where = "vi.f_divergence"
    require_instance(divergence, Divergence, "vi.divergences.forward_kl()", f"{where}, divergence")
    fitted = pair(
        target,
        guide,
        where,
        num_particles=num_particles,
        num_importance=num_importance,
        noise=noise,
        batch_size=batch_size,
        fewest=2,
    )
    require_apart(fitted, where)
    if not divergence.is_smooth and estimator and estimator.name == "doubly_reparameterised":
        raise ValueError(
            explain(
                "Double reparameterisation needs the second derivative of f.",
                expected="a smooth divergence",
                received=divergence.name,
                where=where,
                hint="vi.estimators.pathwise()",
            )
        )

    # VIMCO's two terms are the gradient only of the value that is differentiated as a whole.
    hold = stop_gradient if estimator is None or estimator.name != "vimco" else lambda x: x

    def value(log_weights: jax.Array) -> jax.Array:
        log_mean = hold(logsumexp(log_weights) - math.log(log_weights.size))
        return jnp.mean(jax.vmap(divergence.of)(log_weights - log_mean))

    slope = jax.grad(divergence.of)

    def path_weights(log_weights: jax.Array) -> jax.Array:
        # With h(s) = f(exp(s)): f''(t) t^2 = h''(s) - h'(s).
        s = log_weights - logsumexp(log_weights) + math.log(log_weights.size)
        curvature = jax.vmap(jax.grad(slope))(s) - jax.vmap(slope)(s)
        return -curvature / log_weights.size

    combination = Combination(value, path_weights, Measure(divergence.name, 1))
    return importance_weighted(fitted, combination, estimator, where)


def tail_adaptive(
    target: Target,
    guide: Guide,
    *,
    beta: float = -1.0,
    num_importance: int = 10,
    num_particles: int = 1,
    noise: Noise | None = None,
    batch_size: int | None = None,
) -> Objective:
    """The tail-adaptive f-divergence as an objective: draws weighed by the rank of their weight.

    With F(w_k) the share of draws whose weight is at least w_k, the gradient is

        sum_k r_k d log(p / q)(z_k) / dz_k . dz_k / dparams,   r_k proportional to F(w_k)^beta,

    that of an f-divergence whose f is chosen anew at every step, so that its weights always have
    moments: mass-covering like beta-th powers, without their heavy tails. There is no one function
    that it minimises; the reported value is the average log weight under r, held fixed. A model's
    own parameters ascend the importance-weighted bound, as in `f_divergence`.

    Wang, Liu and Liu (2018), Variational inference with tail-adaptive f-divergence, algorithm 1.

    Args:
        target: what to approximate.
        guide: by what; reparameterised.
        beta: at most 0; -1 is the paper's choice, and 0 gives sticking the landing.
        num_importance: K, draws that are ranked together; at least 2.
        num_particles: how many such estimates are averaged.
        noise: how the draws depend on each other: `vi.noise.iid()` (the default), ...
        batch_size: how many draws are evaluated at once; all where None.

    Returns:
        An `Objective`; `aux.value` is the weighted average, `aux.elbo` the plain one, in nats.

    Raises:
        ValueError: beta > 0, model and guide share a parameter, target and guide do not fit, or
            num_importance < 2.

    Example:
        >>> target = vi.target(lambda v, z, d: -0.5 * jnp.sum(z["z"] ** 2), {"z": vi.Latent((2,))})
        >>> objective = vi.tail_adaptive(target, vi.guides.mean_field(target), num_importance=32)
        >>> params = vi.init_params(objective.declared, jax.random.key(0))
        >>> loss, aux = objective.loss(params, jax.random.key(1))
        >>> bool(aux.value >= aux.elbo)
        True
    """
    where = "vi.tail_adaptive"
    if not beta <= 0:
        raise ValueError(
            explain(
                "A positive power would favour the smallest weights.",
                expected="beta <= 0",
                received=repr(beta),
                where=where,
            )
        )
    fitted = pair(
        target,
        guide,
        where,
        num_particles=num_particles,
        num_importance=num_importance,
        noise=noise,
        batch_size=batch_size,
        fewest=2,
    )
    require_apart(fitted, where)
    require_reparameterised(fitted, where, "vi.iwae with vi.estimators.vimco()")

    def ranks(log_weights: jax.Array) -> jax.Array:
        share = jnp.mean(log_weights[None, :] >= log_weights[:, None], axis=1)
        return jax.nn.softmax(beta * jnp.log(share))

    def evaluate(params: Any, noise: Any, data: Any) -> Any:
        params, model = model_apart(fitted, params, noise, data)
        log_weights = scored(fitted, path, params, noise, data).log_weight
        weights = stop_gradient(jax.vmap(ranks)(log_weights))
        value = jnp.mean(weighted_sum(weights, log_weights))
        return model - value, weight_aux(value, log_weights)

    measure = Measure("tail-adaptive average", -1)
    return objective(
        fitted.declared, fitted.data, fitted.noise, evaluate, target, fitted.guide, measure
    )
