"""Well-known posteriors: the best known mean-field ELBO, and long-run reference moments."""

import importlib.util
import pathlib

import jax
import numpy as np
import pytest

import vi_params as vi

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "shared" / "posteriors"

NAMES = [
    "eight_schools-eight_schools_noncentered",
    "dogs-dogs",
    "arK-arK",
    "garch-garch11",
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (FOLDER / "posteriors.py").exists(),
        reason=f"the optional reference posteriors are not at {FOLDER}",
    ),
]


@pytest.fixture(scope="module")
def posteriors():
    spec = importlib.util.spec_from_file_location("posteriors", FOLDER / "posteriors.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(importlib.sys.modules, "posteriors", module)
        spec.loader.exec_module(module)
        yield module.POSTERIORS


@pytest.mark.parametrize("name", NAMES)
def test_untuned_mean_field_reaches_the_reference(posteriors, name):
    """Ten particles and defaults end within 0.15 nat of the best mean-field ELBO, and not above it
    by more than the noise."""
    with jax.enable_x64(True):
        model, args, kwargs = posteriors[name].make()
        target = vi.from_numpyro(model, *args, **kwargs)
        guide = vi.guides.mean_field(target)
        objective = vi.elbo(target, guide, num_particles=10)
        fit = vi.fit(objective, key=jax.random.key(0), progress=False)
        found = vi.diagnose(target, guide, fit.params, jax.random.key(1), num_draws=10_000)
    reference = posteriors[name].reference()["mean_field_elbo"]
    assert fit.status is vi.Status.CONVERGED
    assert reference - 0.15 < float(found.elbo) < reference + 0.1


@pytest.mark.parametrize(
    "name",
    [
        "kidiq-kidscore_interaction",
        "wells_data-wells_interaction_model",
        "GLM_Poisson_Data-GLM_Poisson_model",
    ],
)
def test_fixed_draws_reach_the_reference(posteriors, name):
    """The mean-field ELBO is the best one; with linear response every mean is within 0.1 posterior
    standard deviations, and every standard deviation within a tenth; k-hat says that it is so."""
    with jax.enable_x64(True):
        posterior = posteriors[name]
        model, args, kwargs = posterior.make()
        target = vi.from_numpyro(model, *args, **kwargs)
        solution = vi.solvers.deterministic(target, jax.random.key(0))
        plain = vi.diagnose(target, solution.guide, solution.params, jax.random.key(1))
        solution = vi.linear_response(target, solution)
        found = vi.diagnose(target, solution.guide, solution.params, jax.random.key(1))
        draws = vi.draws(target, solution.guide, solution.params, jax.random.key(2), 10_000)
    reference = posterior.reference()
    assert solution.info.status == vi.SolverStatus.CONVERGED
    assert abs(float(plain.elbo) - reference["mean_field_elbo"]) < 0.15
    assert found.trustworthy
    for parameter, site in posterior.params.items():
        mean, sd = (np.asarray(reference[what][parameter]) for what in ("mean", "sd"))
        found = np.asarray(draws[site])
        assert np.max(np.abs(found.mean(0) - mean) / sd) < 0.1
        assert np.max(np.abs(np.log(found.std(0) / sd))) < 0.1
