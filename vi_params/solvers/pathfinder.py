"""Pathfinder: normals along a path of L-BFGS to the mode, the best of them by its ELBO.

At a point x of the path with inverse Hessian estimate H^-1 and score g = grad log p(x) the normal
is N(x + H^-1 g, H^-1). Zhang, Carpenter, Gelman and Vehtari (2022), Pathfinder: parallel
quasi-Newton variational inference, JMLR 23(306).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from vi_params._cache import program
from vi_params._check import require_count, require_key
from vi_params._compile import Quick
from vi_params._over import over, over_lanes
from vi_params._tree import all_finite
from vi_params.guide import Guide
from vi_params.guides import full_rank
from vi_params.guides.starts import start_vector
from vi_params.params import unconstrain
from vi_params.solvers.inverse_hessian import Root, empty, extend, root
from vi_params.solvers.solution import Solution, SolverInfo, SolverStatus
from vi_params.solvers.start import data_of, first_finite, log_density, model_from, unchanging
from vi_params.target import Target, flat

HISTORY = 6
"""How many steps of the path an inverse Hessian is made of."""


class Paths(NamedTuple):
    """The draws of all paths, to be importance-resampled.

    Attributes:
        positions: unconstrained draws, an equal number from the best normal of each path, shape
            (paths * num_draws, dim).
        log_ratios: log p of them minus the log density of the equal mixture of all those normals,
            shape (paths * num_draws,). The mixture, not a draw's own normal, is what they are drawn
            from: a path that ended in a poor mode then gets its small weight, and two paths in one
            mode do not count it twice.
        elbos: the ELBO of each path's normal, shape (paths,).
        best: the number of the step at which each path had it, shape (paths,).
    """

    positions: jax.Array
    log_ratios: jax.Array
    elbos: jax.Array
    best: jax.Array


class Trace(NamedTuple):
    """A path of L-BFGS.

    Attributes:
        x: its points, shape (max_steps + 1, dim); the last one repeated.
        slope: the gradients of the loss there.
        steps: how many steps were taken.
        status: a `SolverStatus`.
    """

    x: jax.Array
    slope: jax.Array
    steps: jax.Array
    status: jax.Array


class Normal(NamedTuple):
    """A normal on the path: its mean, its root, its ELBO and where it was found."""

    loc: jax.Array
    root: Root
    elbo: jax.Array
    step: jax.Array


def pathfinder(
    target: Target,
    key: jax.Array,
    data: Any = None,
    *,
    paths: int = 4,
    num_draws: int = 250,
    elbo_draws: int = 25,
    init: Any = None,
    max_steps: int = 200,
    name: str = "guide",
) -> Solution:
    """The best normal along paths of L-BFGS from several starts, and draws of all paths.

    Cheap: one gradient a step and `elbo_draws` densities. A good start for other solvers and for
    MCMC. Pure in (key, data); under `jax.vmap` take `solution.params` and `solution.info` out.

    Args:
        target: what to approximate. Its own parameters are kept as `init`, a `Solution`, has them.
        key: a typed random key: of the starts and of the draws.
        data: the data; the target's own where None.
        paths: how many paths, in one program.
        num_draws: how many draws each path adds to the pool.
        elbo_draws: how many draws estimate the ELBO of each step's normal.
        init: where the paths start, as in `vi.guides.mean_field` (a strategy or None give each its
            own start); or a `Solution` for the parameters of the model, its guide being ignored.
        max_steps: how many steps a path makes at most.
        name: the name of the family's parameters.

    Returns:
        A `Solution` with a `vi.guides.full_rank` guide, the best path's normal. `info.details` are
        `Paths`: `vi.diagnostics.psis(details.log_ratios)` gives the weights of the pooled draws.

    Raises:
        ValueError: paths, num_draws, elbo_draws or max_steps < 1, a start outside its support, a
            target with parameters of its own and no values for them, or data that are a batch.
        KeyError: `init` or `data` hold unknown names, or `data` lack one.
        TypeError: `key` is not a typed key.

    Example:
        >>> target = vi.target(
        ...     lambda v, z, d: -0.5 * jnp.sum((z["z"] - 3.0) ** 2), {"z": vi.Latent((2,))}
        ... )
        >>> solution = vi.solvers.pathfinder(target, jax.random.key(0))
        >>> pool = solution.info.details
        >>> weights = vi.diagnostics.psis(pool.log_ratios).log_weights
        >>> index = jax.random.categorical(jax.random.key(1), weights, shape=(100,))
        >>> draws = jax.vmap(vi.flat(target).constrain)(pool.positions[index])
        >>> draws["z"].shape
        (100, 2)
    """
    where = "solvers.pathfinder"
    data = data_of(target, data)
    require_key(key, where)
    counts = {
        "paths": paths,
        "num_draws": num_draws,
        "elbo_draws": elbo_draws,
        "max_steps": max_steps,
    }
    for what, count in counts.items():
        require_count(count, what, where)
    model, init = model_from(target, init, where)
    guide, solve = program(_build, target, *counts.values(), name, alike=(unchanging(init),))
    params, info = solve(key, model, data)
    return Solution(guide, params, info, jnp.zeros((0, flat(target).dim)))


def _build(
    target: Target,
    paths: int,
    num_draws: int,
    elbo_draws: int,
    max_steps: int,
    name: str,
    init: Any,
) -> tuple[Guide, Callable]:
    guide = full_rank(target, init=init, name=name)
    density, begin = log_density(target), start_vector(target, init)

    def path(key: jax.Array, model: Any, data: Any) -> Any:
        of_start, of_elbo, of_draws = jax.random.split(key, 3)

        def log_p(u: jax.Array) -> jax.Array:
            return density(u, model, data)

        trace = descend(lambda u: -log_p(u), first_finite(log_p, begin, of_start), max_steps)
        e = jax.random.normal(of_elbo, (elbo_draws, trace.x.shape[1]), trace.x.dtype)
        best = along(trace, log_p, e)
        e = jax.random.normal(of_draws, (num_draws, trace.x.shape[1]), trace.x.dtype)
        z = best.loc + jax.vmap(best.root.times)(e)
        square = jax.vmap(best.root.times, 1, 1)(jnp.eye(trace.x.shape[1], dtype=e.dtype))
        scale_tril = jnp.linalg.cholesky(square @ square.T)
        status = jnp.where(
            (trace.status == SolverStatus.CONVERGED) & ~jnp.isfinite(best.elbo),
            SolverStatus.DIVERGED,
            trace.status,
        )
        found = (best.loc, scale_tril, best.elbo, best.step, trace.steps, status)
        return found, z, over(log_p, z)

    @Quick
    def solve(key: jax.Array, model: Any, data: Any) -> tuple[Any, SolverInfo]:
        keys = jax.random.split(key, paths)
        found, z, log_p = over_lanes(lambda key: path(key, model, data), keys)
        loc, scale_tril, elbo, at, steps, status = found
        z, log_p = z.reshape(-1, z.shape[-1]), log_p.reshape(-1)
        log_q = jax.vmap(lambda loc, root: _log_normal(z, loc, root))(loc, scale_tril)
        usable = jnp.isfinite(elbo)
        log_q = jnp.where(usable[:, None], log_q, -jnp.inf)
        mixture = jax.nn.logsumexp(log_q, axis=0) - jnp.log(jnp.sum(usable))
        # Draws of a path without a normal have no weight; nor have those of no density.
        drawn = jnp.repeat(usable, num_draws) & ~jnp.isnan(log_p)
        best = jnp.argmax(jnp.where(usable, elbo, -jnp.inf))
        own = {"loc": loc[best], "scale_tril": scale_tril[best]}
        whole = all_finite(own)
        own = {
            "loc": jnp.where(jnp.isfinite(own["loc"]), own["loc"], 0.0),
            "scale_tril": jnp.where(whole, own["scale_tril"], jnp.eye(loc.shape[1])),
        }
        own = unconstrain(guide.declared, {name: own})
        info = SolverInfo(
            status=status[best],
            elbo=elbo[best],
            steps=steps[best],
            lane_elbos=jnp.where(usable, elbo, jnp.nan),
            lane_statuses=status,
            sampling_error=jnp.full((), jnp.nan, loc.dtype),
            details=Paths(z, jnp.where(drawn, log_p - mixture, -jnp.inf), elbo, at),
        )
        return {**model, **own}, info

    return guide, solve


def descend(loss: Callable[[jax.Array], jax.Array], x: jax.Array, max_steps: int) -> Trace:
    """The path of optax's L-BFGS with its zoom line search, until no step lowers the loss."""
    optimizer = optax.lbfgs(memory_size=HISTORY)
    slope: Any = optax.value_and_grad_from_state(loss)
    precise = 1e-6 if x.dtype == jnp.float64 else 1e-5

    def body(carry: tuple) -> tuple:
        x, state, last, points, slopes, steps, _ = carry
        value, grad = slope(x, state=state)
        finite = all_finite(value, grad)
        points = points.at[steps].set(jnp.where(finite, x, points[steps - 1]))
        slopes = slopes.at[steps].set(jnp.where(finite, grad, slopes[steps - 1]))
        rounding = 10 * jnp.finfo(x.dtype).eps * jnp.abs(value)
        flat_out = last - value <= precise + rounding
        status = jnp.where(flat_out, SolverStatus.CONVERGED, -1)
        broken = jnp.where(steps == 0, SolverStatus.INVALID_START, SolverStatus.STALLED)
        status = jnp.where(finite, status, broken)
        updates, state = optimizer.update(grad, state, x, value=value, grad=grad, value_fn=loss)
        status = status.astype(jnp.int32)
        return optax.apply_updates(x, updates), state, value, points, slopes, steps + 1, status

    points = jnp.zeros((max_steps + 1, x.size), x.dtype)
    start = (x, optimizer.init(x), jnp.inf, points, points, jnp.int32(0), jnp.int32(-1))
    start = jax.tree.map(lambda leaf: jnp.asarray(leaf), start)
    *_, points, slopes, count, status = lax.while_loop(
        lambda carry: (carry[-1] < 0) & (carry[-2] <= max_steps), body, start
    )
    steps = jnp.maximum(count - 1, 0)
    index = jnp.minimum(jnp.arange(max_steps + 1), steps)
    status = jnp.where(status < 0, SolverStatus.MAX_STEPS, status)
    return Trace(points[index], slopes[index], steps, status)


