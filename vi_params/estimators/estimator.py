"""What an estimator is: how one draw counts, and how the draws together make the bound."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vi_params._check import explain
from vi_params._tree import abstract_key, pick
from vi_params.guide import Guide
from vi_params.matching import guide_sites, joint_data, joint_declared, without_gradient
from vi_params.noise import Noise
from vi_params.params import constrain
from vi_params.params.declare import Declared
from vi_params.params.maps import abstract_params
from vi_params.target import EMPTY, Target


class Problem(NamedTuple):
    """What an estimator is built for.

    Attributes:
        target: what is approximated.
        guide: by what; matched to the target.
        num_particles: how many draws an evaluation has.
        noise: how they depend on each other.
        weighted: whether the divergence from the prior has a weight other than one.
        joined: the terms of the bound, each with a plate, whose rows do not go their own ways.
    """

    target: Target
    guide: Guide
    num_particles: int
    noise: Noise
    weighted: bool = False
    joined: frozenset[Any] = frozenset()


class Estimate(NamedTuple):
    """An estimator at work on one target and guide.

    Attributes:
        term: `(params, one particle's noise, data, weight) -> tree`: what one draw gives. `weight`
            multiplies the divergence from the prior; None for one.
        bound: `(params, terms, data) -> scalar`: from what all draws give, along a leading axis, a
            number whose value estimates the bound and whose gradient the bound's gradient.
        declared: parameters of the estimator's own.
    """

    term: Callable[[Any, Any, Any, Any], Any]
    bound: Callable[[Any, Any, Any], jax.Array]
    declared: Declared = EMPTY


class Estimator(NamedTuple):
    """How the gradient of the ELBO is estimated.

    Attributes:
        name: what the estimator is called in messages.
        build: `Problem -> Estimate`; raises where target or guide lack what it needs.
    """

    name: str
    build: Callable[[Problem], Estimate]


def mean_of_terms(params: Any, terms: Any, data: Any) -> jax.Array:
    """The bound of an estimator whose draws do not know of each other."""
    return jnp.mean(terms)


def model_values_of(target: Target, params: Any) -> dict[str, Any]:
    """The constrained parameters of the model, out of the joint unconstrained ones."""
    return constrain(target.declared, pick(params, target.declared))


def log_joint(
    target: Target, params: Any, latents: Any, data: Any, weight: Any = None
) -> jax.Array:
    """log p(x | z) + weight log p(z); the target's log density where the weight is None."""
    values = model_values_of(target, params)
    if weight is None:
        return target.log_density(values, latents, data)
    assert target.sites is not None
    total = jnp.zeros(())
    for site in target.sites(values, latents, data).values():
        share = jnp.sum(site.scale * site.log_prob)
        total = total + (share if site.is_observed else weight * share)
    return total


def times(weight: Any, x: jax.Array) -> jax.Array:
    """`weight * x`, None standing for one."""
    return x if weight is None else weight * x


def fixed(guide: Guide, params: Any) -> dict[str, Any]:
    """The parameters with the guide's own cut off from the gradient."""
    own = {name: params[name] for name in guide.declared}
    return {**params, **jax.lax.stop_gradient(own)}


def abstract_term(problem: Problem, term: Callable[..., Any]) -> Any:
    """The shapes of what one draw gives, computed without a draw."""

    def at(params: Any, key: jax.Array, data: Any) -> Any:
        one = jax.tree.map(lambda leaf: leaf[0], problem.guide.noise(key, 1))
        return term(params, one, data, 1.0 if problem.weighted else None)

    params = abstract_params(joint_declared(problem.target, problem.guide))
    data = joint_data(problem.target, problem.guide)
    return jax.eval_shape(at, params, abstract_key(), data)


def require_reparameterised(problem: Problem, estimator: str) -> None:
    """Raises where a draw of the guide does not carry the gradient of its parameters."""
    sites = guide_sites(problem.target, problem.guide)
    stuck = without_gradient(problem.target, problem.guide)
    if stuck:
        kinds = [f"{type(sites[n].distribution).__name__} at {n!r}" for n in stuck if n in sites]
        finite = sites and all(sites[n].distribution.has_enumerate_support for n in stuck)
        scored = "vi.estimators.mixed() takes the score function there"
        hint = f"estimator={scored if sites else 'vi.estimators.score()'}"
        raise ValueError(
            explain(
                "The guide draws a latent from a distribution that is not reparameterised.",
                expected="distributions with has_rsample",
                received=", ".join(kinds) or f"a family that is not, at {list(stuck)}",
                where=f"vi.elbo, estimator {estimator}",
                hint=hint + (", vi.estimators.enumerate() the exact sum" if finite else ""),
            )
        )
