"""After the fit: verdicts on guides good and bad, draws, summaries, checks that name the site."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from numpyro import distributions as dist

import vi_params as vi

KEY = jax.random.key(0)
DATA = jnp.array([0.5, 1.5, -0.3])


def conjugate(values, latents, data):
    """z ~ N(0, 1), each datum ~ N(z, 1)."""
    z = latents["z"]
    return dist.Normal(0, 1).log_prob(z) + dist.Normal(z, 1).log_prob(data).sum()


@cache
def setting():
    target = vi.target(conjugate, {"z": vi.Latent(())}, data=DATA)
    return target, vi.guides.mean_field(target)


def at(guide, loc, scale):
    values = {"guide": {"loc": jnp.array([loc]), "scale": jnp.array([scale])}}
    return vi.unconstrain(guide.declared, values)


def log_evidence(data):
    n = len(data)
    covariance = np.eye(n) + np.ones((n, n))
    data = np.asarray(data)
    quadratic = data @ np.linalg.solve(covariance, data)
    return -0.5 * (n * np.log(2 * np.pi) + np.linalg.slogdet(covariance)[1] + quadratic)


def exact(data=DATA):
    """The parameters of the posterior N(sum / 4, 1 / 4)."""
    return at(setting()[1], float(data.sum()) / 4, 0.5)


def test_the_exact_guide_is_trusted():
    """At the exact posterior ELBO = log evidence without noise, and every weight is the same."""
    found = vi.diagnose(*setting(), exact(), KEY)
    assert float(found.elbo) == pytest.approx(log_evidence(DATA), abs=1e-4)
    assert float(found.log_evidence) == pytest.approx(log_evidence(DATA), abs=1e-4)
    assert float(found.elbo_se) < 1e-4
    assert float(found.k_hat) < 0.5
    assert float(found.ess) == pytest.approx(4000, rel=0.01)
    assert bool(found.trustworthy)
    assert found.verdict.startswith("Trust this")
    assert found.verdict in str(found)


def test_the_elbo_is_the_evidence_less_the_divergence():
    """ELBO = log evidence - KL(q | p), the divergence of two normals in closed form, in 4 SE."""
    found = vi.diagnose(*setting(), at(setting()[1], 0.6, 0.3), KEY)
    m = float(DATA.sum()) / 4
    divergence = np.log(0.5 / 0.3) + (0.3**2 + (0.6 - m) ** 2) / (2 * 0.25) - 0.5
    expected = log_evidence(DATA) - divergence
    assert abs(float(found.elbo) - expected) < 4 * float(found.elbo_se)
    assert 0 < float(found.elbo_se) < 0.05


def test_the_log_evidence_is_unbiased():
    """From a guide wider than the posterior, importance sampling gives the evidence in 4 SE."""
    diagnose = jax.vmap(lambda key: vi.diagnose(*setting(), at(setting()[1], 0.2, 0.8), key))
    found = diagnose(jax.random.split(KEY, 50))
    evidence = np.exp(np.asarray(found.log_evidence) - log_evidence(DATA))
    assert abs(evidence.mean() - 1) < 4 * evidence.std() / np.sqrt(50)
    assert evidence.std() < 0.1
    assert np.all(found.log_evidence >= found.elbo)


@pytest.mark.parametrize("density", [dist.Cauchy(0, 1), dist.StudentT(2, 0, 1)])
def test_a_guide_that_misses_the_tails_is_not_trusted(density):
    """A narrow normal for a heavy-tailed target has a large k-hat, and the verdict says so."""
    target = vi.target(lambda v, z, d: density.log_prob(z["z"]), {"z": vi.Latent(())})
    guide = vi.guides.mean_field(target)
    found = vi.diagnose(target, guide, at(guide, 0.0, 0.3), KEY)
    assert float(found.k_hat) > 0.7
    assert not bool(found.trustworthy)
    assert found.verdict.startswith("Do not trust this")


def test_diagnoses_are_vmapped_over_restarts_and_data():
    """One verdict for each set of parameters and data, equal to those one by one."""
    data = jnp.stack([DATA, DATA + 2.0])
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), exact(), exact(DATA + 2.0))
    target, guide = setting()
    found = jax.vmap(lambda p, d: vi.diagnose(target, guide, p, KEY, d))(params, data)
    for i in range(2):
        assert float(found.elbo[i]) == pytest.approx(log_evidence(data[i]), abs=1e-3)
    crossed = jax.vmap(lambda p: vi.diagnose(target, guide, p, KEY))(params)
    assert crossed.elbo[0] > crossed.elbo[1] + 1
    assert len(crossed.verdict) == 2
    assert str(crossed).count("\n") == 1


def test_a_point_has_no_verdict():
    """A delta guide has an ELBO, the log density, and no weights to judge."""
    target, _ = setting()
    guide = vi.guides.delta(target, init={"z": 0.4})
    found = vi.diagnose(target, guide, vi.init_params(guide.declared, KEY), KEY)
    assert float(found.elbo) == pytest.approx(float(conjugate({}, {"z": 0.4}, DATA)), abs=1e-4)
    assert np.isnan([found.k_hat, found.ess, found.log_evidence]).all()
    assert not bool(found.trustworthy)
    assert found.verdict.startswith("No verdict")


@pytest.mark.parametrize("bad", [jnp.nan, -jnp.inf])
@pytest.mark.parametrize("share", [0.2, 1.0])
def test_a_density_that_is_not_finite_is_not_trusted(bad, share):
    """NaN at some draws, or no finite density at all, is told; zero density at some draws is left
    to the weights, and no such guide is called close."""
    low = -jnp.inf if share == 1.0 else 0.84

    def broken(values, latents, data):
        return jnp.where(latents["z"] > low, bad, -0.5 * latents["z"] ** 2)

    target = vi.target(broken, {"z": vi.Latent(())})
    guide = vi.guides.mean_field(target)
    found = vi.diagnose(target, guide, at(guide, 0.0, 1.0), KEY)
    if share == 1.0 or np.isnan(bad):
        assert not bool(found.trustworthy)
        assert "not finite" in found.verdict
    else:
        assert float(found.elbo) == -np.inf
        assert float(found.log_evidence) == pytest.approx(
            np.log(0.8 * np.sqrt(2 * np.pi)), abs=0.05
        )
        assert "importance weighting" in found.verdict


def model(y):
    tau = numpyro.sample("tau", dist.HalfNormal(1.0))
    with numpyro.plate("rows", 2):
        theta = numpyro.sample("theta", dist.Normal(0.0, tau))
        numpyro.sample("y", dist.Normal(theta, 1.0), obs=y)
    numpyro.deterministic("total", theta.sum())


@cache
def numpyro_setting():
    target = vi.from_numpyro(model, jnp.array([0.5, -0.5]))
    guide = vi.guides.mean_field(target)
    return target, guide, vi.init_params(guide.declared, KEY)


def test_draws_are_named_constrained_and_reproducible():
    """Latents in their supports and the deterministic sites computed from them, draw by draw; the
    same key gives the same draws, and so does drawing a few at once."""
    draws = vi.draws(*numpyro_setting(), KEY, 50)
    assert list(draws) == ["tau", "theta", "total"]
    assert {name: x.shape for name, x in draws.items()} == {
        "tau": (50,),
        "theta": (50, 2),
        "total": (50,),
    }
    assert np.all(draws["tau"] > 0)
    assert len(np.unique(draws["tau"])) == 50
    np.testing.assert_allclose(draws["total"], draws["theta"].sum(1), rtol=1e-5)
    few = vi.draws(*numpyro_setting(), KEY, 50, batch_size=7)
    again = vi.draws(*numpyro_setting(), KEY, 50)
    other = vi.draws(*numpyro_setting(), jax.random.key(1), 50)
    for name in draws:
        np.testing.assert_allclose(few[name], draws[name], rtol=1e-6)
        np.testing.assert_array_equal(again[name], draws[name])
        assert np.all(other[name] != draws[name])


def test_draws_have_the_moments_of_the_guide():
    """Mean and sd of many draws are the guide's loc and scale, in 4 SE."""
    z = np.asarray(vi.draws(*setting(), at(setting()[1], 0.6, 0.3), KEY, 10_000)["z"])
    assert abs(z.mean() - 0.6) < 4 * 0.3 / 100
    assert abs(z.std() - 0.3) < 4 * 0.3 / np.sqrt(2 * 10_000)


