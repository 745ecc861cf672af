"""Batch and match: Gaussians whose scores agree with the target's, without a learning rate."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vi_params._cache import program
from vi_params._check import explain, require_count, require_key
from vi_params.guide import Guide
from vi_params.guides import full_rank, low_rank
from vi_params.guides.low_rank import checked_rank
from vi_params.guides.starts import start_vector
from vi_params.params import unconstrain
from vi_params.solvers.laplace import curvature
from vi_params.solvers.score_loop import Matching, match_scores
from vi_params.solvers.score_updates import (
    Dense,
    LowRank,
    dense_rule,
    factor_analysis,
    low_rank_rule,
    match,
    score_match,
)
from vi_params.solvers.solution import Solution, SolverInfo, SolverStatus
from vi_params.solvers.start import (
    Given,
    data_of,
    first_finite,
    given_gaussian,
    is_gaussian,
    log_density,
    require_model,
)
from vi_params.solvers.trust_region import minimise
from vi_params.target import Target, flat

FIRST_STEPS = 30
"""How many Newton steps lead from a point to the first Gaussian."""


def batch_and_match(
    target: Target,
    key: jax.Array,
    data: Any = None,
    *,
    rank: int | None = None,
    batch: int | None = None,
    init: Any = None,
    tolerance: float = 0.02,
    max_steps: int = 500,
    name: str = "guide",
) -> Solution:
    """The Gaussian that matches the target's scores, by closed-form steps on batches of draws.

    Each step minimises the score-based divergence over the batch,

        mean_b |grad log q(z_b) - grad log p(z_b)|^2_Cov(q) + (2 / lambda) KL(q_old, q),

    exactly (`score_updates.match`). There is no learning rate: lambda is as large as the residuals
    allow, and small at the end, when it averages. Cai et al. (2024), Batch and match, ICML. Pure in
    (key, data); under `jax.vmap` take `solution.params` and `solution.info` out.

    Args:
        target: what to approximate. Its own parameters are kept as `init`, a `Solution`, has them.
        key: a typed random key: of the start and of the draws.
        data: the data; the target's own where None. For full data: scores of minibatches bias it.
        rank: None for a dense covariance; a number for low rank plus diagonal, at a cost of
            O(dim (rank + batch)^2) a step.
        batch: how many draws a step; by default 64, or twice the dimension up to 512 if that is
            more (64 with `rank`).
        init: a `Solution` with a Gaussian guide, to be polished; a mapping with "loc" and "scale"
            or "scale_tril" in unconstrained coordinates; or a point, as in `vi.guides.mean_field`,
            from which a few Newton steps lead to a first Gaussian.
        tolerance: stop at this standard error of every location and log scale due to the draws
            being so few, in standard deviations.
        max_steps: how many batches are drawn at most.
        name: the name of the family's parameters.

    Returns:
        A `Solution` with a `vi.guides.full_rank` guide (`low_rank` with `rank`). `info.elbo` is
        that of the last batch, `info.details` a `Matching`: `details.residual` is near zero where
        the posterior is Gaussian, and tells how far from one it is otherwise.

    Raises:
        ValueError: batch < 2, max_steps < 1, a rank not among 1 .. dim, tolerance <= 0, a start
            outside its support, or a target with parameters of its own and no values for them.
        KeyError: `init` or `data` hold unknown names, or `data` lack one.
        TypeError: `key` is not a typed key.

    Example:
        >>> precision = jnp.array([[2.0, 0.9], [0.9, 1.0]])
        >>> target = vi.target(
        ...     lambda v, z, d: -0.5 * z["z"] @ precision @ z["z"], {"z": vi.Latent((2,))}
        ... )
        >>> solution = vi.solvers.batch_and_match(target, jax.random.key(0))
        >>> root = vi.constrain(solution.guide.declared, solution.params)["guide"]["scale_tril"]
        >>> bool(jnp.allclose(root @ root.T @ precision, jnp.eye(2), atol=1e-2))
        True
    """
    where = "solvers.batch_and_match"
    if rank is not None:
        rank = checked_rank(rank, flat(target).dim, where)
    return _solve(target, key, data, rank, match, batch, init, tolerance, max_steps, name, where)


def score_matching(
    target: Target,
    key: jax.Array,
    data: Any = None,
    *,
    batch: int | None = None,
    init: Any = None,
    tolerance: float = 0.02,
    max_steps: int = 500,
    name: str = "guide",
) -> Solution:
    """The Gaussian by Gaussian score matching (GSM): the limit of `batch_and_match` draw by draw.

    For each draw the normal nearest to q whose score there is the target's, averaged over the
    batch: O(batch dim^2) a step and no eigenproblem. Its steps forget: where the posterior is not
    Gaussian it needs more of them than `batch_and_match`. Modi et al. (2023), Variational inference
    with Gaussian score matching, NeurIPS.

    Args:
        target: as for `batch_and_match`.
        key: a typed random key: of the start and of the draws.
        data: the data; the target's own where None.
        batch: how many draws a step; by default as for `batch_and_match`.
        init: where to start, as for `batch_and_match`.
        tolerance: the standard error at which to stop, in standard deviations.
        max_steps: how many batches are drawn at most.
        name: the name of the family's parameters.

    Returns:
        A `Solution` with a `vi.guides.full_rank` guide; `info` as for `batch_and_match`.

    Raises:
        ValueError: batch < 2, max_steps < 1, tolerance <= 0, a start outside its support, or a
            target with parameters of its own and no values for them.
        KeyError: `init` or `data` hold unknown names, or `data` lack one.
        TypeError: `key` is not a typed key.

    Example:
        >>> target = vi.target(
        ...     lambda v, z, d: -0.5 * jnp.sum((z["z"] - 3.0) ** 2), {"z": vi.Latent((2,))}
        ... )
        >>> solution = vi.solvers.score_matching(target, jax.random.key(0))
        >>> bool(jnp.allclose(solution.params["guide"]["loc"], 3.0, atol=0.05))
        True
    """
    where = "solvers.score_matching"
    return _solve(
        target, key, data, None, score_match, batch, init, tolerance, max_steps, name, where
    )


def _solve(
    target: Target,
    key: jax.Array,
    data: Any,
    rank: int | None,
    step: Callable,
    batch: int | None,
    init: Any,
    tolerance: float,
    max_steps: int,
    name: str,
    where: str,
) -> Solution:
    data = data_of(target, data)
    require_key(key, where)
    dim = flat(target).dim
    if batch is None:
        batch = 64 if rank is not None else max(64, min(2 * dim, 512))
    require_count(batch, "batch", where, least=2)
    require_count(max_steps, "max_steps", where)
    if not tolerance > 0:
        raise ValueError(
            explain(
                "The tolerance is a standard error to reach.",
                expected="tolerance > 0",
                received=repr(tolerance),
                where=where,
            )
        )
    given = None
    if is_gaussian(init):
        given, init = given_gaussian(target, init, where), None
    else:
        require_model(target, {}, where)
    guide, solve = program(
        _build, target, rank, step, batch, tolerance, max_steps, name, alike=(init,)
    )
    params, info = solve(key, given, data)
    return Solution(guide, params, info, jnp.zeros((0, dim)))


def _build(
    target: Target,
    rank: int | None,
    step: Callable,
    batch: int,
    tolerance: float,
    max_steps: int,
    name: str,
    init: Any,
) -> tuple[Guide, Callable]:
    if rank is None:
        guide, rule = full_rank(target, init=init, name=name), dense_rule(step)
    else:
        guide, rule = low_rank(target, rank=rank, init=init, name=name), low_rank_rule()
    density, begin = log_density(target), start_vector(target, init)

    def first_gaussian(key: jax.Array, data: Any) -> Given:
        """A few Newton steps from a point, and the curvature there."""

        def loss(u: jax.Array) -> jax.Array:
            return -density(u, {}, data)

        u = first_finite(lambda u: -loss(u), begin, key)
        found = minimise(
            loss, u, lambda u: curvature(loss, u).unit, tolerance=0.1, max_steps=FIRST_STEPS
        )
        return Given(found.x, curvature(loss, found.x).scale_tril, {})

    @jax.jit
    def solve(key: jax.Array, given: Given | None, data: Any) -> tuple[Any, SolverInfo]:
        of_start, of_factor, of_draws = jax.random.split(key, 3)
        first = first_gaussian(of_start, data) if given is None else given
        q = Dense(first.loc, first.scale_tril)
        q = q if rank is None else _projected(q, rank, of_factor)
        end = match_scores(
            rule,
            lambda u: density(u, first.model, data),
            q,
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
            sampling_error=jnp.max(jnp.sqrt(end.variance[0])),
            details=Matching(end.residual, end.steps * batch, end.refused[1]),
        )
        return {**first.model, **own}, info

    return guide, solve


def _projected(q: Dense, rank: int, key: jax.Array) -> LowRank:
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
