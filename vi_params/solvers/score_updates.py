"""Gaussians matched to scores: the algebra of one step.

A batch of draws z_b of q = N(loc, Cov) comes with the scores g_b of the target. All updates are the
same in any linear coordinates, so they are made where q is standard normal, or for low rank where
its diagonal is one: neither the units of a latent nor the conditioning of Cov costs precision.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from vi_params.guides.low_rank import root

SWEEPS = 30
"""How many steps of factor analysis project a covariance on low rank plus diagonal."""


class Dense(NamedTuple):
    """A normal with a dense covariance.

    Attributes:
        loc: shape (dim,).
        scale_tril: a lower triangle, its square the covariance, shape (dim, dim).
    """

    loc: jax.Array
    scale_tril: jax.Array


class LowRank(NamedTuple):
    """A normal with covariance D (I + W W^T) D, as `vi.guides.low_rank`.

    Attributes:
        loc: shape (dim,).
        scale: the diagonal of D, shape (dim,).
        factor: W, shape (dim, rank).
    """

    loc: jax.Array
    scale: jax.Array
    factor: jax.Array


class Rule(NamedTuple):
    """How a Gaussian of some form is drawn from and updated.

    Attributes:
        position: `(q, e) -> z`, the draw at standard normal e.
        pull_back: `(q, g) -> C^T g`, with C the linear map of `position`.
        push: `(q, e) -> C e`.
        deviation: `q -> sqrt(diag Cov)`.
        log_det: `q -> log |det C|`.
        shrunk: `q -> q` with its scales a third as large.
        wider: `(e, r) -> shift` of the log scales that a draw with residual r asks for, (dim,).
        freedom: how many numbers the covariance has.
        update: `(q, e, g, weight) -> q`, for e and g of shape (batch, dim); weight > 0 is lambda.
    """

    position: Callable[[Any, jax.Array], jax.Array]
    pull_back: Callable[[Any, jax.Array], jax.Array]
    push: Callable[[Any, jax.Array], jax.Array]
    deviation: Callable[[Any], jax.Array]
    log_det: Callable[[Any], jax.Array]
    shrunk: Callable[[Any], Any]
    wider: Callable[[jax.Array, jax.Array], jax.Array]
    freedom: int
    update: Callable[[Any, jax.Array, jax.Array, jax.Array], Any]


def match(e: jax.Array, h: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Batch and match from a standard normal: the new mean and covariance.

    With means and biased covariances C of e and G of h over the batch, w = lambda / (1 + lambda):

        V = I + lambda C + w e' e'^T,   U = lambda G + w h' h'^T,
        S U S + S = V,                  m = w (S h' + e').

    Cai, Modi, Pillaud-Vivien, Margossian, Gower, Blei and Saul (2024), Batch and match: black-box
    variational inference with a score-based divergence, ICML, equations 7-10.

    Args:
        e: draws, shape (batch, dim).
        h: the target's scores there, shape (batch, dim).
        weight: lambda, a positive scalar.
    """
    dim = e.shape[1]
    share = weight / (1 + weight)
    left, right = _columns(e, weight), _columns(h, weight)
    v = jnp.eye(dim, dtype=e.dtype) + left @ left.T
    covariance = solve_small(right, v) if right.shape[1] < dim else solve_full(right @ right.T, v)
    return share * (covariance @ h.mean(0) + e.mean(0)), covariance


