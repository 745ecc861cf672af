"""Partially centred coordinates: maps against autodiff, densities unchanged, closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from numpyro import distributions as dist
from numpyro.infer import MCMC, NUTS

import vi_params as vi

KEY = jax.random.key(0)
X = jnp.arange(4.0)


def every_family(x, y):
    """Locations and scales of all kinds: vectors of them, a plate, an exponential, to_event."""
    slope = numpyro.sample("slope", dist.Normal(0, 1).expand([2]).to_event(1))
    tau = numpyro.sample("tau", dist.HalfNormal(1).expand([3]).to_event(1))
    s = numpyro.sample("s", dist.Exponential(1.0))
    with numpyro.plate("rows", 4):
        e = numpyro.sample("e", dist.Normal(slope[0] + jnp.arange(3.0), tau).to_event(1))
        rate = numpyro.sample("rate", dist.LogNormal(slope[1] * x, s))
        t = numpyro.sample("t", dist.StudentT(4.0, 0.0, s))
        numpyro.sample("y", dist.Normal(e.sum(-1) + rate + t, 1.0), obs=y)


def groups(y):
    """A centred hierarchy."""
    mean = numpyro.sample("mean", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfNormal(5))
    with numpyro.plate("groups", len(y)):
        x = numpyro.sample("x", dist.Normal(mean, tau))
        numpyro.sample("y", dist.Normal(x, jnp.array([1.0, 4.0, 10.0, 15.0])), obs=y)


Y = jnp.array([2.0, 1.0, -4.0, 8.0])
PLAIN = vi.from_numpyro(every_family, X, jnp.ones(4))
CENTRED = vi.recentred(PLAIN)
VALUES = {"centring": {"e": jnp.full((4, 3), 0.3), "rate": jnp.full(4, 0.7), "t": jnp.zeros(4)}}


def test_latents_are_those_whose_scale_other_latents_set():
    declared = vi.init_params(CENTRED.declared, KEY)
    found = vi.constrain(CENTRED.declared, declared)["centring"]
    assert {name: c.shape for name, c in found.items()} == {"e": (4, 3), "rate": (4,), "t": (4,)}
    for c in found.values():
        np.testing.assert_allclose(c, 0.5)


def test_the_map_has_its_inverse_and_its_jacobian():
    """log |det| is that of the map between the two coordinates, beside the one of the supports."""
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64(True):
        plain = vi.flat(vi.from_numpyro(every_family, np.arange(4.0), np.ones(4)))
        target = vi.recentred(vi.from_numpyro(every_family, np.arange(4.0), np.ones(4)))
        centred = vi.flat(target)
        values = jax.tree.map(lambda c: np.asarray(c, float), VALUES)
        u = jax.random.normal(KEY, (centred.dim,))
        latents, log_det = centred.constrain_with_log_det(u, values)
        np.testing.assert_allclose(centred.unconstrain(latents, values), u, rtol=1e-10)
        between = jax.jacobian(lambda u: plain.unconstrain(centred.constrain(u, values)))(u)
        outer = plain.constrain_with_log_det(plain.unconstrain(latents))[1]
        expected = np.linalg.slogdet(between)[1] + outer
        np.testing.assert_allclose(log_det, expected, rtol=1e-10)


def test_centred_coordinates_are_the_programs_own():
    ones = {"centring": {"e": jnp.ones((4, 3)), "rate": jnp.ones(4), "t": jnp.ones(4)}}
    u = jax.random.normal(KEY, (vi.flat(PLAIN).dim,))
    own, found = vi.flat(PLAIN).constrain(u), vi.flat(CENTRED).constrain(u, ones)
    for name in own:
        np.testing.assert_allclose(found[name], own[name], rtol=1e-5, err_msg=name)


def test_non_centred_coordinates_are_standardised():
    """At c = 0 a latent is loc + scale * v."""
    target = vi.recentred(vi.from_numpyro(groups, Y))
    u = jnp.array([1.5, jnp.log(2.0), 0.3, -1.0, 0.0, 2.0])
    latents = vi.flat(target).constrain(u, {"centring": {"x": jnp.zeros(4)}})
    np.testing.assert_allclose(latents["x"], 1.5 + 2.0 * u[2:], rtol=1e-6)


def test_where_nothing_is_resolved_there_is_no_volume():
    """With a scale far below the rounding of the location, x - loc is rounding alone."""
    flat = vi.flat(vi.recentred(vi.from_numpyro(groups, Y)))
    values = {"centring": {"x": jnp.zeros(4)}}
    near = jnp.array([4.0, -5.0, 3.0, 3.0, 3.0, 3.0])
    far = near.at[1].set(-17.0)
    assert jnp.isfinite(flat.log_density(near, values))
    assert flat.log_density(far, values) == -jnp.inf


def test_the_density_of_latents_is_unchanged():
    latents = vi.flat(PLAIN).constrain(jax.random.normal(KEY, (vi.flat(PLAIN).dim,)))
    for of in ("log_density", "deterministic", "terms"):
        own = getattr(PLAIN, of)({}, latents, PLAIN.data)
        found = getattr(CENTRED, of)(VALUES, latents, CENTRED.data)
        jax.tree.map(np.testing.assert_array_equal, found, own)


def test_the_centring_is_learnt_beside_a_guide():
    """Few data say little of the last groups: they end less centred than the first, and the ELBO
    is above that of the program's own coordinates (Gorinova et al., 2020)."""

    def fitted(target):
        objective = vi.elbo(target, vi.guides.mean_field(target), num_particles=8)
        return vi.fit(objective, key=KEY, num_steps=3000, progress=False)

    plain = vi.from_numpyro(groups, Y)
    target = vi.recentred(plain)
    fit, before = fitted(target), fitted(plain)
    c = vi.constrain(target.declared, {"centring": fit.params["centring"]})["centring"]["x"]
    assert c[0] > c[2]
    assert c[0] > c[3]

    def elbo(target, fit):
        guide = vi.guides.mean_field(target)
        return float(vi.diagnose(target, guide, fit.params, jax.random.key(7)).elbo)

    assert elbo(target, fit) > elbo(plain, before) + 0.1


