"""A Gaussian whose mean and scales across a few directions follow them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro import distributions as dist
from scipy import stats

import vi_params as vi
from vi_params._compile import Quick, compiler
from vi_params.approximation.candidate import judge_of, with_wide_tails
from vi_params.approximation.candidate import judged as candidate_of
from vi_params.approximation.conditional import LARGER, conditioned, with_gradients
from vi_params.approximation.judge import BATCH, FEWER
from vi_params.approximation.optima import HESSIANS
from vi_params.approximation.stages import tried
from vi_params.guides.frame import REACH, Frame, unbent
from vi_params.guides.sinh_arcsinh import log_slope, straightened, tilted
from vi_params.solvers.active import scores
from vi_params.solvers.conditional_frame import bent
from vi_params.solvers.solution import Slopes

KEY = jax.random.key(0)
DIM, GIVEN = 5, 2
LOC, TRIANGLE, SHIFTS, LOG_SCALES = (
    stats.norm.rvs(size=size, random_state=i)
    for i, size in enumerate([DIM, (DIM, DIM), *2 * [(1 + GIVEN, DIM - GIVEN)]])
)
FRAME = Frame(
    LOC,
    np.tril(0.3 * TRIANGLE, -1) + np.diag([1.0, 0.5, 2.0, 1.5, 0.8]),
    stats.ortho_group.rvs(DIM, random_state=1),
    0.3 * SHIFTS,
    0.3 * LOG_SCALES,
    np.array([0.5, 0.0, -0.8]),
)
STRETCH = 0.3


def hierarchy(values, latents, data):
    """One scale stretches eleven latents: they are normal given it; log evidence 0."""
    x, y = latents["scale"], latents["rest"]
    return dist.Normal(0, 1).log_prob(x) + dist.Normal(0, jnp.exp(STRETCH * x)).log_prob(y).sum()


TARGET = vi.target(hierarchy, {"scale": vi.Latent(()), "rest": vi.Latent((11,))})


def many_latents(number):
    """The same with another number of them."""
    return vi.target(hierarchy, {"scale": vi.Latent(()), "rest": vi.Latent((number,))})


def gaussian_of(target, num_hessians=None):
    solution = vi.solvers.deterministic(target, KEY)
    return vi.linear_response(target, solution, num_hessians=num_hessians)


def bent_by(frame, slopes, xp):
    """The frame bent by the scores of a library."""
    frame, slopes = jax.tree.map(xp.asarray, (frame, slopes))
    return bent(frame, scores(frame.loc, frame.scale_tril, slopes, xp), xp)


def judged(target, found, num_draws=8000):
    return vi.diagnose(target, found.guide, found.params, KEY, num_draws=num_draws)


def test_a_frame_there_and_back():
    """Coordinates are undone, their Jacobian is that of autodiff, and the host's numbers are the
    program's, within reach and beyond."""
    frame = jax.tree.map(jnp.asarray, FRAME)
    y = stats.norm.rvs(size=(20, DIM), random_state=2)
    y = np.concatenate([y, np.full((1, DIM), 2 * REACH)])
    u = FRAME.unconstrained(y, np)
    np.testing.assert_allclose(FRAME.coordinates(u, np), y, atol=1e-10)
    np.testing.assert_allclose(frame.unconstrained(jnp.asarray(y)), u, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(frame.coordinates(jnp.asarray(u)), y, rtol=1e-3, atol=1e-3)
    jacobians = jax.vmap(jax.jacobian(frame.unconstrained))(jnp.asarray(y))
    exact = np.linalg.slogdet(jacobians)[1]
    np.testing.assert_allclose(FRAME.log_det(y, np), exact, atol=1e-3)
    np.testing.assert_allclose(frame.log_det(jnp.asarray(y)), exact, atol=1e-3)


def test_straight_coordinates_on_the_host():
    """Where nothing bends, the host leaves out what a program multiplies by one."""
    straight = unbent(*FRAME[:3], GIVEN, np)
    u = stats.norm.rvs(size=(20, DIM), random_state=2)
    y = straight.coordinates(u, np)
    inside = jax.tree.map(jnp.asarray, straight)
    np.testing.assert_allclose(y, inside.coordinates(jnp.asarray(u)), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(straight.unconstrained(y, np), u, atol=1e-10)
    expected = np.full(20, straight.log_det(y, np))
    np.testing.assert_allclose(inside.log_det(jnp.asarray(y)), expected, rtol=1e-4)


@pytest.mark.parametrize("xp", [np, jnp])
@pytest.mark.parametrize("own", [True, False])
def test_it_is_found_from_gradients(own, xp):
    """From the scores of a frame without tilts, at its own draws or at those of the Gaussian, this
    comes back, as far as the Gaussian that it is drawn towards lets it; a gradient that is not
    finite does not count."""
    random = np.random.default_rng(1)
    z = random.standard_normal((400, DIM))
    terms = np.column_stack([np.ones(400), z[:, :GIVEN]])
    precision = np.exp(-2 * terms @ FRAME.log_scales)
    if own:
        z[:, GIVEN:] = terms @ FRAME.shifts / precision + z[:, GIVEN:] / np.sqrt(precision)
    scores = np.zeros_like(z)
    scores[:, GIVEN:] = -precision * z[:, GIVEN:] + terms @ FRAME.shifts
    straight = unbent(FRAME.loc, FRAME.scale_tril, FRAME.rotation, GIVEN, np)
    root = FRAME.scale_tril @ FRAME.rotation
    gradient = scores @ np.linalg.inv(root)
    gradient[7] = np.nan
    slopes = Slopes(FRAME.loc + z @ root.T, gradient, np.full(400, 1 / 400))
    found = bent_by(straight, slopes, xp)
    np.testing.assert_allclose(found.shifts, FRAME.shifts, atol=0.01)
    np.testing.assert_allclose(found.log_scales, FRAME.log_scales, atol=0.01)
    np.testing.assert_allclose(found.tilts, 0.0, atol=0.01)


@pytest.mark.parametrize("xp", [np, jnp])
@pytest.mark.parametrize("tilt", [0.15, -0.3])
def test_skewness_is_found_from_gradients(tilt, xp):
    """The tilt of the sinh-arcsinh distribution whose scores these are, but for what a third
    derivative leaves out."""
    random = np.random.default_rng(2)
    z = random.standard_normal((1000, 3))
    z[:, 1:] = tilted(z[:, 1:], np.array([tilt, 0.0]), np)

    def log_density(x):
        b = straightened(x[1], tilt)
        return -0.5 * (x[0] ** 2 + b**2 + x[2] ** 2) - log_slope(b, tilt)

    scores = np.asarray(jax.vmap(jax.grad(log_density))(jnp.asarray(z)), float)
    straight = unbent(np.zeros(3), np.eye(3), np.eye(3), 1, np)
    slopes = Slopes(z, scores, np.full(1000, 1e-3))
    found = bent_by(straight, slopes, xp)
    np.testing.assert_allclose(found.tilts, [tilt, 0.0], atol=0.25 * abs(tilt))


@pytest.mark.parametrize("xp", [np, jnp])
def test_noise_makes_no_tilts(xp):
    """None where the scores of a Gaussian have errors, though third derivatives are found; all that
    are found where one coordinate of many, or all of them a little, are skewed."""
    random = np.random.default_rng(3)
    z = random.standard_normal((1000, 101))
    errors = 0.3 * random.standard_normal((1000, 101))
    straight = unbent(np.zeros(101), np.eye(101), np.eye(101), 1, np)
    for skewed, third in ((slice(0), 0.0), (slice(7, 8), 0.2), (slice(1, None), 0.04)):
        scores = -z + errors
        scores[:, skewed] += third * (z[:, skewed] ** 2 - 1) / 2
        found = bent_by(straight, Slopes(z, scores, np.full(1000, 1e-3)), xp)
        assert np.any(found.tilts) == np.all(found.tilts) == (third > 0)


def test_counts_of_many_latents():
    """The logarithms of gamma variables, as the rates of few counts are, are skewed: few of a
    Gaussian's draws are effective in fifty dimensions, and a good part of these. The log evidence
    is 0."""
    target = vi.target(
        lambda v, z, d: dist.Gamma(4.0, 1.0).log_prob(z["rate"]).sum(),
        {"rate": vi.Latent((50,), dist.constraints.positive)},
    )
    start = gaussian_of(target)
    found = vi.solvers.conditional_gaussian(target, start, KEY)
    before, after = judged(target, start), judged(target, found)
    assert before.ess < 0.2 * 8000
    assert after.ess > 0.3 * 8000
    assert after.ess > 2 * before.ess
    assert after.k_hat < 0.7
    np.testing.assert_allclose(after.log_evidence, 0.0, atol=0.05)


def test_nothing_is_left_across():
    """With as many directions as dimensions the frame stays as it is."""
    straight = unbent(*FRAME[:3], DIM, np)
    slopes = Slopes(np.ones((30, DIM)), np.ones((30, DIM)), np.full(30, 1 / 30))
    for xp in (np, jnp):
        found = bent_by(straight, slopes, xp)
        jax.tree.map(np.testing.assert_allclose, found, jax.tree.map(xp.asarray, straight))


def test_nothing_follows_a_gaussian():
    """Where the target is Gaussian, the frame stays straight."""
    root = np.tril(TRIANGLE[:4, :4], -1) + 2 * np.eye(4)
    normal = dist.MultivariateNormal(jnp.arange(4.0), scale_tril=jnp.asarray(root))
    target = vi.target(lambda v, z, d: normal.log_prob(z["z"]), {"z": vi.Latent((4,))})
    found = vi.solvers.conditional_gaussian(target, gaussian_of(target))
    frame = vi.constrain(found.guide.declared, found.params)["guide"]["frame"]
    np.testing.assert_allclose(frame["shifts"], 0, atol=1e-3)
    np.testing.assert_allclose(frame["log_scales"], 0, atol=1e-3)
    np.testing.assert_allclose(frame["tilts"], 0, atol=1e-3)


def test_a_hierarchy_is_normal_given_its_scale():
    """Nearly all draws are effective where few of the Gaussian's are, and weighted ones have the
    moments in closed form."""
    start = gaussian_of(TARGET)
    found = vi.solvers.conditional_gaussian(TARGET, start, num_active=1)
    before, after = judged(TARGET, start), judged(TARGET, found)
    assert before.k_hat > 0.7
    assert after.k_hat < 0.7
    assert before.ess < 0.2 * 8000
    assert after.ess > 0.7 * 8000
    np.testing.assert_allclose(after.log_evidence, 0.0, atol=0.05)
    draws = vi.resample(TARGET, found.guide, found.params, KEY, 8000)
    np.testing.assert_allclose(draws["scale"].mean(), 0.0, atol=0.05)
    np.testing.assert_allclose(draws["scale"].std(), 1.0, rtol=0.05)
    np.testing.assert_allclose(draws["rest"].std(), np.exp(STRETCH**2), rtol=0.05)


def test_no_density_is_evaluated_and_it_is_pure():
    """It needs the gradients of linear response alone, and is one program under jit and vmap."""
    calls = []

    def counted(values, latents, data):
        calls.append(None)
        return hierarchy(values, latents, data)

    target = vi.target(counted, TARGET.latents)
    start = gaussian_of(target)
    before = len(calls)
    found = vi.solvers.conditional_gaussian(target, start).params
    assert len(calls) == before

    def solve(params):
        return vi.solvers.conditional_gaussian(target, start._replace(params=params)).params

    twice = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), start.params)
    for params in (
        jax.jit(solve)(start.params),
        jax.tree.map(lambda x: x[1], jax.vmap(solve)(twice)),
    ):
        for leaf, expected in zip(jax.tree.leaves(params), jax.tree.leaves(found), strict=True):
            np.testing.assert_allclose(leaf, expected, rtol=2e-3, atol=2e-3)


