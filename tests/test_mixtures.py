"""Mixtures: the family, population Monte Carlo, merging, resampling; against scipy and closed
forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro import distributions as dist
from numpyro.distributions import constraints
from scipy import stats

import vi_params as vi
from vi_params._compile import precise
from vi_params.guides.active_mixture import Across, Parts
from vi_params.guides.mixture import Components
from vi_params.importance import Weighted, pick_draws, psis_on_host, weigh
from vi_params.solvers.population_monte_carlo import population
from vi_params.solvers.solution import Slopes
from vi_params.solvers.weighted_em import SWEEPS, weighted_em

KEY = jax.random.key(0)
enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
LOCS = np.array([[0.0, 1.0], [3.0, -2.0]])
ROOTS = np.array([[[1.0, 0.0], [0.5, 0.7]], [[0.4, 0.0], [-0.3, 1.5]]])
WEIGHTS = np.array([0.3, 0.7])
TARGET = vi.target(
    lambda v, z, d: dist.Normal(1.0, 2.0).log_prob(z["z"]).sum(), {"z": vi.Latent((2,))}
)


def given(guide):
    values = {"weights": WEIGHTS, "locs": LOCS, "scale_trils": ROOTS}
    return vi.unconstrain(guide.declared, {"guide": values})


@pytest.mark.parametrize("df", [None, 5])
def test_density_of_a_mixture(df):
    """log q is that of scipy, at the guide's own draws, by transform, rescore and log_prob."""
    guide = vi.guides.mixture(TARGET, 2, df=df)
    params = given(guide)
    for i in range(3):
        draw = guide.sample(params, jax.random.key(i))
        point = np.asarray(draw.latents["z"])
        exact = 0.0
        for weight, loc, root in zip(WEIGHTS, LOCS, ROOTS, strict=True):
            shape = root @ root.T
            part = (
                stats.multivariate_normal(loc, shape)
                if df is None
                else stats.multivariate_t(loc, shape, df=df)
            )
            exact += weight * part.pdf(point)
        for log_q in (
            draw.log_prob,
            guide.rescore(params, draw),
            guide.log_prob(params, draw.latents),
        ):
            np.testing.assert_allclose(log_q, np.log(exact), rtol=1e-4)


@pytest.mark.parametrize("df", [None, 5])
def test_draws_of_a_mixture(df):
    """Mean and covariance are those of the parts, within four standard errors."""
    guide = vi.guides.mixture(TARGET, 2, df=df)
    draws = vi.draws(TARGET, guide, given(guide), KEY, 100_000)["z"]
    inflation = 1.0 if df is None else df / (df - 2)
    mean = WEIGHTS @ LOCS
    second = sum(
        weight * (inflation * root @ root.T + np.outer(loc, loc))
        for weight, loc, root in zip(WEIGHTS, LOCS, ROOTS, strict=True)
    )
    products = draws[:, :, None] * draws[:, None, :]
    for found, exact in ((draws, mean), (products, second)):
        error = found.std(0) / np.sqrt(len(found))
        assert np.all(np.abs(found.mean(0) - exact) < 4 * error)


def test_a_mixture_has_no_pathwise_gradient():
    """The component of a draw does not change smoothly: refused where the gradient would lie."""
    with pytest.raises(ValueError, match="not reparameterised"):
        vi.elbo(TARGET, vi.guides.mixture(TARGET, 2))


