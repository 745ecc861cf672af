"""One call from a target to draws and a verdict: against closed forms, quadrature and NUTS."""

import importlib
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from jax.flatten_util import ravel_pytree
from numpyro import distributions as dist
from numpyro.distributions import constraints
from numpyro.infer import MCMC, NUTS
from scipy import stats

import vi_params as vi
from vi_params._cache import program
from vi_params._compile import Quick
from vi_params.approximation.candidate import Candidate, best_of
from vi_params.approximation.judge import BATCH, FEWER, judge_of_guide
from vi_params.approximation.polish import (
    COMPONENTS,
    FAR,
    MORE_COMPONENTS,
    is_stale,
    num_active_of,
    start_of,
)
from vi_params.approximation.proposals import values_of
from vi_params.approximation.result import _deterministic, resampled
from vi_params.approximation.tails import Spread, towards_spreads, worst_spread
from vi_params.guides.frame import unbent
from vi_params.importance import Weighted, psis, psis_on_host
from vi_params.solvers.solution import Slopes

KEY = jax.random.key(0)


def conjugate():
    """Counts with a gamma prior on their rate: the posterior is Gamma(2 + sum, 1 + number)."""

    def log_density(values, latents, data):
        prior = dist.Gamma(2.0, 1.0).log_prob(latents["rate"])
        return prior + dist.Poisson(latents["rate"]).log_prob(data).sum()

    return vi.target(
        log_density,
        {"rate": vi.Latent((), constraints.positive)},
        data=jnp.array([3.0, 5.0, 4.0, 7.0]),
        deterministic=lambda values, latents, data: {"double": 2.0 * latents["rate"]},
    )


TARGET = conjugate()


@pytest.fixture(scope="module")
def posterior():
    return vi.approximate(TARGET, KEY)


def test_draws_are_those_of_the_closed_form(posterior):
    exact = dist.Gamma(21.0, 5.0)
    draws = posterior.draws(jax.random.key(1), 8000)
    assert posterior.trustworthy
    assert posterior.resampled
    assert set(draws) == {"rate", "double"}
    np.testing.assert_array_equal(draws["double"], 2.0 * draws["rate"])
    np.testing.assert_allclose(draws["rate"].mean(), exact.mean, atol=0.04)
    np.testing.assert_allclose(draws["rate"].std(), np.sqrt(exact.variance), rtol=0.05)


def test_any_number_of_draws_is_given(posterior):
    for number in (1, 4001, 450_000):
        draws = posterior.draws(KEY, number)
        assert draws["rate"].shape == draws["double"].shape == (number,)


def test_it_prints_a_verdict_and_what_was_tried(posterior):
    text = str(posterior)
    assert text.startswith("Trust this (")
    assert "* linear response" in text
    assert "log evidence" in text


def test_a_second_call_compiles_nothing(compilations):
    """Other data of the same shapes: every program is there."""
    vi.approximate(TARGET, KEY, TARGET.data).draws(KEY, 100)
    other_key, counts = jax.random.key(5), jnp.array([1.0, 2.0, 0.0, 1.0])
    with compilations() as seen:
        other = vi.approximate(TARGET, other_key, counts)
        draws = other.draws(KEY, 137)
    assert seen == []
    np.testing.assert_allclose(draws["rate"].mean(), 6.0 / 5.0, atol=0.25)


def test_it_holds_few_instances_of_the_model():
    """Tracing counts: the solver holds the model once with derivatives, the judgement once more."""
    calls = []

    def log_density(values, latents, data):
        calls.append(None)
        return dist.StudentT(8.0).log_prob(latents["z"]).sum()

    target = vi.target(log_density, {"z": vi.Latent((2,))})
    vi.approximate(target, KEY, polish=False)
    # Each program traces its loops' bodies up to three times (shapes, fixed points, the program).
    assert len(calls) <= 8