def along(trace: Trace, log_p: Callable[[jax.Array], jax.Array], e: jax.Array) -> Normal:
    """The normal with the largest ELBO at the steps of a path, the last one included."""
    dim = trace.x.shape[1]
    constant = 0.5 * dim * jnp.log(2 * jnp.pi)

    def body(i: jax.Array, carry: tuple) -> tuple:
        history, best = carry
        x, slope = trace.x[i], trace.slope[i]
        history = extend(history, x - trace.x[i - 1], slope - trace.slope[i - 1])
        c = root(history)
        loc = x - c.times(c.transposed(slope))
        z = loc + jax.vmap(c.times)(e)
        log_q = -0.5 * jnp.sum(e**2, axis=1) - constant - c.log_det()
        elbo = jnp.mean(over(log_p, z) - log_q)
        elbo = jnp.where(jnp.isfinite(elbo), elbo, -jnp.inf)
        new = Normal(loc, c, elbo, i)
        best = jax.tree.map(lambda a, b: jnp.where(elbo > best.elbo, a, b), new, best)
        return history, best

    history = empty(dim, HISTORY, trace.x.dtype)
    none = jnp.full((), -jnp.inf, trace.x.dtype)
    blank = Normal(trace.x[0], root(history), none, jnp.int32(0))
    return lax.fori_loop(jnp.int32(1), trace.steps + 1, body, (history, blank))[1]


def _log_normal(z: jax.Array, loc: jax.Array, scale_tril: jax.Array) -> jax.Array:
    """The log density of a normal at draws of shape (num, dim)."""
    e = jax.scipy.linalg.solve_triangular(scale_tril, (z - loc).T, lower=True)
    constant = 0.5 * loc.size * jnp.log(2 * jnp.pi)
    log_det = jnp.sum(jnp.log(jnp.diagonal(scale_tril)))
    return -0.5 * jnp.sum(e**2, axis=0) - constant - log_det