def test_em_on_equal_weights_raises_the_likelihood():
    """Weighted EM with equal weights is the maximum-likelihood fit: its sweeps raise the
    likelihood, and from near the truth they recover the parts of a sample."""
    guide = vi.guides.mixture(TARGET, 2, df=5)
    u = vi.draws(TARGET, guide, given(guide), KEY, 4000)["z"]
    equal = jnp.full(4000, 1 / 4000)
    nothing = Across(jnp.zeros((2, 0)), jnp.ones((2, 0)))

    def likelihood(parts):
        params = vi.unconstrain(guide.declared, {"guide": parts._asdict()})
        return float(precise(jax.vmap(lambda z: guide.log_prob(params, {"z": z})))(u).mean())

    parts = Components(jnp.array([0.5, 0.5]), jnp.array(LOCS + 0.5), jnp.array(ROOTS * 1.5))
    em = jax.jit(precise(lambda parts: weighted_em(parts, u, equal, 5)))
    after, across, reached = parts, nothing, [likelihood(parts)]
    for _ in range(4):
        after, across = em(Parts(after, across))
        reached.append(likelihood(after))
    assert np.all(np.diff(reached) > -1e-4)
    assert reached[-1] > reached[0] + 0.1
    np.testing.assert_allclose(after.weights, WEIGHTS, atol=0.05)
    np.testing.assert_allclose(after.locs, LOCS, atol=0.2)
    covariances = after.scale_trils @ after.scale_trils.swapaxes(1, 2)
    np.testing.assert_allclose(covariances, ROOTS @ ROOTS.swapaxes(1, 2), atol=0.4)


def test_em_keeps_narrow_components_in_float32():
    """Two components 2000 times as narrow as they are apart: their variances are those of the
    draws."""
    random = np.random.default_rng(0)
    u = np.concatenate([side + 1e-3 * random.standard_normal((500, 2)) for side in (-1.0, 1.0)])
    start = Components(
        jnp.array([0.5, 0.5]),
        jnp.array([[-1.0, -1.0], [1.0, 1.0]]),
        jnp.tile(2e-3 * jnp.eye(2), (2, 1, 1)),
    )
    nothing = Across(jnp.zeros((2, 0)), jnp.ones((2, 0)))
    parts = Parts(start, nothing)
    em = jax.jit(lambda parts: weighted_em(parts, jnp.float32(u), jnp.full(1000, 1e-3), 1000))
    for _ in range(4):
        parts = em(parts)
    scales = np.sqrt(np.sum(np.asarray(parts.along.scale_trils) ** 2, axis=2))
    np.testing.assert_allclose(scales, 1e-3, rtol=0.1)


ACTIVE = vi.target(lambda v, z, d: jnp.zeros(()), {"z": vi.Latent((4,))})
TURN = stats.ortho_group.rvs(4, random_state=0)
TRIANGLE = np.tril(stats.norm.rvs(size=(4, 4), random_state=1), -1) + np.diag([1.0, 2.0, 0.5, 1.5])
SHIFTS = np.array([[0.2, -0.3], [0.4, 0.1], [-0.2, 0.0]])
LOG_SCALES = np.array([[-0.2, 0.3], [0.3, -0.1], [0.0, 0.2]])
TILTS = np.array([0.4, -0.7])
CENTRES, SPREADS = np.array([[0.5, -1.0], [2.0, 0.0]]), np.array([[1.0, 0.3], [0.6, 2.0]])


def given_active(guide):
    values = {
        "along": {"weights": WEIGHTS, "locs": LOCS, "scale_trils": ROOTS},
        "across": {"locs": CENTRES, "scales": SPREADS},
        "frame": {
            "loc": np.arange(4.0),
            "scale_tril": TRIANGLE,
            "rotation": TURN,
            "shifts": SHIFTS,
            "log_scales": LOG_SCALES,
            "tilts": TILTS,
        },
    }
    return vi.unconstrain(guide.declared, {"guide": values})


def in_frame(u):
    """The frame's coordinates of rows u, and log |dz/dy|, z the straight ones."""
    z = np.linalg.solve(TRIANGLE, (np.asarray(u) - np.arange(4.0)).T).T @ TURN
    terms = np.column_stack([np.ones(len(z)), np.clip(z[:, :2], -5, 5)])
    log_scales = terms @ LOG_SCALES
    x = z[:, 2:] / np.exp(log_scales) - np.exp(log_scales) * (terms @ SHIFTS)
    # Mean and variance of the sinh-arcsinh transform by quadrature.
    expected = [
        [stats.norm.expect(lambda b, e=e, i=i: np.sinh(np.arcsinh(b) + e) ** i) for i in (1, 2)]
        for e in TILTS
    ]
    mean, square = np.transpose(expected)
    scale = np.sqrt(square - mean**2)
    x = scale * x + mean
    z[:, 2:] = np.sinh(np.arcsinh(x) - TILTS)
    slopes = scale * np.cosh(np.arcsinh(x) - TILTS) / np.sqrt(1 + x**2)
    return z, np.sum(log_scales - np.log(slopes), axis=1)


