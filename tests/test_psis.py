"""Pareto-smoothed importance sampling, against ArviZ and against what is known exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vi_params as vi
from vi_params.diagnostics import psis
from vi_params.importance import psis_on_host

SMOOTH = jax.jit(psis)


def ratios(seed, num, make):
    return make(np.random.default_rng(seed), num).astype(np.float32)


VECTORS = {
    "normal": lambda rng, n: rng.normal(size=n),
    "narrow normal": lambda rng, n: 0.1 * rng.normal(size=n),
    "wide normal": lambda rng, n: 3.0 * rng.normal(size=n),
    "exponential, k = 0.4": lambda rng, n: 0.4 * rng.exponential(size=n),
    "exponential, k = 0.9": lambda rng, n: 0.9 * rng.exponential(size=n),
    "exponential, k = 1.5": lambda rng, n: 1.5 * rng.exponential(size=n),
    "bounded": lambda rng, n: np.log(rng.uniform(size=n)),
    "cauchy": lambda rng, n: np.clip(rng.standard_cauchy(size=n), -50, 50),
    "far away": lambda rng, n: rng.normal(size=n) - 1e4,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("num", [100, 1000])
@pytest.mark.parametrize("name", VECTORS)
def test_weights_and_shape_are_those_of_arviz(name, num):
    """k-hat and the smoothed, normalised log weights are those of arviz.psislw."""
    arviz = pytest.importorskip("arviz")
    x = ratios(0, num, VECTORS[name])
    expected, k = arviz.psislw(x.astype(np.float64).copy(), normalize=True)
    smoothed = SMOOTH(x)
    assert float(smoothed.k_hat) == pytest.approx(float(k), abs=0.02)
    weights = np.exp(np.asarray(smoothed.log_weights, np.float64))
    np.testing.assert_allclose(weights, np.exp(expected), atol=0.005)
    assert weights.sum() == pytest.approx(1.0, abs=1e-4)
    assert float(smoothed.ess) == pytest.approx(1 / np.sum(weights**2), rel=1e-3)


def broken(where, value):
    x = np.linspace(-1.0, 1.0, 100, dtype=np.float32)
    x[where] = value
    return x


BROKEN = {
    "not a number": broken(3, np.nan),
    "infinite": broken(3, np.inf),
    "weights of zero": broken(slice(40), -np.inf),
    "no weight": broken(slice(100), -np.inf),
    "constant": np.zeros(100, np.float32),
    "huge": broken(3, 3e38),
}


@pytest.mark.parametrize("name", [*VECTORS, *BROKEN])
def test_on_the_host_it_is_the_same(name, recwarn):
    x = BROKEN[name] if name in BROKEN else ratios(0, 1000, VECTORS[name])
    on_host, before = psis_on_host(x), x.copy()
    assert not recwarn.list
    np.testing.assert_array_equal(x, before)
    smoothed = SMOOTH(x)
    assert {leaf.dtype for leaf in on_host} == {x.dtype}
    weights = np.exp(on_host.log_weights), np.exp(smoothed.log_weights)
    np.testing.assert_allclose(*weights, rtol=1e-3, atol=1e-3)
    for one, other in zip(on_host[1:], smoothed[1:], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)


def test_a_pareto_tail_has_its_shape():
    """Ratios exp(k E) with E exponential have tail shape k, within 3 standard errors
    (1 + k) / sqrt(M) of an estimate from the largest M = 425."""
    for k in (0.3, 0.7, 1.2):
        x = ratios(1, 20_000, lambda rng, n, k=k: k * rng.exponential(size=n))
        assert float(SMOOTH(x).k_hat) == pytest.approx(k, abs=3 * (1 + k) / 425**0.5)


def test_vmap_is_one_by_one():
    """Under vmap every row is smoothed as it is alone."""
    x = np.stack([ratios(i, 200, VECTORS["wide normal"]) for i in range(3)])
    together = jax.jit(jax.vmap(psis))(x)
    for i in range(3):
        for a, b in zip(together, SMOOTH(x[i]), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=2e-4, atol=2e-4)


def test_constant_ratios_are_exact():
    """Equal ratios: no tail, full effective sample size, the evidence is the ratio."""
    smoothed = SMOOTH(jnp.full(100, 3.0))
    assert float(smoothed.k_hat) == 0.0
    assert float(smoothed.ess) == pytest.approx(100.0, rel=1e-4)
    assert float(smoothed.log_evidence) == pytest.approx(3.0, abs=1e-5)


def test_the_order_does_not_matter():
    """Permuted ratios get permuted weights."""
    x = ratios(3, 100, VECTORS["wide normal"])
    p = np.random.default_rng(0).permutation(100)
    a, b = SMOOTH(x), SMOOTH(x[p])
    np.testing.assert_allclose(a.log_weights[p], b.log_weights, rtol=1e-4, atol=1e-4)
    assert float(a.k_hat) == pytest.approx(float(b.k_hat), abs=1e-4)


def test_ratios_of_minus_infinity_are_weights_of_zero():
    """Draws outside the target's support get no weight and count in the mean weight."""
    x = jnp.where(jnp.arange(400) % 2 == 0, -jnp.inf, 0.01 * jnp.arange(400) / 400)
    smoothed = SMOOTH(x)
    assert np.all(np.asarray(smoothed.log_weights)[::2] == -np.inf)
    assert np.all(np.isfinite(np.asarray(smoothed.log_weights)[1::2]))
    assert float(smoothed.ess) == pytest.approx(200, rel=0.01)
    assert float(smoothed.log_evidence) == pytest.approx(np.log(0.5), abs=0.01)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_broken_ratio_is_not_smoothed_over(bad):
    """One NaN or +inf makes all results NaN: there is no verdict."""
    for part in SMOOTH(jnp.zeros(100).at[7].set(bad)):
        assert np.all(np.isnan(part))


def test_no_weight_at_all_is_no_verdict():
    """With every ratio -inf there are no weights to judge: k-hat is not a good one but NaN."""
    assert np.isnan(SMOOTH(jnp.full(100, -jnp.inf)).k_hat)


def test_one_draw_with_all_the_weight_is_not_trusted():
    """A single draw far above the others: an effective sample of one and no small k-hat."""
    smoothed = SMOOTH(jnp.zeros(100).at[3].set(200.0))
    assert not float(smoothed.k_hat) < 0.7


def test_weights_beyond_the_range_of_the_dtype_have_no_shape():
    """Where all weights but a few underflow, k-hat is infinite and nothing is to be trusted."""
    for seed in range(3):
        noise = jax.random.normal(jax.random.key(seed), (4000,))
        for spread in (100.0, 1000.0):
            assert np.isposinf(vi.diagnostics.psis(spread * noise).k_hat)


def test_a_guide_far_from_its_target_is_not_trusted():
    """N(0, 1) for N(300, 1): one draw has all the weight."""
    target = vi.target(lambda v, z, d: -0.5 * (z["z"] - 300.0) ** 2, {"z": vi.Latent(())})
    guide = vi.guides.mean_field(target, init={"z": 0.0}, init_scale=1.0)
    params = vi.init_params(guide.declared, jax.random.key(0))
    found = vi.diagnose(target, guide, params, jax.random.key(1))
    assert not found.trustworthy
    assert "Do not trust this" in found.verdict
