"""Bounds from powers of importance weights: Renyi's bounds and the chi upper bound.

All are one formula. With K draws z_k from the guide and w_k = p(x, z_k) / q(z_k),

    L(alpha) = 1 / (1 - alpha) log( 1/K sum_k w_k^(1 - alpha) ).

alpha = 0 is the importance-weighted (IWAE) bound, alpha -> 1 the ELBO, and alpha < 0 bounds
log p(x) from above as K grows.
"""

import math

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp

from vi_params._check import explain
from vi_params.estimators import Estimator
from vi_params.guide import Guide
from vi_params.noise import Noise
from vi_params.objectives.importance import Combination, importance_weighted
from vi_params.objectives.objective import Measure, Objective
from vi_params.objectives.pair import pair, require_apart
from vi_params.target import Target

NEAR = 0.01
"""How close to 1 alpha must be for the formula that does not cancel there."""


def renyi(
    target: Target,
    guide: Guide,
    *,
    alpha: float,
    num_importance: int = 10,
    num_particles: int = 1,
    estimator: Estimator | None = None,
    noise: Noise | None = None,
    batch_size: int | None = None,
) -> Objective:
    """Renyi's variational bound L(alpha) as an objective.

        L(alpha) = 1 / (1 - alpha) log E_q (p(x, z) / q(z))^(1 - alpha)
                 = log p(x) - D_alpha(q || p(z | x)),

    estimated with K draws: without bias only at alpha = 1, where it is the ELBO. alpha > 1 favours
    single modes, 0 < alpha < 1 covers more, alpha = 0 is the IWAE bound. For alpha < 0 it lies
    above log p(x) and is minimised, but the estimate from few draws is too low and may lie below;
    a model's own parameters, whose evidence must not be lowered, then ascend the IWAE bound of the
    same draws.

    Li and Turner (2016), Renyi divergence variational inference, eq. 4 and 9.

    Args:
        target: what to approximate.
        guide: by what.
        alpha: the order, any finite number.
        num_importance: K, draws under the logarithm.
        num_particles: how many such estimates are averaged.
        estimator: `vi.estimators.pathwise()` (the default), `doubly_reparameterised()`, or
            `vimco()` for guides that are not reparameterised.
        noise: how the draws depend on each other: `vi.noise.iid()` (the default), or with the
            pathwise gradient others, whose bound is another one.
        batch_size: how many draws are evaluated at once; all where None.

    Returns:
        An `Objective`; `aux.value` is the bound, `aux.elbo` the average log weight, in nats. The
        loss is minus the bound, for alpha < 0 the bound itself.

    Raises:
        ValueError: alpha is not finite, or negative where model and guide share a parameter; target
            and guide do not fit, or the guide lacks what the estimator needs.
        TypeError: an argument is of the wrong kind.

    Example:
        >>> target = vi.target(lambda v, z, d: -0.5 * jnp.sum(z["z"] ** 2), {"z": vi.Latent((2,))})
        >>> objective = vi.renyi(target, vi.guides.mean_field(target), alpha=0.5)
        >>> objective.measure.name
        'Renyi bound (alpha=0.5)'
    """
    fitted = pair(
        target,
        guide,
        "vi.renyi",
        num_particles=num_particles,
        num_importance=num_importance,
        noise=noise,
        batch_size=batch_size,
    )
    alpha = _finite(alpha, "alpha", "vi.renyi")
    if alpha < 0:
        require_apart(fitted, f"vi.renyi, alpha={alpha:g}")
    measure = Measure(f"Renyi bound (alpha={alpha:g})", 1 if alpha < 0 else -1)
    return importance_weighted(fitted, power_bound(alpha, measure), estimator, "vi.renyi")