def test_a_polished_hierarchy_compiles_the_model_twice(monkeypatch):
    """One program with its derivatives and one without: pilot, rounds and draws need no other,
    where there are no deterministic sites."""
    called = set()

    def recorded(own):
        def call(self, *args):
            called.add(self)
            return own(self, *args)

        return call

    def model(sigma, y):
        mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
        with numpyro.plate("schools", 3):
            theta = numpyro.sample("theta", dist.Normal(mu, tau))
            numpyro.sample("y", dist.Normal(theta, sigma), obs=y)

    for how in ("__call__", "side_by_side"):
        monkeypatch.setattr(Quick, how, recorded(getattr(Quick, how)))
    target = vi.from_numpyro(model, jnp.array([15.0, 10.0, 16.0]), jnp.array([28.0, 8.0, -3.0]))
    found = vi.approximate(target, KEY)
    found.draws(KEY, 100)
    assert found.coordinates is not found.target
    assert "* population Monte Carlo" in str(found)
    assert len(values_of(found)["weights"]) == COMPONENTS + 1
    names = sorted(program.light.__name__ for program in called)
    small = {"respond", "compiled", "<lambda>"}  # of means and covariances alone
    assert [name for name in names if name not in small] == ["density", "solve"]
    assert all(program.light._cache_size() <= 1 for program in called)


NOTHING = vi.target(lambda values, latents, data: jnp.zeros(()), {})
NAMED = TARGET._replace(
    declared=vi.target(
        lambda values, latents, data: jnp.zeros(()), {}, declared={"guide": 0.0}
    ).declared
)


def two_modes(values, latents, data):
    z = latents["z"]
    right = dist.Normal(6.0, 1.0).log_prob(z).sum()
    left = dist.Normal(-6.0, 1.0).log_prob(z).sum()
    return jnp.logaddexp(jnp.log(0.7) + right, jnp.log(0.3) + left)


@pytest.mark.slow
def test_distinct_optima_are_merged():
    """Two far modes with 0.7 and 0.3 of the mass: what one Gaussian's weights cannot see."""
    target = vi.target(two_modes, {"z": vi.Latent((2,))})
    found = vi.approximate(target, jax.random.key(1), lanes=8)
    assert "* 2 optima merged" in str(found)
    assert found.trustworthy
    draws = found.draws(KEY, 4000)["z"]
    np.testing.assert_allclose((draws[:, 0] > 0).mean(), 0.7, atol=0.04)
    np.testing.assert_allclose(draws.mean(0), 0.4 * 6.0, atol=0.4)


@pytest.mark.slow
def test_distinct_optima_of_many_latents_are_merged(monkeypatch):
    """Where covariances are a few directions and a diagonal, too."""
    module = importlib.import_module("vi_params.approximation.stages")
    monkeypatch.setattr(module, "DENSE", 1)
    monkeypatch.setattr(module, "RANK", 1)
    target = vi.target(two_modes, {"z": vi.Latent((2,))})
    found = vi.approximate(target, jax.random.key(1), lanes=8, polish=False)
    assert "* 2 optima merged" in str(found)
    np.testing.assert_allclose(found.draws(KEY, 4000)["z"].mean(0), 0.4 * 6.0, atol=0.4)


def test_parameters_of_the_model_are_estimated():
    """z ~ N(mu, 1), y ~ N(z, 1): the evidence of N(mu, 2) is largest at the mean of y."""

    def log_density(values, latents, data):
        z = latents["z"]
        prior = dist.Normal(values["mu"], 1.0).log_prob(z)
        return jnp.sum(prior + dist.Normal(z, 1.0).log_prob(data))

    y = jnp.array([1.0, 2.0, 6.0])
    target = vi.target(log_density, {"z": vi.Latent((3,))}, declared={"mu": 0.0}, data=y)
    found = vi.approximate(target, KEY)
    assert found.trustworthy
    np.testing.assert_allclose(found.params["mu"], 3.0, atol=1e-3)
    np.testing.assert_allclose(found.draws(KEY, 4000)["z"].mean(0), (y + 3.0) / 2, atol=0.05)


def test_plates_are_looked_at_whole():
    """Data marked for batches: the posterior is that of all rows."""

    def likelihood(values, latents, data):
        return dist.Normal(latents["mean"], 1.0).log_prob(data)

    def prior(values, latents, data):
        return dist.Normal(0.0, 10.0).log_prob(latents["mean"])

    y = jnp.linspace(-1.0, 3.0, 100)
    latents = {"mean": vi.Latent(())}
    target = vi.target(prior, latents, per_row=likelihood, data=vi.minibatch(y, 10))
    draws = vi.approximate(target, KEY).draws(KEY, 4000)["mean"]
    np.testing.assert_allclose(draws.mean(), 1.0, atol=0.01)
    np.testing.assert_allclose(draws.std(), 0.1, rtol=0.05)
    streamed = vi.minibatch(y[:10], 10, size=100)
    first = vi.target(prior, latents, per_row=likelihood, data=streamed)
    with pytest.raises(ValueError, match="10 of 100 rows"):
        vi.approximate(first, KEY)
    with pytest.raises(ValueError, match="all data at once"):
        vi.approximate(target, KEY, vi.Batch(y, {"rows": jnp.arange(10)}))


