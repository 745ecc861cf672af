"""Divergences of scores against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro import distributions as dist
from numpyro.distributions import constraints

import vi_params as vi

MEAN, SCALE = 0.7, 0.6

CLOSED = {
    "fisher_divergence": (
        lambda m, s: m**2 + (s - 1 / s) ** 2,
        lambda m, s: (2 * m, 2 * (s**2 - 1 / s**2)),
    ),
    "score_based_divergence": (
        lambda m, s: s**2 * m**2 + (s**2 - 1) ** 2,
        lambda m, s: (2 * s**2 * m, 2 * s**2 * m**2 + 4 * s**2 * (s**2 - 1)),
    ),
}
each = pytest.mark.parametrize("name", CLOSED)


def normal():
    """N(0, 1), unnormalised."""
    return vi.target(lambda v, z, d: -0.5 * jnp.sum(z["z"] ** 2) + 3.0, {"z": vi.Latent((1,))})


def at(guide, mean, scale):
    values = {"guide": {"loc": jnp.full(1, mean), "scale": jnp.full(1, scale)}}
    return vi.unconstrain(guide.declared, values)


@each
def test_values_and_gradients(name):
    """Between N(m, s) and N(0, 1) the divergence and its gradient in m and log s are the closed
    forms, within four standard errors."""
    target = normal()
    guide = vi.guides.mean_field(target)
    objective = getattr(vi, name)(target, guide, num_particles=1)
    params = at(guide, MEAN, SCALE)
    both = jax.value_and_grad(lambda p, key: objective.loss(p, key)[0])
    keys = jax.random.split(jax.random.key(0), 20_000)
    values, slopes = jax.device_get(jax.jit(jax.vmap(both, in_axes=(None, 0)))(params, keys))
    value, slope = CLOSED[name]
    found = [values, slopes["guide"]["loc"], slopes["guide"]["scale"]]
    for draws, exact in zip(found, (value(MEAN, SCALE), *slope(MEAN, SCALE)), strict=True):
        draws = np.asarray(draws, np.float64)
        assert abs(draws.mean() - exact) < 4 * draws.std() / np.sqrt(draws.size)


@each
def test_zero_at_the_posterior(name):
    """At q = p every evaluation and its gradient are zero to rounding: a correlated normal, and a
    positive latent whose unconstrained image is normal."""
    factor = jnp.array([[1.0, 0.0], [0.8, 0.6]])

    def log_density(values, latents, data):
        normal = dist.MultivariateNormal(jnp.zeros(2), scale_tril=factor).log_prob(latents["z"])
        return normal + dist.LogNormal(0.3, 0.5).log_prob(latents["tau"])

    latents = {"z": vi.Latent((2,)), "tau": vi.Latent((), constraints.positive)}
    target = vi.target(log_density, latents)
    guide = vi.guides.full_rank(target)
    tril = jnp.zeros((3, 3)).at[:2, :2].set(factor).at[2, 2].set(0.5)
    own = {"loc": jnp.array([0.0, 0.0, 0.3]), "scale_tril": tril}
    params = vi.unconstrain(guide.declared, {"guide": own})
    objective = getattr(vi, name)(target, guide, num_particles=20)
    loss, slope = jax.jit(jax.value_and_grad(lambda p: objective.loss(p, jax.random.key(0))[0]))(
        params
    )
    assert abs(loss) < 1e-8
    assert max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(slope)) < 1e-4


def test_units_do_not_matter_to_the_score_based_one():
    """In units a hundred times smaller the score-based divergence is the same, and the Fisher
    divergence 10^4 times as large."""
    found = {}
    for unit in (1.0, 0.01):
        target = vi.target(
            lambda v, z, d, unit=unit: -0.5 * jnp.sum((z["z"] / unit) ** 2),
            {"z": vi.Latent((1,))},
        )
        guide = vi.guides.mean_field(target)
        params = at(guide, MEAN * unit, SCALE * unit)
        for name in CLOSED:
            objective = getattr(vi, name)(target, guide)
            found[name, unit] = float(jax.jit(objective.loss)(params, jax.random.key(0))[0])
    same, large = ("score_based_divergence", "fisher_divergence")
    assert found[same, 0.01] == pytest.approx(found[same, 1.0], rel=1e-3)
    assert found[large, 0.01] == pytest.approx(1e4 * found[large, 1.0], rel=1e-3)


def test_a_guide_by_hand_and_a_family():
    """The divergence of a log-normal written by hand is that of the family with its parameters."""
    target = vi.target(
        lambda v, z, d: dist.Gamma(3.0, 2.0).log_prob(z["tau"]),
        {"tau": vi.Latent((), constraints.positive)},
    )
    family = vi.guides.mean_field(target)
    by_hand = vi.guide({"loc": 0.2}, lambda v: {"tau": dist.LogNormal(v["loc"], 0.4)})
    params = (at(family, 0.2, 0.4), {"loc": jnp.array(0.2)})
    found = []
    for guide, own in zip((family, by_hand), params, strict=True):
        objective = vi.fisher_divergence(target, guide, num_particles=20_000)
        found.append(jax.jit(objective.loss)(own, jax.random.key(0))[0])
    # u = log tau: d/du log p = 3 - 2 tau, d/du log q = -(u - 0.2) / 0.16.
    e = np.polynomial.hermite_e.hermegauss(60)
    u = 0.2 + 0.4 * e[0]
    exact = np.sum(e[1] / e[1].sum() * (3 - 2 * np.exp(u) + (u - 0.2) / 0.16) ** 2)
    np.testing.assert_allclose(found, exact, rtol=0.05)


def test_a_guide_of_keys_is_refused():
    """Draws that are no map of normal noise have no slope in it: the error names the way out."""
    by_hand = vi.guide({"loc": jnp.zeros(1)}, lambda v: {"z": dist.Normal(v["loc"], 1.0)})
    with pytest.raises(ValueError, match="not maps of normal noise") as caught:
        vi.score_based_divergence(normal(), by_hand)
    assert "vi.fisher_divergence" in str(caught.value)


@each
def test_a_model_learns_beside_it(name):
    """y ~ N(z, 1), z ~ N(m, 1) with m unknown: the guide's gradient is that of the divergence from
    the posterior, the model's that of minus the ELBO, m - E_q z; the value is the divergence."""
    y, m = 2.0, 0.5

    def log_density(values, latents, data):
        z = latents["z"]
        return jnp.sum(-0.5 * (z - values["m"]) ** 2 - 0.5 * (y - z) ** 2)

    target = vi.target(log_density, {"z": vi.Latent((1,))}, declared={"m": vi.Param(m)})
    guide = vi.guides.mean_field(target)
    make = getattr(vi, name)
    objective = make(target, guide, num_particles=20_000, noise=vi.noise.moment_matched())
    params = {**at(guide, 0.3, 0.8), "m": jnp.asarray(m)}
    fixed = vi.target(lambda v, z, d: log_density({"m": m}, z, d), {"z": vi.Latent((1,))})
    alone = make(fixed, guide, num_particles=20_000, noise=vi.noise.moment_matched())
    key = jax.random.key(3)
    (value, _), slope = jax.value_and_grad(objective.loss, has_aux=True)(params, key)
    (expected, _), slope_alone = jax.value_and_grad(alone.loss, has_aux=True)(
        {"guide": params["guide"]}, key
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(slope["m"], m - 0.3, rtol=1e-4)
    for leaf in ("loc", "scale"):
        np.testing.assert_allclose(
            slope["guide"][leaf], slope_alone["guide"][leaf], rtol=1e-4, atol=1e-4
        )
