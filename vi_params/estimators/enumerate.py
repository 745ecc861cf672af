"""The exact expectation over the finite choices of a guide, beside scores of the others."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import distributions as dist

from vi_params._check import explain, require_count
from vi_params.estimators.baselines import (
    Baseline,
    Scored,
    leave_one_out,
    no_baseline,
    require_comparable,
)
from vi_params.estimators.costs import scored_by_costs
from vi_params.estimators.estimator import Estimate, Estimator, Problem, abstract_term
from vi_params.estimators.mixed import mixed
from vi_params.estimators.rows import joined_rows
from vi_params.estimators.score import scoring
from vi_params.estimators.shares import (
    Dependence,
    Key,
    Shares,
    dependence,
    plates_between,
    shares_of,
)
from vi_params.matching import guide_sites, without_gradient
from vi_params.sites import Site, Term, plates_in_order, spread, sum_onto


class Choice(NamedTuple):
    """The values that one finite site may take, its plates aside.

    Attributes:
        table: array of shape (number of assignments, *value's shape): one value for all rows of a
            plate, every combination of the batch elements that are in none.
        rows: the plates whose rows are enumerated side by side, plate -> axis of log q.
    """

    table: jax.Array
    rows: Mapping[str, int]


def enumerate(*, max_assignments: int = 4096, baseline: Baseline | None = None) -> Estimator:
    """The sum over all values of the guide's finite latents, weighted by their probabilities; for
    the others the pathwise gradient, or where there is none the score function as in `mixed`:

        ELBO = E [ sum_k q(k | z) (log p(x, z, k) - log q(z, k)) ].

    It is exact where all latents are finite. The rows of a plate are summed side by side, at the
    cost of one row, as long as no term of the bound joins them; whatever is in no plate is summed
    jointly, at a cost that grows exponentially. A finite latent that a scored one follows in the
    guide is scored itself. The sum is over the guide's choices: for latents of the model that the
    guide does not have, sum them out in the model.

    Args:
        max_assignments: how many joint values are evaluated at most.
        baseline: as in `score`; it is asked for only where a latent is scored.

    Returns:
        An `Estimator`. Where nothing is finite it is `mixed`.

    Raises:
        ValueError: when built into an objective: too many joint values, the message names the
            sites; a leave-one-out baseline with one particle where a latent is scored.

    Example:
        >>> import numpyro.distributions as dist
        >>> from numpyro.distributions import constraints
        >>> target = vi.target(
        ...     lambda v, z, d: dist.Bernoulli(0.7).log_prob(z["k"]),
        ...     {"k": vi.Latent((), constraints.boolean)},
        ... )
        >>> guide = vi.guide({"logit": 0.0}, lambda v: dist.Bernoulli(logits=v["logit"]))
        >>> objective = vi.elbo(target, guide, estimator=vi.estimators.enumerate())
        >>> params = vi.init_params(objective.declared, jax.random.key(0))
        >>> round(float(objective.loss(params, jax.random.key(1))[0]), 4)  # KL(1/2 || 0.7)
        0.0872
    """
    require_count(max_assignments, "max_assignments", "vi.estimators.enumerate")
    baseline = leave_one_out() if baseline is None else baseline

    def build(problem: Problem) -> Estimate:
        sites = guide_sites(problem.target, problem.guide)
        finite = [name for name, site in sites.items() if _is_finite(site)]
        if not finite:
            return mixed(baseline=baseline).build(problem)
        stuck = [n for n in without_gradient(problem.target, problem.guide) if n not in finite]
        if stuck:
            require_comparable(baseline, problem.num_particles, problem.noise, "enumerate")
        problem = problem._replace(joined=joined_rows(problem))

        def term(params: Any, noise: Any, data: Any, weight: Any = None) -> Scored:
            def run(given: Any = None) -> Shares:
                return shares_of(problem, params, noise, data, weight, given)

            drawn = run()
            depends = dependence(run, drawn.guide)
            first = frozenset().union(*(depends.above[name] for name in stuck))
            summed = [name for name in finite if name not in first]
            choices = _choices(summed, drawn, depends, max_assignments)
            found = drawn._replace(terms=_expected_terms(run, choices, depends))
            scored = [*stuck, *(name for name in finite if name in first)]
            return scored_by_costs(found, depends, scored)

        abstract_term(problem, term)  # too many joint values are refused now
        return scoring(problem, term, baseline if stuck else no_baseline())

    return Estimator("enumerate", build)


def _expected_terms(
    run: Callable[..., Shares], choices: Mapping[str, Choice], depends: Dependence
) -> dict[Key, Term]:
    """The terms, each averaged over the choices that it depends on."""
    counts = [len(choice.table) for choice in choices.values()]
    grid = np.indices(counts).reshape(len(counts), math.prod(counts)).T
    plates: dict[Key, Mapping[str, int]] = {}

    def at(index: jax.Array) -> dict[Key, jax.Array]:
        place = dict(zip(choices, index, strict=True))
        found = run({name: choice.table[place[name]] for name, choice in choices.items()})
        shares = {}
        for key, term in found.terms.items():
            concerned = [name for name in choices if name in depends.terms[key]]
            weight = jnp.ones(())
            for name in concerned:
                weight = weight * _probability(found.guide[name], choices[name], term)
            # Of the choices that the term does not depend on, the first value stands for all.
            others = [place[name] == 0 for name in choices if name not in concerned]
            counts_here = jnp.all(jnp.array(others)) if others else True
            shares[key] = jnp.where(counts_here, weight * term.value, 0.0)
            plates[key] = term.plates
        return shares

    shares = jax.vmap(at)(jnp.asarray(grid))
    return {key: Term(jnp.sum(share, axis=0), plates[key]) for key, share in shares.items()}


def _probability(site: Site, choice: Choice, term: Term) -> jax.Array:
    """q of a choice, at the axes that its rows have in a term."""
    axes = {row: term.plates[row] for row in choice.rows}
    distribution = site.distribution
    if isinstance(distribution, dist.MaskedDistribution):  # which would give every value weight one
        distribution = distribution.base_dist
    log_q = jnp.asarray(distribution.log_prob(site.value))
    log_q = sum_onto(log_q, choice.rows, plates_in_order(axes))
    return spread(jnp.exp(log_q), axes, term.value.ndim)


def _is_finite(site: Site) -> bool:
    return site.distribution.has_enumerate_support and _element(site.distribution).event_shape == ()


def _element(distribution: Any) -> Any:
    """The distribution of one number of an array of independent ones."""
    while isinstance(
        distribution, (dist.Independent, dist.ExpandedDistribution, dist.MaskedDistribution)
    ):
        distribution = distribution.base_dist
    return distribution


def _choices(
    finite: Sequence[str], drawn: Shares, depends: Dependence, limit: int
) -> dict[str, Choice]:
    """The tables of all finite sites; raises where there are too many joint values."""
    supports, rows, free = {}, {}, {}
    for name in finite:
        site = drawn.guide[name]
        shared = [
            plates_between(name, key, drawn, depends)
            for key in drawn.terms
            if name in depends.terms[key]
        ]
        rows[name] = {
            plate: axis
            for plate, axis in site.plates.items()
            if all(plate in plates for plates in shared)
        }
        supports[name] = jnp.ravel(_element(site.distribution).enumerate_support(expand=False))
        free[name] = list(np.shape(site.value))
        for axis in rows[name].values():
            free[name][axis - site.distribution.event_dim] = 1
    sizes = {name: (len(supports[name]), math.prod(free[name])) for name in finite}
    total = math.prod(values**elements for values, elements in sizes.values())
    if total > limit:
        raise ValueError(
            explain(
                "The guide's finite latents have too many joint values to sum over.",
                expected=f"at most max_assignments={limit}",
                received=" times ".join(
                    f"{values}^{elements} at {name!r}" for name, (values, elements) in sizes.items()
                )
                + f" = {total:.3g}",
                where="vi.elbo, estimator enumerate",
                hint="put independent rows in a plate of the model (and of the guide program), "
                "which are summed side by side; or vi.estimators.mixed()",
            )
        )
    choices = {}
    for name, (values, elements) in sizes.items():
        index = np.indices([values] * elements).reshape(elements, values**elements).T
        table = supports[name][index].reshape(-1, *free[name])
        full = (len(table), *np.shape(drawn.guide[name].value))
        choices[name] = Choice(jnp.broadcast_to(table, full), rows[name])
    return choices