def test_new_draws_tell_of_many_latents():
    """In three hundred dimensions the gradients at the fixed draws are too few; with a key others
    are found."""
    target = many_latents(300)
    start = gaussian_of(target)
    few = vi.solvers.conditional_gaussian(target, start, num_active=1)
    found = vi.solvers.conditional_gaussian(target, start, KEY, num_active=1)
    assert judged(target, few).ess < 0.1 * 8000
    assert judged(target, found).ess > 0.3 * 8000


def test_rounds_go_on_from_it():
    """Population Monte Carlo keeps its frame, and more draws are effective than of rounds that
    begin at the Gaussian."""

    def log_density(values, latents, data):
        skew = dist.Gumbel(0.0, 1.0).log_prob(latents["scale"])
        spread = jnp.exp(STRETCH * latents["scale"])
        return skew + dist.Normal(0, spread).log_prob(latents["rest"]).sum()

    target = vi.target(log_density, {"scale": vi.Latent(()), "rest": vi.Latent((20,))})
    start = gaussian_of(target)
    begun = vi.solvers.conditional_gaussian(target, start, num_active=1)
    rounds = {"num_active": 1, "max_steps": 3}
    found = vi.solvers.population_monte_carlo(target, KEY, init=begun, **rounds)
    from_gaussian = vi.solvers.population_monte_carlo(target, KEY, init=start, **rounds)
    frames = [vi.constrain(x.guide.declared, x.params)["guide"]["frame"] for x in (begun, found)]
    for leaf, kept in zip(*map(jax.tree.leaves, frames), strict=True):
        np.testing.assert_allclose(leaf, kept, rtol=1e-4, atol=1e-6)
    after = judged(target, found)
    assert after.k_hat < 0.7
    np.testing.assert_allclose(after.log_evidence, 0.0, atol=0.05)
    assert after.ess > 1.5 * max(judged(target, one).ess for one in (begun, from_gaussian))


