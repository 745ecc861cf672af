"""The bound by its terms, and which terms a latent can change.

The ELBO of a program is a sum of terms, one for each site of the model and of the guide. A choice
is answerable for those terms alone that depend on it, directly or through choices made after it
(Schulman, Heess, Weber and Abbeel, 2015, theorem 1), and within a plate for those of its own row,
as far as the rows go their own ways. Who depends on whom is read off the program as it is traced.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import kl_divergence
from numpyro.ops.provenance import eval_provenance

from vi_params._tree import is_traced
from vi_params.estimators.estimator import Problem, model_values_of, times
from vi_params.params import constrain
from vi_params.params.maps import abstract_params
from vi_params.sites import Site, Term, is_point_mass
from vi_params.target import Target

Key = tuple[str, str]
"""What a term is: one of "model", "guide", "divergence", and the name of its site."""


class Shares(NamedTuple):
    """The sites of one draw, and the terms of its bound.

    Attributes:
        guide: the guide's sites.
        model: the target's sites.
        terms: what the bound is the sum of.
    """

    guide: dict[str, Site]
    model: dict[str, Site]
    terms: dict[Key, Term]


class Dependence(NamedTuple):
    """Who depends on whom.

    Attributes:
        terms: term -> the guide's sites that it depends on, directly or through later choices.
        priors: latent -> the same, for the parameters of its prior.
        above: site of the guide -> the sites that it depends on.
    """

    terms: dict[Key, frozenset[str]]
    priors: dict[str, frozenset[str]]
    above: dict[str, frozenset[str]]


def shares_of(
    problem: Problem,
    params: Any,
    noise: Any,
    data: Any,
    weight: Any = None,
    given: Mapping[str, Any] | None = None,
    exact: frozenset[str] = frozenset(),
) -> Shares:
    """The terms of the bound at a draw, those at `exact` sites as closed-form divergences."""
    assert problem.guide.sites is not None
    target = problem.target
    q = dict(problem.guide.sites(params, noise, data, given or {}))
    latents = {name: q[name].value for name in target.latents}
    values = model_values_of(target, params)
    if target.sites is None:
        log_p = target.log_density(values, latents, data)
        p = {"log_density": Site(None, log_p, None, {}, is_observed=True)}
    else:
        p = target.sites(values, latents, data)
    terms: dict[Key, Term] = {}
    for name, site in p.items():
        if name not in exact:
            share = site.scale * site.log_prob
            share = share if site.is_observed else times(weight, share)
            terms["model", name] = _term(share, site, ("model", name), problem)
    for name, site in q.items():
        if name in exact:
            share = -site.scale * divergence(site, p[name])
            key = ("divergence", name)
        else:
            share = -site.scale * site.log_prob
            key = ("guide", name)
        terms[key] = _term(times(weight, share), site, key, problem)
    return Shares(q, p, terms)


def dependence(run: Callable[[Mapping[str, Any]], Shares], guide: Mapping[str, Site]) -> Dependence:
    """Who depends on whom, by what the traced program passes on.

    Args:
        run: the shares, with given values at the guide's sites.
        guide: those sites, at a draw.
    """
    # eval_provenance takes marks as keywords, among names of its own.
    marks = {f"site {name}": jnp.zeros_like(site.value) for name, site in guide.items()}

    def outputs(**marks: Any) -> Any:
        found = run({name: site.value + marks[f"site {name}"] for name, site in guide.items()})
        return {
            "terms": {key: term.value for key, term in found.terms.items()},
            "choices": {name: site.log_prob for name, site in found.guide.items()},
            "priors": {
                name: list(map(jnp.asarray, jax.tree.leaves(site.distribution)))
                for name, site in found.model.items()
                if name in guide and site.distribution is not None
            },
        }

    direct = jax.tree.map(
        lambda names: frozenset(name.removeprefix("site ") for name in names),
        eval_provenance(outputs, **marks),
        is_leaf=lambda leaf: isinstance(leaf, frozenset),
    )
    above = _ancestors({name: found - {name} for name, found in direct["choices"].items()})

    def closed(names: frozenset[str]) -> frozenset[str]:
        return names.union(*(above[name] for name in names))

    priors = {name: frozenset().union(*found) for name, found in direct["priors"].items()}
    return Dependence(
        {key: closed(names) for key, names in direct["terms"].items()},
        {name: closed(names) for name, names in priors.items()},
        above,
    )


def plates_between(name: str, key: Key, shares: Shares, depends: Dependence) -> frozenset[str]:
    """The plates in which a row of a choice concerns that row of a term alone: those of both, and
    of all choices through which the one may reach the other."""
    between = [other for other in depends.terms[key] if name in depends.above[other]]
    plates = frozenset(shares.terms[key].plates)
    for other in (name, *between):
        plates &= frozenset(shares.guide[other].plates)
    return plates


def exact_sites(problem: Problem, shares: Shares, depends: Dependence) -> frozenset[str]:
    """The latents whose divergence from their prior has a closed form that holds here.

    It is an expectation over the latent with its prior held fixed: the prior's parameters must not
    depend on the latent, as they would through choices that the guide makes after it.
    """
    return frozenset(
        name
        for name in problem.target.latents
        if name in shares.model
        and not is_point_mass(shares.guide[name].distribution)
        and name not in depends.priors.get(name, frozenset())
        and _same(shares.guide[name].scale, shares.model[name].scale)
        and divergence(shares.guide[name], shares.model[name]) is not None
    )


def divergence(q: Site, p: Site) -> Any:
    """KL(q || p) in the shape of log q, where numpyro has it in closed form; None elsewhere."""
    ours, theirs = q.distribution, p.distribution
    extra = theirs.event_dim - ours.event_dim
    shape = q.log_prob.shape[: q.log_prob.ndim - max(extra, 0)]
    ours, theirs = ours.to_event(max(extra, 0)), theirs.to_event(max(-extra, 0))
    try:
        found = kl_divergence(ours, theirs)
    except NotImplementedError:
        return None
    if jnp.shape(found) != shape:
        return None
    return jnp.expand_dims(found, tuple(range(-max(extra, 0), 0)))


def _term(value: jax.Array, site: Site, key: Key, problem: Problem) -> Term:
    """A term, in those of its site's plates whose rows go their own ways."""
    plates = {
        name: axis
        for name, axis in site.plates.items()
        if -axis <= jnp.ndim(value) and (key, name) not in problem.joined
    }
    return Term(value, plates)


def _ancestors(parents: Mapping[str, frozenset[str]]) -> dict[str, frozenset[str]]:
    """The transitive closure of a relation."""
    above = dict(parents)
    for _ in parents:
        above = {
            name: found.union(*(above[parent] for parent in found)) for name, found in above.items()
        }
    return above


def _same(a: Any, b: Any) -> bool:
    """Whether two scales are the same, as far as can be known while tracing."""
    if a is b:
        return True
    return not is_traced(a, b) and bool(np.all(np.asarray(a) == np.asarray(b)))


def knows_priors(target: Target) -> bool:
    """Whether the target tells the distribution of each latent from the rest of its density."""
    sites = target.sites
    if sites is None:
        return False
    found: dict[str, Site] = {}

    def look(params: Any, latents: Any, data: Any) -> None:
        found.update(sites(constrain(target.declared, params), latents, data))

    latents = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in target.latents.items()}
    jax.eval_shape(look, abstract_params(target.declared), latents, target.data)
    return all(name in found for name in target.latents)