def test_density_of_an_active_mixture():
    """log q is that of scipy in the frame's coordinates, by transform, rescore and log_prob."""
    guide = vi.guides.active_mixture(ACTIVE, 2, 2, df=5)
    params = given_active(guide)
    for i in range(3):
        draw = guide.sample(params, jax.random.key(i))
        (y,), (log_det,) = in_frame(draw.latents["z"][None])
        exact = 0.0
        for k in range(2):
            along = stats.multivariate_t(LOCS[k], ROOTS[k] @ ROOTS[k].T, df=5).pdf(y[:2])
            exact += WEIGHTS[k] * along * stats.norm(CENTRES[k], SPREADS[k]).pdf(y[2:]).prod()
        exact /= np.linalg.det(TRIANGLE) * np.exp(log_det)
        for log_q in (
            draw.log_prob,
            guide.rescore(params, draw),
            guide.log_prob(params, draw.latents),
        ):
            np.testing.assert_allclose(log_q, np.log(exact), rtol=1e-3)


def test_draws_of_an_active_mixture_and_em_on_them():
    """In the frame's coordinates, draws have the mean of the parts; EM on them recovers the parts
    along and across, from near the truth."""
    guide = vi.guides.active_mixture(ACTIVE, 2, 2, df=5)
    u = vi.draws(ACTIVE, guide, given_active(guide), KEY, 20_000)["z"]
    y, _ = in_frame(u)
    mean = np.concatenate([WEIGHTS @ LOCS, WEIGHTS @ CENTRES])
    assert np.all(np.abs(y.mean(0) - mean) < 4 * y.std(0) / np.sqrt(len(y)))
    parts = Parts(
        Components(jnp.array([0.5, 0.5]), jnp.array(LOCS + 0.3), jnp.array(1.3 * ROOTS)),
        Across(jnp.array(CENTRES - 0.3), jnp.array(1.3 * SPREADS)),
    )
    em = jax.jit(lambda parts: weighted_em(parts, jnp.array(y), jnp.full(len(y), 1 / len(y)), 5))
    for _ in range(4):
        parts = em(parts)
    np.testing.assert_allclose(parts.along.weights, WEIGHTS, atol=0.03)
    np.testing.assert_allclose(parts.along.locs, LOCS, atol=0.1)
    np.testing.assert_allclose(parts.across.locs, CENTRES, atol=0.1)
    np.testing.assert_allclose(parts.across.scales, SPREADS, rtol=0.05)


def test_a_covariance_that_few_draws_speak_for_stays_what_it_was():
    """A sweep sets it to n / (n + 4 dim) of that of n draws, and the rest of what it was."""
    u = stats.norm.rvs(size=(6, 2), random_state=3)
    now = Parts(
        Components(np.ones(1), np.zeros((1, 2)), 3 * np.eye(2)[None]),
        Across(np.zeros((1, 0)), np.ones((1, 0))),
    )
    expected = 9 * np.eye(2)
    for _ in range(SWEEPS):
        expected = 6 / 14 * np.cov(u.T, bias=True) + 8 / 14 * expected
    (root,) = weighted_em(now, u, np.full(6, 1 / 6), 10**9, np).along.scale_trils
    np.testing.assert_allclose(root @ root.T, expected, rtol=1e-5)


def bent(values, latents, data):
    """Many latents: one bends another and stretches the rest; log evidence 0."""
    z = latents["z"]
    rest = dist.Normal(0.0, jnp.exp(0.15 * z[0])).log_prob(z[2:]).sum()
    bend = dist.Normal(0.4 * z[0] ** 2, 0.5).log_prob(z[1])
    return dist.Normal(0.0, 1.0).log_prob(z[0]) + bend + rest


