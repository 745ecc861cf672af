"""Estimators that differentiate through the draw z = z(params, noise).

Each gives, for one draw, a scalar whose mean is the ELBO and whose gradient is an unbiased estimate
of the ELBO's. They differ in what is done with -log q.
"""

from typing import Any

import jax

from vi_params._check import explain
from vi_params.estimators.estimator import (
    Estimate,
    Estimator,
    Problem,
    fixed,
    log_joint,
    mean_of_terms,
    require_reparameterised,
    times,
)


def pathwise() -> Estimator:
    """The reparameterisation gradient: log p(z) - log q(z), differentiated through the draw.

    Kingma and Welling (2014), Auto-encoding variational Bayes, eq. 7.

    Example:
        >>> vi.estimators.pathwise().name
        'pathwise'
    """

    def build(problem: Problem) -> Estimate:
        require_reparameterised(problem, "pathwise")
        target, guide = problem.target, problem.guide

        def term(params: Any, noise: Any, data: Any, weight: Any = None) -> jax.Array:
            draw = guide.transform(params, noise, data)
            log_p = log_joint(target, params, draw.latents, data, weight)
            return log_p - times(weight, draw.log_prob)

        return Estimate(term, mean_of_terms)

    return Estimator("pathwise", build)


def closed_form_entropy() -> Estimator:
    """log p(z) + H[q], with the entropy in closed form as far as it is known.

    Kucukelbir et al. (2017), eq. 5. For families on unconstrained space the Jacobian of the
    constraints stays at the draw.

    Example:
        >>> vi.estimators.closed_form_entropy().name
        'closed_form_entropy'
    """

    def build(problem: Problem) -> Estimate:
        require_reparameterised(problem, "closed_form_entropy")
        target, guide, entropy = problem.target, problem.guide, problem.guide.entropy
        if entropy is None:
            raise ValueError(
                explain(
                    "The guide's entropy is not known in closed form.",
                    expected="a Gaussian family of vi.guides",
                    received="a guide without `entropy`",
                    where="vi.elbo, estimator closed_form_entropy",
                    hint="vi.estimators.pathwise() or vi.estimators.sticking_the_landing(); "
                    "vi.estimators.analytic_kl() takes what is known site by site",
                )
            )

        def term(params: Any, noise: Any, data: Any, weight: Any = None) -> jax.Array:
            draw = guide.transform(params, noise, data)
            log_p = log_joint(target, params, draw.latents, data, weight)
            return log_p + times(weight, entropy(params, draw, data))

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
        require_reparameterised(problem, "sticking_the_landing")
        target, guide = problem.target, problem.guide

        def term(params: Any, noise: Any, data: Any, weight: Any = None) -> jax.Array:
            draw = guide.transform(params, noise, data)
            log_p = log_joint(target, params, draw.latents, data, weight)
            return log_p - times(weight, guide.rescore(fixed(guide, params), draw, data))

        return Estimate(term, mean_of_terms)

    return Estimator("sticking_the_landing", build)
