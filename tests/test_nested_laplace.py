"""A Gaussian whose mean and precision follow the latents that keep a posterior from being one."""

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro import distributions as dist
from scipy import stats

import vi_params as vi
from vi_params._compile import compiler
from vi_params.approximation.candidate import best_of, judge_of, with_wide_tails
from vi_params.approximation.candidate import judged as candidate_of
from vi_params.approximation.nested import WELL, nested, settles
from vi_params.approximation.nested import _nodes as moved_nodes
from vi_params.approximation.proposals import log_density_of
from vi_params.approximation.structure import LARGEST, has_structure, structure_of
from vi_params.guides.frame import CLIPPED, Coupled, Frame, spline_terms
from vi_params.importance import Weighted
from vi_params.importance.psis import psis_on_host
from vi_params.solvers.nested_frame import (
    Nodes,
    along,
    first_nodes,
    nested_frame,
    num_nodes_for,
    spread_nodes,
)
from vi_params.solvers.third_derivative import fixed_directions, third_derivative

enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64

KEY = jax.random.key(0)
EPS = np.finfo(float).eps
DIM, FIXED, NODES = 5, 2, 7
ROOT = np.tril(0.3 * stats.norm.rvs(size=(DIM, DIM), random_state=1), -1) + np.eye(DIM)
NUM_TERMS = 1 + FIXED + NODES
SIZES = np.repeat([0.1, 3e-4], [1 + FIXED, NODES])  # cubes are large far out
FRAME = Frame(
    stats.norm.rvs(size=DIM, random_state=2),
    ROOT,
    stats.ortho_group.rvs(DIM, random_state=3),
    *(SIZES[:, None] * stats.norm.rvs(size=(2, NUM_TERMS, DIM - FIXED), random_state=4)),
    np.array([0.5, 0.0, -0.8]),
    Coupled(
        SIZES[:, None, None] * stats.norm.rvs(size=(NUM_TERMS, 3, 3), random_state=5),
        stats.norm.rvs(size=(NODES, FIXED), random_state=6),
        np.array([0.3, -0.2]),
        np.array([1.5, 0.7]),
    ),
)
CORRELATION = np.array([[1.0, 0.9, 0.0], [0.9, 1.0, -0.5], [0.0, -0.5, 1.5]])


def process(values, latents, data):
    """Three latents given two: their covariance turns with one and grows with the other."""
    scale, turn, rest = latents["scale"], latents["turn"], latents["rest"]
    prior = dist.Normal(0, 0.7).log_prob(scale) + dist.Normal(0, 0.7).log_prob(turn)
    mean = jnp.array([turn, 0.5 * turn**2, scale])
    covariance = jnp.exp(scale) * (jnp.eye(3) + CORRELATION * jnp.exp(turn))
    return prior + dist.MultivariateNormal(mean, covariance).log_prob(rest)


TARGET = vi.target(
    process, {"scale": vi.Latent(()), "turn": vi.Latent(()), "rest": vi.Latent((3,))}
)


def curved(values, latents, data):
    """Twelve latents with a common regression on one another that a thirteenth turns."""
    x, y = latents["x"], latents["y"]
    steps = jnp.concatenate([y[:1], y[1:] - jnp.tanh(x) * y[:-1]])
    return -0.5 * x**2 + dist.Normal(0, jnp.exp(0.25 * x)).log_prob(steps).sum()


CURVED = vi.target(curved, {"x": vi.Latent(()), "y": vi.Latent((12,))})


def gaussian_of(target):
    return vi.linear_response(target, vi.solvers.deterministic(target, KEY))


def share(target, found, key=1):
    diagnosis = vi.diagnose(target, found.guide, found.params, jax.random.key(key))
    return float(diagnosis.ess) / diagnosis.num_draws


