"""Lanes in two stages: the same F at few draws and at all, distinct optima, shared results."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

import vi_params as vi
from vi_params._over import lanes_in_turn
from vi_params.approximation.optima import optima, solver, together
from vi_params.solvers.deterministic import default_draws
from vi_params.solvers.fixed_draws import FEW, FRESH, MANY, fixed_draws
from vi_params.solvers.lanes import in_stages, planned
from vi_params.solvers.solution import SolverStatus
from vi_params.solvers.trust_region import LAST, Minimum

KEY = jax.random.key(0)


def covariance_of(solution):
    """Of a solution with a dense root."""
    root = vi.constrain(solution.guide.declared, solution.params)["guide"]["scale_tril"]
    return np.asarray(root @ root.T)


def modes(heights):
    """Two normals in the plane, far apart."""

    def log_density(values, latents, data):
        z = latents["z"]
        first = data[0] - 0.5 * jnp.sum((z + 6.0) ** 2)
        second = data[1] - 0.5 * jnp.sum((z - 6.0) ** 2)
        return jnp.logaddexp(first, second)

    return vi.target(log_density, {"z": vi.Latent((2,))}, data=jnp.asarray(heights))


def assert_same_loss(plain, staged, stage, x, v):
    """The value, gradient and product with the Hessian of one loss, and of a stage of another."""
    expected, found = plain.expand(x, LAST), staged.expand(x, stage)
    for one, other in zip(expected[:2], found[:2], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    products = plain.product(expected[2], v), staged.product(found[2], v)
    np.testing.assert_allclose(*products, rtol=1e-3, atol=1e-3)
    return expected[2], found[2]


def test_a_first_stage_is_the_loss_at_its_few_draws():
    """Value, gradient, Hessian and slopes are those of a loss at these draws alone, with a Hessian
    held as a matrix and with products; those of the last stage are those at all draws."""

    def log_density(u, theta):
        return -jnp.sum(u**4) - jnp.prod(u[:2])

    for dim in (2, 40):
        draws = vi.noise.moment_matched().draw(KEY, 12, dim)
        few = jnp.stack(
            [vi.noise.moment_matched().draw(jax.random.key(i), FEW, dim) for i in (1, 2)]
        )
        rng = np.random.default_rng(0)
        x, v = (jnp.asarray(rng.normal(size=2 * dim) * 0.3, jnp.float32) for _ in range(2))
        for size in (1, 2**30):  # all at once; one by one
            staged = fixed_draws(log_density, draws, size, 0, few)
            for stage, alone in ((np.int32(0), few[0]), (np.int32(1), few[1]), (LAST, draws)):
                plain = fixed_draws(log_density, alone, size, 0)
                expected, found = assert_same_loss(plain, staged, stage, x, v)
                if dim == 2:
                    rows = jnp.array([0, 1, 6, 7]) if stage != LAST else jnp.arange(12)
                    slopes = found.slopes[rows]
                    np.testing.assert_allclose(slopes, expected.slopes, rtol=1e-4, atol=1e-4)


def test_later_stages_are_the_loss_at_fresh_draws_and_at_all():
    """Value, gradient and products; with a Hessian held, the slopes at the first draws and of every
    pair the mean gradient over the sets."""

    def log_density(u, theta):
        return -jnp.sum(u**4) - jnp.prod(u[:2])

    for dim in (2, 40):
        scheme, keys = vi.noise.moment_matched(), jax.random.split(KEY, 5)
        draws, *fresh = (scheme.draw(key, 12, dim) for key in keys[:3])
        few = jnp.stack([scheme.draw(key, FEW, dim) for key in keys[3:]])
        rng = np.random.default_rng(0)
        x, v = (jnp.asarray(rng.normal(size=2 * dim) * 0.3, jnp.float32) for _ in range(2))
        staged = fixed_draws(log_density, draws, 1, 0, few, jnp.stack(fresh))
        everything = jnp.concatenate([*fresh, draws])
        cases = (np.int32(1), few[1]), (LAST, draws), (FRESH, fresh[0]), (MANY, everything)
        for stage, alone in cases:
            assert_same_loss(fixed_draws(log_density, alone, 1, 0), staged, stage, x, v)
        if dim == 2:
            found = staged.expand(x, MANY)[2]
            sets = [fixed_draws(log_density, e, 1, 0).expand(x, LAST)[2] for e in (*fresh, draws)]
            np.testing.assert_allclose(found.slopes, sets[-1].slopes, rtol=1e-4, atol=1e-4)
            scores = np.mean([one.scores for one in sets], axis=0)
            np.testing.assert_allclose(found.scores, scores, rtol=1e-4, atol=1e-4)


def sum_of_lognormals(number=40):
    """Normal latents, half of them exponentiated, whose sum is observed: the ELBO of mean-field has
    a closed form."""
    half, seen = number // 2, number / 2

    def log_density(values, latents, data):
        z = latents["z"]
        total = jnp.sum(z[:half]) + jnp.sum(jnp.exp(z[half:]))
        return -0.5 * jnp.sum(z**2) - 0.5 * (seen - total) ** 2

    def elbo(m, w):
        variance = jnp.exp(2 * w)
        means = jnp.exp(m[half:] + 0.5 * variance[half:])
        mean = jnp.sum(m[:half]) + jnp.sum(means)
        spread = jnp.sum(variance[:half]) + jnp.sum(means**2 * jnp.expm1(variance[half:]))
        energy = jnp.sum(m**2 + variance) + (seen - mean) ** 2 + spread
        return jnp.sum(w) - 0.5 * energy

    return vi.target(log_density, {"z": vi.Latent((number,))}), elbo


ON_CPU = pytest.mark.skipif(not lanes_in_turn(), reason="accelerators have one stage")


@ON_CPU
def test_the_elbo_is_not_short_of_the_best_one():
    """By draws that are too few it is: fresh ones tell, and it goes on at many."""
    target, elbo = sum_of_lognormals()

    def loss(x):
        return -elbo(x[:40], x[40:])

    best = -optimize.minimize(
        jax.jit(loss), jnp.full(80, -0.5), jac=jax.jit(jax.grad(loss)), method="BFGS"
    ).fun
    for num_draws, bounds in ((None, (0.0, 0.1)), (80, (0.12, 2.0))):
        for seed in range(3):
            solution = vi.solvers.deterministic(target, jax.random.key(seed), num_draws=num_draws)
            found = solution.params["guide"]
            assert solution.info.status == SolverStatus.CONVERGED
            assert len(solution.noise) == 80
            assert solution.info.details == (80 if num_draws else 1280)
            assert bounds[0] - 1e-3 < best - elbo(found["loc"], found["scale"]) < bounds[1]


@pytest.mark.parametrize("dim", [3, 40])
def test_where_draws_are_enough_it_stays(dim):
    """The optimum of a quadratic is exact at the first draws: others promise nothing."""
    root = jnp.eye(dim) + 0.5 * jnp.tril(jnp.ones((dim, dim)), -1)
    target = vi.target(
        lambda v, z, d: -0.5 * jnp.sum((root @ z["z"]) ** 2), {"z": vi.Latent((dim,))}
    )
    number = vi.solvers.deterministic(target, KEY).noise.shape[0]
    found, expected = (
        vi.solvers.deterministic(target, KEY, num_draws=n, lanes=1) for n in (None, number)
    )
    assert found.info.steps == expected.info.steps + lanes_in_turn()  # the one that tells
    assert found.info.details == number
    np.testing.assert_array_equal(found.params["guide"]["loc"], expected.params["guide"]["loc"])


@ON_CPU
def test_what_follows_a_solution_at_many_draws():
    """Covariances are those of an optimum, though the first draws have another one; `refine` begins
    from as many draws as there are."""
    target, _ = sum_of_lognormals()
    solution = vi.solvers.deterministic(target, KEY)
    assert solution.info.details == 1280
    expected = vi.linear_response(
        target, vi.solvers.deterministic(target, KEY, num_draws=1280, lanes=1)
    )
    units = np.sqrt(np.diagonal(covariance_of(expected)))
    for options in ({}, {"rank": 40}):
        found = vi.linear_response(target, solution, **options)
        assert found.info.status == SolverStatus.CONVERGED
        if not options:
            sds = np.sqrt(np.diagonal(covariance_of(found)))
            np.testing.assert_allclose(sds / units, 1.0, atol=0.25)
    finer = vi.solvers.refine(target, KEY, init=solution, tolerable=0.01, doublings=1)
    assert finer.info.details == 2560


@ON_CPU
def test_the_error_of_many_draws_is_smaller():
    """What linear response estimates is that of all draws."""
    target, _ = sum_of_lognormals(32)
    few, many = (
        vi.linear_response(target, vi.solvers.deterministic(target, KEY, num_draws=n))
        for n in (64, None)
    )
    assert len(few.noise) == len(many.noise) == 64
    assert (few.info.details, many.info.details) == (64, 1024)
    ratio = float(few.info.sampling_error / many.info.sampling_error)
    assert 3.0 < ratio < 5.0  # sixteen times as many


def test_derivatives_are_those_of_autodiff():
    """The loss, its gradient and Hessian in (m, w, theta), the slopes and the gradients of pairs,
    with draws side by side, in blocks and one by one."""

    def log_density(u, theta):
        return -jnp.sum(jnp.cosh(u - theta[0])) - jnp.prod(u) * theta[1] - theta[2] ** 4

    draws = vi.noise.moment_matched().draw(KEY, 8, 2)
    x = jnp.asarray(np.random.default_rng(0).normal(size=7) * 0.5, jnp.float32)
    z, theta = x[:2] + jnp.exp(x[2:4]) * draws, x[4:]

    def plain(x, draws=draws):
        terms = jax.vmap(lambda e: log_density(x[:2] + jnp.exp(x[2:4]) * e, x[4:]))(draws)
        return -jnp.mean(terms) - jnp.sum(x[2:4])

    pairs = jax.vmap(lambda i: jax.grad(plain)(x, draws[jnp.array([i, i + 4])]))(jnp.arange(4))
    for size in (1, 2**14, 2**30):
        value, slope, curvature = fixed_draws(log_density, draws, size, 3).expand(x, LAST)
        np.testing.assert_allclose(value, plain(x), rtol=1e-5)
        np.testing.assert_allclose(slope, jax.grad(plain)(x), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(curvature.hessian, jax.hessian(plain)(x), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(curvature.scores, pairs, rtol=1e-4, atol=1e-4)
        slopes = jax.vmap(lambda u: jax.grad(log_density)(u, theta))(z)
        np.testing.assert_allclose(curvature.slopes, slopes, rtol=1e-4, atol=1e-4)


def test_every_optimum_is_found_the_best_first():
    found = optima(modes([0.0, 1.0]), KEY, jnp.array([0.0, 1.0]), {}, 8)
    elbos = [float(one.info.elbo) for one in found]
    # log of height times mass, 2 pi in the plane.
    expected = sorted([np.log(2 * np.pi), 1.0 + np.log(2 * np.pi)], reverse=True)
    np.testing.assert_allclose(elbos, expected, atol=1e-3)
    locs = np.array([one.params["guide"]["loc"] for one in found])
    np.testing.assert_allclose(locs, [[6.0, 6.0], [-6.0, -6.0]], atol=1e-2)


def test_lanes_of_one_optimum_share_its_result():
    """Each lane has parameters, ELBO and response of the lane that went on for it, to the bit; side
    by side, as on an accelerator, all go on."""
    target = vi.target(
        lambda values, latents, data: -jnp.sum(jnp.cosh(latents["z"] - 1.0)),
        {"z": vi.Latent((3,))},
    )
    solution = vi.solvers.deterministic(target, KEY, lanes=6)
    found = (*solution.lanes, solution.info.lane_elbos, solution.info.lane_statuses)
    apart = 0.0 if lanes_in_turn() else 1e-3
    for leaf in map(np.asarray, jax.tree.leaves(found)):
        shared = np.broadcast_to(leaf[0], leaf.shape)
        np.testing.assert_allclose(leaf, shared, rtol=apart, atol=apart)
    two = vi.solvers.deterministic(modes([0.0, 1.0]), KEY, lanes=6)
    right = np.asarray(two.lanes[0]["guide"]["loc"])[:, 0] > 0
    assert 0 < right.sum() < 6
    elbos = np.where(right, 1.0, 0.0) + np.log(2 * np.pi)
    np.testing.assert_allclose(two.info.lane_elbos, elbos, atol=1e-3)


def minima(x, value):
    zeros = jnp.zeros(len(value), jnp.int32)
    return Minimum(x, value, (), zeros, zeros)


def test_who_goes_on():
    """The best of every optimum, distances in the smaller scale, in the order of their losses; not
    what has no finite loss; a lane that is at the second stage already before all others."""
    locs = jnp.array([0.0, 0.5, 5.0, 5.1, 9.0, 20.0, 0.2])
    scales = jnp.array([1.0, 1.0, 1.0, 0.01, 1.0, 1.0, 1.0])
    value = jnp.array([2.0, 1.0, 3.0, 2.5, 90.0, jnp.inf, -jnp.inf])
    x = jnp.stack([locs, jnp.log(scales)], axis=1)
    order, leaders = planned(minima(x, value), 1)
    assert order.tolist() == [6, 1, 0, 3, 2, 4, 5]
    assert leaders.tolist() == [6, 6, 2, 3, 4, -1, 6]  # 2 is ten scales of 3 away from it
    # Another value of the target's own parameter is another optimum.
    model = jnp.where(jnp.arange(7) == 1, 1.0, 0.0)[:, None]
    _, leaders = planned(minima(jnp.concatenate([x, model], axis=1), value), 1)
    assert leaders.tolist() == [6, 1, 2, 3, 4, -1, 6]


def test_the_best_of_two_optima_that_are_near_a_lane_leads_it():
    locs = jnp.array([0.0, 3.0, 1.5])
    x = jnp.stack([locs, jnp.zeros(3)], axis=1)
    assert planned(minima(x, jnp.array([1.0, 0.0, 2.0])), 1)[1].tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("ended", "at"), [(SolverStatus.INVALID_START, jnp.inf), (SolverStatus.MAX_STEPS, 1e18)]
)
def test_lanes_go_on_themselves_where_the_best_one_came_to_no_end(ended, at):
    """In the first stage lane 1 of three at one optimum is the best one; at all draws it fails."""
    first = jnp.array([2.0, 1.0, 3.0])

    def lane(number, stage, x, enabled):
        fails = (stage == LAST) & (number == 1)
        value = jnp.where(stage == LAST, 10.0 + number, first[number])
        value = jnp.where(fails, at, value)
        status = jnp.where(fails, jnp.int32(ended), SolverStatus.CONVERGED)
        here = Minimum(jnp.zeros(2) + 0.1 * number, value, (), jnp.int32(4), status)
        return jax.tree.map(lambda leaf: jnp.where(enabled, leaf, 99), here)

    found, *_ = in_stages(lane, minima(jnp.full((3, 2), jnp.nan), jnp.full(3, jnp.inf)), 1)
    np.testing.assert_allclose(found.value, [10.0, at, 12.0])
    assert found.steps.tolist() == [8, 8, 8]


def test_what_is_short_goes_on_and_is_told():
    """Of two optima one is short: it ends at many draws, its status told; lanes are compared where
    they were at the same draws."""

    def lane(number, stage, x, enabled):
        is_short = number == 0
        value = jnp.select([stage == LAST, stage == MANY], [10.0 + number, 50.0], 1.0 + number)
        fails = is_short & ((stage == FRESH) | (stage == MANY))
        status = jnp.where(fails, SolverStatus.MAX_STEPS, SolverStatus.CONVERGED)
        at = jnp.where(stage == FRESH, 99.0, 20.0 * number)
        here = Minimum(jnp.stack([at, 0.0 * at]), value, (), jnp.int32(3), status.astype("int32"))
        return jax.tree.map(lambda leaf: jnp.where(enabled, leaf, 99), here)

    begun = minima(jnp.full((2, 2), jnp.nan), jnp.full(2, jnp.inf))
    found, best, many = in_stages(lane, begun, 1, goes_on=True)
    np.testing.assert_allclose(found.value, [50.0, 11.0])
    np.testing.assert_allclose(found.x[:, 0], [0.0, 20.0])
    assert found.status.tolist() == [SolverStatus.MAX_STEPS, SolverStatus.CONVERGED]
    assert found.steps.tolist() == [12, 9]
    assert int(best) == 0
    assert bool(many)


def test_the_first_stage_is_rough(monkeypatch):
    """It ends sooner than it would by the tolerance of the second one, which ends where it did."""

    def log_density(values, latents, data):
        return -jnp.sum(jnp.cosh(3.0 * latents["z"]))

    found = []
    for rough in (0.0, 0.1):
        monkeypatch.setattr("vi_params.solvers.lanes.ROUGH", rough)
        target = vi.target(log_density, {"z": vi.Latent((40,))})
        found.append(vi.solvers.deterministic(target, KEY, lanes=1).info)
    assert found[1].steps < found[0].steps
    np.testing.assert_allclose(found[0].elbo, found[1].elbo, rtol=1e-5)


@pytest.mark.parametrize("lanes", [1, 5, 8])
def test_halves_of_the_lanes_find_what_all_do(lanes):
    """Every lane ends where it does in one search, the better optimum is the solution's, and the
    other one is told."""
    target, fewer, key = modes([0.0, 1.0]), modes([0.0, -40.0]), jax.random.key(3)
    expected = vi.solvers.deterministic(target, key, lanes=lanes, num_draws=default_draws(2))
    found = optima(target, key, target.data, {}, lanes)
    assert found[0].info.lane_elbos.shape == (lanes,)
    np.testing.assert_allclose(found[0].info.lane_elbos, expected.info.lane_elbos, atol=0.05)
    np.testing.assert_array_equal(found[0].info.lane_statuses, expected.info.lane_statuses)
    np.testing.assert_allclose(
        found[0].lanes[0]["guide"]["loc"], expected.lanes[0]["guide"]["loc"], atol=0.1
    )
    if lanes == 8:
        assert len(found) == 2
        assert [round(float(one.params["guide"]["loc"][0])) for one in found] == [6, -6]
        assert len(optima(fewer, key, fewer.data, {}, lanes)) == 1  # it holds no mass that matters


def test_the_better_half_is_the_solution(monkeypatch):
    """Whichever it is."""
    target, key = modes([0.0, 1.0]), jax.random.key(3)
    guide, solve = solver(target, {}, 8)
    parts = [solve(key, target.data, {}, None, np.int32(numbers)) for numbers in ([0, 1], [2, 3])]
    worse = (parts[0][0], parts[0][1]._replace(elbo=parts[0][1].elbo - 5.0), *parts[0][2:])
    for order in ([worse, parts[1]], [parts[1], worse]):
        found = together(guide, order)
        assert float(found.info.elbo) == float(parts[1][1].elbo)
        np.testing.assert_array_equal(found.params["guide"]["loc"], parts[1][0]["guide"]["loc"])


def test_what_is_told_is_of_all_draws():
    """Four draws flatter where latents are correlated: the ELBO, gradients at the draws and
    statuses of every lane are those at all of them."""

    def log_density(values, latents, data):
        return -5e3 * jnp.sum(latents["z"]) ** 2 - 0.5 * jnp.sum(latents["z"] ** 2)

    target = vi.target(log_density, {"z": vi.Latent((8,))})
    precision = 1e4 * jnp.ones((8, 8)) + jnp.eye(8)
    for seed in range(6):
        solution = vi.solvers.deterministic(target, jax.random.key(seed), lanes=8)
        scale = jnp.exp(solution.params["guide"]["scale"])
        u = solution.params["guide"]["loc"] + scale * solution.noise
        energy = 0.5 * jnp.mean(jnp.einsum("ni,ij,nj->n", u, precision, u))
        entropy = jnp.sum(jnp.log(scale)) + 4 * (1 + jnp.log(2 * jnp.pi))
        np.testing.assert_allclose(solution.info.elbo, entropy - energy, rtol=1e-4)
        assert bool(jnp.all(jnp.any(solution.response.slopes != 0, axis=1)))
        assert float(jnp.ptp(solution.info.lane_elbos)) < 1e-2  # it is a quadratic: one optimum


def test_one_stage_for_lanes_side_by_side(monkeypatch):
    """As on an accelerator: all lanes at all draws in step, to the same optimum."""
    key = jax.random.key(3)
    expected = vi.solvers.deterministic(modes([0.0, 1.0]), key)
    for where in ("vi_params._over", "vi_params.solvers.lanes"):
        monkeypatch.setattr(f"{where}.lanes_in_turn", lambda: False)
    found = vi.solvers.deterministic(modes([0.0, 1.0]), key)
    np.testing.assert_allclose(found.info.elbo, expected.info.elbo, atol=1e-3)
    for one, other in zip(*map(jax.tree.leaves, (found.params, expected.params)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-2)
    elbos = np.where(np.asarray(found.lanes[0]["guide"]["loc"])[:, 0] > 0, 1.0, 0.0)
    np.testing.assert_allclose(found.info.lane_elbos, elbos + np.log(2 * np.pi), atol=1e-3)


def test_an_optimum_at_few_draws_need_not_be_finite_at_all():
    """A lane whose first optimum is of no use at all draws goes on from its own starts."""

    def log_density(values, latents, data):
        z = latents["z"]
        return jnp.where(jnp.abs(z) <= 1.6, -0.5 * z**2, -jnp.inf)

    target = vi.target(log_density, {"z": vi.Latent(())})
    solution = vi.solvers.deterministic(target, KEY, init={"z": 0.1})
    # Four matched draws end at scale 1: none is above sqrt(2). Of all draws one is outside then.
    assert float(jnp.max(jnp.abs(solution.noise))) > 1.6
    own = solution.params["guide"]
    assert float(jnp.max(jnp.abs(own["loc"] + jnp.exp(own["scale"]) * solution.noise))) < 1.601
    assert np.isfinite(solution.info.elbo)


def test_stages_are_one_program(compilations):
    target = modes([0.0, 0.0])
    vi.solvers.deterministic(target, KEY)
    other = jnp.array([1.0, 0.5])
    with compilations() as seen:
        found = vi.solvers.deterministic(target, jax.random.key(5), other)
    assert seen == []
    assert np.any(np.isclose(found.info.elbo, other + np.log(2 * np.pi), atol=1e-3))