def reparameterised_twice(y):
    tau = numpyro.sample("tau", dist.HalfNormal(1))
    numpyro.sample("centring", dist.Normal(0, tau), obs=None)
    numpyro.sample("y", dist.Normal(0, tau), obs=y)


def nothing_to_centre(y):
    x = numpyro.sample("x", dist.Normal(0, 3))
    numpyro.sample("y", dist.Normal(x, 1), obs=y)


@pytest.mark.parametrize(
    "target",
    [
        vi.from_numpyro(nothing_to_centre, 1.0),
        vi.from_numpyro(reparameterised_twice, 1.0),
        vi.target(lambda v, z, d: -0.5 * z["z"] ** 2, {"z": vi.Latent()}),
        CENTRED,
    ],
)
def test_a_target_without_such_latents_is_refused(target):
    with pytest.raises(ValueError, match=r"nothing to centre(.|\n)*whose prior is a location"):
        vi.recentred(target)


def test_coordinates_without_their_centring_are_refused():
    flat = vi.flat(CENTRED)
    with pytest.raises(KeyError, match=r"need their centring(.|\n)*'e', 'rate', 't'"):
        flat.constrain(jnp.zeros(flat.dim))


def test_steps_of_a_scan_are_left_alone():
    def walk(y):
        tau = numpyro.sample("tau", dist.HalfNormal(1))

        def step(x, y):
            x = numpyro.sample("x", dist.Normal(x, tau))
            numpyro.sample("y", dist.Normal(x, 1), obs=y)
            return x, None

        numpyro.contrib.control_flow.scan(step, 0.0, y)

    with pytest.raises(ValueError, match="nothing to centre"):
        vi.recentred(vi.from_numpyro(walk, jnp.zeros(5)))


def test_approximate_follows_a_centred_hierarchy():
    """What NUTS finds in non-centred coordinates; the guide is one of the target as it was given,
    and NUTS starts in the target's own coordinates."""

    def apart(y):
        mean = numpyro.sample("mean", dist.Normal(0, 5))
        tau = numpyro.sample("tau", dist.HalfNormal(5))
        with numpyro.plate("groups", len(y)):
            v = numpyro.sample("v", dist.Normal(0, 1))
            x = numpyro.deterministic("x", mean + tau * v)
            numpyro.sample("y", dist.Normal(x, jnp.array([1.0, 4.0, 10.0, 15.0])), obs=y)

    target = vi.from_numpyro(groups, Y)
    posterior = vi.approximate(target, KEY)
    assert posterior.trustworthy
    draws = posterior.draws(jax.random.key(1), 8000)
    mcmc = MCMC(NUTS(apart), num_warmup=500, num_samples=4000, progress_bar=False)
    mcmc.run(jax.random.key(2), Y)
    exact = mcmc.get_samples()
    for name in ("mean", "tau", "x"):
        sd = exact[name].std(0)
        error = (draws[name].mean(0) - exact[name].mean(0)) / sd
        np.testing.assert_allclose(error, np.zeros_like(error), atol=0.15, err_msg=name)

    assert posterior.target is not posterior.coordinates
    fitted = posterior.guide, posterior.params
    again = vi.diagnose(posterior.coordinates, *fitted, jax.random.key(3))
    with pytest.raises(KeyError, match=r"posterior\.coordinates"):
        vi.diagnose(target, *fitted, jax.random.key(3))
    np.testing.assert_allclose(again.log_evidence, posterior.diagnosis.log_evidence, atol=0.1)
    start = posterior.nuts_start(jax.random.key(4))
    spread = start.unconstrained["tau"]
    assert start.position.shape == (4, 6)
    assert bool(jnp.all(jnp.exp(spread) < 40.0))
    log_tau = np.log(np.asarray(draws["tau"]))
    np.testing.assert_allclose(start.inverse_mass_matrix[1, 1], log_tau.var(), rtol=0.3)