def test_a_coupled_frame_there_and_back():
    """Coordinates are undone, their Jacobian is that of autodiff, and the host's numbers are the
    program's, within reach of the nodes and beyond."""
    with enable_x64(True):
        frame = jax.tree.map(jnp.asarray, FRAME)
        y = stats.norm.rvs(size=(20, DIM), random_state=7)
        y = np.concatenate([y, np.full((1, DIM), 2 * CLIPPED)])
        u, log_det = FRAME.unconstrained_with_log_det(y, np)
        np.testing.assert_allclose(FRAME.coordinates(u, np), y, rtol=1e-6, atol=1e-8)
        rows = frame.unconstrained(jnp.asarray(y))
        np.testing.assert_allclose(rows, u, rtol=1e-8)
        np.testing.assert_allclose(frame.unconstrained(jnp.asarray(y[3])), u[3], rtol=1e-8)
        np.testing.assert_allclose(frame.coordinates(rows), y, rtol=1e-6, atol=1e-8)
        jacobians = jax.vmap(jax.jacobian(frame.unconstrained))(jnp.asarray(y))
        np.testing.assert_allclose(log_det, np.linalg.slogdet(jacobians)[1], rtol=1e-8)
        np.testing.assert_allclose(frame.log_det(jnp.asarray(y)), log_det, rtol=1e-8)
        np.testing.assert_allclose(FRAME.log_det(y, np), log_det, rtol=1e-12)


@pytest.mark.parametrize("xp", [np, jnp])
def test_third_derivatives(xp):
    """Of a cubic density they are those of autodiff, in the coordinates asked for."""
    with enable_x64(True):
        cubic = jnp.asarray(stats.norm.rvs(size=(4, 4, 4), random_state=0))

        def log_density(z):
            return -0.5 * z @ z + jnp.einsum("ijk,i,j,k->", cubic, z, z, z)

        def gradient(rows):
            return xp.asarray(jax.vmap(jax.grad(log_density))(jnp.asarray(rows)))

        exact = jax.jacfwd(jax.hessian(log_density))(jnp.zeros(4))
        found = third_derivative(gradient, 4, xp)
        assert isinstance(found, np.ndarray) == (xp is np)
        np.testing.assert_allclose(found, exact, atol=1e-9)


def test_the_latents_that_are_fixed():
    """The scale and the turn, in whatever units and order, and no more than are worth it; what is
    left is what autodiff leaves orthogonal to them."""
    with enable_x64(True):
        flat = vi.flat(TARGET)
        loc = np.zeros(5)
        scale_tril = np.linalg.cholesky(np.diag([0.3, 4.0, 0.5, 0.5, 2.0]) + 0.05)
        where = np.array(
            [
                flat.unconstrain(
                    {"scale": float(i == 0), "turn": float(i == 1), "rest": jnp.zeros(3)}, {}
                )
                for i in range(2)
            ]
        )

        def log_density(z):
            return flat.log_density(loc + jnp.asarray(scale_tril) @ z)

        def gradient(rows):
            return np.asarray(jax.vmap(jax.grad(log_density))(jnp.asarray(rows)))

        third = third_derivative(gradient, 5, np)
        directions, left = fixed_directions(third, scale_tril, xp=np)
        assert directions.shape == (5, 2)
        np.testing.assert_allclose(directions.T @ directions, np.eye(2), atol=1e-12)
        rows = where @ scale_tril  # what fixing these two latents fixes
        np.testing.assert_allclose(rows @ directions @ directions.T, rows, atol=1e-12)
        rest = np.eye(5) - directions @ directions.T
        projected = np.einsum("ijk,ia,jb,kc->abc", third, rest, rest, rest)
        np.testing.assert_allclose(left[-1], np.sum(projected**2), rtol=1e-8, atol=1e-12)
        assert left[0] > left[1] > 3 * left[2]

        more, _ = fixed_directions(jnp.asarray(third), jnp.asarray(scale_tril), 2)
        np.testing.assert_allclose(np.abs(more), np.abs(directions), atol=1e-8)
        nothing, left = fixed_directions(0.01 * third, scale_tril, xp=np)
        assert nothing.shape == (5, 0)  # a Gaussian has none
        assert len(left) == 1


def test_none_is_fixed_where_many_matter_alike():
    """As where every latent is skewed by itself."""
    third = np.zeros((9, 9, 9))
    third[np.arange(9), np.arange(9), np.arange(9)] = 1.0
    directions, left = fixed_directions(third, np.eye(9), xp=np)
    assert directions.shape == (9, 0)
    np.testing.assert_allclose(left, [9.0])
    directions, _ = fixed_directions(np.full_like(third, np.nan), np.eye(9), xp=np)
    assert directions.shape == (9, 0)


@pytest.mark.parametrize("xp", [np, jnp])
def test_directions_of_latents_that_are_nearly_the_same(xp):
    """Are orthonormal all the same, and those of these latents as long as they are apart."""
    root = xp.asarray(np.linalg.cholesky(np.full((4, 4), 0.999) + 0.001 * np.eye(4)))
    third = np.zeros((4, 4, 4))
    third[0, 0, 0] = 1.0
    directions, _ = fixed_directions(xp.asarray(third), root, 3, xp)
    assert directions.shape == (4, 3)
    np.testing.assert_allclose(directions.T @ directions, np.eye(3), atol=1e-5)


