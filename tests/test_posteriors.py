"""Mean-field fits of well-known posteriors against the best known mean-field ELBO."""

import importlib.util
import pathlib

import jax
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