@pytest.mark.parametrize("number", [30, 300])
def test_approximate_finds_it(number):
    """The one call takes it where linear response is not good enough, and its draws have the
    moments in closed form: in 31 dimensions from gradients at hand, in 301 from others."""
    target = many_latents(number)
    posterior = vi.approximate(target, jax.random.key(1))
    assert posterior.trustworthy
    response, conditional = posterior.table.rows
    assert response[0] == "linear response"
    assert conditional[0] == "* conditional Gaussian"
    assert conditional[2] > 3 * response[2]
    # Its guide and parameters are what was judged.
    told = judged(posterior.coordinates, posterior)
    np.testing.assert_allclose(told.log_evidence, 0.0, atol=0.1)
    np.testing.assert_allclose(told.ess / 8000, conditional[2] / 100, rtol=0.3)
    draws = posterior.draws(jax.random.key(1), 8000)
    np.testing.assert_allclose(draws["scale"].mean(), 0.0, atol=0.06)
    np.testing.assert_allclose(draws["scale"].std(), 1.0, rtol=0.06)
    np.testing.assert_allclose(draws["rest"].std(), np.exp(STRETCH**2), rtol=0.06)


def test_rounds_of_approximate_go_on_from_it(monkeypatch):
    """Where it is not good enough, along its directions; from the Gaussian they would come to
    nothing."""
    monkeypatch.setattr("vi_params.approximation.conditional.ENOUGH", (0.0, 1.0))
    monkeypatch.setattr("vi_params.approximation.structure.LARGEST", 0)
    target = many_latents(30)
    posterior = vi.approximate(target, jax.random.key(3))
    assert posterior.trustworthy
    name, k_hat, share, _ = posterior.table.rows[-1]
    assert name == "* population Monte Carlo"
    assert k_hat < 0.7
    assert share > 40
    told = judged(posterior.coordinates, posterior)
    np.testing.assert_allclose(told.log_evidence, 0.0, atol=0.1)
    np.testing.assert_allclose(told.ess / 8000, share / 100, rtol=0.3)
    draws = posterior.draws(jax.random.key(1), 8000)
    np.testing.assert_allclose(draws["scale"].std(), 1.0, rtol=0.06)
    np.testing.assert_allclose(draws["rest"].std(), np.exp(STRETCH**2), rtol=0.06)


