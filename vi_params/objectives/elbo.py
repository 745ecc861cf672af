"""The evidence lower bound."""

from typing import Any

import jax
import jax.numpy as jnp

from vi_params._check import explain, require_count, require_instance
from vi_params._tree import abstract_key, pick
from vi_params.estimators import Estimator, pathwise
from vi_params.guide import Guide
from vi_params.matching import joint_data, joint_declared, matched, without_gradient
from vi_params.noise import Noise, iid
from vi_params.objectives.objective import Aux, Objective, objective
from vi_params.params import constrain
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
        estimator: how the gradient is taken: `vi.estimators.pathwise()` (the default),
            `closed_form_entropy()` or `sticking_the_landing()`.
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
    declared = joint_declared(target, guide)
    guide = matched(target, guide)
    _require_estimable(target, guide, estimator)
    jax.eval_shape(
        lambda key: guide.noise(key, num_particles, scheme),
        abstract_key(),
    )
    model = target.declared

    def evaluate(params: Any, noise: Any, data: Any) -> tuple[jax.Array, Aux]:
        values = constrain(model, pick(params, model))

        def term(one: Any) -> jax.Array:
            draw = guide.transform(params, one, data)
            log_density = target.log_density(values, draw.latents, data)
            return estimator.term(guide, params, draw, log_density, data)

        if num_particles == 1:
            bound = term(jax.tree.map(lambda leaf: leaf[0], noise))
        elif batch_size is None or batch_size >= num_particles:
            bound = jnp.mean(jax.vmap(term)(noise))
        else:
            bound = jnp.mean(jax.lax.map(term, noise, batch_size=batch_size))
        return -bound, Aux(bound)

    return objective(
        declared,
        joint_data(target, guide),
        lambda key: guide.noise(key, num_particles, scheme),
        evaluate,
        target,
        guide,
    )


def _require_estimable(target: Target, guide: Guide, estimator: Estimator) -> None:
    """Raises unless the guide has what the estimator needs."""
    if "entropy" in estimator.needs and guide.entropy is None:
        raise ValueError(
            explain(
                "The guide's entropy is not known in closed form.",
                expected="a Gaussian family of vi.guides",
                received="a guide without `entropy`",
                where=f"vi.elbo, estimator {estimator.name}",
                hint="vi.estimators.pathwise() or vi.estimators.sticking_the_landing()",
            )
        )
    stuck = without_gradient(target, guide) if "reparameterised" in estimator.needs else ()
    if stuck:
        raise ValueError(
            explain(
                "The guide draws a latent from a distribution that is not reparameterised.",
                expected="distributions with has_rsample",
                received=f"none at {list(stuck)}",
                where=f"vi.elbo, estimator {estimator.name}",
                hint="use a reparameterised distribution; score-function estimators are not there "
                "yet",
            )
        )