def test_densities_that_are_not_finite_are_told():
    def log_density(values, latents, data):
        z = latents["z"]
        return jnp.where(z > 1.5, jnp.inf, dist.Normal().log_prob(z))

    found = vi.approximate(vi.target(log_density, {"z": vi.Latent(())}), KEY, polish=False)
    assert not found.trustworthy
    assert "not finite at some draws" in found.verdict


def test_a_spread_beyond_the_dtype_is_told_without_a_warning(recwarn):
    target = vi.target(lambda v, z, d: -1e25 * jnp.float32(z["z"]) ** 2, {"z": vi.Latent(())})
    guide = vi.guides.mean_field(target)
    params = vi.init_params(guide.declared, KEY)
    _, diagnosis = judge_of_guide(target, guide, params, target.data, 100)(KEY)
    assert np.isfinite(diagnosis.elbo)
    assert not diagnosis.trustworthy
    assert not recwarn.list


def test_deterministic_sites_make_no_batched_factorisations():
    """On a CPU such calls can wait for each other for ever."""
    root = jnp.eye(3) + jnp.tri(3)

    def solved(values, latents, data):
        return {"x": jax.scipy.linalg.solve_triangular(latents["z"] * root, data, lower=True)}

    target = vi.target(
        lambda v, z, d: dist.Normal(3.0, 0.1).log_prob(z["z"]),
        {"z": vi.Latent(())},
        data=jnp.ones(3),
        deterministic=solved,
    )
    found = vi.approximate(target, KEY)
    draws = found.draws(KEY, 10)
    exact = np.linalg.solve(np.asarray(root), np.ones(3)) / np.asarray(draws["z"])[:, None]
    np.testing.assert_allclose(draws["x"], exact, rtol=1e-4, atol=1e-6)
    drawn = vi.resample(target, found.guide, found.params, KEY, 50)
    assert drawn["x"].shape == (50, 3)
    compute = program(_deterministic, target).plain
    text = str(jax.make_jaxpr(compute)({}, {"z": draws["z"]}, target.data))
    assert ("scan" in text) == (jax.default_backend() == "cpu")


def banana(values, latents, data):
    """x ~ N(0, 1), y ~ N(x^2 / 2, 1/4): E[y] = 1/2, var y = 1/2 + 1/16."""
    x, y = latents["z"]
    return dist.Normal(0.0, 1.0).log_prob(x) + dist.Normal(0.5 * x**2, 0.25).log_prob(y)


def test_a_bent_posterior_is_polished():
    """Where linear response is flagged, the mixture is trusted and right."""
    target = vi.target(banana, {"z": vi.Latent((2,))})
    rough = vi.approximate(target, KEY, polish=False)
    assert not rough.trustworthy
    assert "Use MCMC" in rough.verdict
    assert not rough.resampled
    fine = vi.approximate(target, KEY)
    assert "* population Monte Carlo" in str(fine)
    assert fine.trustworthy
    # Few draws of the Gaussian are effective: it takes more components, and the guard.
    assert float(rough.diagnosis.ess) < FAR * int(rough.diagnosis.num_draws)
    assert len(values_of(fine)["weights"]) == MORE_COMPONENTS + 1
    draws = fine.draws(KEY, 8000)["z"]
    np.testing.assert_allclose(draws.mean(0), [0.0, 0.5], atol=0.06)
    np.testing.assert_allclose(draws.std(0), [1.0, 0.75], rtol=0.08)
    np.testing.assert_allclose(float(fine.diagnosis.log_evidence), 0.0, atol=0.05)


def schools(sigma, y):
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfNormal(5))
    with numpyro.plate("schools", len(sigma)):
        z = numpyro.sample("z", dist.Normal(0, 1))
        numpyro.deterministic("theta", mu + tau * z)
        numpyro.sample("y", dist.Normal(mu + tau * z, sigma), obs=y)


