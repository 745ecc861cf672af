"""Estimators that differentiate through the draw z = z(params, noise).

Each gives, for one draw, a scalar whose mean is the ELBO and whose gradient is an unbiased estimate
of the ELBO's. They differ in what is done with -log q.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vi_params._check import explain
from vi_params.estimators.estimator import (
    Estimate,
    Estimator,
    Problem,
    abstract_term,
    fixed,
    log_joint,
    mean_of_terms,
    require_reparameterised,
    times,
)
from vi_params.guide import Draw
from vi_params.sites import Site


def pathwise() -> Estimator:
    """The reparameterisation gradient: log p(z) - log q(z), differentiated through the draw.

    Kingma and Welling (2014), Auto-encoding variational Bayes, eq. 7.

    Example:
        >>> vi.estimators.pathwise().name
        'pathwise'
    """

    def build(problem: Problem) -> Estimate:
        return _through_draws(problem, "pathwise", lambda params, draw, data: -draw.log_prob)

    return Estimator("pathwise", build)


def closed_form_entropy() -> Estimator:
    """log p(z) + H[q], with the entropy in closed form.

    Kucukelbir et al. (2017), eq. 5. For families on unconstrained space the Jacobian of the
    constraints stays at the draw. A guide that is known site by site has the sum of its sites'
    entropies, each given the sites drawn before it.

    Raises:
        ValueError: when built into an objective: a guide, or a site of it, whose entropy is not
            known.

    Example:
        >>> vi.estimators.closed_form_entropy().name
        'closed_form_entropy'
    """

    def build(problem: Problem) -> Estimate:
        guide = problem.guide
        if guide.entropy is not None:
            return _through_draws(problem, "closed_form_entropy", guide.entropy)
        require_reparameterised(problem, "closed_form_entropy")
        sites = guide.sites
        if sites is None:
            raise _unknown_entropy("a guide without `entropy`")

        def term(params: Any, noise: Any, data: Any, weight: Any = None) -> jax.Array:
            drawn = sites(params, noise, data)
            latents = {name: drawn[name].value for name in problem.target.latents}
            entropies = (jnp.sum(x.scale * _entropy(x, name)) for name, x in drawn.items())
            log_p = log_joint(problem.target, params, latents, data, weight)
            return log_p + times(weight, sum(entropies, start=jnp.zeros(())))

        abstract_term(problem, term)  # a site of unknown entropy is refused now
        return Estimate(term, mean_of_terms)

    return Estimator("closed_form_entropy", build)


def sticking_the_landing() -> Estimator:
    """log p(z) - log q(z) with log q's own parameters held fixed: the gradient has zero variance
    where q equals the posterior.

    Roeder, Wu and Duvenaud (2017), Sticking the landing, eq. 6.

    Example:
        >>> vi.estimators.sticking_the_landing().name
        'sticking_the_landing'
    """

    def build(problem: Problem) -> Estimate:
        guide = problem.guide

        def minus_log_q(params: Any, draw: Draw, data: Any) -> jax.Array:
            return -guide.rescore(fixed(guide, params), draw, data)

        return _through_draws(problem, "sticking_the_landing", minus_log_q)

    return Estimator("sticking_the_landing", build)


def _through_draws(
    problem: Problem, name: str, minus_log_q: Callable[[Any, Draw, Any], jax.Array]
) -> Estimate:
    """The mean of log p(z) + minus_log_q(params, draw, data), differentiated through the draws."""
    require_reparameterised(problem, name)

    def term(params: Any, noise: Any, data: Any, weight: Any = None) -> jax.Array:
        draw = problem.guide.transform(params, noise, data)
        log_p = log_joint(problem.target, params, draw.latents, data, weight)
        return log_p + times(weight, minus_log_q(params, draw, data))

    return Estimate(term, mean_of_terms)


def _entropy(site: Site, name: str) -> jax.Array:
    """The entropy of a site given those before it, in the shape of its log q."""
    try:
        entropy = site.distribution.entropy()
    except NotImplementedError:
        raise _unknown_entropy(f"{type(site.distribution).__name__} at {name!r}") from None
    return jnp.broadcast_to(entropy, jnp.shape(site.log_prob))


def _unknown_entropy(received: str) -> ValueError:
    return ValueError(
        explain(
            "The guide's entropy is not known in closed form.",
            expected="a Gaussian family of vi.guides, or distributions with a closed-form entropy",
            received=received,
            where="vi.elbo, estimator closed_form_entropy",
            hint="vi.estimators.pathwise() or vi.estimators.sticking_the_landing(); "
            "vi.estimators.analytic_kl() takes what is known site by site",
        )
    )
