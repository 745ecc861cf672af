"""Stein variational gradient descent: particles moved to the posterior, and apart from each other.

    x_i <- x_i + step phi(x_i),   phi(x) = mean_j [k(x_j, x) score(x_j) + d k(x_j, x) / d x_j].

Liu and Wang (2016), Stein variational gradient descent: a general purpose Bayesian inference
algorithm, NeurIPS, algorithm 1. The inverse multiquadric kernel: Gorham and Mackey (2017),
Measuring sample quality with kernels, ICML.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from vi_params._cache import program
from vi_params._check import require_count, require_instance, require_key, require_positive
from vi_params._compile import Quick
from vi_params._over import over
from vi_params._tree import all_finite
from vi_params.params import constrain
from vi_params.solvers.score_solver import first_given, gaussian_start
from vi_params.solvers.solution import MESSAGES, SolverStatus
from vi_params.solvers.start import Given, data_of, log_density
from vi_params.target import Target, flat


class Kernel(NamedTuple):
    """A kernel k(x, y) = value(|x - y|^2 / bandwidth).

    Attributes:
        name: what it is called in messages.
        value: a decreasing function of a scaled squared distance, 1 at 0.
        bandwidth: what squared distances are divided by; None for the median heuristic, the median
            of those between the particles over log(n + 1), at every step.
    """

    name: str
    value: Callable[[jax.Array], jax.Array]
    bandwidth: float | None


class Particles(NamedTuple):
    """Points that stand for a posterior with equal weights.

    It is no guide: a finite set of points has no density, hence neither ELBO nor k-hat, and more
    draws than there are particles cannot be had. `latents` has the form of `vi.draws`, so that
    `vi.summary` takes it.

    Attributes:
        latents: name -> constrained values, leading axis the particles.
        positions: the same, unconstrained, shape (num_particles, dim).
        params: the target's own parameters, as they were given.
        status: a `SolverStatus`.
        steps: how many steps were made.
        residual: the root mean square of phi at the end, in coordinates where the first Gaussian is
            standard normal.
    """

    latents: dict[str, jax.Array]
    positions: jax.Array
    params: Any
    status: jax.Array
    steps: jax.Array
    residual: jax.Array

    @property
    def message(self) -> str:
        """The status in words."""
        return MESSAGES[SolverStatus(int(self.status))]

    def __str__(self) -> str:
        return (
            f"{self.positions.shape[0]} particles: {self.message} after {int(self.steps)} steps, "
            f"residual {float(self.residual):.2g}"
        )


def rbf(bandwidth: float | None = None) -> Kernel:
    """exp(-|x - y|^2 / bandwidth), the usual kernel; the median heuristic where None.

    Example:
        >>> vi.solvers.rbf().value(jnp.float32(0.0))
        Array(1., dtype=float32)
    """
    return Kernel("rbf", lambda s: jnp.exp(-s), _positive(bandwidth))


def imq(bandwidth: float | None = None) -> Kernel:
    """(1 + |x - y|^2 / bandwidth)^(-1/2): its tails keep far particles in touch.

    Example:
        >>> vi.solvers.imq().value(jnp.float32(3.0))
        Array(0.5, dtype=float32)
    """
    return Kernel("imq", lambda s: (1 + s) ** -0.5, _positive(bandwidth))


def svgd(
    target: Target,
    key: jax.Array,
    data: Any = None,
    *,
    num_particles: int = 100,
    kernel: Kernel | None = None,
    optimizer: optax.GradientTransformation | None = None,
    init: Any = None,
    tolerance: float = 1e-3,
    max_steps: int = 1000,
) -> Particles:
    """Particles by Stein variational gradient descent.

    They start as draws of a first Gaussian, and distances are measured where that Gaussian is
    standard normal, so that the units of a latent do not matter. Kernels see little in many
    dimensions: above some twenty the particles' spread is too small. One particle goes to the mode.

    Args:
        target: what to approximate. Its own parameters are kept as `init`, a `Solution`, has them.
        key: a typed random key: of the first Gaussian and of its draws.
        data: the data; the target's own where None.
        num_particles: how many; a step costs num_particles^2 dim.
        kernel: `vi.solvers.rbf()` (the default) or `vi.solvers.imq()`.
        optimizer: any optax transformation of the direction -phi; by default Adam, its step size
            falling from 0.1 to zero along a cosine.
        init: the first Gaussian, or a point to find it from, as for `vi.solvers.batch_and_match`.
        tolerance: stop where the root mean square of phi is below this.
        max_steps: how many steps are made at most.

    Returns:
        `Particles`.

    Raises:
        ValueError: num_particles or max_steps < 1, tolerance <= 0, a start outside its support, a
            target with parameters of its own and no values for them, or data that are a batch.
        KeyError: `init` or `data` hold unknown names, or `data` lack one.
        TypeError: `key` is not a typed key, or `kernel` is no kernel.

    Example:
        >>> target = vi.target(
        ...     lambda v, z, d: -0.5 * jnp.sum((z["z"] - 3.0) ** 2), {"z": vi.Latent((2,))}
        ... )
        >>> particles = vi.solvers.svgd(target, jax.random.key(0), num_particles=20)
        >>> particles.latents["z"].shape, bool(abs(particles.latents["z"].mean() - 3.0) < 0.05)
        ((20, 2), True)
    """
    where = "solvers.svgd"
    data = data_of(target, data)
    require_key(key, where)
    require_count(num_particles, "num_particles", where)
    require_count(max_steps, "max_steps", where)
    kernel = rbf() if kernel is None else kernel
    require_instance(kernel, Kernel, "vi.solvers.rbf()", f"{where}, kernel")
    if optimizer is None:
        optimizer = optax.adam(optax.cosine_decay_schedule(0.1, max_steps))
    require_positive(tolerance, "tolerance", where)
    given, init = first_given(target, init, where)
    solve = program(
        _build, target, num_particles, tolerance, max_steps, alike=(kernel, optimizer, init)
    )
    return solve(key, given, data)


def stein_direction(kernel: Kernel, x: jax.Array, score: jax.Array) -> jax.Array:
    """phi at every particle.

    Args:
        kernel: k.
        x: the particles, shape (n, dim).
        score: the gradient of log p at each, shape (n, dim).
    """
    n = x.shape[0]
    apart = x[:, None] - x[None]  # x_j - x_i at [j, i]
    squared = jnp.sum(apart**2, axis=-1)
    if kernel.bandwidth is None:
        width = jnp.median(squared) / jnp.log(n + 1.0)
        width = jnp.where(width > 0, width, 1.0)
    else:
        width = jnp.asarray(kernel.bandwidth, x.dtype)
    near, slope = jax.vmap(jax.value_and_grad(kernel.value))((squared / width).ravel())
    near, slope = near.reshape(n, n), slope.reshape(n, n)
    pushed = jnp.einsum("ji,jid->id", slope * 2 / width, apart)
    return (near.T @ score + pushed) / n


def _build(
    target: Target,
    num_particles: int,
    tolerance: float,
    max_steps: int,
    kernel: Kernel,
    optimizer: optax.GradientTransformation,
    init: Any,
) -> Callable:
    density, first_gaussian = log_density(target), gaussian_start(target, init)
    flat_target = flat(target)

    @Quick
    def solve(key: jax.Array, given: Given | None, data: Any) -> Particles:
        of_start, of_draws = jax.random.split(key)
        first = first_gaussian(of_start, data) if given is None else given

        def log_p(x: jax.Array) -> jax.Array:
            return density(first.loc + first.scale_tril @ x, first.model, data)

        def scores(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            return over(jax.value_and_grad(log_p), x)

        def body(carry: tuple) -> tuple:
            x, state, steps, _, _ = carry
            value, score = scores(x)
            broken = ~all_finite(value, score)
            phi = stein_direction(kernel, x, score)
            residual = jnp.sqrt(jnp.mean(phi**2))
            updates, state = optimizer.update(-phi, state, x)
            failed = jnp.where(steps == 0, SolverStatus.INVALID_START, SolverStatus.DIVERGED)
            status = jnp.where(residual < tolerance, SolverStatus.CONVERGED, -1)
            status = jnp.where(broken, failed, status).astype(jnp.int32)
            moved: Any = optax.apply_updates(x, updates)
            return jnp.where(status < 0, moved, x), state, steps + 1, residual, status

        x = jax.random.normal(of_draws, (num_particles, first.loc.size), first.loc.dtype)
        # A particle at which the density is not finite starts at the centre.
        value, score = scores(x)
        usable = jnp.isfinite(value) & jnp.all(jnp.isfinite(score), axis=1)
        x = jnp.where(usable[:, None], x, 0.0)
        start = (x, optimizer.init(x), jnp.int32(0), jnp.zeros((), x.dtype), jnp.int32(-1))
        x, _, steps, residual, status = lax.while_loop(
            lambda carry: (carry[4] < 0) & (carry[2] < max_steps), body, start
        )
        positions = first.loc + x @ first.scale_tril.T
        values = constrain(target.declared, first.model)
        return Particles(
            over(lambda u: flat_target.constrain(u, values, data), positions),
            positions,
            first.model,
            jnp.where(status < 0, SolverStatus.MAX_STEPS, status).astype(jnp.int32),
            steps,
            residual,
        )

    return solve


def _positive(bandwidth: float | None) -> float | None:
    if bandwidth is not None:
        require_positive(bandwidth, "bandwidth", "kernel", "None is the median heuristic")
    return bandwidth