@pytest.mark.slow
def test_nuts_starts_from_it():
    """numpyro's NUTS takes positions and mass matrix as they are, keeps the matrix in the order of
    its latents, and finds the moments of the draws."""
    y, sigma = jnp.array([28.0, 8.0, -3.0]), jnp.array([15.0, 10.0, 16.0])
    target = vi.from_numpyro(schools, sigma, y)
    found = vi.approximate(target, KEY)
    start = found.nuts_start(jax.random.key(1), num_chains=2)
    assert start.position.shape == (2, 5)
    assert not np.any(start.position[0] == start.position[1])
    names = tuple(start.unconstrained)
    joined = jnp.concatenate([ravel_pytree(start.unconstrained[n][0])[0] for n in names])
    np.testing.assert_array_equal(joined, start.position[0])
    kernel = NUTS(
        schools, dense_mass=[names], inverse_mass_matrix={names: start.inverse_mass_matrix}
    )
    mcmc = MCMC(kernel, num_warmup=300, num_samples=1500, num_chains=1, progress_bar=False)
    first = {name: value[0] for name, value in start.unconstrained.items()}
    mcmc.run(jax.random.key(2), sigma, y, init_params=first)
    chain, draws = mcmc.get_samples(), found.draws(jax.random.key(3), 4000)
    for name in ("mu", "tau", "theta"):
        gap = np.abs(draws[name].mean(0) - chain[name].mean(0)) / chain[name].std(0)
        assert np.all(gap < 0.25)


def test_no_valid_start_is_an_error_that_says_where():
    target = vi.target(lambda v, z, d: jnp.log(-1.0 - z["z"] ** 2), {"z": vi.Latent(())})
    with pytest.raises(ValueError, match="No start has a finite log density") as error:
        vi.approximate(target, KEY)
    assert "vi.check" in str(error.value)


@pytest.mark.parametrize(
    ("call", "kind", "fragment"),
    [
        (lambda: vi.approximate(TARGET, 0), TypeError, "key"),
        (lambda: vi.approximate(schools, KEY), TypeError, "vi.from_numpyro"),
        (lambda: vi.approximate(TARGET, KEY, lanes=0), ValueError, "lanes"),
        (lambda: vi.approximate(NOTHING, KEY), ValueError, "nothing to approximate"),
        (lambda: vi.approximate(NAMED, KEY), ValueError, "name of the guide"),
    ],
)
def test_wrong_arguments_are_refused(call, kind, fragment):
    with pytest.raises(kind, match=fragment):
        call()


@pytest.mark.parametrize(
    ("call", "kind", "fragment"),
    [
        (lambda posterior: posterior.draws(KEY, 0), ValueError, "num_draws"),
        (lambda posterior: posterior.draws(1, 10), TypeError, "key"),
        (lambda posterior: posterior.nuts_start(KEY, 0), ValueError, "num_chains"),
    ],
)
def test_wrong_requests_are_refused(posterior, call, kind, fragment):
    with pytest.raises(kind, match=fragment):
        call(posterior)


def test_a_parameter_called_centring_is_the_models_own():
    """Nothing else has that name where a model uses it."""

    def model(y):
        shift = numpyro.param("centring", 0.0)
        tau = numpyro.sample("tau", dist.LogNormal(0.0, 0.3))
        x = numpyro.sample("x", dist.Normal(shift, tau).expand([2]).to_event(1))
        numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)

    target = vi.from_numpyro(model, jnp.array([1.0, 3.0]))
    found = vi.approximate(target, KEY, polish=False)
    assert found.coordinates is found.target
    np.testing.assert_allclose(found.params["centring"], 2.0, atol=0.05)


def tried(k_hat, share, log_evidence=0.0):
    diagnosis = types.SimpleNamespace(
        k_hat=k_hat, ess=1000 * share, num_draws=1000, log_evidence=log_evidence
    )
    return Candidate("", None, diagnosis, (), None)


