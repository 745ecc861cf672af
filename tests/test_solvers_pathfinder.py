"""Pathfinder, against the dense BFGS recursion, Gaussians and exact evidence."""

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro import distributions as dist

import vi_params as vi
from vi_params.solvers.inverse_hessian import empty, extend, root
from vi_params.solvers.pathfinder import along, descend

enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64

KEY = jax.random.key(0)
Status = vi.SolverStatus


def values_of(solution):
    own = {"guide": solution.params["guide"]}
    return vi.constrain(solution.guide.declared, own)["guide"]


def dense_bfgs(alpha, pairs):
    """H <- (I - rho s y') H (I - rho y s') + rho s s', by hand."""
    h = np.diag(alpha)
    for s, y in pairs:
        rho = 1 / (s @ y)
        left = np.eye(len(s)) - rho * np.outer(s, y)
        h = left @ h @ left.T + rho * np.outer(s, s)
    return h


@pytest.mark.parametrize(("dim", "size"), [(7, 2), (4, 3), (7, 5)])
def test_the_inverse_hessian_is_that_of_the_recursion(dim, size):
    """The compact form equals the dense recursion over the last steps, with fewer and with more
    steps than it keeps, and whether or not 2 size exceeds dim."""
    with enable_x64(True):
        rng = np.random.default_rng(0)
        a = rng.normal(size=(dim, dim))
        hessian = a @ a.T + np.eye(dim)
        history, pairs = empty(dim, size, jnp.float64), []
        for i in range(size + 2):
            s = rng.normal(size=dim)
            pairs.append((s, hessian @ s))
            history = extend(history, jnp.asarray(s), jnp.asarray(hessian @ s))
            if i not in (0, size + 1):
                continue
            c = root(history)
            square = jax.vmap(c.times, 1, 1)(jnp.eye(dim))
            dense = dense_bfgs(np.asarray(history.alpha), pairs[-size:])
            np.testing.assert_allclose(square @ square.T, dense, rtol=1e-8, atol=1e-10)
            np.testing.assert_allclose(2 * c.log_det(), np.linalg.slogdet(dense)[1], rtol=1e-8)
            turned = jax.vmap(c.transposed, 1, 1)(jnp.eye(dim))
            np.testing.assert_allclose(turned, square.T, atol=1e-10)


def test_steps_without_curvature_do_not_count():
    """A step along which the gradient falls, and one that is not finite, leave all as it was."""
    history = extend(empty(3, 2, jnp.float32), jnp.ones(3), 2 * jnp.ones(3))
    for change in (-jnp.ones(3), jnp.full(3, jnp.nan), jnp.zeros(3)):
        after = extend(history, jnp.ones(3), change)
        for leaf, other in zip(history, after, strict=True):
            np.testing.assert_array_equal(leaf, other)


MEAN = np.array([1.0, -2.0, 0.5, 3.0, -1.0])
A = np.random.default_rng(1).normal(size=(5, 5))
COVARIANCE = A @ A.T + 0.5 * np.eye(5)


def test_every_normal_on_the_path_is_nearer_to_the_mode():
    """On a 5-dimensional Gaussian the mean of every normal along the path has a larger density than
    the point that it was made at (the wrong sign of the shift moves away), and the path ends in the
    mode."""
    precision = jnp.asarray(np.linalg.inv(COVARIANCE))

    def loss(u):
        return 0.5 * (u - MEAN) @ precision @ (u - MEAN)

    with enable_x64(True):
        trace = jax.jit(lambda x: descend(loss, x, 50))(jnp.full(5, -1.5))
        assert trace.status == Status.CONVERGED
        np.testing.assert_allclose(trace.x[-1], MEAN, atol=1e-3)
        history = empty(5, 6, trace.x.dtype)
        for i in range(1, int(trace.steps) + 1):
            step = trace.x[i] - trace.x[i - 1]
            history = extend(history, step, trace.slope[i] - trace.slope[i - 1])
            c = root(history)
            loc = trace.x[i] - c.times(c.transposed(trace.slope[i]))
            assert loss(loc) < loss(trace.x[i]) + 1e-9


def test_the_last_step_is_considered():
    """A path is used to its end and no further: of one step, that step is the best."""
    with enable_x64(True):
        precision = jnp.asarray(np.linalg.inv(COVARIANCE))
        trace = descend(lambda u: 0.5 * u @ precision @ u, jnp.full(5, 4.0), 50)
        e = jax.random.normal(KEY, (10, 5))
        short = trace._replace(steps=jnp.int32(2))
        best = along(short, lambda u: -0.5 * u @ precision @ u, e)
        assert best.step <= 2
        only = trace._replace(x=trace.x[:2], slope=trace.slope[:2], steps=jnp.int32(1))
        assert along(only, lambda u: -0.5 * u @ precision @ u, e).step == 1


