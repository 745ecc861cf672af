"""Linear response: the covariances that mean-field leaves out, from how its optimum moves.

If the log density is tilted by t.u, the optimal locations move at the rate

    d m / d t = [H^-1]_mm,   H the Hessian of the fixed-draw loss in (m, log scale),

and the rate at which a posterior mean moves under such a tilt is the posterior covariance.
Giordano, Broderick and Jordan (2018), Covariances, robustness, and variational Bayes, JMLR 19(51).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vi_params._cache import program
from vi_params._check import explain, require_count
from vi_params._compile import Quick
from vi_params._over import divisor, num_parts, over
from vi_params._tree import is_within_program
from vi_params.guide import Guide
from vi_params.guides import full_rank, mean_field
from vi_params.guides.low_rank import checked_rank
from vi_params.params import unconstrain
from vi_params.solvers.curvature import along
from vi_params.solvers.fixed_draws import BLOCK, Response, exists, expansion
from vi_params.solvers.inverse_products import standard_error
from vi_params.solvers.layout import Layout
from vi_params.solvers.low_rank_response import build_low_rank
from vi_params.solvers.solution import (
    Slopes,
    Solution,
    SolverStatus,
    require_mean_field,
)
from vi_params.solvers.start import data_of
from vi_params.solvers.trust_region import LAST
from vi_params.target import Target, flat, whole

PLACES, SIDE_BY_SIDE = 1000, 25
"""At how many places one call computes gradients at most, and how many of them side by side."""


def linear_response(
    target: Target,
    solution: Solution,
    data: Any = None,
    *,
    rank: int | None = None,
    num_hessians: int | None = None,
) -> Solution:
    """The Gaussian with the locations of a mean-field solution and linear-response covariances.

    A dense matrix: dim Hessian-vector products for every draw, or for `num_hessians` of them,
    memory for (2 dim)^2 numbers; or, for many latents, `rank` directions and a diagonal, by
    conjugate gradients. For a Gaussian target the dense result is exact. Judge it by k-hat
    (`vi.diagnose`), not by its ELBO: a mean-field scale is fitted to the ELBO, a covariance by
    linear response is not. `vi.quantity_response` gives the covariances of a few functions alone.

    Args:
        target: the target that was approximated.
        solution: what `vi.solvers.deterministic` gave for it.
        data: the data of that solution; the target's own where None. (A solution that brings its
            `response` was expanded at them already.)
        rank: None for all covariances; a number for the covariance D (c I + V diag(l) V') D of
            that many directions V, the ones along which mean-field is most too narrow.
        num_hessians: the largest number of fixed draws at which Hessians are computed, even, since
            these come in pairs, every coordinate rescaled to mean square one; None for all. A few
            are enough where what follows corrects the covariances; gradients are those of all.
            (Not with `rank`. A solution that brings its `response` has Hessians at all draws.)

    Returns:
        A `Solution` with a `vi.guides.full_rank` guide (`low_rank` with `rank`).
        `info.sampling_error` is estimated from how the gradient differs between the antithetic
        pairs. Where the Hessian is not positive definite, `info.status` is INDEFINITE and the
        scales are those of mean-field. `slopes` has the gradients at the fixed draws (not with
        `rank`).

    Raises:
        ValueError: the solution is of another family, or has no even number of fixed draws; a
            rank not among 1 .. dim; `num_hessians` is no even number above zero, or is
            given together with `rank`; data that are a batch.
        TypeError: `solution` is none, or `num_hessians` no int.

    Example:
        >>> precision = jnp.array([[2.0, 0.9], [0.9, 1.0]])
        >>> target = vi.target(
        ...     lambda v, z, d: -0.5 * z["z"] @ precision @ z["z"], {"z": vi.Latent((2,))}
        ... )
        >>> solution = vi.solvers.deterministic(target, jax.random.key(0))
        >>> solution = vi.linear_response(target, solution)
        >>> root = vi.constrain(solution.guide.declared, solution.params)["guide"]["scale_tril"]
        >>> bool(jnp.allclose(root @ root.T @ precision, jnp.eye(2), atol=1e-3))
        True
    """
    name = require_mean_field(solution, "linear_response")
    data, target = data_of(target, data), whole(target)
    _require_num_hessians(num_hessians, rank)
    if rank is not None:
        rank = checked_rank(rank, flat(target).dim, "linear_response")
        guide, respond = program(build_low_rank, target, name, rank)
        params, info = respond(solution.params, solution.info, solution.noise, data)
        return Solution(guide, params, info, solution.noise)
    guide, expand, respond = prepared(target, name)
    params, draws, info = solution.params, solution.noise, solution.info
    response = solution.response
    if response is None:
        response = _expanded(expand, params, draws, data, num_hessians)
    params, status, sampling_error, slopes = respond(params, info.status, draws, response)
    info = info._replace(status=status, sampling_error=sampling_error)
    return Solution(guide, params, info, draws, slopes=slopes)


def _require_num_hessians(num_hessians: int | None, rank: int | None) -> None:
    """Raises unless it is None, or an even number without a rank."""
    if num_hessians is None:
        return
    require_count(num_hessians, "num_hessians", "linear_response", least=2)
    if rank is None and num_hessians % 2 == 0:
        return
    raise ValueError(
        explain(
            "num_hessians counts draws in pairs, and belongs to dense covariances.",
            expected="num_hessians an even number above zero or None; None with rank",
            received=f"num_hessians={num_hessians!r}, rank={rank!r}",
            where="linear_response",
            hint="make it even, or leave it out where there is a rank",
        )
    )


def prepared(target: Target, name: str) -> tuple[Guide, Quick, Quick]:
    """The guide, and two programs.

    The first is `(params, draws, data, few, places, number) -> (Response, gradients)`: with number
    zero the response, its Hessian that of the few draws, or of all where these are None; else the
    gradients of the log density at that many of the places u, shape (`PLACES`, dim), in the order
    of these. The other one of the two is zeros: one program for both has the log density compiled
    once.

    The second is `(params, status, draws, response) -> (params, status, sampling error, Slopes)`.
    """
    return program(_build, target, name)


def nowhere(draws: Any, num_hessians: int | None) -> tuple[Any, Any, Any]:
    """The last arguments of the first program, for draws or their shapes, as nothing is asked for:
    the few draws of one call, the places and the number."""
    number, dim = _num_few(draws, num_hessians), draws.shape[1]
    few = None
    if number is not None:
        few = np.zeros((number // _num_calls(number), dim), draws.dtype)
    return few, np.zeros((PLACES, dim), draws.dtype), np.int32(0)


def _expanded(
    expand: Quick, params: Any, draws: jax.Array, data: Any, num_hessians: int | None
) -> Response:
    """The response of a solution that does not bring it."""
    _, *nothing = nowhere(draws, num_hessians)
    number, dim = _num_few(draws, num_hessians), draws.shape[1]
    if number is None:
        parts = [None]
    elif is_within_program(params, draws, data):
        parts = [_fewer(draws, number)]
    else:
        pairs = _fewer(np.asarray(draws), number, np).reshape(2, -1, dim)
        parts = [few.reshape(-1, dim) for few in np.split(pairs, _num_calls(number), axis=1)]
    calls = [(params, draws, data, few, *nothing) for few in parts]
    first, *others = (response for response, _ in expand.side_by_side(calls))
    if not others:
        return first
    # They differ in the Hessian alone.
    return first._replace(hessian=np.mean([np.asarray(r.hessian) for r in (first, *others)], 0))


def _build(target: Target, name: str) -> tuple[Guide, Quick, Quick]:
    guide = full_rank(target, name=name)
    layout = Layout(target, mean_field(target, name=name))
    dim = layout.dim

    @Quick
    def expand(
        params: Any, draws: jax.Array, data: Any, few: Any, places: jax.Array, number: jax.Array
    ) -> tuple[Response, jax.Array]:
        """The Hessian and scores that were not at hand, or gradients at places."""
        few = draws if few is None else few
        x, unit = layout.vector(params), layout.units(layout.vector(params))
        theta, x, unit = x[2 * dim :], x[: 2 * dim], unit[: 2 * dim]
        at_once = divisor(len(draws), BLOCK // layout.size(data))

        def log_density(u: jax.Array, _: jax.Array) -> jax.Array:
            return layout.log_density(data)(u, theta)

        def share(x: jax.Array, e: jax.Array) -> tuple[jax.Array, jax.Array]:
            """The gradients of a draw's share of the loss, and of the log density there."""
            m, w = x[:dim], x[dim:]
            slope = jax.grad(log_density)(m + jnp.exp(w) * e, theta)
            return jnp.concatenate([-slope, -slope * jnp.exp(w) * e - 1.0]), slope

        few_at_once = divisor(len(few), at_once)

        def column(v: jax.Array) -> jax.Array:
            def product(e: jax.Array) -> jax.Array:
                return along(lambda x: share(x, e)[0], x, v, unit)

            return over(product, few, few_at_once).mean(0)

        def missing(gradient: jax.Array) -> jax.Array:
            """The part diag(exp(w) e g) is one at an optimum. In the mean over draws that it is not
            the optimum of, with this gradient, it can be so negative that the whole is not positive
            definite: what it lacks."""
            return (-gradient).at[:dim].set(0.0)

        def curvature() -> tuple[Response, jax.Array]:
            """By draws, or where the density has no second derivative by columns, from differences
            of gradients."""
            by_draw = expansion(log_density, few, layout.size(data), 0)
            if exists(by_draw, few, 0):
                found = by_draw(x, LAST)[2]
                hessian, gradient = found.hessian, found.scores.mean(0)
                if few is draws:
                    full = found._replace(hessian=hessian + jnp.diag(missing(gradient)))
                    return full, jnp.zeros_like(places)
            else:
                hessian = lax.map(column, jnp.eye(2 * dim, dtype=x.dtype))
                gradient = over(lambda e: share(x, e)[0], few, few_at_once).mean(0)
            shares, slopes = over(lambda e: share(x, e), draws, at_once)
            scores = shares.reshape(2, -1, 2 * dim).mean(0)
            response = Response(hessian + jnp.diag(missing(gradient)), scores, slopes)
            return response, jnp.zeros_like(places)

        def gradients() -> tuple[Response, jax.Array]:
            def put(i: jax.Array, found: jax.Array) -> jax.Array:
                rows = lax.dynamic_slice_in_dim(places, i * SIDE_BY_SIDE, SIDE_BY_SIDE)
                slopes = over(lambda u: jax.grad(log_density)(u, theta), rows, beside)
                return lax.dynamic_update_slice_in_dim(found, slopes, i * SIDE_BY_SIDE, 0)

            beside = divisor(SIDE_BY_SIDE, BLOCK // layout.size(data))
            blocks = (number + SIDE_BY_SIDE - 1) // SIDE_BY_SIDE
            found = lax.fori_loop(0, blocks, put, jnp.zeros_like(places))
            dtype, pairs = jnp.result_type(x, draws), len(draws) // 2
            hessian, scores = (jnp.zeros((n, 2 * dim), dtype) for n in (2 * dim, pairs))
            return Response(hessian, scores, jnp.zeros_like(draws)), found

        return lax.cond(number == 0, curvature, gradients)

    @Quick
    def respond(params: Any, status: Any, draws: jax.Array, response: Response) -> Any:
        own = params[name]
        scale = jnp.exp(own["scale"])
        # (m, log scale) in units of the scales: every block of the Hessian is then of order one.
        unit = jnp.concatenate([scale, jnp.ones_like(scale)])
        hessian = unit[:, None] * response.hessian * unit
        factor = jnp.linalg.cholesky(0.5 * (hessian + hessian.T))
        inverse = jax.scipy.linalg.cho_solve((factor, True), jnp.eye(2 * dim, dtype=unit.dtype))
        covariance, location = inverse[:dim, :dim], inverse[:dim]
        scale_tril = jnp.linalg.cholesky(0.5 * (covariance + covariance.T))

        # The loss is a mean over pairs of draws, which count as independent of each other here:
        # orthogonal ones are a little better than that.
        scores = unit * response.scores
        moved = (scores - scores.mean(0)) @ location.T
        error = standard_error(moved, len(scores))
        relative = jnp.max(error / jnp.sqrt(jnp.diagonal(covariance)))

        definite = jnp.all(jnp.isfinite(scale_tril))
        scale_tril = jnp.where(definite, scale[:, None] * scale_tril, jnp.diag(scale))
        values = {name: {"loc": own["loc"], "scale_tril": scale_tril}}
        status = jnp.where(definite, status, SolverStatus.INDEFINITE)
        rest = {key: params[key] for key in params if key != name}
        equal = jnp.full(len(draws), 1 / len(draws), draws.dtype)
        slopes = Slopes(own["loc"] + scale * draws, response.slopes, equal)
        return {**rest, **unconstrain(guide.declared, values)}, status, relative, slopes

    return guide, expand, respond


def _num_few(draws: Any, num_hessians: int | None) -> int | None:
    """At how many draws Hessians are computed; None for all."""
    return None if num_hessians is None or num_hessians >= len(draws) else num_hessians


def _num_calls(few: int) -> int:
    """By how many calls, each of whole pairs."""
    return num_parts(few // 2)


def _fewer(draws: Any, number: int, xp: Any = jnp) -> Any:
    """The first pairs of antithetic draws (e in the first half, -e in the second), so many draws,
    rescaled to mean square one in every coordinate."""
    half = len(draws) // 2
    few = xp.concatenate([draws[: number // 2], draws[half : half + number // 2]])
    return few / xp.sqrt(xp.mean(few**2, axis=0))
