"""The score-function estimator of the whole draw."""

from typing import Any

import jax

from vi_params._check import explain
from vi_params.estimators.baselines import (
    Baseline,
    Scored,
    bound_of,
    leave_one_out,
    require_comparable,
)
from vi_params.estimators.estimator import (
    Estimate,
    Estimator,
    Problem,
    abstract_term,
    log_joint,
    times,
)
from vi_params.matching import guide_sites
from vi_params.params.declare import Declared
from vi_params.sites import is_point_mass
from vi_params.target import EMPTY

WHOLE = "latents"
"""The name of the one cost there is: that of all latents together."""


def score(*, baseline: Baseline | None = None) -> Estimator:
    """The score-function gradient of every latent, reparameterised or not:

        grad ELBO = E_q[(f(z) - b) grad log q(z)],   f = log p(x, z) - log q(z),

    with the draw and f held fixed. It asks nothing of log p but values: neither it nor the draw
    need have a gradient. Its variance grows with the number of latents; `mixed` scores only those
    latents that need it, each for what it can change.

    Ranganath, Gerrish and Blei (2014), Black box variational inference, eq. 2.

    Args:
        baseline: what is taken off f: `vi.estimators.leave_one_out()` (the default, from two
            particles on), `no_baseline()`, `decaying_average()`, `learned_baseline(...)`.

    Returns:
        An `Estimator`.

    Raises:
        ValueError: when built into an objective: a guide that is a point mass, or a leave-one-out
            baseline with one particle or dependent draws.

    Example:
        >>> import numpyro.distributions as dist
        >>> from numpyro.distributions import constraints
        >>> target = vi.target(
        ...     lambda v, z, d: dist.Bernoulli(0.7).log_prob(z["k"]),
        ...     {"k": vi.Latent((), constraints.boolean)},
        ... )
        >>> guide = vi.guide({"logit": 0.0}, lambda v: dist.Bernoulli(logits=v["logit"]))
        >>> objective = vi.elbo(target, guide, num_particles=2, estimator=vi.estimators.score())
    """
    baseline = leave_one_out() if baseline is None else baseline

    def build(problem: Problem) -> Estimate:
        require_comparable(baseline, problem.num_particles, problem.noise, "score")
        _require_density(problem)
        target, guide = problem.target, problem.guide

        def term(params: Any, noise: Any, data: Any, weight: Any = None) -> Scored:
            draw = jax.lax.stop_gradient(guide.transform(params, noise, data))
            log_q = guide.rescore(params, draw, data)
            log_p = log_joint(target, params, draw.latents, data, weight)
            f = log_p - times(weight, jax.lax.stop_gradient(log_q))
            return Scored(f, {WHOLE: log_q}, {WHOLE: f})

        return scoring(problem, term, baseline)

    return Estimator("score", build)


def scoring(problem: Problem, term: Any, baseline: Baseline) -> Estimate:
    """The estimate of a term that gives `Scored`, with the parameters of its baseline."""
    declared: Declared = EMPTY
    if baseline.declared is not None:
        declared = baseline.declared(abstract_term(problem, term).costs)

    def bound(params: Any, terms: Scored, data: Any) -> jax.Array:
        return bound_of(terms, baseline, declared, params, data)

    return Estimate(term, bound, declared)


def _require_density(problem: Problem) -> None:
    """Raises where log q does not tell how likely a draw was: at a mass that moves with params."""
    sites = guide_sites(problem.target, problem.guide)
    auxiliary = [name for name in sites if name not in problem.target.latents]
    masses = [name for name, site in sites.items() if is_point_mass(site.distribution)]
    if problem.guide.is_point or (masses and not auxiliary):
        raise ValueError(
            explain(
                "A point mass has no score.",
                expected="a guide with a density at every latent",
                received=f"point masses at {masses}" if masses else "a point estimate",
                where="vi.elbo, estimator score",
                hint="vi.estimators.pathwise(), or vi.estimators.mixed() where others need a score",
            )
        )