@pytest.mark.parametrize(
    ("candidates", "best"),
    [
        ([tried(0.6, 0.5), tried(0.4, 0.3)], 0),  # effective enough to make up for its tail
        ([tried(0.6, 0.5), tried(0.4, 0.4)], 1),
        ([tried(0.2, 0.4), tried(0.3, 0.6)], 1),
        ([tried(0.2, 0.9, -1.0), tried(0.3, 0.6)], 1),  # the first one misses mass
        ([tried(0.75, 0.9), tried(0.6, 0.2)], 1),  # the first one is not to be trusted
        ([tried(0.75, 0.1), tried(0.9, 0.9)], 0),  # none is
        ([tried(0.4, math.nan), tried(0.6, 0.2)], 1),
    ],
)
def test_which_of_several_is_taken(candidates, best):
    assert best_of(candidates) is candidates[best]


def test_those_whose_spreads_show_come_first():
    """Before those of larger merit, but only among what is to be trusted."""
    unshown = tried(0.2, 0.9)._replace(spread=Spread("x", 0.9, 0.1))
    shown = tried(0.3, 0.4)._replace(spread=Spread("x", 0.9, 0.01))
    assert best_of([unshown, shown]) is shown
    assert not unshown.is_good
    hopeless = tried(0.2, 0.9)._replace(spread=Spread("x", 0.5, 0.01, drawn_error=0.2))
    assert hopeless.is_good  # other draws gain nothing
    assert not hopeless.is_shown
    assert best_of([unshown, tried(0.75, 0.9)]) is unshown


@pytest.mark.parametrize(
    ("skewness", "num_data", "num_draws"),
    [(0.0, 6000, FEWER), (0.3, 6000, BATCH), (0.0, 1000, FEWER), (0.0, 100, BATCH)],
)
def test_few_draws_are_enough_for_what_is_clear(skewness, num_data, num_draws):
    """Where densities take long, a Gaussian is judged by few draws, and what is not Gaussian by all
    of them; of either the moments are those of the closed form."""

    def log_density(values, latents, data):
        spread = jnp.exp(skewness * latents["x"])
        shown = dist.Normal(latents["x"], jnp.sqrt(len(data))).log_prob(data).sum()
        return shown + dist.Normal(0.0, spread).log_prob(latents["y"])

    target = vi.target(log_density, {n: vi.Latent(()) for n in "xy"}, data=jnp.zeros(num_data))
    found = vi.approximate(target, KEY, polish=False)
    assert found.diagnosis.num_draws == num_draws
    assert found.trustworthy
    draws = found.draws(jax.random.key(1), 8000)
    np.testing.assert_allclose(draws["x"].std(), 1.0, rtol=0.06)
    np.testing.assert_allclose(draws["y"].std(), np.exp(skewness**2), rtol=0.1)


def test_resampling_is_stratified():
    """Of every stretch of the order, and so of any tail, as many draws are chosen as its weight
    says, to one draw; they come in random order."""
    random = np.random.default_rng(0)
    values, log_weights = random.standard_normal(2000), random.standard_normal(2000)
    log_weights -= np.logaddexp.reduce(log_weights)
    index = resampled(KEY, log_weights, 500, np.argsort(values))
    assert len(index) == 500
    for edge in np.quantile(values, [0.01, 0.2, 0.5, 0.9, 0.999]):
        weight = np.exp(log_weights)[values <= edge].sum()
        assert abs(np.sum(values[index] <= edge) - 500 * weight) <= 1
    assert abs(stats.spearmanr(np.arange(500), values[index]).statistic) < 0.2


def test_draws_are_sorted_by_the_heaviest_tail():
    """Of several latents, by the one whose spread few draws of the posterior show."""
    log_scales = jnp.array([0.1, 0.9, 0.3])
    target = vi.target(
        lambda v, z, d: dist.LogNormal(0.0, log_scales).log_prob(z["x"]).sum(),
        {"x": vi.Latent((3,), constraints.positive)},
    )
    assert vi.approximate(target, KEY).sorted_by == ("x", 1)


def test_rounds_begin_with_what_is_much_better():
    """With a conditional Gaussian that is to be trusted and has over three times as many effective
    draws; else, and in many dimensions, with linear response."""
    few, many = (
        vi.target(lambda v, z, d: -0.5 * jnp.sum(z["z"] ** 2), {"z": vi.Latent((number,))})
        for number in (32, 33)
    )
    response = tried(0.6, 0.15)
    better = tried(0.6, 0.5)
    assert start_of(few, response, better) is better
    assert start_of(many, response, better) is response
    for worse in (tried(0.6, 0.4), tried(0.8, 0.9)):
        assert start_of(few, response, worse) is response