def cubo(
    target: Target,
    guide: Guide,
    *,
    order: float = 2.0,
    num_importance: int = 10,
    num_particles: int = 1,
    estimator: Estimator | None = None,
    noise: Noise | None = None,
    batch_size: int | None = None,
) -> Objective:
    """The chi upper bound of the log evidence as an objective, minimised.

        CUBO_n = 1/n log E_q (p(x, z) / q(z))^n >= log p(x),   n >= 1,

    with equality where q is the posterior. Minimising it minimises the chi^n divergence from the
    posterior to the guide, which covers the posterior's mass. It is Renyi's bound of order 1 - n,
    and like that one its estimate from K draws is too low: it falls on where no draw meets the
    posterior, the sooner the more latents there are. Begin at a fit of the ELBO, with many draws. A
    model's own parameters, whose evidence must not be lowered, ascend the IWAE bound of the same
    draws.

    Dieng, Tran, Ranganath, Paisley and Blei (2017), Variational inference via chi upper bound
    minimization, eq. 3. (They descend exp(n CUBO_n), which is unbiased and overflows.)

    Args:
        target: what to approximate.
        guide: by what.
        order: n, at least 1.
        num_importance: K, draws under the logarithm.
        num_particles: how many such estimates are averaged.
        estimator: `vi.estimators.pathwise()` (the default), `doubly_reparameterised()`, or
            `vimco()` for guides that are not reparameterised.
        noise: how the draws depend on each other: `vi.noise.iid()` (the default), or with the
            pathwise gradient others, whose bound is another one.
        batch_size: how many draws are evaluated at once; all where None.

    Returns:
        An `Objective`; `aux.value`, the loss, is the bound, `aux.elbo` the average log weight, in
        nats: the log evidence lies between them.

    Raises:
        ValueError: order < 1, model and guide share a parameter, target and guide do not fit, or
            the guide lacks what the estimator needs.
        TypeError: an argument is of the wrong kind.

    Example:
        >>> target = vi.target(lambda v, z, d: -0.5 * jnp.sum(z["z"] ** 2), {"z": vi.Latent((2,))})
        >>> objective = vi.cubo(target, vi.guides.mean_field(target), num_importance=20)
        >>> params = vi.init_params(objective.declared, jax.random.key(0))
        >>> loss, aux = objective.loss(params, jax.random.key(1))
        >>> bool(loss >= aux.elbo)
        True
    """
    fitted = pair(
        target,
        guide,
        "vi.cubo",
        num_particles=num_particles,
        num_importance=num_importance,
        noise=noise,
        batch_size=batch_size,
    )
    order = _finite(order, "order", "vi.cubo")
    if order < 1:
        raise ValueError(
            explain(
                "A chi bound of order below one bounds nothing from above.",
                expected="order >= 1",
                received=f"{order:g}",
                where="vi.cubo",
                hint=f"vi.renyi(..., alpha={1 - order:g}) is a lower bound",
            )
        )
    require_apart(fitted, "vi.cubo")
    combination = power_bound(1.0 - order, Measure(f"CUBO (order {order:g})", 1))
    return importance_weighted(fitted, combination, estimator, "vi.cubo")


def power_bound(alpha: float, measure: Measure) -> Combination:
    """L(alpha) of K log weights.

    a_k = w_k^(1 - alpha) / sum_j w_j^(1 - alpha) are the normalised powers, and with
    d a_k / d log w_k = (1 - alpha) a_k (1 - a_k) double reparameterisation takes
    c_k = alpha a_k + (1 - alpha) a_k^2: squares for IWAE, 1 / K for the ELBO.
    """
    power = 1.0 - alpha

    def value(log_weights: jax.Array) -> jax.Array:
        if abs(power) > NEAR:
            return (logsumexp(power * log_weights) - math.log(log_weights.size)) / power
        mean = jnp.mean(log_weights)
        if power == 0:
            return mean
        # log mean exp(power s) / power at deviations s: what cancels is of the size of the result.
        return mean + jnp.log1p(jnp.mean(jnp.expm1(power * (log_weights - mean)))) / power

    def path_weights(log_weights: jax.Array) -> jax.Array:
        a = jax.nn.softmax(power * log_weights)
        return alpha * a + power * a**2

    return Combination(value, path_weights, measure)


def _finite(number: float, name: str, where: str) -> float:
    try:
        value = float(number)
    except (TypeError, ValueError) as error:
        raise TypeError(
            explain(
                f"{name} must be a number.",
                expected="a finite Python number",
                received=f"{number!r} ({type(number).__name__})",
                where=where,
            )
        ) from error
    if not math.isfinite(value):
        raise ValueError(
            explain(
                f"{name} must be finite.",
                expected="a finite number",
                received=f"{value}",
                where=where,
            )
        )
    return value
