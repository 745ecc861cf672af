"""The evidence lower bound."""

from typing import Any

import jax
import jax.numpy as jnp

from vi_params._check import require_count, require_instance
from vi_params._tree import abstract_key, merge
from vi_params.estimators import Estimator, pathwise
from vi_params.estimators.estimator import Problem
from vi_params.guide import Guide
from vi_params.matching import joint_data, joint_declared, matched
from vi_params.noise import Noise, iid
from vi_params.objectives.objective import Aux, Objective, objective
from vi_params.target import Target


def elbo(
    target: Target,
    guide: Guide,
    *,
    num_particles: int = 1,
    estimator: Estimator | None = None,
    noise: Noise | None = None,
    batch_size: int | None = None,
) -> Objective:
    """The evidence lower bound as an objective.

        ELBO(params) = E_{z ~ q(.; params)} [log p(x, z) - log q(z; params)],   loss = -ELBO,

    estimated by the mean over `num_particles` draws.

    Args:
        target: what to approximate.
        guide: by what.
        num_particles: draws per evaluation.
        estimator: how the gradient is taken, one of `vi.estimators`: `pathwise()` (the default),
            `closed_form_entropy()`, `sticking_the_landing()`, `analytic_kl()`; `mixed()`,
            `enumerate()` or `score()` where a latent is discrete or not reparameterised.
        noise: how the draws depend on each other: `vi.noise.iid()` (the default), ...
        batch_size: how many draws are evaluated at once; all of them where None. Fewer cap the
            memory at that of `batch_size` draws.

    Returns:
        An `Objective`; `aux.elbo` is the estimate, in nats.

    Raises:
        ValueError: target and guide declare the same name, their latents do not match, or the guide
            lacks what the estimator needs.

    Example:
        >>> target = vi.target(lambda v, z, d: -0.5 * jnp.sum(z["z"] ** 2), {"z": vi.Latent((2,))})
        >>> objective = vi.elbo(target, vi.guides.mean_field(target), num_particles=8)
        >>> params = vi.init_params(objective.declared, jax.random.key(0))
        >>> loss, aux = objective.loss(params, jax.random.key(1))
        >>> bool(loss == -aux.elbo)
        True
    """
    require_instance(target, Target, "vi.target or vi.from_numpyro", "vi.elbo, target")
    require_instance(guide, Guide, "vi.guides.mean_field(target)", "vi.elbo, guide")
    require_count(num_particles, "num_particles", "vi.elbo")
    if batch_size is not None:
        require_count(batch_size, "batch_size", "vi.elbo")
    estimator = estimator or pathwise()
    require_instance(estimator, Estimator, "vi.estimators.pathwise()", "vi.elbo, estimator")
    scheme = noise or iid()
    require_instance(scheme, Noise, "vi.noise.antithetic()", "vi.elbo, noise")
    guide = matched(target, guide)
    problem = Problem(target, guide, num_particles, scheme)
    estimate = estimator.build(problem)
    declared = merge(
        joint_declared(target, guide),
        estimate.declared,
        what="parameters of target, guide and estimator",
        where="declared",
    )
    jax.eval_shape(
        lambda key: guide.noise(key, num_particles, scheme),
        abstract_key(),
    )

    def evaluate(params: Any, noise: Any, data: Any) -> tuple[jax.Array, Aux]:
        def term(one: Any) -> Any:
            return estimate.term(params, one, data, None)

        if num_particles == 1:
            one = term(jax.tree.map(lambda leaf: leaf[0], noise))
            terms = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], one)
        elif batch_size is None or batch_size >= num_particles:
            terms = jax.vmap(term)(noise)
        else:  # without checkpoint the gradient would keep what every batch computed
            terms = jax.lax.map(jax.checkpoint(term), noise, batch_size=batch_size)
        bound = estimate.bound(params, terms, data)
        return -bound, Aux(bound)

    return objective(
        declared,
        joint_data(target, guide),
        lambda key: guide.noise(key, num_particles, scheme),
        evaluate,
        target,
        guide,
    )
