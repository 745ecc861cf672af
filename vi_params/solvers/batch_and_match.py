"""Batch and match: Gaussians whose scores agree with the target's, without a learning rate."""

from functools import partial
from typing import Any

import jax

from vi_params.guides import full_rank, low_rank
from vi_params.guides.low_rank import checked_rank
from vi_params.solvers.score_solver import Form, projected, solve_scores
from vi_params.solvers.score_updates import dense_rule, low_rank_rule, score_match
from vi_params.solvers.solution import Solution
from vi_params.target import Target, flat


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
            outside its support, a target with parameters of its own and no values for them, or data
            that are a batch.
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
    dim = flat(target).dim
    if rank is None:
        form = Form(full_rank, dense_rule(dim), lambda q, key: q)
    else:
        rank = checked_rank(rank, dim, where)
        form = Form(
            partial(low_rank, rank=rank), low_rank_rule(dim, rank), partial(projected, rank)
        )
        batch = 64 if batch is None else batch
    return solve_scores(target, key, data, form, batch, init, tolerance, max_steps, name, where)


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
        ValueError: batch < 2, max_steps < 1, tolerance <= 0, a start outside its support, a
            target with parameters of its own and no values for them, or data that are a batch.
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
    form = Form(full_rank, dense_rule(flat(target).dim, score_match), lambda q, key: q)
    where = "solvers.score_matching"
    return solve_scores(target, key, data, form, batch, init, tolerance, max_steps, name, where)