@pytest.mark.parametrize(("different", "expected"), [(0, 2), (3, 3), (9, 4)])
def test_directions_of_the_rounds(different, expected):
    """As many as the gradient of the log ratio is large along, from two to four."""
    random = np.random.default_rng(0)
    z = random.standard_normal((2000, 40))
    scales = np.where(np.arange(40) < different, 1.2, 0.7)
    slopes = Slopes(z, scales * random.standard_normal((2000, 40)) - z, np.full(2000, 1 / 2000))
    own = {"loc": np.zeros(40), "scale_tril": np.eye(40)}
    assert num_active_of(own, slopes) == expected
    assert num_active_of({"loc": np.zeros(20), "scale_tril": np.eye(20)}, slopes) is None
    assert num_active_of({"weights": np.ones(2) / 2}, None) is None
    frame = unbent(np.zeros(40), np.eye(40), np.eye(40), 1, np)
    assert num_active_of({"frame": frame.values}, None) == 1


def test_few_gradients_make_no_directions():
    """In 300 dimensions eigenvalues of a thousand gradients of 0.36 exceed one by chance."""
    random = np.random.default_rng(0)
    z, weights = random.standard_normal((1000, 300)), random.exponential(size=1000) ** 2
    slopes = Slopes(z, 0.6 * random.standard_normal((1000, 300)) - z, weights / weights.sum())
    own = {"loc": np.zeros(300), "scale_tril": np.eye(300)}
    assert num_active_of(own, slopes) == 2


def test_what_is_clear():
    """A light tail, half of the draws, and every spread shown."""
    assert tried(0.2, 0.6).is_clear
    assert not tried(0.4, 0.6).is_clear
    assert not tried(0.2, 0.4).is_clear
    hopeless = Spread("x", 0.5, 0.01, drawn_error=0.2)
    assert not tried(0.2, 0.6)._replace(spread=hopeless).is_clear


def test_a_spare_one_is_taken_where_nothing_else_is_to_be_trusted():
    """And only if it is good; others are tried before."""
    spare = tried(0.2, 0.9)._replace(is_spare=True)
    assert best_of([spare, tried(0.6, 0.2)]).share == 0.2
    assert best_of([spare, tried(0.75, 0.2)]) is spare
    assert spare.is_good
    assert not spare.is_enough
    rough = tried(0.65, 0.9)._replace(is_spare=True)
    assert best_of([rough, tried(0.75, 0.2)]).share == 0.2


