"""Moments of an approximation: of the weighted draws by which it was judged."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro import distributions as dist
from numpyro.distributions import constraints

import vi_params as vi
from vi_params.approximation.moments import moments_of
from vi_params.importance import psis_on_host

KEY = jax.random.key(0)


EXACT = dist.Gamma(21.0, 5.0)

TARGET = vi.target(
    lambda values, latents, data: EXACT.log_prob(latents["rate"]),
    {"rate": vi.Latent((), constraints.positive)},
    deterministic=lambda values, latents, data: {"both": latents["rate"] * jnp.ones((2, 1))},
)


@pytest.fixture(scope="module")
def posterior():
    return vi.approximate(TARGET, KEY)


def test_they_are_those_of_the_closed_form(posterior):
    found = posterior.moments(KEY)
    assert set(found.mean) == set(found.sd) == set(found.error) == {"rate", "both"}
    assert found.mean["both"].shape == found.sd["both"].shape == found.error["both"].shape == (2, 1)
    assert found.num_effective >= 4000
    assert abs(found.mean["rate"] - EXACT.mean) < 4 * found.error["rate"]
    np.testing.assert_allclose(found.sd["rate"], np.sqrt(EXACT.variance), rtol=0.05)
    np.testing.assert_allclose(found.mean["both"], found.mean["rate"], rtol=1e-6)
    np.testing.assert_allclose(found.sd["both"], found.sd["rate"], rtol=1e-5)


def test_they_have_the_weights_of_the_draws_that_it_was_judged_by(posterior):
    """No other draws where these are enough."""
    found = posterior.moments(KEY, num_effective=10)
    rate = np.concatenate([batch.latents["rate"] for batch in posterior.batches]).astype(float)
    ratios = np.concatenate([batch.log_ratios for batch in posterior.batches])
    weights = np.exp(np.asarray(psis_on_host(ratios).log_weights, float))
    mean = np.average(rate, weights=weights)
    np.testing.assert_allclose(found.mean["rate"], mean, rtol=1e-6)
    squares = (rate - mean) ** 2
    np.testing.assert_allclose(
        found.sd["rate"], np.sqrt(np.average(squares, weights=weights)), rtol=1e-5
    )
    np.testing.assert_allclose(
        found.error["rate"], np.sqrt(np.sum(weights**2 * squares)), rtol=1e-5
    )
    np.testing.assert_allclose(found.num_effective, 1 / np.sum(weights**2), rtol=1e-5)


def test_further_draws_are_made_until_enough_are_effective(posterior):
    few, many = (posterior.moments(KEY, number) for number in (10, 40_000))
    assert many.num_effective > 39_000 > few.num_effective
    ratio = many.error["rate"] / few.error["rate"]
    np.testing.assert_allclose(ratio, np.sqrt(few.num_effective / many.num_effective), rtol=0.2)


def test_further_draws_are_others():
    """By the key that it was approximated with, too."""
    posterior = vi.approximate(TARGET, KEY)
    seen = np.concatenate([batch.latents["rate"] for batch in posterior.batches])
    batches = posterior._enough(KEY, 20_000)
    rate = np.concatenate([batch.latents["rate"] for batch in batches])
    assert len(rate) > len(seen)
    assert len(np.unique(rate)) > 0.99 * len(rate)  # of few in float32 some are alike by chance


def test_an_infinite_density_is_told(posterior):
    batch = posterior.batches[0]
    ratios = np.array(batch.log_ratios)
    ratios[0] = np.inf
    batch = batch._replace(log_ratios=ratios, smoothed=psis_on_host(ratios))
    found = dataclasses.replace(posterior, batches=(batch,)).moments(KEY, num_effective=10)
    assert np.isnan(found.mean["rate"])
    assert np.isnan(found.sd["rate"])


def test_errors_are_those_of_repeated_batches(posterior):
    """Each by draws of its own: their means differ as they say."""
    batches = [posterior.judge(jax.random.key(i))[0] for i in range(40)]
    found = [
        dataclasses.replace(posterior, batches=(one,)).moments(KEY, num_effective=10)
        for one in batches
    ]
    spread = np.std([one.mean["rate"] for one in found])
    np.testing.assert_allclose(np.mean([one.error["rate"] for one in found]), spread, rtol=0.3)


def test_what_is_not_to_be_trusted_has_the_guides_own(posterior):
    plain = dataclasses.replace(posterior, resampled=False).moments(KEY, num_effective=10)
    rate = np.concatenate([batch.latents["rate"] for batch in posterior.batches]).astype(float)
    np.testing.assert_allclose(plain.mean["rate"], rate.mean(), rtol=1e-6)
    np.testing.assert_allclose(plain.sd["rate"], rate.std(), rtol=1e-5)
    assert plain.num_effective == pytest.approx(len(rate))
    assert plain.mean["rate"] != posterior.moments(KEY, num_effective=10).mean["rate"]


def test_draws_of_no_weight_may_be_infinite(posterior):
    batch = posterior.batches[0]
    rate, ratios = np.array(batch.latents["rate"]), np.array(batch.log_ratios)
    rate[0], ratios[0] = np.inf, -np.inf
    batch = batch._replace(latents={"rate": rate}, log_ratios=ratios)
    found = dataclasses.replace(posterior, batches=(batch,)).moments(KEY, num_effective=10)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(found))


def test_blocks_of_draws_add_up(monkeypatch):
    random = np.random.default_rng(0)
    x = random.standard_normal((30, 2, 3))
    weights = random.uniform(size=30)
    weights /= weights.sum()
    parts = [(weights[:17], {"x": x[:17], "none": np.zeros((17, 0))})]
    parts += [(weights[17:], {"x": x[17:], "none": np.zeros((13, 0))})]
    whole = moments_of(parts)
    monkeypatch.setattr("vi_params.approximation.moments.BLOCK", 24)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b), moments_of(parts), whole)
    np.testing.assert_allclose(whole.mean["x"], np.average(x, axis=0, weights=weights))
    assert whole.mean["none"].shape == (0,)


@pytest.mark.parametrize(
    ("call", "kind", "fragment"),
    [
        (lambda p: p.moments(jax.random.PRNGKey(0)), TypeError, "Approximation.moments"),
        (lambda p: p.moments(KEY, 0), ValueError, "num_effective"),
    ],
)
def test_wrong_requests_are_refused(posterior, call, kind, fragment):
    with pytest.raises(kind, match=fragment):
        call(posterior)
