"""f-divergences and the tail-adaptive one against quadrature, closed forms and each other."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpyro import distributions as dist
from numpyro.distributions import constraints
from scipy import stats

import vi_params as vi

MEAN, SCALE = 0.4, 0.8
LOG_Z = -2.0
KINDS = {
    "reverse_kl": lambda t: -np.log(t),
    "forward_kl": lambda t: t * np.log(t) - t + 1,
    "chi_squared": lambda t: (t - 1) ** 2,
    "hellinger": lambda t: 0.5 * (np.sqrt(t) - 1) ** 2,
    "jensen_shannon": lambda t: 0.5 * (t * np.log(2 * t / (1 + t)) + np.log(2 / (1 + t))),
    "total_variation": lambda t: 0.5 * np.abs(t - 1),
}
SMOOTH = [name for name in KINDS if name != "total_variation"]


def target():
    """N(0, 1), unnormalised."""
    return vi.target(lambda v, z, d: dist.Normal().log_prob(z["z"]) + LOG_Z, {"z": vi.Latent(())})


def guide(scale=SCALE):
    declared = {"loc": vi.Param(MEAN), "scale": vi.Param(scale, constraint=constraints.positive)}
    return vi.guide(declared, lambda v: {"z": dist.Normal(v["loc"], v["scale"])})


def exact(name, loc, scale):
    """D_f by summation on a fine grid, f as its textbook writes it."""
    z = np.linspace(-9, 9, 200_001)
    p, q = stats.norm.pdf(z), stats.norm.pdf(z, loc, scale)
    ratio = np.exp(stats.norm.logpdf(z) - stats.norm.logpdf(z, loc, scale))
    keep = q > 1e-290
    assert np.all(p[~keep] < 1e-3)
    return np.sum(q[keep] * KINDS[name](ratio[keep])) * (z[1] - z[0])


def exact_slopes(name, scale):
    h = 1e-4
    return {
        "loc": (exact(name, MEAN + h, scale) - exact(name, MEAN - h, scale)) / (2 * h),
        "scale": (exact(name, MEAN, scale * np.exp(h)) - exact(name, MEAN, scale * np.exp(-h)))
        / (2 * h),
    }


def evaluations(objective, num):
    """Losses and gradients at `num` keys."""
    params = vi.init_params(objective.declared, jax.random.key(0))
    both = jax.value_and_grad(lambda p, key: objective.loss(p, key)[0])
    keys = jax.random.split(jax.random.key(1), num)
    return jax.device_get(jax.jit(jax.vmap(both, in_axes=(None, 0)))(params, keys))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("estimator", ["pathwise", "doubly_reparameterised"])
def test_divergences_and_their_gradients(name, estimator):
    """With many draws the value is the divergence and both gradients are its gradient, although
    the target is not normalised."""
    if estimator == "doubly_reparameterised" and name not in SMOOTH:
        return
    kind = getattr(vi.divergences, name)()
    objective = vi.f_divergence(
        target(),
        guide(1.1),
        kind,
        num_importance=4000,
        estimator=getattr(vi.estimators, estimator)(),
    )
    values, slopes = evaluations(objective, 40)
    error = 4 * values.std() / np.sqrt(values.size) + 1e-3
    assert abs(values.mean() - exact(name, MEAN, 1.1)) < error
    for leaf, slope in exact_slopes(name, 1.1).items():
        error = 4 * slopes[leaf].std() / np.sqrt(values.size) + 3e-3
        assert abs(slopes[leaf].mean() - slope) < error


def test_vimco_of_a_divergence():
    """Without reparameterisation the mean gradient is the divergence's too."""
    objective = vi.f_divergence(
        target(),
        guide(1.1),
        vi.divergences.forward_kl(),
        num_importance=50,
        estimator=vi.estimators.vimco(),
    )
    _, slopes = evaluations(objective, 5000)
    for leaf, slope in exact_slopes("forward_kl", 1.1).items():
        error = 4 * slopes[leaf].std() / np.sqrt(5000) + 2e-2
        assert abs(slopes[leaf].mean() - slope) < error


