"""The evidence lower bound."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vi_params._check import explain, require_count, require_instance
from vi_params._over import over
from vi_params._tree import abstract_key, is_traced, merge
from vi_params.estimators import Estimator, pathwise
from vi_params.estimators.estimator import Problem, log_joint
from vi_params.estimators.shares import knows_priors
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
    kl_weight: float | Callable[[Any], Any] | None = None,
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
        kl_weight: a factor b on the divergence from the prior, for a target of `vi.from_numpyro`:

                loss = -(E log p(x | z) - b KL(q || prior)),

            a number, or a schedule `step -> b` such as `optax.linear_schedule(0.0, 1.0, 1000)`,
            which `vi.svi`, `vi.run` and `vi.fit` follow (Bowman et al., 2016, section 3.1; Higgins
            et al., 2017, eq. 4). Where no step is given a schedule is at its end, b = 1: starts and
            restarts are judged by the ELBO itself. A fit should not stop before its schedule ends.

    Returns:
        An `Objective`; `aux.elbo` is the estimate, in nats, of the ELBO without `kl_weight`.

    Raises:
        ValueError: target and guide declare the same name, their latents do not match, the guide
            lacks what the estimator needs, or the target what `kl_weight` needs.

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
    _require_weight(target, kl_weight)
    problem = Problem(target, guide, num_particles, scheme, weighted=kl_weight is not None)
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

    def mean(f: Callable[[Any], Any], bound: Callable[[Any], jax.Array], noise: Any) -> jax.Array:
        """What `bound` makes of `f` at all draws."""
        if num_particles == 1:
            one = f(jax.tree.map(lambda leaf: leaf[0], noise))
            return bound(jax.tree.map(lambda leaf: leaf[None], one))
        # Without the checkpoint the gradient would keep what every batch computed.
        in_batches = batch_size is not None and batch_size < num_particles
        return bound(over(jax.checkpoint(f) if in_batches else f, noise, batch_size))

    def plain(params: Any, noise: Any, data: Any) -> jax.Array:
        draw = guide.transform(params, noise, data)
        return log_joint(target, params, draw.latents, data) - draw.log_prob

    def evaluate(params: Any, noise: Any, data: Any, step: Any = None) -> tuple[jax.Array, Aux]:
        weight = kl_weight
        if callable(kl_weight):
            weight = None if step is None else kl_weight(step)
        bound = mean(
            lambda one: estimate.term(params, one, data, weight),
            lambda terms: estimate.bound(params, terms, data),
            noise,
        )
        if weight is None:
            return -bound, Aux(bound)
        fixed = jax.lax.stop_gradient(params)
        return -bound, Aux(mean(lambda one: plain(fixed, one, data), jnp.mean, noise))

    return objective(
        declared,
        joint_data(target, guide),
        lambda key: guide.noise(key, num_particles, scheme),
        evaluate,
        target,
        guide,
        scheduled=True,
    )


def _require_weight(target: Target, kl_weight: Any) -> None:
    """Raises unless the divergence from the prior can be told from the rest, and weighed so."""
    if kl_weight is None:
        return
    number: Any = 1.0 if callable(kl_weight) or is_traced(kl_weight) else kl_weight
    if np.ndim(number) != 0 or not np.all(np.asarray(number, float) >= 0):
        raise ValueError(
            explain(
                "A weight must not be negative.",
                expected="a number >= 0, or a schedule step -> number",
                received=repr(kl_weight),
                where="vi.elbo, kl_weight",
            )
        )
    if not knows_priors(target):
        raise ValueError(
            explain(
                "The target does not tell its prior from its likelihood.",
                expected="a target of vi.from_numpyro, whose observed sites are the likelihood",
                received="a log density that is one function",
                where="vi.elbo, kl_weight",
                hint="write the model as a NumPyro program; numpyro.factor counts as observed",
            )
        )
