"""The loop of score-based solvers: search with large steps, average, and stop when it is enough.

At a draw z = loc + C e of q with score g, the residual r = e + C^T g vanishes where q has the
target's score; E|r|^2 is the Fisher divergence weighted by Cov(q), and C r is how far the draw says
that the location is off. Three things follow.

- Search: a step whose residuals are larger than before by a factor, or not finite, is undone and
  made again with a smaller weight.
- Once the residuals have stopped falling, the share of the k-th further step is 2 / (k + 2), which
  averages all batches from there on.
- The spread of C r over the batch gives the standard error of the average, carried along as
  s^2 <- (1 - w)^2 s^2 + w^2 v. The loop ends when it is below a tolerance, and the last batch,
  which was drawn afresh, does not contradict the average.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from vi_params._over import over
from vi_params._tree import all_finite, where_tree
from vi_params.solvers.score_updates import Rule
from vi_params.solvers.solution import SolverStatus

WORSE = 4.0
"""By which factor the median squared residual may grow in a step."""

PATIENCE = 8
"""After how many steps without lower residuals the search ends."""

CONTRADICTION = 0.25
"""From how many on a batch sends the averaging back to the search."""

AGREEMENT = 0.1
"""By how many standard deviations beyond its noise the last batch may disagree at the end."""

EXCESS = 0.05
"""How many nats of divergence the noise of the averaged covariance may cost."""

REFUSALS = 20
"""After how many refused steps in a row the loop gives up."""

LIMIT = 1e12
"""How many times larger or smaller than at the start a scale may become."""


class Matching(NamedTuple):
    """How the loop got on.

    Attributes:
        residual: the mean of |r|^2 / dim over the last batch: 0 where q is the target.
        gradients: how many gradients of the log density were computed.
        refused: how many steps were undone.
    """

    residual: jax.Array
    gradients: jax.Array
    refused: jax.Array


class Loop(NamedTuple):
    """What the next step needs.

    Attributes:
        pending: the Gaussian to be tried.
        current: the last one accepted.
        e: its batch of standard normal draws, shape (batch, dim).
        g: the scores there.
        elbo: the ELBO over that batch.
        residual: the mean of |r|^2 / dim over it.
        typical: the median of the same.
        level: its logarithm, averaged over steps.
        lowest: the lowest level so far.
        waited: how many steps ago that was.
        weight: the lambda of the next search step.
        share: the w of the step to `pending`.
        averaged: how many steps are averaged; 0 in the search.
        variance: s^2 of locations and log scales, in standard deviations, shape (2, dim).
        excess: the divergence that the noise of the averaged covariance costs, in nats.
        refused: how many steps were undone; in a row, and in all.
        steps: how many batches were drawn.
        status: a `SolverStatus`; -1 while running.
    """

    pending: Any
    current: Any
    e: jax.Array
    g: jax.Array
    elbo: jax.Array
    residual: jax.Array
    typical: jax.Array
    level: jax.Array
    lowest: jax.Array
    waited: jax.Array
    weight: jax.Array
    share: jax.Array
    averaged: jax.Array
    variance: jax.Array
    excess: jax.Array
    refused: jax.Array
    steps: jax.Array
    status: jax.Array


def match_scores(
    rule: Rule,
    density: Callable[[jax.Array], jax.Array],
    start: Any,
    key: jax.Array,
    *,
    batch: int,
    tolerance: float,
    max_steps: int,
) -> Loop:
    """The Gaussian whose scores are the target's, on average over its own draws.

    Args:
        rule: the form of the Gaussian and its update.
        density: `u -> log p`, differentiable.
        start: a Gaussian of that form.
        key: a typed random key.
        batch: how many draws a step.
        tolerance: the standard error to reach, in standard deviations.
        max_steps: how many batches are drawn at most.
    """
    dim = start.loc.shape[0]
    dtype = start.loc.dtype
    first = rule.deviation(start)
    largest = 1e3 if dtype == jnp.float64 else 1e2

    def body(loop: Loop) -> Loop:
        e = jax.random.normal(jax.random.fold_in(key, loop.steps), (batch, dim), dtype)
        q = loop.pending
        value, g = over(jax.value_and_grad(density), jax.vmap(rule.position, (None, 0))(q, e))
        r = e + jax.vmap(rule.pull_back, (None, 0))(q, g)
        squares = jnp.mean(r**2, axis=1)
        residual, typical = jnp.mean(squares), jnp.median(squares)
        began = jnp.isfinite(loop.typical)
        finite = all_finite(q, value, g, residual)
        accepted = finite & (typical <= jnp.maximum(WORSE * loop.typical, 1.0))

        # What the batch says of locations and log scales, in standard deviations.
        deviation = rule.deviation(q)
        moved = jax.vmap(rule.push, (None, 0))(q, r) / deviation
        said = jnp.stack([moved, rule.wider(e, r)], axis=1)
        spread = jnp.var(said, axis=0) / batch
        share = jnp.where(began, loop.share, 1.0)
        variance = (1 - share) ** 2 * loop.variance + share**2 * spread
        excess = (1 - share) ** 2 * loop.excess + share**2 * 0.25 * rule.freedom * residual / batch
        off = jnp.max(jnp.abs(jnp.mean(said, axis=0)) - 4 * jnp.sqrt(spread))

        level = jnp.where(began, 0.7 * loop.level + 0.3 * jnp.log(typical), jnp.log(typical))
        lower = level < loop.lowest - 0.05
        again = (loop.averaged > 0) & (off > CONTRADICTION)
        waited = jnp.where(lower | again, 0, loop.waited + 1)
        averages = (loop.averaged > 0) | (waited >= PATIENCE)
        averaged = jnp.where(averages & ~again, loop.averaged + 1, 0)
        exact = jnp.max(squares) < tolerance**2
        precise = (jnp.max(jnp.sqrt(variance)) < tolerance) & (excess < EXCESS)
        enough = precise & (averaged > 5) & (off < max(tolerance, AGREEMENT))
        scales = deviation / first
        away = ~jnp.all(jnp.isfinite(scales) & (scales < LIMIT) & (scales > 1 / LIMIT))
        new = Loop(
            pending=q,
            current=q,
            e=e,
            g=g,
            elbo=jnp.mean(value + 0.5 * jnp.sum(e**2, axis=1))
            + 0.5 * dim * jnp.log(2 * jnp.pi)
            + rule.log_det(q),
            residual=residual,
            typical=typical,
            level=level,
            lowest=jnp.where(lower | again, level, loop.lowest),
            waited=waited,
            weight=jnp.minimum(2 * loop.weight, largest),
            share=share,
            averaged=averaged,
            variance=variance,
            excess=excess,
            refused=loop.refused.at[0].set(0),
            steps=loop.steps + 1,
            status=jnp.where(
                exact | enough,
                SolverStatus.CONVERGED,
                jnp.where(away, SolverStatus.DIVERGED, -1),
            ).astype(jnp.int32),
        )
        old = loop._replace(weight=loop.weight / 4, refused=loop.refused + 1, steps=loop.steps + 1)
        loop = where_tree(accepted, new, old)
        began = began | accepted
        weight = jnp.where(loop.averaged > 0, 2.0 / loop.averaged, loop.weight)
        weight = weight * 0.25 ** loop.refused[0]
        stepped = rule.update(loop.current, loop.e, loop.g, weight.astype(dtype))
        # Where the start's own draws are not usable, it is drawn in.
        pending = where_tree(began, stepped, rule.shrunk(loop.pending))
        return loop._replace(
            pending=pending,
            share=(weight / (1 + weight)).astype(dtype),
            status=jnp.where(
                (loop.status < 0) & (loop.refused[0] >= REFUSALS),
                jnp.where(began, SolverStatus.STALLED, SolverStatus.INVALID_START),
                loop.status,
            ).astype(jnp.int32),
        )

    infinite = jnp.full((), jnp.inf, dtype)
    zeros = jnp.zeros((batch, dim), dtype)
    end = lax.while_loop(
        lambda loop: (loop.status < 0) & (loop.steps < max_steps),
        body,
        Loop(
            pending=start,
            current=start,
            e=zeros,
            g=zeros,
            elbo=jnp.full((), jnp.nan, dtype),
            residual=infinite,
            typical=infinite,
            level=infinite,
            lowest=infinite,
            waited=jnp.int32(0),
            weight=jnp.full((), largest / 10, dtype),
            share=jnp.ones((), dtype),
            averaged=jnp.int32(0),
            variance=jnp.zeros((2, dim), dtype),
            excess=jnp.zeros((), dtype),
            refused=jnp.zeros(2, jnp.int32),
            steps=jnp.int32(0),
            status=jnp.int32(-1),
        ),
    )
    return end._replace(
        status=jnp.where(end.status < 0, SolverStatus.MAX_STEPS, end.status).astype(jnp.int32)
    )