@pytest.mark.parametrize("name", KINDS)
def test_f_in_log_space(name):
    """of(log t) is f(t), f(1) = 0, and t = 0 gives the limit without NaN in value or gradient."""
    of = getattr(vi.divergences, name)().of
    t = np.array([0.01, 0.5, 1.0, 2.0, 30.0])
    np.testing.assert_allclose(jax.vmap(of)(jnp.log(t)), KINDS[name](t), rtol=1e-4, atol=1e-6)
    assert of(jnp.zeros(())) == 0
    limit = {
        "reverse_kl": np.inf,
        "forward_kl": 1,
        "chi_squared": 1,
        "jensen_shannon": np.log(2) / 2,
    }
    assert of(-jnp.inf) == pytest.approx(limit.get(name, 0.5))
    assert np.isfinite(jax.grad(of)(-jnp.inf))
    assert np.isfinite(jax.grad(jax.grad(of))(-jnp.inf))


def test_reverse_kl_is_the_elbo():
    """The gradient of KL(q || p) is minus the ELBO's, draw by draw, when both are doubly
    reparameterised, and its value log Z - ELBO in the mean."""
    stuck = vi.estimators.doubly_reparameterised()
    one = vi.f_divergence(
        target(), guide(), vi.divergences.reverse_kl(), num_importance=50, estimator=stuck
    )
    other = vi.elbo(target(), guide(), num_particles=50, estimator=stuck)
    for a, b in zip(*(jax.tree.leaves(evaluations(o, 5)[1]) for o in (one, other)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_mass_covering_and_mode_seeking():
    """Of a bivariate normal with correlation 0.8, the closest product of normals has scale
    sqrt(1 - 0.8^2) = 0.6 in KL(q || p) and 1 in KL(p || q): there the gradients are zero. The
    tail-adaptive gradient widens the first, and narrows what is far too wide."""
    covariance = jnp.array([[1.0, 0.8], [0.8, 1.0]])
    correlated = vi.target(
        lambda v, z, d: dist.MultivariateNormal(jnp.zeros(2), covariance).log_prob(z["z"]),
        {"z": vi.Latent((2,))},
    )
    q = vi.guides.mean_field(correlated, init={"z": jnp.zeros(2)})
    objectives = {
        "reverse": vi.f_divergence(correlated, q, vi.divergences.reverse_kl(), num_importance=1000),
        "forward": vi.f_divergence(correlated, q, vi.divergences.forward_kl(), num_importance=1000),
        "adaptive": vi.tail_adaptive(correlated, q, num_importance=1000),
    }
    found = {}
    for name, objective in objectives.items():

        def slope(scale, key, objective=objective):
            own = {"loc": jnp.zeros(2), "scale": jnp.full(2, jnp.log(scale))}
            return jax.grad(lambda p: objective.loss(p, key)[0])({"guide": own})["guide"]["scale"]

        scales = jnp.array([0.6, 1.0, 2.5])
        keys = jax.random.split(jax.random.key(0), 100)
        draws = jax.vmap(jax.vmap(slope, in_axes=(None, 0)), in_axes=(0, None))
        draws = np.asarray(jax.jit(draws)(scales, keys)).mean(axis=2)
        found[name] = draws.mean(axis=1), 4 * draws.std(axis=1) / np.sqrt(100)
    assert abs(found["reverse"][0][0]) < found["reverse"][1][0]
    assert abs(found["forward"][0][1]) < found["forward"][1][1] + 0.01
    assert found["reverse"][0][1] > found["reverse"][1][1]
    assert found["forward"][0][0] < -found["forward"][1][0]
    assert found["adaptive"][0][0] < -found["adaptive"][1][0]
    assert found["adaptive"][0][2] > found["adaptive"][1][2]


def test_tail_adaptive_weights():
    """beta = 0 is sticking the landing, draw by draw; with beta = -1 the k-th largest of n distinct
    weights has weight (1 / k) / (1 + 1/2 + .. + 1/n), whatever the weights are."""
    stuck = vi.estimators.sticking_the_landing()
    pair = (
        vi.tail_adaptive(target(), guide(), beta=0.0),
        vi.elbo(target(), guide(), num_particles=10, estimator=stuck),
    )
    for a, b in zip(*(jax.tree.leaves(evaluations(o, 5)) for o in pair), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    objective = vi.tail_adaptive(target(), guide())
    params = vi.init_params(objective.declared, jax.random.key(0))
    noise = objective.noise(jax.random.key(5))
    draws = [objective.guide.transform(params, noise[0, i]) for i in range(10)]
    log_w = sorted(float(target().log_density({}, d.latents, None) - d.log_prob) for d in draws)
    weights = 1 / np.arange(10, 0, -1)
    loss = objective.evaluate(params, noise, None)[0]
    assert -loss == pytest.approx(np.sum(weights * log_w) / weights.sum(), rel=1e-4)


NOISE = 0.8
OBSERVED = 1.5


def conjugate(shift=None):
    """z ~ N(shift, 1), y ~ N(z, 0.8), the shift a parameter where it is not given."""

    def log_density(values, latents, data):
        prior = dist.Normal(values.get("shift", shift), 1.0).log_prob(latents["z"])
        return prior + dist.Normal(latents["z"], NOISE).log_prob(data)

    declared = {"shift": 0.3} if shift is None else {}
    data = jnp.array(OBSERVED)
    return vi.target(log_density, {"z": vi.Latent(())}, declared=declared, data=data)


BESIDE = {
    "f": lambda t, g: vi.f_divergence(t, g, vi.divergences.chi_squared(), num_importance=6),
    "tail-adaptive": lambda t, g: vi.tail_adaptive(t, g, num_importance=6),
    "cubo": lambda t, g: vi.cubo(t, g, num_importance=6),
    "upper renyi": lambda t, g: vi.renyi(t, g, alpha=-0.5, num_importance=6),
}


@pytest.mark.parametrize("name", BESIDE)
def test_a_model_learns_by_the_importance_weighted_bound(name):
    """Beside a divergence or an upper bound a model's own parameters have the gradient of the IWAE
    bound at the same draws, and the guide and the value know nothing of it."""
    objective = BESIDE[name](conjugate(), guide())
    params, key = vi.init_params(objective.declared, jax.random.key(0)), jax.random.key(2)

    def both(objective, params):
        return jax.jit(jax.value_and_grad(lambda p: objective.loss(p, key)[0]))(params)

    loss, slope = both(objective, params)
    iwae = both(vi.iwae(conjugate(), guide(), num_importance=6), params)[1]
    np.testing.assert_allclose(slope.pop("shift"), iwae["shift"], rtol=1e-4)
    own = {n: x for n, x in params.items() if n != "shift"}
    held = both(BESIDE[name](conjugate(0.3), guide()), own)
    np.testing.assert_allclose(loss, held[0], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), slope, held[1])


def test_empirical_bayes_beside_an_upper_bound():
    """Minimising CUBO in the guide, the shift of the prior ends at its maximum of the evidence, y,
    and the guide at the posterior under it; the upper bound alone would have driven it away."""
    objective = vi.cubo(conjugate(), guide(), num_importance=20)
    svi = vi.svi(objective, optax.adam(optax.exponential_decay(0.05, 200, 0.5)))
    key = jax.random.key(0)
    state, _ = jax.jit(lambda s, k: vi.run(svi, s, k, 1000))(svi.init(key), key)
    found = vi.constrain(objective.declared, state.params)
    assert found["shift"] == pytest.approx(OBSERVED, abs=0.05)
    assert found["loc"] == pytest.approx(OBSERVED, abs=0.05)
    assert found["scale"] == pytest.approx((1 + 1 / NOISE**2) ** -0.5, rel=0.03)


def test_what_a_model_cannot_learn_by():
    """Two losses cannot move one parameter."""
    shared = vi.Param(0.3)
    target = vi.target(
        lambda v, z, d: -((z["z"] - v["loc"]) ** 2), {"z": vi.Latent()}, declared={"loc": shared}
    )
    q = vi.guide({"loc": shared}, lambda v: {"z": dist.Normal(v["loc"], 1.0)})
    others = (vi.reweighted_wake_sleep, vi.fisher_divergence)
    for build in (*BESIDE.values(), *(lambda t, g, f=f: f(t, g) for f in others)):
        with pytest.raises(ValueError, match="cannot follow two losses") as caught:
            build(target, q)
        assert "['loc']" in str(caught.value)