def test_only_modes_count():
    """Across there is a Student-t distribution with a weak prior: far out its Hessian is not
    negative definite, or hardly. What counts is where the gradient is zero."""
    frame = along(np.zeros(2), np.eye(2), np.eye(2)[:, :1], np)
    starts = frame._replace(
        shifts=np.array([[0.0], [8.0]])  # linear in the node
    )

    def gradient(rows):
        c = rows[:, 1:]
        return np.concatenate([-rows[:, :1], -4 * c / (0.3 + c**2) - 0.2 * c], axis=1)

    found, enough = nested_frame(starts, gradient, EPS, xp=np)
    assert enough
    nodes = first_nodes(1, float, np).a
    at = found.unconstrained(np.concatenate([nodes, 0 * nodes], axis=1), np)
    np.testing.assert_allclose(at[:, 1], 0.0, atol=1e-3)

    def unknown(rows):  # where the modes are
        at = gradient(rows)
        return np.where(np.abs(rows[:, 1:]) < 3.0, np.nan, at)

    _, enough = nested_frame(starts._replace(shifts=starts.shifts + 40.0), unknown, EPS, xp=np)
    assert not enough


@pytest.mark.parametrize("xp", [np, jnp])
def test_modes_and_precisions_between_the_nodes(xp):
    """Given the two latents the density is a Gaussian in closed form: at the nodes its mean and
    covariance are those found, and near them almost."""
    with enable_x64(True):
        flat = vi.flat(TARGET)
        index = [
            int(np.argmax(flat.unconstrain({**zeros(), name: 1.0}, {})))
            for name in ("scale", "turn")
        ]
        rest = [i for i in range(5) if i not in index]
        directions = np.eye(5)[:, index]
        frame = along(xp.zeros(5), xp.eye(5), xp.asarray(directions), xp)

        def gradient(rows):
            return xp.asarray(jax.vmap(jax.grad(flat.log_density))(jnp.asarray(rows)))

        found, enough = nested_frame(frame, gradient, EPS, xp=xp)
        assert enough
        nodes = first_nodes(2, float, np).a
        near = nodes[np.max(np.abs(nodes), axis=1) < 1.5] + 0.15
        inside = nodes[np.max(np.abs(nodes), axis=1) < 2.5]
        for places, tolerance in [(inside, 1e-5), (near, 0.03)]:
            places = xp.asarray(places)
            y = xp.concatenate([places, xp.zeros((len(places), 3))], axis=1)
            centre = np.asarray(found.unconstrained(y, xp))
            scale, turn = centre[:, index].T
            mean = np.stack([turn, 0.5 * turn**2, scale], axis=1)
            sd = np.exp(0.5 * scale)[:, None]
            assert np.max(np.abs(centre[:, rest] - mean) / sd) < tolerance
            for i in range(len(places)):
                axes = [found.unconstrained(y[i] + xp.eye(5)[2 + j], xp) for j in range(3)]
                root = (np.asarray(axes) - centre[i])[:, rest].T
                exact = np.exp(scale[i]) * (np.eye(3) + CORRELATION * np.exp(turn[i]))
                ratio = np.linalg.solve(exact, root @ root.T)
                np.testing.assert_allclose(ratio, np.eye(3), atol=5 * tolerance)


def zeros():
    return {"scale": jnp.zeros(()), "turn": jnp.zeros(()), "rest": jnp.zeros(3)}


def test_without_modes_nothing_follows():
    """Where no node has a mode the frame is the Gaussian's."""
    frame = along(np.zeros(3), np.eye(3), np.eye(3)[:, :1], np)
    found, enough = nested_frame(frame, lambda rows: np.full_like(rows, np.nan), EPS, xp=np)
    assert not enough
    y = stats.norm.rvs(size=(6, 3), random_state=0)
    np.testing.assert_allclose(found.unconstrained(y, np), frame.unconstrained(y, np))


