"""Natural gradients of the ELBO for Gaussian families, with steps that keep precisions positive.

Where q is standard normal, h are the target's scores at draws e and r = e + h, the natural gradient
of the ELBO needs E[h] = E[r] and E[Hessian] = E[e h^T] = E[e r^T] - I (Stein). With
G = sym(E[e r^T]) and step size w the new precision and mean are

    P = I - w G + (w^2 / 2) G^2 = (I + (I - w G)^2) / 2 > 0,   m = w P^-1 E[r].

Lin, Schmidt and Khan (2020), Handling the positive-definite constraint in the Bayesian learning
rule, ICML, section 4; the diagonal form is that of variational online Newton (Khan et al., 2018,
Fast and scalable Bayesian deep learning by weight-perturbation in Adam, ICML). Written in r, as in
sticking the landing, the estimates have no variance where q is the target.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vi_params._check import explain
from vi_params.guide import Guide
from vi_params.guides import full_rank, mean_field
from vi_params.solvers.score_solver import Form, solve_scores
from vi_params.solvers.score_updates import Dense, Rule, dense_rule
from vi_params.solvers.solution import Solution
from vi_params.target import Target, flat


class Diagonal(NamedTuple):
    """A normal with independent coordinates.

    Attributes:
        loc: shape (dim,).
        scale: shape (dim,).
    """

    loc: jax.Array
    scale: jax.Array


def natural_gradient(
    target: Target,
    key: jax.Array,
    data: Any = None,
    *,
    family: Callable[..., Guide] = full_rank,
    batch: int | None = None,
    init: Any = None,
    tolerance: float = 0.02,
    max_steps: int = 500,
    name: str = "guide",
) -> Solution:
    """The Gaussian with the largest ELBO, by natural-gradient steps on batches of draws.

    The steps are as large as the residuals allow, and average at the end, as those of
    `vi.solvers.batch_and_match`; what they look for is the optimum of the ELBO, not matched scores.
    Pure in (key, data); under `jax.vmap` take `solution.params` and `solution.info` out.

    Args:
        target: what to approximate. Its own parameters are kept as `init`, a `Solution`, has them.
        key: a typed random key: of the start and of the draws.
        data: the data; the target's own where None.
        family: `vi.guides.full_rank`, or `vi.guides.mean_field` for independent coordinates.
        batch: how many draws a step; by default 64, or twice the dimension up to 512 if that is
            more: a dense Hessian from fewer draws than dimensions is mostly noise.
        init: where to start, as for `vi.solvers.batch_and_match`.
        tolerance: stop at this standard error of every location and log scale due to the draws
            being so few, in standard deviations.
        max_steps: how many batches are drawn at most.
        name: the name of the family's parameters.

    Returns:
        A `Solution`; `info` as for `vi.solvers.batch_and_match`.

    Raises:
        ValueError: batch < 2, max_steps < 1, tolerance <= 0, a start outside its support, a
            target with parameters of its own and no values for them, or data that are a batch.
        KeyError: `init` or `data` hold unknown names, or `data` lack one.
        TypeError: `key` is not a typed key, or the family is another one.

    Example:
        >>> target = vi.target(
        ...     lambda v, z, d: -0.5 * jnp.sum((z["z"] - 3.0) ** 2), {"z": vi.Latent((2,))}
        ... )
        >>> solution = vi.solvers.natural_gradient(target, jax.random.key(0))
        >>> bool(jnp.allclose(solution.params["guide"]["loc"], 3.0, atol=0.05))
        True
    """
    where = "solvers.natural_gradient"
    dim = flat(target).dim
    if family is mean_field:
        form = Form(mean_field, diagonal_rule(dim), _independent)
    elif family is full_rank:
        rule = dense_rule(dim, natural_step)._replace(wider=wider)
        form = Form(full_rank, rule, lambda q, key: q)
    else:
        raise TypeError(
            explain(
                "Natural gradients are there for two families.",
                expected="vi.guides.full_rank or vi.guides.mean_field",
                received=repr(family),
                where=f"{where}, family",
            )
        )
    return solve_scores(target, key, data, form, batch, init, tolerance, max_steps, name, where)


def wider(e: jax.Array, r: jax.Array) -> jax.Array:
    """The shift of log scales that the gradient of the ELBO asks for."""
    return 0.5 * e * r


def natural_step(e: jax.Array, h: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A natural-gradient step from a standard normal: the new mean and covariance.

    Args:
        e: draws, shape (batch, dim).
        h: the target's scores there, shape (batch, dim).
        weight: lambda; the step size is lambda / (1 + lambda).
    """
    share = weight / (1 + weight)
    eye = jnp.eye(e.shape[1], dtype=e.dtype)
    r = e + h
    g = e.T @ r / e.shape[0]
    left = eye - share * 0.5 * (g + g.T)
    covariance = jnp.linalg.inv(0.5 * (eye + left @ left))
    return share * covariance @ r.mean(0), covariance


def diagonal_rule(dim: int) -> Rule:
    """Independent coordinates, each by the same formulas."""

    def update(q: Diagonal, e: jax.Array, g: jax.Array, weight: jax.Array) -> Diagonal:
        share = weight / (1 + weight)
        r = e + g * q.scale
        precision = 0.5 * (1 + (1 - share * jnp.mean(e * r, axis=0)) ** 2)
        mean = share * r.mean(0) / precision
        return Diagonal(q.loc + q.scale * mean, q.scale / jnp.sqrt(precision))

    return Rule(
        position=lambda q, e: q.loc + q.scale * e,
        pull_back=lambda q, g: q.scale * g,
        push=lambda q, e: q.scale * e,
        deviation=lambda q: q.scale,
        log_det=lambda q: jnp.sum(jnp.log(q.scale)),
        shrunk=lambda q: q._replace(scale=q.scale / 3),
        wider=wider,
        freedom=dim,
        update=update,
    )


def _independent(q: Dense, key: jax.Array) -> Diagonal:
    """The independent normal nearest to a dense one in KL(., q): its conditional scales."""
    precision = jax.scipy.linalg.cho_solve((q.scale_tril, True), jnp.eye(q.loc.shape[0]))
    return Diagonal(q.loc, jnp.diagonal(precision) ** -0.5)
