"""Reweighted wake-sleep and neural posterior estimation: forward-KL optima, posterior maps."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest
from numpyro import distributions as dist
from numpyro.distributions import constraints
from scipy import stats

import vi_params as vi

COVARIANCE = np.array([[1.0, 0.8], [0.8, 1.0]])


def correlated():
    return vi.target(
        lambda v, z, d: dist.MultivariateNormal(jnp.zeros(2), COVARIANCE).log_prob(z["z"]) - 3.0,
        {"z": vi.Latent((2,))},
    )


def train(objective, num_steps, rate=0.05, seed=0):
    """The constrained values after steps at a rate that falls to zero."""
    svi = vi.svi(objective, optax.adam(optax.linear_schedule(rate, 0.0, num_steps)))

    @jax.jit
    def go(key):
        state, losses = vi.run(svi, svi.init(key), key, num_steps)
        return vi.constrain(objective.declared, state.params), losses

    return jax.device_get(go(jax.random.key(seed)))


def test_wake_phi_finds_the_forward_kl_optimum():
    """Of a correlated normal, wake-phi finds the product of normals with the right moments, scale
    1, where the ELBO's optimum has scale 0.6."""
    target = correlated()
    guide = vi.guides.mean_field(target, init={"z": jnp.array([0.5, -0.5])}, init_scale=1.5)
    awake, _ = train(vi.reweighted_wake_sleep(target, guide, num_importance=500), 500)
    bound, _ = train(vi.elbo(target, guide, num_particles=50), 500)
    np.testing.assert_allclose(awake["guide"]["scale"], 1.0, rtol=0.04)
    np.testing.assert_allclose(awake["guide"]["loc"], 0.0, atol=0.06)
    np.testing.assert_allclose(bound["guide"]["scale"], 0.6, rtol=0.05)


def test_wake_loss_is_the_forward_divergence():
    """With many draws the reported wake loss is KL(p || q): between normals, in closed form."""
    target = vi.target(lambda v, z, d: dist.Normal().log_prob(z["z"]) + 5.0, {"z": vi.Latent(())})
    guide = vi.guide({"loc": 0.5}, lambda v: {"z": dist.Normal(v["loc"], 1.3)})
    objective = vi.reweighted_wake_sleep(target, guide, num_importance=100_000)
    params = vi.init_params(objective.declared, jax.random.key(0))
    (loss, aux), slope = jax.jit(jax.value_and_grad(objective.loss, has_aux=True))(
        params, jax.random.key(1)
    )
    assert loss == pytest.approx(np.log(1.3) + (1 + 0.5**2) / (2 * 1.3**2) - 0.5, abs=0.01)
    assert slope["loc"] == pytest.approx(0.5 / 1.3**2, abs=0.02)
    assert aux.value == pytest.approx(5.0, abs=0.01)


def test_wake_theta_trains_the_model():
    """The model's mean gradient is the importance-weighted one: IWAE's at the same draws; and the
    guide's own does not depend on it."""
    target = vi.target(
        lambda v, z, d: (
            dist.Normal(v["shift"], 1.0).log_prob(z["z"]) + dist.Normal(z["z"], 0.5).log_prob(d)
        ),
        {"z": vi.Latent(())},
        declared={"shift": vi.Param(0.3)},
        data=jnp.array(1.2),
    )
    guide = vi.guide({"loc": 0.5}, lambda v: {"z": dist.Normal(v["loc"], 0.7)})
    pair = [
        vi.reweighted_wake_sleep(target, guide, num_importance=7, wake=wake) for wake in (1.0, 3.0)
    ]
    pair.append(vi.iwae(target, guide, num_importance=7))
    params = vi.init_params(pair[0].declared, jax.random.key(0))
    slopes = [
        jax.jit(jax.grad(lambda p, o=o: o.loss(p, jax.random.key(1))[0]))(params) for o in pair
    ]
    for slope in slopes[:2]:
        np.testing.assert_allclose(slope["shift"], slopes[2]["shift"], rtol=1e-4)
    np.testing.assert_allclose(slopes[1]["loc"], 3 * slopes[0]["loc"], rtol=1e-4)


def model(x, y):
    """A regression through the origin: the posterior is normal, its map from y linear."""
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("y", dist.Normal(slope * x, 0.5), obs=y)


X = jnp.array([1.0, -2.0, 0.5])
PRECISION = 1 + float(jnp.sum(X**2)) / 0.25


def amortised():
    declared = {
        "weights": vi.Param(jnp.zeros(3)),
        "scale": vi.Param(1.0, constraint=constraints.positive),
    }
    return vi.guide(
        declared, lambda v, d: {"slope": dist.Normal(v["weights"] @ d["y"], v["scale"])}
    )