def _columns(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Columns whose outer products sum to lambda Cov(x) + w mean(x) mean(x)^T."""
    mean = x.mean(0)
    spread = jnp.sqrt(weight / x.shape[0]) * (x - mean)
    return jnp.concatenate([spread, jnp.sqrt(weight / (1 + weight)) * mean[None]]).T


def solve_full(u: jax.Array, v: jax.Array) -> jax.Array:
    """The positive definite S with S U S + S = V.

    With V = R R^T and R^T U R = Q diag(a) Q^T it is R Q diag(2 / (1 + sqrt(1 + 4 a))) Q^T R^T: only
    symmetric matrices have their roots taken.
    """
    r = jnp.linalg.cholesky(v)
    inner = r.T @ u @ r
    a, q = jnp.linalg.eigh(0.5 * (inner + inner.T))
    turned = r @ q
    return (turned * (2 / (1 + jnp.sqrt(1 + 4 * jnp.maximum(a, 0.0))))) @ turned.T


def solve_small(columns: jax.Array, v: jax.Array) -> jax.Array:
    """`solve_full` for U = F F^T with fewer columns than rows: V - V F M^-2 F^T V, where
    M = I / 2 + sqrt(F^T V F + I / 4). An eigenproblem of the batch's size."""
    vf = v @ columns
    half = _half(columns.T @ vf)
    left = vf @ half
    return v - left @ left.T


def _half(gram: jax.Array) -> jax.Array:
    """M^-1 = (I / 2 + sqrt(gram + I / 4))^-1 up to a rotation from the right."""
    a, p = jnp.linalg.eigh(0.5 * (gram + gram.T))
    return p / (0.5 + jnp.sqrt(jnp.maximum(a, 0.0) + 0.25))


def score_match(e: jax.Array, h: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gaussian score matching from a standard normal, the mean over the batch.

    For each draw, the normal nearest in divergence whose score there is the target's: the limit of
    `match` for a batch of one and lambda to infinity. The share lambda / (1 + lambda) of the way is
    gone. Modi, Margossian, Yao, Gower, Blei and Saul (2023), Variational inference with Gaussian
    score matching, NeurIPS, theorem 2.1.
    """
    share = weight / (1 + weight)

    def one(e: jax.Array, h: jax.Array) -> tuple[jax.Array, jax.Array]:
        m = -e @ h
        rho = 0.5 * jnp.sqrt(1 + 4 * (h @ h + m**2)) - 0.5
        delta = h + e
        step = (delta + e * (h @ delta) / (1 + rho + m)) / (1 + rho)
        return step, jnp.outer(e, e) - jnp.outer(step - e, step - e)

    steps, changes = jax.vmap(one)(e, h)
    return share * steps.mean(0), jnp.eye(e.shape[1], dtype=e.dtype) + share * changes.mean(0)


def matched_scale(e: jax.Array, r: jax.Array) -> jax.Array:
    """The shift of log scales that matched scores ask for: (e^2 - h^2) / 4 with h = r - e, which is
    zero on average where draws and scores have the same variance."""
    return 0.25 * r * (2 * e - r)


def dense_rule(dim: int, step: Callable[..., tuple[jax.Array, jax.Array]] = match) -> Rule:
    """Dense covariances, updated by `match`, `score_match` or a natural gradient."""

    def update(q: Dense, e: jax.Array, g: jax.Array, weight: jax.Array) -> Dense:
        mean, covariance = step(e, g @ q.scale_tril, weight)
        triangle = jnp.linalg.cholesky(0.5 * (covariance + covariance.T))
        return Dense(q.loc + q.scale_tril @ mean, q.scale_tril @ triangle)

    return Rule(
        position=lambda q, e: q.loc + q.scale_tril @ e,
        pull_back=lambda q, g: q.scale_tril.T @ g,
        push=lambda q, e: q.scale_tril @ e,
        deviation=lambda q: jnp.sqrt(jnp.sum(q.scale_tril**2, axis=1)),
        log_det=lambda q: jnp.sum(jnp.log(jnp.diagonal(q.scale_tril))),
        shrunk=lambda q: q._replace(scale_tril=q.scale_tril / 3),
        wider=matched_scale,
        freedom=dim**2,
        update=update,
    )


def low_rank_rule(dim: int, rank: int) -> Rule:
    """Low rank plus diagonal: the matched covariance is never formed, and projected by factor
    analysis at every step.

    Modi, Cai and Saul (2025), Batch, match, and patch: low-rank approximations for score-based
    variational inference, AISTATS.
    """

    def update(q: LowRank, e: jax.Array, g: jax.Array, weight: jax.Array) -> LowRank:
        x = jax.vmap(root(q.factor).times)(e)
        h = g * q.scale
        right = _columns(h, weight)
        wide = jnp.concatenate([q.factor, _columns(x, weight)], axis=1)

        def times_v(y: jax.Array) -> jax.Array:
            return y + wide @ (wide.T @ y)

        vf = times_v(right)
        taken = vf @ _half(right.T @ vf)

        def times(y: jax.Array) -> jax.Array:
            return times_v(y) - taken @ (taken.T @ y)

        diagonal = 1 + jnp.sum(wide**2, axis=1) - jnp.sum(taken**2, axis=1)
        share = weight / (1 + weight)
        mean = share * (times(h.mean(0)) + x.mean(0))
        factor, psi = factor_analysis(times, diagonal, q.factor, jnp.ones_like(q.scale))
        scale = jnp.sqrt(psi)
        return LowRank(q.loc + q.scale * mean, q.scale * scale, factor / scale[:, None])

    return Rule(
        position=lambda q, e: q.loc + q.scale * root(q.factor).times(e),
        pull_back=lambda q, g: root(q.factor).transposed(q.scale * g),
        push=lambda q, e: q.scale * root(q.factor).times(e),
        deviation=lambda q: q.scale * jnp.sqrt(1 + jnp.sum(q.factor**2, axis=1)),
        log_det=lambda q: jnp.sum(jnp.log(q.scale)) + root(q.factor).log_det(),
        shrunk=lambda q: q._replace(scale=q.scale / 3),
        wider=matched_scale,
        freedom=dim * (rank + 1),
        update=update,
    )


def factor_analysis(
    times: Callable[[jax.Array], jax.Array],
    diagonal: jax.Array,
    factor: jax.Array,
    psi: jax.Array,
    sweeps: int = SWEEPS,
) -> tuple[jax.Array, jax.Array]:
    """The nearest F F^T + diag(psi) to a covariance S, in KL(S, .), by expectation maximisation.

    Rubin and Thayer (1982), EM algorithms for ML factor analysis, Psychometrika 47.

    Args:
        times: y -> S y, for y of shape (dim, rank).
        diagonal: that of S, shape (dim,).
        factor: where F starts, shape (dim, rank); not zero, which stays zero.
        psi: where psi starts, shape (dim,).
        sweeps: how many steps.
    """
    eye = jnp.eye(factor.shape[1], dtype=factor.dtype)
    floor = jnp.sqrt(jnp.finfo(factor.dtype).eps) * diagonal

    def sweep(_: int, now: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        f, psi = now
        scaled = f / psi[:, None]
        beta = jnp.linalg.solve(eye + f.T @ scaled, scaled.T)  # F^T (F F^T + diag psi)^-1
        t = times(beta.T)
        inner = beta @ t + eye - beta @ f
        new = jnp.linalg.solve(0.5 * (inner + inner.T), t.T).T
        return new, jnp.maximum(diagonal - jnp.sum(new * t, axis=1), floor)

    return lax.fori_loop(0, sweeps, sweep, (factor, psi))
