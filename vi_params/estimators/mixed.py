"""Pathwise where it can be, the score function where it must be, closed forms where there are."""

from typing import Any

from vi_params._check import explain
from vi_params.estimators.baselines import Baseline, Scored, leave_one_out, require_comparable
from vi_params.estimators.costs import scored_by_costs, total_of
from vi_params.estimators.estimator import Estimate, Estimator, Problem
from vi_params.estimators.pathwise import pathwise
from vi_params.estimators.rows import joined_rows
from vi_params.estimators.score import score, scoring
from vi_params.estimators.shares import (
    Shares,
    dependence,
    exact_sites,
    knows_priors,
    shares_of,
)
from vi_params.matching import guide_sites, without_gradient


def mixed(*, baseline: Baseline | None = None) -> Estimator:
    """Latent by latent: the pathwise gradient where the distribution is reparameterised, the score
    function elsewhere, with the costs that the latent can change and no others:

        grad = grad_path ELBO + sum_i E[(f_i - b_i) grad log q(z_i)],

    f_i the sum of the terms of log p - log q that depend on z_i, directly or through later choices
    of the guide; in a plate row by row. Plates are those of a NumPyro model and guide; a guide from
    distributions has those of its target.

    Schulman, Heess, Weber and Abbeel (2015), Gradient estimation using stochastic computation
    graphs, theorem 1 and corollary 2; as in NumPyro's TraceGraph_ELBO, with baselines.

    Args:
        baseline: as in `score`; it is asked for only where a latent is scored.

    Returns:
        An `Estimator`. For a family it is `pathwise`, or `score` where a draw has no gradient.

    Raises:
        ValueError: when built into an objective: a leave-one-out baseline with one particle.

    Example:
        >>> import numpyro.distributions as dist
        >>> from numpyro.distributions import constraints
        >>> target = vi.target(
        ...     lambda v, z, d: dist.Poisson(3.0).log_prob(z["k"]) - (z["x"] - z["k"]) ** 2,
        ...     {"k": vi.Latent((), constraints.nonnegative_integer), "x": vi.Latent()},
        ... )
        >>> guide = vi.guide(
        ...     {"rate": vi.Param(1.0, constraint=constraints.positive), "loc": 0.0},
        ...     lambda v: {"k": dist.Poisson(v["rate"]), "x": dist.Normal(v["loc"], 1.0)},
        ... )
        >>> objective = vi.elbo(target, guide, num_particles=4, estimator=vi.estimators.mixed())
    """
    baseline = leave_one_out() if baseline is None else baseline

    def build(problem: Problem) -> Estimate:
        if not without_gradient(problem.target, problem.guide):
            return pathwise().build(problem)
        if problem.guide.sites is None:
            return score(baseline=baseline).build(problem)
        return _by_site(problem, baseline, "mixed", analytic=False)

    return Estimator("mixed", build)


def analytic_kl(*, baseline: Baseline | None = None) -> Estimator:
    """`mixed`, with each latent's divergence from its prior in closed form where numpyro knows it:

        E_q[log p(z_i | .) - log q(z_i | .)] = -KL(q(z_i | .) || p(z_i | .)),

    for the pairs of `numpyro.distributions.kl_divergence`; sampled elsewhere, and where the prior
    depends on what the guide draws after z_i, for which the identity does not hold.

    Kingma and Welling (2014), eq. 10; as in NumPyro's TraceMeanField_ELBO, which leaves the
    condition to its user.

    Args:
        baseline: as in `score`; it is asked for only where a latent is scored.

    Returns:
        An `Estimator`.

    Raises:
        ValueError: when built into an objective: a target or a guide that does not tell the
            distributions of its latents.

    Example:
        >>> import numpyro, numpyro.distributions as dist
        >>> def model(y):
        ...     z = numpyro.sample("z", dist.Normal(0, 1))
        ...     numpyro.sample("y", dist.Normal(z, 1), obs=y)
        >>> target = vi.from_numpyro(model, jnp.array(0.5))
        >>> guide = vi.guide({"loc": 0.0}, lambda v: {"z": dist.Normal(v["loc"], 1.0)})
        >>> objective = vi.elbo(target, guide, estimator=vi.estimators.analytic_kl())
    """
    baseline = leave_one_out() if baseline is None else baseline

    def build(problem: Problem) -> Estimate:
        if problem.guide.sites is None or not knows_priors(problem.target):
            lacking = "guide" if problem.guide.sites is None else "target"
            raise ValueError(
                explain(
                    "Closed-form divergences need the distributions of latents and priors.",
                    expected="a target of vi.from_numpyro, and a guide of vi.guide, "
                    "vi.numpyro_guide or vi.guides.mean_field",
                    received=f"a {lacking} that is one density",
                    where="vi.elbo, estimator analytic_kl",
                    hint="vi.estimators.closed_form_entropy() for a family, or "
                    "vi.estimators.pathwise()",
                )
            )
        return _by_site(problem, baseline, "analytic_kl", analytic=True)

    return Estimator("analytic_kl", build)


def _by_site(problem: Problem, baseline: Baseline, name: str, *, analytic: bool) -> Estimate:
    sites = guide_sites(problem.target, problem.guide)
    scored = [name for name, site in sites.items() if not site.has_gradient]
    if scored:
        require_comparable(baseline, problem.num_particles, problem.noise, name)
        problem = problem._replace(joined=joined_rows(problem))

    def term(params: Any, noise: Any, data: Any, weight: Any = None) -> Scored:
        def run(given: Any = None, exact: frozenset[str] = frozenset()) -> Shares:
            return shares_of(problem, params, noise, data, weight, given, exact)

        found = run()
        exact: frozenset[str] = frozenset()
        if analytic:
            exact = exact_sites(problem, found, dependence(run, found.guide))
            found = run(exact=exact)
        if not scored:
            return Scored(total_of(found.terms), {}, {})
        depends = dependence(lambda given: run(given, exact), found.guide)
        return scored_by_costs(found, depends, scored)

    return scoring(problem, term, baseline)
