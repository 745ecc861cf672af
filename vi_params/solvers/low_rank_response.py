"""Linear response for many latents: a diagonal and the directions that mean-field misses most.

In units D of the mean-field scales the linear-response covariance S of a Gaussian posterior is the
inverse of a matrix with unit diagonal. Its largest eigenvalues are where mean-field is most wrong;
they are found by subspace iteration on products with H^-1, and the rest of S by its mean
eigenvalue c:

    Cov = D (c I + V (Lambda - c) V') D.

The trace behind c is estimated from random signs outside the subspace. Halko, Martinsson and Tropp
(2011), Finding structure with randomness, SIAM Review 53(2), section 4.5; Hutchinson (1990).
"""

from typing import Any

import jax
import jax.numpy as jnp

from vi_params._compile import Quick
from vi_params.guides import low_rank
from vi_params.params import unconstrain
from vi_params.solvers.inverse_products import inverse_products, judged, standard_error
from vi_params.solvers.solution import SolverInfo
from vi_params.target import Target

EXTRA = 8
"""How many directions more than asked for are iterated."""

ITERATIONS = 3
"""How often the subspace is multiplied by S."""

PROBES = 16
"""How many random signs estimate the trace."""

PAIRS = 16
"""From how many pairs of draws, at most, the sampling error is estimated: each takes a solve."""


def build_low_rank(target: Target, name: str, rank: int) -> Any:
    """The guide, and `(params, info, draws, data) -> (params, info)`."""
    guide = low_rank(target, rank=rank, name=name)

    @Quick
    def respond(params: Any, info: SolverInfo, draws: jax.Array, data: Any) -> Any:
        inverse = inverse_products(target, name, params, draws, data, rank + EXTRA)
        dim = inverse.layout.dim
        width = min(rank + EXTRA, dim)

        def times(v: jax.Array) -> tuple[jax.Array, jax.Array]:
            """S v for every row of v, and the residual."""
            found, residual = inverse.solve(jnp.pad(v, ((0, 0), (0, dim))))
            return found[:, :dim], residual

        # A key of its own: the response is a function of the solution alone.
        of_start, of_probes = jax.random.split(jax.random.key(0))
        rows = _orthonormal(jax.random.normal(of_start, (width, dim)))
        rows = jax.lax.fori_loop(0, ITERATIONS, lambda _, v: _orthonormal(times(v)[0]), rows)
        image, residual = times(rows)
        eigenvalues, turn = jnp.linalg.eigh(0.5 * (rows @ image.T + image @ rows.T))
        directions = turn.T @ rows

        residuals, outside = [residual], 0.0
        if rest := dim - width:
            signs = jax.random.rademacher(of_probes, (PROBES, dim), dtype=rows.dtype)
            signs = signs - (signs @ rows.T) @ rows
            image, residual = times(signs)
            outside = rest * jnp.sum(signs * image) / jnp.sum(signs**2)
            residuals.append(residual)
        left = dim - rank
        mean = (outside + jnp.sum(eigenvalues[: width - rank])) / left if left else eigenvalues[0]
        factor = directions[width - rank :].T * jnp.sqrt(
            jnp.maximum(eigenvalues[width - rank :] / mean - 1.0, 0.0)
        )

        some = inverse.scores[:PAIRS]
        moved, residual = inverse.solve(some - some.mean(0))
        residuals.append(residual)
        variances = mean * (1.0 + jnp.sum(factor**2, axis=1))
        error = standard_error(moved[:, :dim], len(inverse.scores)) / jnp.sqrt(variances)

        definite = jnp.all(eigenvalues > 0) & (mean > 0) & jnp.all(jnp.isfinite(factor))
        scale = inverse.unit[:dim] * jnp.where(definite, jnp.sqrt(mean), 1.0)
        values = {
            "loc": params[name]["loc"],
            "scale": scale,
            "factor": jnp.where(definite, factor, 0.0),
        }
        status = judged(info.status, definite, jnp.max(jnp.stack(residuals)))
        info = info._replace(status=status, sampling_error=jnp.max(error))
        rest_of_params = {key: params[key] for key in params if key != name}
        return {**rest_of_params, **unconstrain(guide.declared, {name: values})}, info

    return guide, respond


def _orthonormal(rows: jax.Array) -> jax.Array:
    """Orthonormal rows that span the same."""
    return jnp.linalg.qr(rows.T)[0].T