def test_population_monte_carlo_along_few_directions():
    """Where the weights of a Gaussian are few, those of the mixture are many, and their draws have
    the moments in closed form."""
    target = vi.target(bent, {"z": vi.Latent((40,))})
    start = vi.linear_response(target, vi.solvers.deterministic(target, KEY))
    found = vi.solvers.population_monte_carlo(target, KEY, init=start, num_active=2, max_steps=8)
    before = vi.diagnose(target, start.guide, start.params, KEY, num_draws=16_000)
    after = vi.diagnose(target, found.guide, found.params, KEY, num_draws=16_000)
    assert after.k_hat < 0.7
    assert after.ess > 1.5 * before.ess
    assert before.log_evidence < -0.1
    # Gradients at the draws of linear response are too few to be asked for.
    other = vi.solvers.population_monte_carlo(
        target, KEY, init=start._replace(slopes=None), num_active=2, max_steps=8
    )
    jax.tree.map(np.testing.assert_array_equal, other.params, found.params)
    np.testing.assert_allclose(after.log_evidence, 0.0, atol=0.1)
    draws = vi.resample(target, found.guide, found.params, KEY, 64_000)["z"]
    np.testing.assert_allclose(draws[:, :2].mean(0), [0.0, 0.4], atol=0.08)
    variance = [1.0, 2 * 0.4**2 + 0.5**2] + 38 * [np.exp(2 * 0.15**2)]
    np.testing.assert_allclose(draws.std(0), np.sqrt(variance), rtol=0.1)


def test_directions_take_no_further_gradients():
    """With those that linear response has at its draws, the mixture begins and is refitted without
    the density."""
    calls = []

    def log_density(values, latents, data):
        calls.append(None)
        return bent(values, latents, data)

    target = vi.target(log_density, {"z": vi.Latent((40,))})
    start = vi.linear_response(target, vi.solvers.deterministic(target, KEY))
    noise = start.guide.noise(KEY, 100)
    drawn = weigh(target, start.guide, start.params, noise, target.data)
    drawn = jax.tree.map(np.asarray, drawn)
    own = vi.constrain(start.guide.declared, start.params)["guide"]
    own = jax.tree.map(np.asarray, own)
    before = len(calls)
    slopes = jax.device_get(start.slopes)
    np.testing.assert_allclose(slopes.weights, 1 / 80)
    rounds = population(target, start.guide, 2, 7, 2)
    first = rounds.begin(own, drawn.position[:2], drawn, slopes, np)
    rounds.refit(first, drawn, np)
    assert len(calls) == before
    exact = jax.vmap(jax.grad(lambda z: bent({}, {"z": z}, None)))(slopes.position)
    np.testing.assert_allclose(slopes.gradient, exact, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(np.sum(first.frame.rotation[0, :2] ** 2), 1.0, atol=0.1)


@pytest.mark.parametrize("num_active", [None, 2])
def test_a_round_is_the_same_in_a_program_and_on_the_host(num_active):
    """Mixture and refit of the same weighted draws, in jax.numpy and in numpy."""
    start = vi.guides.full_rank(ACTIVE, init={"z": jnp.zeros(4)}, init_scale=1.0)
    rounds = population(ACTIVE, start, 3, 5, num_active)
    random = np.random.default_rng(0)
    u, scores = random.normal(0.1, 1.0, (400, 4)), random.normal(size=(400, 4))
    drawn = Weighted({}, u, None, psis_on_host(random.normal(size=400)))
    slopes = Slopes(u, scores - u, np.full(400, 1 / 400))
    own = {"loc": np.zeros(4), "scale_tril": np.eye(4)}

    def run(xp):
        first = rounds.begin(*jax.tree.map(xp.asarray, (own, u[:3], drawn, slopes)), xp)
        return rounds.refit(first, jax.tree.map(xp.asarray, drawn), xp)

    with enable_x64(True):
        here, there = run(np), jax.jit(lambda: run(jnp))()
    for one, other in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True):
        assert isinstance(one, np.ndarray)
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def skewed(values, latents, data):
    """The logarithm of a Gamma(1.5) variable is skewed; its square root's, a second one, less."""
    return dist.Gamma(1.5, 1.0).log_prob(latents["a"]) + dist.Gamma(3.0, 1.0).log_prob(latents["b"])


