"""IWAE, Renyi and chi bounds: values and gradients against closed forms and quadrature."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from numpyro import distributions as dist
from numpyro.distributions import constraints
from scipy import stats
from scipy.special import logsumexp

import vi_params as vi

Y, NOISE = 1.5, 0.8
EVIDENCE = stats.norm.logpdf(Y, 0.0, np.sqrt(1 + NOISE**2))
POST_MEAN, POST_SD = Y / (1 + NOISE**2), np.sqrt(NOISE**2 / (1 + NOISE**2))
MEAN, SCALE, SHIFT = 0.5, 0.8, 0.3
estimators = vi.estimators


def conjugate(declared=None):
    """z ~ N(shift, 1), y ~ N(z, 0.8); the evidence and the posterior are known."""

    def log_density(values, latents, data):
        prior = dist.Normal(values.get("shift", 0.0), 1.0).log_prob(latents["z"])
        return prior + dist.Normal(latents["z"], NOISE).log_prob(data)

    return vi.target(log_density, {"z": vi.Latent()}, declared=declared or {}, data=jnp.array(Y))


def normal_guide():
    scale = vi.Param(SCALE, constraint=constraints.positive)
    declared = {"loc": vi.Param(MEAN), "scale": scale}
    return vi.guide(declared, lambda v: {"z": dist.Normal(v["loc"], v["scale"])})


def start(objective):
    return jax.jit(lambda key: vi.init_params(objective.declared, key))(jax.random.key(0))


def losses(objective, num, params=None):
    """The losses at `num` keys."""
    params = start(objective) if params is None else params
    keys = jax.random.split(jax.random.key(1), num)
    return np.asarray(jax.jit(jax.vmap(lambda k: objective.loss(params, k)[0]))(keys), np.float64)


def slopes(objective, num):
    """The gradients at `num` keys: name -> shape (num,)."""
    slope = jax.grad(lambda params, key: objective.loss(params, key)[0])
    keys = jax.random.split(jax.random.key(2), num)
    found = jax.jit(jax.vmap(slope, in_axes=(None, 0)))(start(objective), keys)
    return {name: np.asarray(leaf, np.float64) for name, leaf in found.items()}


def assert_mean(draws, exact, slack=0.0):
    assert abs(draws.mean() - exact) < 4 * draws.std() / np.sqrt(draws.size) + slack


def exact_bound(alpha, loc, log_scale, shift=0.0):
    """E L(alpha) of K = 2 draws, by Gauss-Hermite quadrature over both of them, in NumPy."""
    e, weight = np.polynomial.hermite_e.hermegauss(60)
    weight = weight / weight.sum()
    z = loc + np.exp(log_scale) * e
    log_w = stats.norm.logpdf(z, shift, 1.0) + stats.norm.logpdf(Y, z, NOISE)
    log_w -= stats.norm.logpdf(z, loc, np.exp(log_scale))
    power = 1 - alpha
    pair = np.stack(np.broadcast_arrays(power * log_w[:, None], power * log_w[None, :]))
    bound = (logsumexp(pair, axis=0) - np.log(2)) / power
    return np.sum(weight[:, None] * weight[None, :] * bound)


def exact_slopes(alpha, **options):
    """The gradient of `exact_bound` by central differences."""
    at = {"loc": MEAN, "log_scale": np.log(SCALE)} | options
    found = {}
    for name in at:
        up, down = (exact_bound(alpha, **(at | {name: at[name] + h})) for h in (1e-5, -1e-5))
        found["scale" if name == "log_scale" else name] = (up - down) / 2e-5
    return found


POINTS = {  # log_scale in place of scale
    "loc": np.array([MEAN, -0.3, 1.2]),
    "log_scale": np.log(np.array([SCALE, 1.1, 0.6])),
    "shift": np.array([SHIFT, -0.5, 0.8]),
}


@pytest.mark.parametrize("alpha", [0.0, 0.5, -1.0])
@pytest.mark.parametrize("estimator", ["pathwise", "doubly_reparameterised", "vimco"])
def test_gradients_are_unbiased(alpha, estimator):
    """Every estimator's mean gradient, in guide and model, is that of the exact two-draw bound, at
    three sets of parameters, within four standard errors of 100,000 evaluations."""
    with_model = alpha >= 0
    objective = vi.renyi(
        conjugate({"shift": vi.Param(SHIFT)} if with_model else {}),
        normal_guide(),
        alpha=alpha,
        num_importance=2,
        estimator=getattr(estimators, estimator)(),
    )
    points = POINTS if with_model else {n: x for n, x in POINTS.items() if n != "shift"}
    params = {"scale" if n == "log_scale" else n: jnp.float32(x) for n, x in points.items()}
    slope = jax.grad(lambda p, key: objective.measure.of(objective.loss(p, key)[0]))
    over_keys = jax.vmap(slope, in_axes=(None, 0))
    keys = jax.random.split(jax.random.key(2), 100_000)
    found = jax.jit(lambda p: jax.lax.map(lambda one: over_keys(one, keys), p))(params)
    for i in range(3):
        exact = exact_slopes(alpha, **{name: x[i] for name, x in points.items()})
        for name, truth in exact.items():
            assert_mean(np.asarray(found[name][i], np.float64), truth, slack=1e-5)


def test_a_discrete_latent():
    """A Bernoulli latent and guide: VIMCO's mean gradient of the two-draw bound is that of the sum
    over all four outcomes, and wake-phi's that of the average over them of its own."""
    log_p = jnp.log(jnp.array([0.7, 0.3])) + dist.Normal(jnp.array([-1.0, 1.0]), 1.0).log_prob(0.6)

    def model(y):
        z = numpyro.sample("z", dist.Bernoulli(0.3))
        numpyro.sample("y", dist.Normal(2.0 * z - 1.0, 1.0), obs=y)

    target = vi.from_numpyro(model, jnp.array(0.6))
    guide = vi.guide({"logit": vi.Param(0.4)}, lambda v: dist.Bernoulli(logits=v["logit"]))

    def bound(logit):
        log_q = jax.nn.log_sigmoid(jnp.array([-logit, logit]))
        log_w = log_p - log_q
        pair = jnp.logaddexp(log_w[:, None], log_w[None, :]) - jnp.log(2.0)
        return jnp.sum(jnp.exp(log_q[:, None] + log_q[None, :]) * pair)

    def wake(logit):
        log_q = jax.nn.log_sigmoid(jnp.array([-logit, logit]))
        q, log_w = jax.lax.stop_gradient((jnp.exp(log_q), log_p - log_q))
        share = jax.nn.sigmoid(log_w[:, None] - log_w[None, :])
        crossed = share * log_q[:, None] + (1 - share) * log_q[None, :]
        return -jnp.sum(q[:, None] * q[None, :] * crossed)

    iwae = vi.iwae(target, guide, num_importance=2, estimator=estimators.vimco())
    assert_mean(-slopes(iwae, 20_000)["logit"], jax.grad(bound)(0.4))
    awake = vi.reweighted_wake_sleep(target, guide, num_importance=2)
    assert_mean(slopes(awake, 20_000)["logit"], jax.grad(wake)(0.4))