@pytest.fixture(scope="module")
def gaussian():
    covariance = jnp.asarray(COVARIANCE)
    return vi.target(
        lambda v, z, d: dist.MultivariateNormal(d, covariance).log_prob(z["z"]),
        {"z": vi.Latent((5,))},
        data=jnp.asarray(MEAN),
    )


@pytest.mark.slow
def test_a_gaussian(gaussian):
    """The normal is near the target, the log ratios of the pooled draws give its evidence, zero,
    and resampled draws have its moments."""
    solution = vi.solvers.pathfinder(gaussian, KEY)
    assert solution.info.status == Status.CONVERGED
    np.testing.assert_allclose(values_of(solution)["loc"], MEAN, atol=0.5)
    pool = solution.info.details
    assert pool.positions.shape == (1000, 5)
    smoothed = vi.diagnostics.psis(pool.log_ratios)
    assert abs(float(smoothed.log_evidence)) < 0.15
    weights = np.exp(smoothed.log_weights)
    np.testing.assert_allclose(weights @ pool.positions, MEAN, atol=0.4)


@pytest.mark.slow
@pytest.mark.slow
def test_two_modes_have_their_weights():
    """Paths that end in either mode: the pooled draws have each with its mass, whichever number of
    paths ended there."""
    target = vi.target(
        lambda v, z, d: jnp.logaddexp(
            jnp.log(0.9) + dist.Normal(8.0, 0.5).log_prob(z["z"]),
            jnp.log(0.1) + dist.Normal(-8.0, 0.5).log_prob(z["z"]),
        ),
        {"z": vi.Latent(())},
    )
    solution = vi.solvers.pathfinder(target, KEY, paths=8)
    pool = solution.info.details
    weights = np.exp(vi.diagnostics.psis(pool.log_ratios).log_weights)
    right = np.asarray(pool.positions[:, 0]) > 0
    assert 0 < np.mean(right) < 1
    np.testing.assert_allclose(weights[right].sum(), 0.9, atol=0.05)
    np.testing.assert_allclose(values_of(solution)["loc"], [8.0], atol=0.2)


@pytest.mark.slow
def test_vmap_over_keys_and_data_equals_the_loop(gaussian, compilations):
    """Many solutions are one program, equal to one at a time; a second one compiles nothing."""
    means = jnp.stack([MEAN, MEAN + 1.0])
    keys = jax.random.split(KEY, 2)

    def solve(key, mean):
        return vi.solvers.pathfinder(gaussian, key, mean)[1:3]

    params, info = jax.vmap(solve)(keys, means)
    for i in range(2):
        one, _ = solve(keys[i], means[i])
        np.testing.assert_allclose(one["guide"]["loc"], params["guide"]["loc"][i], atol=0.2)
    key, data = keys[0], means[1]
    with compilations() as seen:
        vi.solvers.pathfinder(gaussian, key, data)
    assert seen == []
    assert np.all(info.status == Status.CONVERGED)


FAILURES = [
    (lambda z: jnp.log(-1.0 - z[0] ** 2), Status.INVALID_START, "vi.check"),
    (lambda z: -jnp.sum(z**2) + 0.5 * jnp.cos(3 * z[0]), Status.MAX_STEPS, "max_steps"),
]


@pytest.mark.parametrize("case", range(len(FAILURES)))
def test_failures_are_told(case):
    """A density that is nowhere finite, and too few steps."""
    densities = [log_density for log_density, *_ in FAILURES]
    target = vi.target(
        lambda v, z, d: jax.lax.switch(d, densities, z["z"]),
        {"z": vi.Latent((2,))},
        data=jnp.int32(case),
    )
    _, status, told = FAILURES[case]
    solution = vi.solvers.pathfinder(target, KEY, max_steps=2, paths=2)
    assert solution.info.status == status
    assert told in str(solution)
    assert np.all(np.isfinite(values_of(solution)["scale_tril"]))


@pytest.mark.parametrize(
    ("options", "kind", "fragment"),
    [
        ({"paths": 0}, ValueError, "paths"),
        ({"num_draws": 0}, ValueError, "num_draws"),
        ({"elbo_draws": 0}, ValueError, "elbo_draws"),
        ({"max_steps": 0}, ValueError, "max_steps"),
        ({"init": {"y": 0.0}}, KeyError, "y"),
        ({"key": 0}, TypeError, "key"),
        ({"data": {"mean": MEAN}}, ValueError, "structure"),
        ({"target": 3}, TypeError, "Target"),
    ],
)
def test_wrong_arguments_are_refused(gaussian, options, kind, fragment):
    with pytest.raises(kind, match=fragment):
        vi.solvers.pathfinder(**{"target": gaussian, "key": KEY} | options)
