"""Draws that depend on each other: which gradients stay unbiased, which vary less, which refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from numpyro import distributions as dist

import vi_params as vi

E = vi.estimators
Y, NOISE = jnp.array([1.5, -0.4]), 0.8
LOC, SCALE = jnp.array([0.6, 0.3]), 0.7


def model(y):
    with numpyro.plate("rows", 2):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(z, NOISE), obs=y)


TARGET = vi.from_numpyro(model, Y)
GUIDE = vi.guides.mean_field(TARGET, init={"z": LOC}, init_scale=SCALE)
PARAMS = vi.init_params(GUIDE.declared, jax.random.key(0))
SLOPES = {  # of the ELBO; the scale is trained as its logarithm
    "loc": -LOC + (Y - LOC) / NOISE**2,
    "scale": jnp.full(2, 1 - SCALE**2 * (1 + 1 / NOISE**2)),
}
ESTIMATORS = {
    "pathwise": E.pathwise(),
    "closed_form_entropy": E.closed_form_entropy(),
    "sticking_the_landing": E.sticking_the_landing(),
    "analytic_kl": E.analytic_kl(),
    "mixed": E.mixed(),
    "score": E.score(baseline=E.no_baseline()),
}
SCHEMES = {"sobol": vi.noise.sobol(), "antithetic": vi.noise.antithetic()}


def gradients(objective, num):
    slope = jax.grad(lambda p, key: -objective.loss(p, key)[0])
    keys = jax.random.split(jax.random.key(1), num)
    found = jax.jit(jax.vmap(slope, in_axes=(None, 0)))(PARAMS, keys)["guide"]
    return {name: np.asarray(leaf, np.float64) for name, leaf in found.items()}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_dependent_draws(name):
    """With Sobol nets and antithetic pairs of 16 draws every estimator's mean gradient is that of
    the exact ELBO, within four standard errors; with nets it varies less than with independent
    draws, by half at least where it goes through the draws."""
    spread = {}
    for scheme in ("iid", *SCHEMES):
        noise = SCHEMES.get(scheme)
        options = {"estimator": ESTIMATORS[name], "noise": noise, "num_particles": 16}
        found = gradients(vi.elbo(TARGET, GUIDE, **options), 6000)
        for leaf, exact in SLOPES.items():
            error = found[leaf].std(axis=0) / np.sqrt(6000)
            assert np.all(np.abs(found[leaf].mean(axis=0) - exact) < 4 * error + 1e-5), leaf
        spread[scheme] = sum(leaf.var(axis=0).sum() for leaf in found.values())
    assert spread["sobol"] < (0.9 if name == "score" else 0.5) * spread["iid"]


def test_bounds_of_dependent_draws():
    """An importance-weighted bound of a Sobol net lies below the evidence as that of independent
    draws does, and the wake loss estimates the same divergence with less variance."""
    evidence = dist.Normal(0.0, np.sqrt(1 + NOISE**2)).log_prob(Y).sum()
    keys = jax.random.split(jax.random.key(2), 500)
    for build in (vi.iwae, vi.reweighted_wake_sleep):
        spread = []
        for noise in (vi.noise.iid(), vi.noise.sobol()):
            objective = build(TARGET, GUIDE, num_importance=32, noise=noise)
            aux = jax.jit(jax.vmap(lambda key, o=objective: o.loss(PARAMS, key)[1]))(keys)
            values = np.asarray(aux.value, np.float64)
            assert values.mean() < evidence + 4 * values.std() / np.sqrt(500)
            spread.append(values.std())
        assert spread[1] < spread[0]


@pytest.mark.parametrize("estimator", [E.doubly_reparameterised(), E.vimco()])
def test_gradients_that_average_over_one_draw_given_the_others(estimator):
    """Double reparameterisation and VIMCO would be biased: they refuse, and pathwise is the way."""
    with pytest.raises(ValueError, match="biased where draws depend") as caught:
        vi.iwae(TARGET, GUIDE, noise=vi.noise.sobol(), estimator=estimator)
    assert estimator.name in str(caught.value)
    assert "pathwise()" in str(caught.value)
    vi.iwae(TARGET, GUIDE, num_importance=1, noise=vi.noise.sobol(), estimator=E.pathwise())