def divergence(alpha):
    """Renyi's divergence of order alpha from q = N(MEAN, SCALE) to the posterior: Gil, Alajaji and
    Linder (2013), table 2."""
    mixed = alpha * POST_SD**2 + (1 - alpha) * SCALE**2
    middle = 0.5 / (alpha - 1) * np.log(POST_SD**2 / mixed)
    return np.log(POST_SD / SCALE) + middle + 0.5 * alpha * (MEAN - POST_MEAN) ** 2 / mixed


@pytest.mark.parametrize("alpha", [0.5, 1.5, -0.5])
def test_bounds_against_closed_forms(alpha):
    """With many draws L(alpha) is log p(y) - D_alpha(q || posterior)."""
    objective = vi.renyi(conjugate(), normal_guide(), alpha=alpha, num_importance=40_000)
    found = objective.measure.of(losses(objective, 20))
    assert_mean(found, EVIDENCE - divergence(alpha), slack=1e-3)


def test_iwae_rises_to_the_evidence():
    """L_1 < L_4 < L_32 < log p(y), each by more than its error, and L_1024 is log p(y) nearly."""
    found = {}
    for num in (1, 4, 32, 1024):
        objective = vi.iwae(conjugate(), normal_guide(), num_importance=num)
        draws = -losses(objective, 4000 if num < 1024 else 200)
        found[num] = draws.mean(), 4 * draws.std() / np.sqrt(draws.size)
    for fewer, more in ((1, 4), (4, 32)):
        assert found[fewer][0] + found[fewer][1] < found[more][0] - found[more][1]
    assert found[32][0] < EVIDENCE
    assert abs(found[1024][0] - EVIDENCE) < found[1024][1] + 1e-3


def both(one, other):
    """Losses and gradients of two objectives at the same key."""
    params = start(one)
    key = jax.random.key(3)
    return [
        jax.jit(jax.value_and_grad(lambda p, o=o: o.loss(p, key)[0]))(params) for o in (one, other)
    ]


@pytest.mark.slow
def test_special_orders():
    """alpha = 1, and near it, is the ELBO; alpha = 0 the IWAE bound; 1 - n the bound of chi^n; one
    draw is the ELBO at any alpha. The same draws give the same loss and gradient."""
    target, guide = conjugate(), normal_guide()
    elbo = vi.elbo(target, guide, num_particles=6)
    for alpha in (1.0, 1 + 1e-6):
        pair = both(vi.renyi(target, guide, alpha=alpha, num_importance=6), elbo)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *pair)
    for alpha in (0.5,):
        one = vi.renyi(target, guide, alpha=alpha, num_importance=1, num_particles=6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *both(one, elbo))
    iwae = vi.iwae(target, guide, num_importance=6)
    pair = both(vi.renyi(target, guide, alpha=0.0, num_importance=6), iwae)
    jax.tree.map(np.testing.assert_array_equal, *pair)
    cubo = vi.cubo(target, guide, order=2, num_importance=6)
    pair = both(vi.renyi(target, guide, alpha=-1.0, num_importance=6), cubo)
    jax.tree.map(np.testing.assert_array_equal, *pair)