def test_rounds_end_when_the_last_ones_were_in_vain():
    assert not is_stale([0.5, 0.4, 0.4, 0.4])  # too few
    assert is_stale([0.5, 0.4, 0.4, 0.4, 0.54])
    assert not is_stale([0.5, 0.4, 0.4, 0.4, 0.56])
    assert not is_stale([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert not is_stale([0.0, 0.2, 0.0, 0.0, 0.0])


@pytest.mark.parametrize(("df", "k_hat"), [(2.0, 1.0), (4.0, 0.5), (8.0, 0.25)])
def test_second_moments_have_the_tail_of_the_squares(df, k_hat):
    """The square of a Student-t variable has a Pareto tail of shape 2 / df; what is not finite at
    weight zero does not count."""
    size = 40_000
    draws = jax.random.normal(KEY, (size, 3, 50)).at[:, 2, 7].set(jax.random.t(KEY, df, (size,)))
    log_ratios = jnp.zeros(size).at[0].set(-jnp.inf)
    draws = draws.at[0].set(jnp.inf)
    latents = {"x": draws, "c": jnp.ones(size)}
    found = worst_spread(Weighted(latents, draws, log_ratios, psis(log_ratios)))
    assert found.name == "x[2, 7]"
    np.testing.assert_allclose(found.k_hat, k_hat, atol=0.2)


def test_the_error_of_a_spread_is_that_of_repeated_batches():
    """Weighted draws of N(0, 1.2) towards N(0, 1), whose log standard deviations are known."""
    random = np.random.default_rng(0)
    found, kurtosis = [], 3.0
    for _ in range(300):
        x = 1.2 * random.standard_normal(2000)
        smoothed = psis_on_host(-0.5 * x**2 + 0.5 * (x / 1.2) ** 2)
        weights = np.exp(smoothed.log_weights)
        log_sd = 0.5 * np.log(weights @ (x - weights @ x) ** 2)
        spread = worst_spread(Weighted({"x": x}, x, None, smoothed))
        found.append((log_sd, spread.error, spread.drawn_error))
    log_sds, errors, drawn_errors = np.transpose(found)
    np.testing.assert_allclose(errors.mean(), log_sds.std(), rtol=0.15)
    exact = 0.5 * np.sqrt((kurtosis - 1) / 4000)
    np.testing.assert_allclose(drawn_errors.mean(), exact, rtol=0.05)


def test_draws_in_the_order_of_a_heavy_tail_have_its_spread():
    """Of log-normal latents, drawn wide enough for their tails to be light in the weights: that of
    the one that draws are resampled in the order of, not of another, nor from narrower draws."""
    random = np.random.default_rng(0)

    def worst(scale, num):
        z = scale * random.standard_normal((8000, num))
        log_ratios = np.sum(-0.5 * z**2 + 0.5 * (z / scale) ** 2, axis=1)
        latents = {f"x{i}": np.exp(1.2 * z[:, i]) for i in range(num)}
        return worst_spread(Weighted(latents, z, log_ratios, psis_on_host(log_ratios)))

    spread = worst(2.2, 1)
    assert spread.drawn_error > 0.1
    assert spread.error < 0.03
    assert spread.is_shown
    assert not spread._replace(order=("x1", 0)).is_shown
    assert not worst(2.2, 2).is_shown
    assert not worst(1.0, 1).is_shown


def test_a_mixture_is_fitted_to_the_spread_that_does_not_show():
    """Half of the weights are those of the second moment that is not shown."""
    random = np.random.default_rng(3)
    light, heavy = random.standard_normal(4000), random.standard_t(1.5, 4000)
    smoothed = psis_on_host(np.where(heavy > 20.0, -np.inf, 0.0))
    drawn = Weighted({"x": light, "y": heavy}, heavy, None, smoothed)
    weights = np.exp(smoothed.log_weights)
    shares = weights * (heavy - weights @ heavy) ** 2
    expected = 0.5 * weights + 0.5 * shares / shares.sum()
    found = towards_spreads(drawn)
    np.testing.assert_allclose(np.exp(found.smoothed.log_weights), expected, rtol=1e-10)
    np.testing.assert_allclose(found.smoothed.ess, 1 / np.sum(expected**2))


def test_one_of_two_batches_can_be_lucky():
    """The worst of two batches counts, by standard error and k-hat together."""
    assert Spread("x", 0.9, 0.02).is_shown
    assert not Spread("x", 0.8, 0.04).is_shown
    assert not Spread("x", 0.81, 0.025).is_shown
    assert Spread("x", 0.79, 0.025).is_shown
    assert not Spread("x", 0.72, 0.04).is_shown
    assert Spread("x", 0.69, 0.04).is_shown
    assert not Spread("x", 0.4, 0.05).is_shown
    assert not Spread("x", 0.4, 0.01, drawn_error=0.05).is_shown
    assert Spread("x", 0.4, 0.01, drawn_error=0.04).is_shown
    random = np.random.default_rng(1)
    light, heavy = random.standard_normal(4000), random.standard_t(2.0, 4000)
    smoothed = psis_on_host(np.zeros(4000))
    batches = [Weighted({"x": x}, x, None, smoothed) for x in (light, heavy)]
    assert worst_spread(batches[0]).is_shown
    assert not worst_spread(*batches).is_shown


@pytest.mark.parametrize(("spread", "trusted"), [(0.5, True), (3.0, False)])
def test_a_spread_that_draws_do_not_show_is_not_trusted(spread, trusted):
    """A log-normal latent: its logarithm is approximated exactly, but at a spread of 3 its standard
    deviation is that of one draw in millions."""

    def log_density(values, latents, data):
        return jnp.sum(dist.LogNormal(0.0, data).log_prob(latents["x"]))

    target = vi.target(
        log_density, {"x": vi.Latent((2,), constraints.positive)}, data=jnp.array([0.1, spread])
    )
    posterior = vi.approximate(target, KEY)
    assert posterior.trustworthy is trusted
    assert posterior.resampled
    assert float(posterior.diagnosis.k_hat) < 0.5
    assert trusted or "do not show the spread of x[1]" in posterior.verdict
