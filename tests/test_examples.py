"""The examples run as they stand, and what they tell their readers is true."""

import importlib.util
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"

pytestmark = pytest.mark.slow


def load(name):
    """An example as a module, from its file."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_eight_schools(tmp_path, monkeypatch, capsys):
    """In one call both models are approximated well, by hand the centred one is not; the means are
    those of long MCMC runs (mu 4.4, tau 3.6, theta_1 6.2)."""
    example = load("eight_schools")
    monkeypatch.setattr(example, "PICTURE", tmp_path / "picture.png")
    results = example.main()
    best = results["non-centred", "full-rank"]
    assert best.diagnosis.trustworthy
    assert abs(jnp.mean(best.draws["mu"]) - 4.4) < 0.5
    assert abs(jnp.mean(best.draws["theta"][:, 0]) - 6.2) < 1.0
    assert 2.5 < jnp.mean(best.draws["tau"]) < 4.0
    for family in ("mean-field", "full-rank"):
        centred = results["centred", family].diagnosis
        assert not centred.trustworthy
        assert centred.elbo < best.diagnosis.elbo - 0.5
    for result in results.values():
        assert result.fit.status.name == "CONVERGED"
        assert "10 of 10" in result.fit.message
    told = capsys.readouterr().out
    one_call = told.split("== check")[0].split("== in one call")
    assert all("Trust this (" in printed for printed in one_call[1:])
    known = {"mu": (4.4, 0.4), "tau": (3.6, 0.4), "theta[0]": (6.2, 0.6)}
    for printed in one_call[1:]:
        rows = [line.split() for line in printed.splitlines()]
        means = {row[0]: float(row[1]) for row in rows if row and row[0] in known}
        for name, (mean, error) in known.items():
            assert abs(means[name] - mean) < error
    assert "Trust: non-centred" in told
    assert "Do not trust: centred, mean-field; centred, full-rank" in told


def test_eight_schools_without_matplotlib(monkeypatch):
    """Without matplotlib no picture is drawn, and nothing fails."""
    for module in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    assert not load("eight_schools").draw_picture({}, ("", ""))


def test_logistic_regression():
    """Both families predict; full-rank alone sees how uncertain correlated weights are."""
    pytest.importorskip("sklearn")
    results = load("logistic_regression").main()
    mean_field, full_rank = results["mean-field"], results["full-rank"]
    for result in results.values():
        assert result.accuracy > 0.95
        assert -0.15 < result.log_predictive_density < 0
    assert full_rank.diagnosis.elbo > mean_field.diagnosis.elbo + 5
    assert full_rank.diagnosis.k_hat < 1 < mean_field.diagnosis.k_hat
    spread = jnp.std(full_rank.draws["weight"], 0) / jnp.std(mean_field.draws["weight"], 0)
    assert jnp.mean(spread) > 1.5


@pytest.mark.parametrize("name", ["logistic_regression", "mixture", "vae"])
def test_missing_scikit_learn_names_the_extra(name, monkeypatch):
    modules = ("sklearn", "sklearn.datasets", "sklearn.decomposition", "sklearn.mixture")
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit, match=r"vi_params\[examples\]"):
        load(name)


def test_mixture():
    """No more flowers in another part than by maximum likelihood, about as many as the draws of the
    labels say; in each draw each flower is in one part."""
    pytest.importorskip("sklearn")
    pytest.importorskip("funsor")
    result = load("mixture").main()
    assert result.errors <= result.errors_of_scikit_learn <= 6
    expected = np.sum(1 - np.max(result.probability, axis=1))
    assert 1 < expected < 8
    np.testing.assert_array_equal(result.discrete["counts"].sum(axis=1), 150)
    assert result.diagnosis.k_hat < 0.9


def test_custom_guide():
    """The structured guide becomes the posterior; the independent one has the moments that
    coordinate ascent has: right means, and the standard deviations of the conditionals."""
    example = load("custom_guide")
    results = example.main()
    exact = example.posterior()
    sd = np.sqrt(np.diag(exact.covariance))
    structured, independent = results["structured"], results["independent"]
    np.testing.assert_allclose(structured.mean, exact.mean, atol=0.1)
    np.testing.assert_allclose(structured.sd, sd, rtol=0.05)
    for name, expected in example.exact_structure().items():
        np.testing.assert_allclose(structured.values[name], expected, rtol=0.01)
    assert structured.diagnosis.trustworthy
    assert abs(structured.diagnosis.elbo - exact.log_evidence) < 0.01
    assert structured.diagnosis.elbo_se < 0.001

    np.testing.assert_allclose(independent.mean, exact.mean, atol=0.1)
    np.testing.assert_allclose(independent.sd, np.diag(exact.precision) ** -0.5, rtol=0.05)
    assert not independent.diagnosis.trustworthy
    _, log_det = np.linalg.slogdet(exact.covariance)
    divergence = 0.5 * (np.sum(np.log(np.diag(exact.precision))) + log_det)
    gap = exact.log_evidence - independent.diagnosis.elbo
    assert abs(gap - divergence) < 4 * independent.diagnosis.elbo_se + 0.02


def test_vae(tmp_path, monkeypatch):
    """The ELBO rises far above its start, and the code beats a linear one of the same length."""
    pytest.importorskip("sklearn")
    example = load("vae")
    monkeypatch.setattr(example, "PICTURE", tmp_path / "picture.png")
    result = example.main()
    assert result.first_elbo < 0
    assert result.last_elbo > 30
    assert result.vae_error < 0.7 * result.pca_error
    assert result.fit.skipped == 0
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(result.fit.params))


def test_amortised():
    """Every kind of network comes near the exact posteriors, for new patients too; rows that start
    from it come nearer than those that start from nothing, while it keeps its bits."""
    result = load("amortised").main()
    assert "plain JAX" in result.encoders
    for found in (*result.encoders.values(), result.new):
        assert found.mean < 0.25
        assert found.scale < 0.1
    assert result.refined.mean < 0.5 * result.encoders["plain JAX"].mean
    assert result.refined.mean < 0.5 * result.alone.mean
    assert result.refined.scale < 0.1
    same = {name: result.after[name] for name in result.before}
    jax.tree.map(np.testing.assert_array_equal, same, result.before)


def test_matrix_factorisation():
    """A million rows are fitted: the noise is recovered, and means of questions not asked are found
    almost as well as the exact posterior does that knows the questions, with intervals that hold
    most of them."""
    example = load("matrix_factorisation")
    result = example.main()
    assert abs(result.noise - 0.5) < 0.05
    assert result.limit < result.error < 1.2 * result.limit
    assert result.error < 0.25 * result.baseline
    assert 0.8 < result.coverage < 0.95
    assert result.fit.skipped == 0


def test_streaming():
    """Batches from a file lead to the exact posterior, within the noise of their gradients."""
    result = load("streaming").main()
    assert result.error < 1.0
    assert result.scale < 1.5
    assert result.fit.status.name == "NUM_STEPS"