def test_alpha_near_one_is_continuous():
    """On either side of the switch between its two formulas L(alpha) is the same to 1e-4."""
    found = [
        losses(vi.renyi(conjugate(), normal_guide(), alpha=alpha, num_importance=8), 50)
        for alpha in (1 - 0.0099, 1 - 0.0101)
    ]
    np.testing.assert_allclose(*found, atol=1e-3)


def test_cubo_lies_above_the_evidence_and_touches_it_at_the_posterior():
    """CUBO_2 > log p(y) at another q, from enough draws; at the posterior every evaluation of
    CUBO, IWAE and every Renyi bound is log p(y)."""
    objective = vi.cubo(conjugate(), normal_guide(), num_importance=5000)
    draws = losses(objective, 50)
    assert draws.mean() - 4 * draws.std() / np.sqrt(draws.size) > EVIDENCE
    values = {"loc": POST_MEAN, "scale": POST_SD}
    exact = vi.unconstrain(objective.declared, jax.tree.map(jnp.asarray, values))
    for objective in (
        vi.cubo(conjugate(), normal_guide(), num_importance=3),
        vi.iwae(conjugate(), normal_guide(), num_importance=3),
        vi.renyi(conjugate(), normal_guide(), alpha=3.0, num_importance=3),
    ):
        found = objective.measure.of(losses(objective, 10, exact))
        np.testing.assert_allclose(found, EVIDENCE, rtol=1e-5)


def test_signal_to_noise_with_more_draws():
    """From K = 4 to K = 64 the pathwise gradient's signal-to-noise ratio falls, the doubly
    reparameterised one's does not: Rainforth et al. (2018), Tucker et al. (2019), figure 1."""
    ratio = {}
    for estimator in ("pathwise", "doubly_reparameterised"):
        for num in (4, 64):
            objective = vi.iwae(
                conjugate(),
                normal_guide(),
                num_importance=num,
                estimator=getattr(estimators, estimator)(),
            )
            draws = slopes(objective, 20_000)["loc"]
            ratio[estimator, num] = abs(draws.mean()) / draws.std()
    assert ratio["pathwise", 64] < 0.7 * ratio["pathwise", 4]
    assert ratio["doubly_reparameterised", 64] > ratio["doubly_reparameterised", 4]


def test_doubly_reparameterised_has_no_variance_at_the_posterior():
    """At q = posterior every draw's gradient is zero to rounding, for several draws and orders."""
    for alpha in (0.0, 0.5):
        objective = vi.renyi(
            conjugate(),
            normal_guide(),
            alpha=alpha,
            num_importance=4,
            estimator=estimators.doubly_reparameterised(),
        )
        values = {"loc": jnp.asarray(POST_MEAN), "scale": jnp.asarray(POST_SD)}
        params = vi.unconstrain(objective.declared, values)
        slope = jax.grad(lambda p, k, o=objective: o.loss(p, k)[0])
        keys = jax.random.split(jax.random.key(0), 20)
        found = jax.jit(jax.vmap(slope, in_axes=(None, 0)))(params, keys)
        assert max(float(jnp.max(jnp.abs(leaf))) for leaf in found.values()) < 1e-5


def test_vimco_trains_a_guide_without_reparameterisation():
    """A von Mises guide of a von Mises target: the location is found, and the bound is log Z."""
    target = vi.target(
        lambda v, z, d: dist.VonMises(1.0, 4.0).log_prob(z["angle"]) + 0.7,
        {"angle": vi.Latent((), constraints.circular)},
    )
    declared = {
        "loc": vi.Param(0.3),
        "concentration": vi.Param(2.0, constraint=constraints.positive),
    }
    guide = vi.guide(declared, lambda v: {"angle": dist.VonMises(v["loc"], v["concentration"])})
    objective = vi.iwae(target, guide, num_importance=8, estimator=estimators.vimco())
    fit = vi.fit(objective, key=jax.random.key(0), num_steps=3000, progress=False)
    values = vi.constrain(objective.declared, fit.params)
    assert abs(values["loc"] - 1.0) < 0.1
    assert abs(fit.elbo - 0.7) < 0.05
    assert "IWAE bound 0." in str(fit)


@pytest.mark.parametrize("estimator", ["pathwise", "doubly_reparameterised", "vimco"])
def test_draws_outside_the_support_weigh_nothing(estimator):
    """A draw at which the density is zero has weight zero: the bound of the others is finite, and
    so is its gradient."""
    target = vi.target(lambda v, z, d: jnp.where(z["z"] > 0, -z["z"], -jnp.inf), {"z": vi.Latent()})
    objective = vi.iwae(
        target, normal_guide(), num_importance=20, estimator=getattr(estimators, estimator)()
    )
    assert all(np.all(np.isfinite(leaf)) for leaf in slopes(objective, 20).values())
