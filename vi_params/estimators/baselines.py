"""Baselines: what is taken off a cost before it multiplies the score.

The score function's estimate E[(f - b) grad log q] has the same mean for every b that does not
depend on the draw, and a variance that b may cut by orders of magnitude. A baseline is a value;
those that learn keep what they learnt in declared parameters, beside all others.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vi_params._check import explain, require_names
from vi_params._tree import pick
from vi_params.noise import Noise
from vi_params.params import Param, constrain
from vi_params.params.declare import Declared, normalise


class Baseline(NamedTuple):
    """What is subtracted from the costs of a score-function estimator.

    Attributes:
        name: what the baseline is called in messages.
        value: `(values, costs, data) -> mapping`: a baseline for each site's costs, an array of
            shape (particles, ...), from the baseline's own constrained values.
        declared: `costs -> declared`, the baseline's parameters, for costs without particles; None
            where it has none.
        compares: whether draws are compared with each other, which must then be independent.
    """

    name: str
    value: Callable[[Any, Mapping[str, jax.Array], Any], Mapping[str, Any]]
    declared: Callable[[Mapping[str, Any]], Declared] | None = None
    compares: bool = False


def no_baseline() -> Baseline:
    """Nothing is taken off: the plain score function, or REINFORCE (Williams, 1992).

    Example:
        >>> estimator = vi.estimators.score(baseline=vi.estimators.no_baseline())
    """
    return Baseline("no_baseline", lambda values, costs, data: dict.fromkeys(costs, 0.0))


def leave_one_out() -> Baseline:
    """Each draw's cost is compared with the mean cost of the others:

        grad = 1 / (S - 1) sum_s (f_s - mean f) grad log q(z_s).

    Unbiased for any number of independent draws S >= 2 (Kool, van Hoof and Welling, 2019); the
    gradient of half the sample variance of f, the log-variance loss VarGrad (Richter et al., 2020).

    Example:
        >>> estimator = vi.estimators.score(baseline=vi.estimators.leave_one_out())
    """

    def value(values: Any, costs: Mapping[str, jax.Array], data: Any) -> dict[str, jax.Array]:
        return {
            name: (jnp.sum(cost, axis=0) - cost) / (cost.shape[0] - 1)
            for name, cost in costs.items()
        }

    return Baseline("leave_one_out", value, compares=True)


def decaying_average(name: str = "baseline") -> Baseline:
    """A running mean of every cost, kept in parameters of its own.

    The parameter b descends on (f - b)^2 / 2, whose gradient is b - f: under `optax.sgd(1 - decay)`
    it is the exponentially decaying average b <- decay b + (1 - decay) f, under other optimisers
    one that adapts its decay. It works from a single draw on.

    Args:
        name: the name of the parameters, a number for each site that is scored, or an array where
            its rows have costs of their own.

    Example:
        >>> baseline = vi.estimators.decaying_average()
        >>> estimator = vi.estimators.score(baseline=baseline)
    """

    def declared(costs: Mapping[str, Any]) -> Declared:
        return {name: {site: Param(jnp.zeros(cost.shape)) for site, cost in costs.items()}}

    return Baseline("decaying_average", lambda values, costs, data: values[name], declared)


def learned_baseline(declared: Declared, baseline: Callable[..., Any]) -> Baseline:
    """A baseline of your own, such as a network of the data (Mnih and Gregor, 2014).

    Args:
        declared: name -> `Param`, the baseline's parameters, fitted to the costs by least squares
            in the same steps; `{}` for a fixed baseline.
        baseline: `(values, data) -> b`: a number or an array for all sites, or a mapping from the
            sites that are scored to them. It must not depend on the draw.

    Example:
        >>> constant = vi.estimators.learned_baseline({}, lambda values, data: 3.0)
        >>> estimator = vi.estimators.score(baseline=constant)
    """
    declared = normalise(declared)

    def value(values: Any, costs: Mapping[str, jax.Array], data: Any) -> Mapping[str, Any]:
        b = baseline(values, data)
        if not isinstance(b, Mapping):
            return dict.fromkeys(costs, b)
        require_names(list(b), list(costs), what="baselines", where="vi.estimators")
        return b

    return Baseline("learned_baseline", value, lambda costs: declared)


class Scored(NamedTuple):
    """What one draw gives to a score-function estimator.

    Attributes:
        bound: its share of the bound, differentiable where the draw is not concerned.
        log_probs: site -> log q of what was drawn there.
        costs: site -> what that choice is answerable for, broadcasting against its log q.
    """

    bound: jax.Array
    log_probs: dict[str, jax.Array]
    costs: dict[str, jax.Array]


def bound_of(
    scored: Scored, baseline: Baseline, declared: Declared, params: Any, data: Any
) -> jax.Array:
    """The mean bound, with the score-function gradient of every site added to its own.

    Each correction has value zero: only its gradient counts.
    """
    costs = jax.lax.stop_gradient(scored.costs)
    values = constrain(declared, pick(params, declared)) if declared else {}
    level = baseline.value(values, costs, data)
    zero = jnp.zeros(())
    for name, cost in costs.items():
        if not baseline.compares:
            _require_shape(level[name], cost.shape[1:], f"site {name!r}, {baseline.name}")
        gap = cost - level[name]
        score = jnp.sum(jax.lax.stop_gradient(gap) * scored.log_probs[name])
        misfit = 0.5 * jnp.sum(gap**2) if declared else 0.0
        share = (score - misfit) / cost.shape[0]
        zero = zero + share - jax.lax.stop_gradient(share)
    return jnp.mean(scored.bound) + zero


def _require_shape(level: Any, shape: tuple[int, ...], where: str) -> None:
    """Raises unless a baseline broadcasts to the costs of one draw."""
    try:
        fits = jnp.broadcast_shapes(jnp.shape(level), shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            explain(
                "A baseline has the wrong shape.",
                expected=f"a number, or a shape that broadcasts to {shape}",
                received=f"shape {jnp.shape(level)}",
                where=where,
            )
        )


def require_comparable(baseline: Baseline, num_particles: int, noise: Noise, name: str) -> None:
    """Raises where draws are to be compared that are too few or not independent."""
    if not isinstance(baseline, Baseline):
        raise TypeError(
            explain(
                "A baseline was expected.",
                expected="a Baseline, such as vi.estimators.leave_one_out() gives",
                received=f"{type(baseline).__name__}: {baseline!r}"[:200],
                where=f"vi.estimators.{name}, baseline",
            )
        )
    if not baseline.compares:
        return
    if num_particles < 2:
        raise ValueError(
            explain(
                "The leave-one-out baseline compares draws with each other.",
                expected="num_particles >= 2",
                received=str(num_particles),
                where=f"vi.elbo, estimator {name}",
                hint="num_particles=2 or more, or a baseline that takes one draw: "
                f"vi.estimators.{name}(baseline=vi.estimators.decaying_average())",
            )
        )
    if not noise.is_iid:
        raise ValueError(
            explain(
                "The leave-one-out baseline is biased where draws depend on each other.",
                expected="vi.noise.iid()",
                received=f"vi.noise.{noise.name}()",
                where=f"vi.elbo, estimator {name}",
                hint=f"vi.estimators.{name}(baseline=vi.estimators.decaying_average())",
            )
        )