def test_a_diagnosis_in_batches_is_the_same():
    """batch_size bounds the memory and changes nothing else."""
    a = vi.diagnose(*setting(), exact(), KEY, num_draws=100)
    b = vi.diagnose(*setting(), exact(), KEY, num_draws=100, batch_size=30)
    np.testing.assert_allclose(a.elbo, b.elbo, rtol=1e-5)


def test_a_summary_has_a_row_for_each_number():
    """Rows are labelled by name and index; mean, sd and quantiles are numpy's."""
    x = np.random.default_rng(0).normal(size=(100, 2, 2))
    table = vi.summary({"a": x[:, 0, 0], "b": x}, quantiles=(0.1, 0.9))
    assert table["name"] == ("a", "b[0, 0]", "b[0, 1]", "b[1, 0]", "b[1, 1]")
    assert table.columns == ("name", "mean", "sd", "10%", "90%")
    assert table["mean"][2] == pytest.approx(x[:, 0, 1].mean())
    assert table["sd"][3] == pytest.approx(x[:, 1, 0].std())
    assert table["90%"][4] == pytest.approx(np.quantile(x[:, 1, 1], 0.9))


def test_a_sound_model_passes_the_check():
    """Everything finite: ok, no problems, a row for each latent and each term, and it prints."""
    report = vi.check(numpyro_setting()[0], KEY)
    assert report.ok
    assert report.problems == ()
    assert set(report.table["name"]) == {"tau", "theta", "y"}
    assert str(report).startswith("All finite.")
    assert np.isfinite(report.log_density)


def nan_site():
    z = numpyro.sample("z", dist.Normal(0.0, 1.0))
    numpyro.factor("broken_term", jnp.nan * z)


def log_of_negative():
    z = numpyro.sample("z", dist.HalfNormal(1.0))
    numpyro.factor("broken_term", jnp.log(-z))


def nan_data():
    z = numpyro.sample("z", dist.Normal(0.0, 1.0))
    numpyro.sample("broken_term", dist.Normal(z, 1.0), obs=jnp.array([0.0, jnp.nan]))


@pytest.mark.parametrize("model", [nan_site, log_of_negative, nan_data])
def test_a_check_names_the_site_that_is_broken(model):
    """A NaN term, a log of a negative number, NaN among the data: the site is named, others not."""
    report = vi.check(vi.from_numpyro(model), KEY)
    assert not report.ok
    named = [problem for problem in report.problems if "log density" in problem]
    assert len(named) == 1
    assert "'broken_term'" in named[0]
    assert str(report).startswith("Not usable: ")
    assert not np.isfinite(report.log_density)


def test_a_check_sees_a_broken_gradient():
    """A finite density whose gradient is not is no use either."""
    target = vi.target(lambda v, z, d: -jnp.sqrt(jnp.abs(0.0 * z["z"])), {"z": vi.Latent(())})
    report = vi.check(target, KEY)
    assert not report.ok
    assert any("gradient" in problem and "'z'" in problem for problem in report.problems)
