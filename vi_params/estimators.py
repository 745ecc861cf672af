"""Gradient estimators of the ELBO, as values.

An estimator gives, for one draw z = z(params, noise), a scalar whose mean over draws is the ELBO
and whose gradient is an unbiased estimate of the ELBO's gradient.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from vi_params.guide import Draw, Guide


class Estimator(NamedTuple):
    """How the gradient of the ELBO is estimated.

    Attributes:
        name: what the estimator is called in messages.
        term: `(guide, params, draw, log_density, data) -> scalar`, one draw's share of the ELBO.
        needs: what a guide must have: a subset of {"reparameterised", "entropy"}.
    """

    name: str
    term: Callable[[Guide, Any, Draw, jax.Array, Any], jax.Array]
    needs: frozenset[str]


def pathwise() -> Estimator:
    """The reparameterisation gradient: log p(z) - log q(z), differentiated through the draw.

    Kingma and Welling (2014), Auto-encoding variational Bayes, eq. 7.

    Example:
        >>> vi.estimators.pathwise().name
        'pathwise'
    """

    def term(guide: Guide, params: Any, draw: Draw, log_density: jax.Array, data: Any) -> jax.Array:
        return log_density - draw.log_prob

    return Estimator("pathwise", term, frozenset({"reparameterised"}))


def closed_form_entropy() -> Estimator:
    """log p(z) + H[q], with the entropy in closed form as far as it is known.

    Kucukelbir et al. (2017), eq. 5. For families on unconstrained space the Jacobian of the
    constraints stays at the draw.

    Example:
        >>> vi.estimators.closed_form_entropy().name
        'closed_form_entropy'
    """

    def term(guide: Guide, params: Any, draw: Draw, log_density: jax.Array, data: Any) -> jax.Array:
        assert guide.entropy is not None
        return log_density + guide.entropy(params, draw, data)

    return Estimator("closed_form_entropy", term, frozenset({"reparameterised", "entropy"}))


def sticking_the_landing() -> Estimator:
    """log p(z) - log q(z) with log q's own parameters held fixed: the gradient has zero variance
    where q equals the posterior.

    Roeder, Wu and Duvenaud (2017), Sticking the landing, eq. 6.

    Example:
        >>> vi.estimators.sticking_the_landing().name
        'sticking_the_landing'
    """

    def term(guide: Guide, params: Any, draw: Draw, log_density: jax.Array, data: Any) -> jax.Array:
        own = {name: params[name] for name in guide.declared}
        fixed = {**params, **jax.lax.stop_gradient(own)}
        return log_density - guide.rescore(fixed, draw, data)

    return Estimator("sticking_the_landing", term, frozenset({"reparameterised"}))