def test_what_is_not_enough_is_looked_at_again(monkeypatch):
    """By more draws, and it is a spare one then; what is enough is looked at once. The model is
    compiled once with second derivatives and once without, gradients included."""
    called = set()
    own = Quick.__call__

    def call(self, *args):
        called.add(self)
        return own(self, *args)

    monkeypatch.setattr(Quick, "__call__", call)
    target = many_latents(40)
    solution = with_wide_tails(target, gaussian_of(target, HESSIANS))
    keys = iter(jax.random.split(KEY, 8))
    response = candidate_of("response", solution, judge_of(target, solution, None), keys)
    assert len(response.solution.slopes.weights) < 100
    response = with_gradients(target, response, None)
    assert len(response.solution.slopes.weights) == 1000
    enough = conditioned(target, response, KEY, None)
    assert enough.diagnosis.num_draws == BATCH
    assert enough.is_enough
    monkeypatch.setattr("vi_params.approximation.conditional.ENOUGH", (0.0, 1.0))
    spare = conditioned(target, response, KEY, None)
    assert spare.diagnosis.num_draws == LARGER[-1]
    assert spare.is_spare
    names = sorted(program.light.__name__ for program in called)
    assert [name for name in names if name != "<lambda>"] == [
        "density",
        "expand",
        "respond",
        "solve",
    ]
    assert all(program.light._cache_size() <= 1 for program in called)