SKEWED = vi.target(
    skewed,
    {"a": vi.Latent((), constraints.positive), "b": vi.Latent((), constraints.positive)},
)


@pytest.mark.slow
def test_population_monte_carlo_follows_a_skewed_posterior():
    """k-hat falls, the evidence is one, and resampled draws have the moments of the gammas."""
    start = vi.solvers.deterministic(SKEWED, KEY)
    found = vi.solvers.population_monte_carlo(SKEWED, KEY, init=start)
    before = vi.diagnose(SKEWED, start.guide, start.params, KEY)
    after = vi.diagnose(SKEWED, found.guide, found.params, KEY)
    assert found.info.status == vi.SolverStatus.CONVERGED
    assert after.k_hat < min(0.5, float(before.k_hat))
    assert after.ess > before.ess
    np.testing.assert_allclose(after.log_evidence, 0.0, atol=0.05)
    draws = vi.resample(SKEWED, found.guide, found.params, KEY, 8000)
    for name, shape in (("a", 1.5), ("b", 3.0)):
        np.testing.assert_allclose(draws[name].mean(), shape, rtol=0.05)
        np.testing.assert_allclose(draws[name].std(), np.sqrt(shape), rtol=0.07)


@pytest.mark.slow
def test_population_monte_carlo_is_pure():
    """Under vmap over keys, each lane gives what it gives alone; a mixture is a start, too."""
    start = vi.solvers.deterministic(SKEWED, KEY)

    def solve(key):
        return vi.solvers.population_monte_carlo(
            SKEWED, key, init=start, num_components=2, num_draws=500, max_steps=2
        )[1:3]

    keys = jax.random.split(KEY, 2)
    params, info = jax.vmap(solve)(keys)
    alone, own = solve(keys[1])
    np.testing.assert_allclose(params["guide"]["locs"][1], alone["guide"]["locs"], atol=1e-3)
    assert info.steps[1] == own.steps
    found = vi.solvers.population_monte_carlo(SKEWED, KEY, init=start, max_steps=1)
    again = vi.solvers.population_monte_carlo(SKEWED, KEY, init=found, max_steps=1)
    assert np.isfinite(float(again.info.elbo))
    with pytest.raises(ValueError, match="Gaussian approximation was expected"):
        vi.solvers.population_monte_carlo(SKEWED, KEY, init=found, num_active=1)


def test_merging_weighs_by_evidence():
    """Gaussians of masses 1 and 3: the merged mixture is the target, its evidence 4."""

    def log_density(values, latents, data):
        z = latents["z"]
        parts = [
            dist.Normal(-9.0, 1.0).log_prob(z),
            jnp.log(3.0) + dist.Normal(9.0, 2.0).log_prob(z),
        ]
        return jnp.logaddexp(*parts)

    target = vi.target(log_density, {"z": vi.Latent(())})
    parts = [vi.solvers.deterministic(target, KEY, init={"z": at}, lanes=1) for at in (-8.0, 8.0)]
    both = vi.merge(target, parts, KEY)
    own = vi.constrain(both.guide.declared, both.params)["guide"]
    np.testing.assert_allclose(own["weights"], [0.25, 0.75], atol=0.01)
    np.testing.assert_allclose(both.info.lane_elbos, np.log([1.0, 3.0]), atol=0.03)
    diagnosis = vi.diagnose(target, both.guide, both.params, KEY)
    assert diagnosis.trustworthy
    np.testing.assert_allclose(diagnosis.log_evidence, np.log(4.0), atol=0.02)


def test_systematic_resampling_takes_draws_as_often_as_weighted():
    """Each index comes floor or ceil of its expected number of times."""
    weights = jax.random.dirichlet(KEY, jnp.ones(20))
    index = pick_draws(jax.random.key(1), jnp.log(weights), 1000)
    counts = np.bincount(index, minlength=20)
    assert np.all(np.abs(counts - 1000 * np.asarray(weights)) < 1.01)
    assert np.any(np.diff(index) < 0)  # in random order