def test_nodes_with_no_mode_do_not_count():
    """The spline goes through the others."""
    frame = along(np.zeros(2), np.eye(2), np.eye(2)[:, :1], np)

    def gradient(rows):  # the mode is the sine of the first, which is not known beyond 2
        known = np.where(np.abs(rows[:, :1]) < 2, np.sin(rows[:, :1]), np.nan)
        return np.concatenate([-rows[:, :1], known - rows[:, 1:]], axis=1)

    a = np.linspace(-2.5, 2.5, 32)[:, None]
    a.flags.writeable = False  # what is given is not written into
    nodes = Nodes(a, np.zeros(1), np.ones(1))
    found, enough = nested_frame(frame, gradient, EPS, nodes, xp=np)
    assert enough
    inside = np.linspace(-1.5, 1.5, 9)
    at = found.unconstrained(np.stack([inside, 0 * inside], axis=1), np)
    np.testing.assert_allclose(at[:, 1], np.sin(inside), atol=1e-3)


def test_nodes_beyond_the_clip_do_not_count():
    """There two of them would be the same to the spline."""
    frame = along(np.zeros(2), np.eye(2), np.eye(2)[:, :1], np)
    a = np.append(np.linspace(-3, 3, 30), [CLIPPED + 1, CLIPPED + 2])[:, None]
    nodes = Nodes(a, np.zeros(1), np.ones(1))
    found, _ = nested_frame(
        frame, lambda rows: np.stack([-rows[:, 0], rows[:, 0] - rows[:, 1]], axis=1), EPS, nodes, np
    )
    inside = np.linspace(-3, 3, 9)
    at = found.unconstrained(np.stack([inside, 0 * inside], axis=1), np)
    np.testing.assert_allclose(at[:, 1], inside, atol=1e-6)
    assert np.max(np.abs(found.shifts)) < 2


def test_splines_have_gradients_at_their_nodes():
    """In float32, too, where a square may be less than zero by rounding."""
    nodes = jnp.asarray(spread_nodes(1, 32), jnp.float32)
    near = jnp.concatenate([nodes, nodes + 1e-4, jnp.linspace(-3, 3, 4000)[:, None]])
    slopes = jax.vmap(jax.jacobian(lambda x: spline_terms(x, nodes)))(near.astype(jnp.float32))
    assert np.all(np.isfinite(slopes))


@pytest.mark.parametrize("num", [1, 2, 3, 4])
def test_nodes_reach_into_the_tails(num):
    """They have the spread of the Student-t distribution that they stand for, and no two are the
    same."""
    nodes = spread_nodes(num, num_nodes_for(num))
    assert nodes.shape == (num_nodes_for(num), num)
    assert len(np.unique(nodes, axis=0)) == len(nodes)
    assert 3.5 < np.max(np.abs(nodes)) < CLIPPED
    np.testing.assert_allclose(np.median(np.abs(nodes)), 1.3 * stats.t.ppf(0.75, 5), rtol=0.15)


def test_it_follows_what_a_conditional_gaussian_does_not():
    """A covariance that turns with one latent and grows with another."""
    start = gaussian_of(TARGET)
    found = vi.solvers.nested_laplace(TARGET, start)
    conditional = vi.solvers.conditional_gaussian(TARGET, start, key=KEY)
    assert share(TARGET, found) > 0.85 > 0.75 > share(TARGET, conditional)
    assert share(TARGET, found) > 2 * share(TARGET, start)
    assert found.info == start.info


def test_it_is_pure_and_can_be_mapped():
    """The same in a program, over many starts at once, and compiled once."""

    @jax.jit
    def fitted(key):
        start = vi.linear_response(TARGET, vi.solvers.deterministic(TARGET, key))
        return vi.solvers.nested_laplace(TARGET, start).params

    together = jax.vmap(fitted)(jax.random.split(KEY, 2))
    alone = fitted(jax.random.split(KEY, 2)[1])
    guide = vi.solvers.nested_laplace(TARGET, gaussian_of(TARGET)).guide
    shares = []
    for params in (jax.tree.map(lambda leaf: leaf[1], together), alone):
        diagnosis = vi.diagnose(TARGET, guide, params, KEY)
        shares.append(float(diagnosis.ess) / diagnosis.num_draws)
    assert min(shares) > 0.5
    np.testing.assert_allclose(*shares, rtol=0.02)


def test_a_second_call_compiles_nothing(compilations):
    start = gaussian_of(TARGET)
    vi.solvers.nested_laplace(TARGET, start)
    with compilations() as seen:
        vi.solvers.nested_laplace(TARGET, start)
    assert not seen