def test_a_linear_response_that_is_followed_is_judged_by_few_draws(monkeypatch):
    """Where densities take long and few draws do not trust it; by all that it needs where what
    follows is not enough."""
    monkeypatch.setattr("vi_params.approximation.judge.QUICK", 10**6)
    target = many_latents(120)
    with compiler() as pool:

        def found():
            return tried(pool, target, target, KEY, None, 2, True, False)

        response, following = found()
        assert not response.is_trustworthy
        assert following.is_enough
        assert response.diagnosis.num_draws == FEWER
        monkeypatch.setattr("vi_params.approximation.conditional.ENOUGH", (0.0, 1.0))
        monkeypatch.setattr("vi_params.approximation.stages.polished", lambda *args: args[2])
        response, _, begun_with = found()
        assert response.diagnosis.num_draws == BATCH
        assert begun_with is response


@pytest.mark.parametrize(
    ("call", "error", "told"),
    [
        (
            lambda s: vi.solvers.conditional_gaussian(TARGET, s, num_active=12),
            ValueError,
            "there are 12",
        ),
        (
            lambda s: vi.solvers.conditional_gaussian(TARGET, s, num_active=0),
            ValueError,
            "num_active",
        ),
        (
            lambda s: vi.solvers.conditional_gaussian(TARGET, s._replace(slopes=None)),
            ValueError,
            "no gradients",
        ),
        (lambda s: vi.solvers.conditional_gaussian(TARGET, s.params), TypeError, "solution"),
        (lambda s: vi.solvers.conditional_gaussian(TARGET, s, 0), TypeError, "key"),
        (
            lambda s: vi.solvers.conditional_gaussian(TARGET, s, data=jnp.zeros(3)),
            ValueError,
            "no key, with data",
        ),
        (
            lambda s: vi.solvers.conditional_gaussian(TARGET, s, KEY, given="scales"),
            ValueError,
            "given='scales'",
        ),
        (
            lambda s: vi.solvers.conditional_gaussian(TARGET, s, given="latents"),
            ValueError,
            "no key, with given='latents'",
        ),
        (
            lambda s: vi.solvers.conditional_gaussian(TARGET, s, num_fits=2),
            ValueError,
            "num_fits=2",
        ),
        (
            lambda s: vi.solvers.conditional_gaussian(TARGET, s, KEY, num_fits=0),
            ValueError,
            "num_fits",
        ),
        (
            lambda s: vi.solvers.conditional_gaussian(
                TARGET, vi.solvers.deterministic(TARGET, KEY), KEY
            ),
            ValueError,
            "no dense covariance",
        ),
        (
            lambda s: vi.solvers.conditional_gaussian(TARGET, s, KEY, num_draws=24),
            ValueError,
            "num_draws",
        ),
        (
            lambda s: vi.solvers.population_monte_carlo(
                TARGET,
                KEY,
                init=vi.solvers.conditional_gaussian(TARGET, s, num_active=1),
                num_active=2,
            ),
            ValueError,
            "num_active=1",
        ),
    ],
)
def test_bad_input_is_told(call, error, told):
    with pytest.raises(error, match=told):
        call(gaussian_of(TARGET))
