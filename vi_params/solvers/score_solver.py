"""From a target to a Gaussian by its scores: what such solvers have in common."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vi_params._cache import program
from vi_params._check import require_count, require_key, require_positive
from vi_params._compile import Quick
from vi_params.guide import Guide
from vi_params.guides import mean_field
from vi_params.noise import moment_matched
from vi_params.params import unconstrain
from vi_params.solvers.fixed_draws import Response
from vi_params.solvers.lanes import search
from vi_params.solvers.laplace import curvature, of_hessian
from vi_params.solvers.layout import Layout
from vi_params.solvers.score_loop import Matching, match_scores
from vi_params.solvers.score_updates import Dense, LowRank, Rule, factor_analysis
from vi_params.solvers.solution import Solution, SolverInfo, SolverStatus
from vi_params.solvers.start import (
    Given,
    data_of,
    given_gaussian,
    is_gaussian,
    log_density,
    require_model,
    unchanging,
)
from vi_params.target import Target, flat

FIRST_LANES = 4
"""From how many points the first Gaussian is looked for."""

FIRST_STEPS = 100
"""How many Newton steps lead from a point to the first Gaussian at most."""

FIRST_DRAWS, FIRST_SCALE, FIRST_TOLERANCE = 16, 0.1, 0.5
"""At how many draws that is found, from which scales, and to how many nats."""


class Form(NamedTuple):
    """The form of the Gaussian that is looked for.

    Attributes:
        family: `(target, init=, name=) -> Guide`, one of `vi.guides`.
        rule: how it is drawn from and updated; its fields are those of the family's parameters.
        start: `(dense normal, key) -> q`, the Gaussian of that form to start from.
    """

    family: Callable[..., Guide]
    rule: Rule
    start: Callable[[Dense, jax.Array], Any]


def solve_scores(
    target: Target,
    key: jax.Array,
    data: Any,
    form: Form,
    batch: int | None,
    init: Any,
    tolerance: float,
    max_steps: int,
    name: str,
    where: str,
) -> Solution:
    """The solution by `match_scores`, its arguments checked."""
    data = data_of(target, data)
    require_key(key, where)
    dim = flat(target).dim
    if batch is None:
        batch = max(64, min(2 * dim, 512))
    require_count(batch, "batch", where, least=2)
    require_count(max_steps, "max_steps", where)
    require_positive(tolerance, "tolerance", where)
    given, init = first_given(target, init, where)
    guide, solve = program(_build, target, batch, tolerance, max_steps, name, alike=(form, init))
    params, info = solve(key, given, data)
    return Solution(guide, params, info, jnp.zeros((0, dim)))


def first_given(target: Target, init: Any, where: str) -> tuple[Given | None, Any]:
    """The Gaussian that `init` gives, if it does, and what it says of a point otherwise."""
    if is_gaussian(target, init):
        return given_gaussian(target, init, where), None
    require_model(target, {}, where)
    return None, unchanging(init)


def _build(
    target: Target,
    batch: int,
    tolerance: float,
    max_steps: int,
    name: str,
    form: Form,
    init: Any,
) -> tuple[Guide, Callable]:
    guide = form.family(target, init=init, name=name)
    density, first_gaussian = log_density(target), gaussian_start(target, init)

    @Quick
    def solve(key: jax.Array, given: Given | None, data: Any) -> tuple[Any, SolverInfo]:
        of_start, of_form, of_draws = jax.random.split(key, 3)
        first = first_gaussian(of_start, data) if given is None else given
        end = match_scores(
            form.rule,
            lambda u: density(u, first.model, data),
            form.start(Dense(first.loc, first.scale_tril), of_form),
            of_draws,
            batch=batch,
            tolerance=tolerance,
            max_steps=max_steps,
        )
        own = unconstrain(guide.declared, {name: end.current._asdict()})
        known = end.status != SolverStatus.INVALID_START
        info = SolverInfo(
            status=end.status,
            elbo=end.elbo,
            steps=end.steps,
            lane_elbos=jnp.where(known, end.elbo, jnp.nan)[None],
            lane_statuses=end.status[None],
            sampling_error=jnp.where(known, jnp.max(jnp.sqrt(end.variance[0])), jnp.nan),
            details=Matching(end.residual, end.steps * batch, end.refused[1]),
        )
        return {**first.model, **own}, info

    return guide, solve


def gaussian_start(target: Target, init: Any) -> Callable[[jax.Array, Any], Given]:
    """`(key, data) -> Given`: a first Gaussian from points as `vi.guides.mean_field` starts at.

    The mean-field optimum at a few fixed draws, from several points, with the curvature over these
    draws, or at its location where Hessians are not held. A mode would not do: that of a funnel
    lies in its neck, where hardly any mass is.
    """
    density, dim = log_density(target), flat(target).dim

    def first_gaussian(key: jax.Array, data: Any) -> Given:
        layout = Layout(target, mean_field(target, init=init, init_scale=FIRST_SCALE))
        draws = moment_matched().draw(jax.random.fold_in(key, FIRST_LANES), FIRST_DRAWS, dim)
        found, *_ = search(
            layout,
            lambda u, theta: density(u, {}, data),
            layout.size(data),
            draws,
            key,
            jnp.arange(FIRST_LANES),
            tolerance=FIRST_TOLERANCE,
            max_steps=FIRST_STEPS,
        )
        settled = found.status == SolverStatus.CONVERGED
        rank = jnp.where(jnp.isfinite(found.value), -found.value, -jnp.inf)
        best = jax.tree.map(lambda leaf: leaf[jnp.lexsort((rank, settled))[-1]], found)
        loc = best.x[:dim]
        if isinstance(best.curvature, Response):
            return Given(loc, of_hessian(best.curvature.hessian[:dim, :dim]).scale_tril, {})
        return Given(loc, curvature(lambda u: -density(u, {}, data), loc).scale_tril, {})

    return first_gaussian


def projected(rank: int, q: Dense, key: jax.Array) -> LowRank:
    """The low-rank normal nearest to a dense one."""
    deviation = jnp.sqrt(jnp.sum(q.scale_tril**2, axis=1))
    correlated = q.scale_tril / deviation[:, None]
    factor = 0.1 * jax.random.normal(key, (q.loc.shape[0], rank), q.loc.dtype)
    factor, psi = factor_analysis(
        lambda y: correlated @ (correlated.T @ y),
        jnp.ones_like(q.loc),
        factor,
        jnp.ones_like(q.loc),
    )
    scale = jnp.sqrt(psi)
    return LowRank(q.loc, deviation * scale, factor / scale[:, None])
