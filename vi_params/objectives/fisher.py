"""Divergences between scores: how far the slopes of log q and log p are apart.

    F(q) = E_q |d/du log q - d/du log p|^2,

over unconstrained latents u, which needs no normaliser and is zero only where q is the posterior.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vi_params._check import explain
from vi_params._tree import abstract_key, is_key
from vi_params.guide import Guide
from vi_params.noise import Noise
from vi_params.objectives.importance import model_apart
from vi_params.objectives.objective import Measure, Objective, objective
from vi_params.objectives.pair import (
    Pair,
    model_values,
    over_draws,
    pair,
    require_apart,
    require_reparameterised,
    total,
)
from vi_params.params.maps import abstract_params
from vi_params.target import Target, flat


def fisher_divergence(
    target: Target,
    guide: Guide,
    *,
    num_particles: int = 10,
    noise: Noise | None = None,
    batch_size: int | None = None,
) -> Objective:
    """The Fisher divergence from the guide to the posterior as an objective.

        F(q) = E_q |d/du log q(u) - d/du log p(u | x)|^2,

    u the unconstrained latents (the densities' Jacobians cancel). It depends on the units of u:
    `vi.score_based_divergence` does not. The gradient passes through draws and scores, and needs
    second derivatives of the log density.

    Hyvarinen (2005), Estimation of non-normalized statistical models by score matching, eq. 2, with
    the expectation under q.

    Args:
        target: what to approximate. Parameters of its own ascend the ELBO at the same draws: a
            divergence of scores says nothing of how likely the data are.
        guide: by what; reparameterised, its density differentiable at any latents.
        num_particles: draws per evaluation.
        noise: how the draws depend on each other: `vi.noise.iid()` (the default), ...
        batch_size: how many draws are evaluated at once; all where None.

    Returns:
        An `Objective` whose loss is the divergence; aux is empty.

    Raises:
        ValueError: model and guide share a parameter, the guide is not reparameterised, or target
            and guide do not fit.
        TypeError: an argument is of the wrong kind.

    Example:
        >>> target = vi.target(lambda v, z, d: -0.5 * jnp.sum(z["z"] ** 2), {"z": vi.Latent((2,))})
        >>> guide = vi.guides.mean_field(target, init={"z": jnp.zeros(2)}, init_scale=1.0)
        >>> objective = vi.fisher_divergence(target, guide)
        >>> params = vi.init_params(objective.declared, jax.random.key(0))
        >>> float(objective.loss(params, jax.random.key(1))[0])
        0.0
    """
    where = "vi.fisher_divergence"
    fitted = _fit(target, guide, where, num_particles, noise, batch_size)
    flat_target = flat(target)
    draw = jax.eval_shape(
        fitted.guide.sample, abstract_params(fitted.declared), abstract_key(), fitted.data
    )
    made_at = getattr(draw.position, "shape", None)  # of a family: the vector u itself
    is_family = guide.distributions is None and made_at == (flat_target.dim,)

    def square(params: Any, noise: Any, data: Any) -> jax.Array:
        draw = fitted.guide.transform(params, noise, data)
        values = model_values(fitted, params)
        u = draw.position if is_family else flat_target.unconstrain(draw.latents, values, data)

        def log_weight(u: jax.Array) -> jax.Array:
            latents = flat_target.constrain(u, values, data)
            if is_family:
                log_q = fitted.guide.rescore(params, draw._replace(position=u), data)
            else:
                log_q = fitted.guide.log_prob(params, latents, data)
            return target.log_density(values, latents, data) - log_q

        return jnp.sum(jax.grad(log_weight)(u) ** 2)

    return _objective(fitted, square, "Fisher divergence")


def score_based_divergence(
    target: Target,
    guide: Guide,
    *,
    num_particles: int = 10,
    noise: Noise | None = None,
    batch_size: int | None = None,
) -> Objective:
    """The Fisher divergence in the guide's own units as an objective.

        D(q) = E_q |d/du log q - d/du log p|^2 in the norm of Cov(q),

    which a change of units of u leaves as it is. With u = loc + C e it is the squared slope of
    log p - log q in e, so that a guide is needed whose draws are maps of normal noise.

    Cai, Modi, Pillaud-Vivien, Margossian, Gower, Blei and Saul (2024), Batch and match: black-box
    variational inference with a score-based divergence, eq. 3.

    Args:
        target: what to approximate. Parameters of its own ascend the ELBO at the same draws: a
            divergence of scores says nothing of how likely the data are.
        guide: a family of `vi.guides`.
        num_particles: draws per evaluation.
        noise: how the draws depend on each other: `vi.noise.iid()` (the default), ...
        batch_size: how many draws are evaluated at once; all where None.

    Returns:
        An `Objective` whose loss is the divergence; aux is empty.

    Raises:
        ValueError: model and guide share a parameter, the guide is no map of normal noise, or
            target and guide do not fit.
        TypeError: an argument is of the wrong kind.

    Example:
        >>> target = vi.target(lambda v, z, d: -0.5 * jnp.sum(z["z"] ** 2), {"z": vi.Latent((2,))})
        >>> objective = vi.score_based_divergence(target, vi.guides.full_rank(target))
        >>> objective.measure.name
        'score-based divergence'
    """
    where = "vi.score_based_divergence"
    fitted = _fit(target, guide, where, num_particles, noise, batch_size)
    if any(is_key(leaf) for leaf in jax.tree.leaves(jax.eval_shape(fitted.noise, abstract_key()))):
        raise ValueError(
            explain(
                "The guide's draws are not maps of normal noise.",
                expected="a family of vi.guides",
                received="a guide whose noise is random keys",
                where=where,
                hint="vi.fisher_divergence takes any reparameterised guide",
            )
        )

    def square(params: Any, noise: Any, data: Any) -> jax.Array:
        slope = jax.grad(lambda e: total(fitted, params, e, data).log_weight)(noise)
        return jnp.sum(slope**2)

    return _objective(fitted, square, "score-based divergence")


def _fit(
    target: Target,
    guide: Guide,
    where: str,
    num_particles: int,
    noise: Noise | None,
    batch_size: int | None,
) -> Pair:
    fitted = pair(
        target, guide, where, num_particles=num_particles, noise=noise, batch_size=batch_size
    )
    require_apart(fitted, where)
    require_reparameterised(fitted, where, "use a reparameterised distribution")
    return fitted


def _objective(fitted: Pair, square: Callable[[Any, Any, Any], jax.Array], name: str) -> Objective:
    """The mean over draws of `square(params, one draw's noise, data)` as an objective."""

    def evaluate(params: Any, noise: Any, data: Any) -> tuple[jax.Array, tuple]:
        params, model = model_apart(fitted, params, noise, data)
        sizes = over_draws(lambda one: square(params, one, data), noise, fitted.batch_size)
        return model + jnp.mean(sizes), ()

    return objective(
        fitted.declared,
        fitted.data,
        fitted.noise,
        evaluate,
        fitted.target,
        fitted.guide,
        Measure(name, 1, unit="squared units", tolerance=1e-3),
    )