def test_the_guide_knows_its_density():
    """What a draw says of its density is what is found from its place."""
    found = vi.solvers.nested_laplace(TARGET, gaussian_of(TARGET))
    for seed in range(5):
        draw = found.guide.sample(found.params, jax.random.key(seed))
        again = found.guide.log_prob(found.params, draw.latents)
        np.testing.assert_allclose(draw.log_prob, again, atol=1e-3)
    assert set(found.params["guide"]["frame"]["coupled"]) == {"weights", "nodes", "centre", "unit"}


def test_rounds_go_on_from_it():
    """Population Monte Carlo keeps its frame, and fits what is along."""
    start = gaussian_of(CURVED)
    begun = vi.solvers.nested_laplace(CURVED, start, num_active=1)
    found = vi.solvers.population_monte_carlo(
        CURVED, KEY, init=begun, num_components=4, num_active=1, num_draws=4000, max_steps=3
    )
    assert share(CURVED, found) > 0.6 > 2 * share(CURVED, begun)
    frames = (one.params["guide"]["frame"] for one in (begun, found))
    jax.tree.map(lambda *leaves: np.testing.assert_allclose(*leaves, atol=1e-5), *frames)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"num_active": 5}, ValueError, "fewer directions"),
        ({"num_active": 0}, ValueError, "num_active"),
        ({"data": {"nothing": 1}}, ValueError, "built without data"),
    ],
)
def test_errors(change, error, words):
    with pytest.raises(error, match=words):
        vi.solvers.nested_laplace(TARGET, gaussian_of(TARGET), **change)


def test_errors_of_solutions():
    mean_field = vi.solvers.deterministic(TARGET, KEY)
    with pytest.raises(ValueError, match=r"linear_response\(target, solution\) without a rank"):
        vi.solvers.nested_laplace(TARGET, mean_field)
    with pytest.raises(TypeError, match="solution"):
        vi.solvers.nested_laplace(TARGET, mean_field.guide)


def test_approximate_takes_it():
    """Where a conditional Gaussian is not good enough."""
    posterior = vi.approximate(CURVED, KEY)
    assert posterior.trustworthy
    names = [row[0] for row in posterior.table.rows]
    assert names[-1] == "* nested Laplace, polished"
    assert posterior.diagnosis.ess > 0.6 * posterior.diagnosis.num_draws
    draws = posterior.draws(KEY, 4000)  # x is standard normal
    assert abs(float(jnp.mean(draws["x"]))) < 0.1
    assert abs(float(jnp.std(draws["x"])) - 1) < 0.1
    with_guide = vi.diagnose(CURVED, posterior.guide, posterior.params, jax.random.key(5))
    assert with_guide.ess > 0.6 * with_guide.num_draws


def test_approximate_compiles_nothing_twice(compilations):
    """Neither what leads to it nor what it takes."""
    for seed in range(2):
        with compilations() as seen:
            posterior = vi.approximate(CURVED, jax.random.key(seed))
        assert posterior.table.rows[-1][0] == "* nested Laplace, polished"
        assert not seen or seed == 0


def test_nodes_move_to_where_the_draws_are(monkeypatch):
    """From a Gaussian elsewhere, which nodes that stay would not do: on average over keys, since
    after so few rounds shares differ by chance."""
    start = gaussian_of(CURVED)
    own = start.params["guide"]
    params = {"guide": {**own, "loc": own["loc"] + 1.0}}
    wide = with_wide_tails(CURVED, start._replace(params=params))
    response = candidate_of("shifted", wide, judge_of(CURVED, wide, None), iter([KEY] * 9))
    monkeypatch.setattr("vi_params.approximation.polish.ROUNDS", 3)
    structure = structure_of(CURVED, response.solution, None)
    shares = {}
    for well in (WELL, -1.0):  # of the draws that nodes move to
        monkeypatch.setattr("vi_params.approximation.nested.WELL", well)
        with compiler() as pool:
            found = [
                nested(pool, CURVED, response, structure, [], jax.random.key(seed), None)[0].share
                for seed in range(6)
            ]
        shares[well] = np.mean(found)
    assert shares[WELL] > 0.45
    assert shares[WELL] > shares[-1.0] + 0.1


