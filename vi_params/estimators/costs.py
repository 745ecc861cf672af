"""What a scored choice is answerable for: the terms of the bound that it can change."""

from collections.abc import Collection, Mapping

import jax
import jax.numpy as jnp

from vi_params.estimators.baselines import Scored
from vi_params.estimators.shares import Dependence, Key, Shares, plates_between
from vi_params.sites import Term, plates_in_order, spread, sum_onto


def scored_by_costs(shares: Shares, depends: Dependence, scored: Collection[str]) -> Scored:
    """A draw with its choices at `scored`, each beside its cost."""
    return Scored(
        total_of(shares.terms, scored),
        {name: shares.guide[name].log_prob for name in scored},
        {name: cost_of(name, shares, depends) for name in scored},
    )


def total_of(terms: Mapping[Key, Term], scored: Collection[str] = ()) -> jax.Array:
    """The sum of all terms. Where a latent is scored, the gradient of its own log q has mean zero
    and is left out."""
    total = jnp.zeros(())
    for (kind, name), term in terms.items():
        share = jnp.sum(term.value)
        own = kind == "guide" and name in scored
        total = total + (jax.lax.stop_gradient(share) if own else share)
    return total


def cost_of(name: str, shares: Shares, depends: Dependence) -> jax.Array:
    """What one choice is answerable for, row by row, broadcasting against its log q."""
    site = shares.guide[name]
    rank = site.log_prob.ndim
    plates = {plate: axis for plate, axis in site.plates.items() if -axis <= rank}
    rows = plates_in_order(plates)
    cost = jnp.zeros((1,) * rank)
    for key, term in shares.terms.items():
        if key == ("guide", name):  # log q of batch elements that are in no plate: each its own
            cost = cost + term.value
        elif name in depends.terms[key]:
            own = plates_between(name, key, shares, depends)
            axes = {plate: axis for plate, axis in term.plates.items() if plate in own}
            cost = cost + spread(sum_onto(term.value, axes, rows), plates, rank)
    return cost
