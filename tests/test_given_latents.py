"""A Gaussian given several latents that keep a posterior from being one."""

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import distributions as dist

import vi_params as vi
from vi_params.approximation.candidate import judge_of, once, with_wide_tails
from vi_params.approximation.given import GIVEN, LARGER, given_latents
from vi_params.approximation.structure import structure_of

KEY = jax.random.key(0)
SCALES, EACH, STRETCH = 8, 3, 0.35


def stretched(values, latents, data):
    """Eight scales, each of three latents, which are normal given it; log evidence 0."""
    x, y = latents["scale"], latents["rest"]
    across = dist.Normal(0.0, jnp.exp(STRETCH * x)[:, None]).log_prob(y).sum()
    return dist.Normal(0.0, 1.0).log_prob(x).sum() + across


LATENTS = {"scale": vi.Latent((SCALES,)), "rest": vi.Latent((SCALES, EACH))}
TARGET = vi.target(stretched, LATENTS)


def response_of(target):
    """The linear response, judged once."""
    mean_field = vi.solvers.deterministic(target, KEY)
    wide = with_wide_tails(target, vi.linear_response(target, mean_field))
    return once("linear response", wide, judge_of(target, wide, None), KEY)


def found_for(target, others=()):
    response = response_of(target)
    structure = structure_of(target, response.solution, None)
    return response, given_latents(target, response, structure, list(others), KEY, None)


def test_all_scales_are_found():
    """No few of them are enough; given all eight the rest is normal, and most draws count, where of
    the Gaussian's few do. The solution draws what was judged."""
    response, (found,) = found_for(TARGET)
    assert response.share < 0.3
    assert found.is_enough
    assert found.share > 0.6
    (name,) = found.solution.guide.declared
    along = vi.constrain(found.solution.guide.declared, found.solution.params)[name]["along"]
    assert along["locs"].shape[1] == SCALES
    told = vi.diagnose(TARGET, found.solution.guide, found.solution.params, jax.random.key(1))
    assert told.ess > 0.6 * told.num_draws
    np.testing.assert_allclose(told.log_evidence, 0.0, atol=0.05)


def test_approximate_takes_it(compilations):
    """Where few latents do not make it a Gaussian; moments are those of the closed form, and a
    second call compiles nothing."""
    for seed in range(2):
        with compilations() as seen:
            posterior = vi.approximate(TARGET, jax.random.key(seed))
        assert posterior.trustworthy
        assert f"* {GIVEN}" in [row[0] for row in posterior.table.rows]
        assert not seen or seed == 0
    draws = posterior.draws(KEY, 8000)
    np.testing.assert_allclose(draws["scale"].mean(0), 0.0, atol=0.1)
    np.testing.assert_allclose(draws["scale"].std(0), 1.0, rtol=0.1)
    np.testing.assert_allclose(draws["rest"].std(0), np.exp(STRETCH**2), rtol=0.15)


def test_a_gaussian_has_no_such_latents():
    precision = np.eye(12) + 0.5
    target = vi.target(lambda v, z, d: -0.5 * z["z"] @ precision @ z["z"], {"z": vi.Latent((12,))})
    assert found_for(target)[1] == []


def test_more_draws_show_a_heavy_spread(monkeypatch):
    """Where a batch does not show it, it is judged by many more, of which the first are part."""
    monkeypatch.setattr("vi_params.approximation.conditional.HEAVY_ERROR", 0.004)
    _, (found,) = found_for(TARGET)
    assert found.diagnosis.num_draws == LARGER[-1]
    assert len(found.batches[0].log_ratios) == len(found.batches[1].log_ratios) == LARGER[-1]
    assert not np.array_equal(found.batches[0].log_ratios, found.batches[1].log_ratios)
    monkeypatch.setattr("vi_params.approximation.judge.QUICK", 10**6)  # densities take longer
    _, (found,) = found_for(TARGET)
    assert found.diagnosis.num_draws == LARGER[0]


def test_it_is_not_taken_where_it_misses_another_optimum():
    """A mixture of both optima knows of mass that it never draws."""

    def two(values, latents, data):
        both = [
            stretched(values, {"scale": latents["scale"] - far, "rest": latents["rest"]}, data)
            for far in (-6.0, 6.0)
        ]
        return jnp.logaddexp(*both)

    target = vi.target(two, LATENTS)
    starts = [jnp.full(SCALES, far) for far in (-6.0, 6.0)]
    modes = [
        vi.linear_response(
            target, vi.solvers.deterministic(target, KEY, init={"scale": at}, lanes=1)
        )
        for at in starts
    ]
    merged = vi.merge(target, modes, KEY)
    both = once("both", merged, judge_of(target, merged, None), KEY)
    wide = with_wide_tails(target, modes[0])
    response = once("one", wide, judge_of(target, wide, None), KEY)
    structure = structure_of(target, response.solution, None)
    for others, is_partial in (([], False), ([both], True)):
        (found,) = given_latents(target, response, structure, others, KEY, None)
        assert found.is_trustworthy
        assert found.is_partial == is_partial


def test_the_solver_is_given_latents_too():
    """Better than given as many directions; and is fitted again, to gradients at its own draws,
    which changes little where the first fit is exact."""
    start = vi.linear_response(TARGET, vi.solvers.deterministic(TARGET, KEY))

    def solved(**given):
        return vi.solvers.conditional_gaussian(TARGET, start, KEY, num_active=SCALES, **given)

    def share(found):
        told = vi.diagnose(TARGET, found.guide, found.params, jax.random.key(1))
        return float(told.ess) / int(told.num_draws)

    once_fitted, again = (solved(given="latents", num_fits=number) for number in (1, 2))
    assert share(once_fitted) > max(0.6, 1.5 * share(solved()))
    np.testing.assert_allclose(share(again), share(once_fitted), atol=0.02)
    scales = [one.params["guide"]["frame"]["log_scales"] for one in (once_fitted, again)]
    assert 0 < np.max(np.abs(scales[0] - scales[1])) < 0.05