def test_resampling_mends_a_wide_guide():
    guide = vi.guides.mean_field(TARGET, init={"z": jnp.zeros(2)}, init_scale=3.0)
    params = vi.init_params(guide.declared, KEY)
    draws = vi.resample(TARGET, guide, params, KEY, 4000)["z"]
    np.testing.assert_allclose(draws.mean(0), np.ones(2), atol=0.15)
    np.testing.assert_allclose(draws.std(0), 2 * np.ones(2), rtol=0.07)


def two_parameters():
    """The solution of a guide written by hand."""
    guide = vi.guide(
        {"loc": jnp.zeros(2), "log_scale": jnp.zeros(2)},
        lambda v: {"z": dist.Normal(v["loc"], jnp.exp(v["log_scale"])).to_event(1)},
    )
    return vi.Solution(guide, vi.init_params(guide.declared, KEY), None, None)


BY_HAND = two_parameters()


def test_a_round_whose_weights_are_no_numbers_is_not_kept():
    """The density is infinite far out, where a draw of some rounds falls."""

    def log_density(values, latents, data):
        z = latents["z"]
        return jnp.where(z > 4.0, jnp.inf, dist.Normal().log_prob(z))

    target = vi.target(log_density, {"z": vi.Latent(())})
    guide = vi.guides.mean_field(target, init={"z": jnp.zeros(())}, init_scale=1.0)
    start = vi.Solution(guide, vi.init_params(guide.declared, KEY), None, None)
    found = [
        vi.solvers.population_monte_carlo(
            target, key, init=start, num_components=1, num_draws=60, max_steps=4
        )
        for key in jax.random.split(KEY, 6)
    ]
    elbos = np.array([one.info.elbo for one in found])
    assert not np.any(np.isinf(elbos))
    assert np.sum(np.isfinite(elbos)) >= 4
    for one in found:
        if np.isfinite(one.info.elbo):  # that of the guide that is given
            draws = vi.draws(target, one.guide, one.params, KEY, 4000)["z"]
            log_q = jax.vmap(lambda z, one=one: one.guide.log_prob(one.params, {"z": z}))(draws)
            ratio = dist.Normal().log_prob(draws) - log_q
            error = 4.0 * float(ratio.std()) / np.sqrt(60)  # four standard errors of 60 draws
            np.testing.assert_allclose(one.info.elbo, ratio.mean(), atol=error)


@pytest.mark.parametrize(
    ("call", "kind", "fragment"),
    [
        (lambda: vi.guides.mixture(TARGET, 0), ValueError, "num_components"),
        (lambda: vi.guides.mixture(TARGET, 2, df=0), ValueError, "df"),
        (lambda: vi.guides.mixture(TARGET, 2, init_scale=-1.0), ValueError, "scale"),
        (lambda: vi.guides.active_mixture(TARGET, 2, 0), ValueError, "num_active"),
        (lambda: vi.guides.active_mixture(TARGET, 2, 3), ValueError, "the dimension"),
        (lambda: vi.guides.active_mixture(TARGET, 2, 1, df=0), ValueError, "df"),
        (lambda: vi.merge(TARGET, [], KEY), ValueError, "nothing to merge"),
        (lambda: vi.merge(TARGET, [TARGET], KEY), TypeError, r"solutions\[0\]"),
        (lambda: vi.merge(TARGET, [BY_HAND], KEY), ValueError, "one family"),
        (
            lambda: vi.solvers.population_monte_carlo(TARGET, KEY, init=TARGET),
            TypeError,
            "init",
        ),
        (
            lambda: vi.solvers.population_monte_carlo(TARGET, KEY, init=BY_HAND),
            ValueError,
            "one family",
        ),
        (lambda: vi.resample(TARGET, None, None, KEY, 10, num_proposals=2), ValueError, ">= 25"),
    ],
)
def test_wrong_arguments_are_refused(call, kind, fragment):
    with pytest.raises(kind, match=fragment):
        call()