def test_half_of_the_nodes_are_draws():
    random = np.random.default_rng(0)
    frame = along(np.zeros(3), np.eye(3), np.eye(3)[:, :2], np)
    u = random.standard_normal((4000, 3)) * [2.0, 0.5, 1.0] + [3.0, -1.0, 0.0]
    log_ratios = np.zeros(4000)
    drawn = Weighted({}, u, log_ratios, psis_on_host(log_ratios))
    nodes = moved_nodes(frame, drawn, KEY)
    a = u @ np.asarray(frame.rotation)[:, :2]
    assert len(nodes.a) == num_nodes_for(2)
    is_draw = np.min(np.abs(nodes.a[:, None] - a).max(-1), axis=1) < 1e-12
    assert is_draw.sum() == len(nodes.a) // 2
    np.testing.assert_allclose(nodes.centre, a.mean(0))
    np.testing.assert_allclose(nodes.unit, a.std(0), rtol=0.01)


def test_more_latents_and_data_and_parameters():
    """Where the gradients are those of the program of a linear response; the target's own
    parameters stay, and the data are those given."""
    latents = {"x": vi.Latent(()), "y": vi.Latent((36,))}

    def shifted(values, z, data):  # the evidence is largest at shift 1
        x = z["x"] - values["shift"] - data["shift"]
        return curved({}, {"x": x, "y": z["y"]}, None) - (values["shift"] - 1.0) ** 2

    target = vi.target(
        shifted,
        latents,
        declared={"shift": vi.Param(0.0)},
        data={"shift": jnp.zeros(())},
    )
    posterior = vi.approximate(target, KEY, {"shift": jnp.asarray(5.0)})
    assert posterior.trustworthy
    assert posterior.table.rows[-1][0] == "* nested Laplace, polished"
    np.testing.assert_allclose(posterior.params["shift"], 1.0, atol=0.01)
    x = posterior.draws(KEY, 4000)["x"]
    np.testing.assert_allclose(x.mean(), 6.0, atol=0.1)
    np.testing.assert_allclose(x.std(), 1.0, atol=0.1)
    start = vi.linear_response(target, vi.solvers.deterministic(target, KEY))
    found = vi.solvers.nested_laplace(target, start, {"shift": jnp.asarray(0.0)}, num_active=1)
    np.testing.assert_array_equal(found.params["shift"], start.params["shift"])
    assert set(found.params) == set(posterior.params)


def test_where_it_is_tried():
    many = vi.target(curved, {"x": vi.Latent(()), "y": vi.Latent((LARGEST,))})
    assert has_structure(CURVED)
    assert not has_structure(many)
    assert not has_structure(TARGET)  # of few latents a mixture does as well


def two_curved(values, latents, data):
    """Two of them, far apart."""
    x = latents["x"]
    modes = [curved(values, {"x": x - far, "y": latents["y"]}, data) for far in (-6.0, 6.0)]
    return jnp.logaddexp(*modes)


def test_it_is_not_taken_where_it_misses_another_optimum():
    """A mixture of both optima knows of mass that a nested approximation of one never draws."""
    target = vi.target(two_curved, {"x": vi.Latent(()), "y": vi.Latent((12,))})
    modes = [
        vi.linear_response(target, vi.solvers.deterministic(target, KEY, init={"x": far}, lanes=1))
        for far in (-6.0, 6.0)
    ]
    merged = vi.merge(target, modes, KEY)
    keys = iter(jax.random.split(KEY, 9))
    wide = with_wide_tails(target, modes[0])
    response = candidate_of("one", wide, judge_of(target, wide, None), keys)
    both = candidate_of("both", merged, judge_of(target, merged, None), keys)
    structure = structure_of(target, response.solution, None)
    with compiler() as pool:
        (alone,) = nested(pool, target, response, structure, [], KEY, None)
        assert alone.is_trustworthy  # it cannot know
        (known,) = nested(pool, target, response, structure, [both], KEY, None)
    assert known.is_partial
    assert settles(alone._replace(spread=None))
    assert not settles(known._replace(spread=None))
    assert best_of([response, alone]) is alone
    assert best_of([response, known]) is response


def test_densities_of_what_was_found():
    """On the host, at places that another approximation has drawn, they are the guide's own."""
    with enable_x64(True):
        start = gaussian_of(CURVED)
        found = vi.solvers.nested_laplace(CURVED, start, num_active=1)
        merged = vi.merge(CURVED, [start, start], KEY)
        flat = vi.flat(CURVED)
        u = 0.5 * stats.norm.rvs(size=(4, 13), random_state=0)
        for solution in (found, merged):
            at = [
                solution.guide.log_prob(solution.params, flat.constrain(jnp.asarray(row)))
                for row in u
            ]  # nothing is constrained
            np.testing.assert_allclose(log_density_of(solution, None)(u), at, rtol=1e-6)