@pytest.mark.parametrize("kind", ["neural_posterior", "sleep"])
def test_the_exact_posterior_map_is_learnt(kind):
    """From joint draws alone the amortised guide becomes the posterior at every y: mean
    x . y / (0.25 precision), sd precision^(-1/2); the observed y does not matter."""
    target = vi.from_numpyro(model, X, jnp.full(3, 100.0))
    if kind == "sleep":
        objective = vi.reweighted_wake_sleep(
            target, amortised(), num_importance=2, wake=0.0, sleep=1.0, num_simulations=100
        )
    else:
        objective = vi.neural_posterior(target, amortised(), num_simulations=100)
    values, losses = train(objective, 1500)
    np.testing.assert_allclose(values["weights"], X / 0.25 / PRECISION, atol=0.02)
    np.testing.assert_allclose(values["scale"], PRECISION**-0.5, rtol=0.03)
    if kind == "neural_posterior":
        expected = -stats.norm(0, PRECISION**-0.5).entropy()
        assert -losses[-300:].mean() == pytest.approx(expected, abs=0.02)


def test_simulations_follow_the_model():
    """The simulator of a NumPyro model draws latents and observations with the model's moments and
    keeps the design; given values are the model's own."""
    target = vi.from_numpyro(model, X, jnp.zeros(3))
    keys = jax.random.split(jax.random.key(0), 20_000)
    draw = jax.jit(jax.vmap(lambda key: target.simulate({}, key, target.data)))
    latents, data = jax.device_get(draw(keys))
    assert latents["slope"].std() == pytest.approx(1.0, rel=0.03)
    np.testing.assert_allclose(np.cov(data["y"].T), np.outer(X, X) + 0.25 * np.eye(3), atol=0.15)
    np.testing.assert_array_equal(data["x"][7], X)


def plain_simulate(values, key, data):
    first, second = jax.random.split(key)
    slope = jax.random.normal(first)
    return {"slope": slope}, {"x": data["x"], "y": slope * data["x"] + jax.random.normal(second)}


def plain(simulate=None):
    data = {"x": X, "y": jnp.zeros(3)}
    target = vi.target(lambda v, z, d: -(z["slope"] ** 2), {"slope": vi.Latent(())}, data=data)
    return vi.neural_posterior(target, amortised(), simulate=simulate)


def blind():
    target = vi.from_numpyro(model, X, jnp.zeros(3))
    return vi.neural_posterior(target, vi.guides.mean_field(target))


def computed():
    def indirect(y):
        mu = numpyro.sample("mu", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(mu, 1.0), obs=jnp.log(y))

    target = vi.from_numpyro(indirect, jnp.ones(()))
    return vi.neural_posterior(target, vi.guides.mean_field(target))


ERRORS = {
    "no simulator": (lambda: plain(), ["nothing to simulate", "simulate="]),
    "computed observations": (lambda: computed(), ["nothing to simulate", "its arguments"]),
    "a blind guide": (lambda: blind(), ["does not look at the data", "amortised"]),
    "one thing": (lambda: plain(lambda v, k, d: {"slope": 1.0}), ["a tuple (latents, data)"]),
    "a misspelt latent": (
        lambda: plain(lambda v, k, d: ({"slop": jnp.zeros(())}, d)),
        ["unknown: 'slop'", "did you mean 'slope'?"],
    ),
    "data missing": (
        lambda: plain(lambda v, k, d: ({"slope": jnp.zeros(())}, {"y": d["y"]})),
        ["names of the data", "missing: 'x'"],
    ),
    "data of another shape": (
        lambda: plain(lambda v, k, d: ({"slope": jnp.zeros(())}, {"x": d["x"], "y": d["y"][:2]})),
        ["other shapes", "(2,)"],
    ),
    "no weight": (
        lambda: vi.reweighted_wake_sleep(t := correlated(), vi.guides.mean_field(t), wake=0.0),
        ["not both zero"],
    ),
    "one draw": (
        lambda: vi.reweighted_wake_sleep(
            t := correlated(), vi.guides.mean_field(t), num_importance=1
        ),
        ["num_importance >= 2"],
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    """What cannot be trained on is refused when the objective is built, with the way out."""
    build, fragments = ERRORS[case]
    with pytest.raises((ValueError, KeyError)) as caught:
        build()
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_a_plain_simulator():
    """A simulator beside a plain density trains; its loss is finite and falls."""
    _, losses = train(plain(plain_simulate), 200)
    assert losses[-20:].mean() < losses[:20].mean() - 0.1
