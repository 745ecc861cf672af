"""Flows: the map against numerical Jacobians, its inverse, and what it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpyro import distributions as dist
from numpyro.distributions import constraints

import vi_params as vi
from vi_params.guides.flow import Layers, coupled, coupling_masks, uncoupled

KEY = jax.random.key(0)
TARGET = vi.target(
    lambda v, z, d: dist.Normal(1.0, 2.0).log_prob(z["x"]).sum() + dist.Gamma(2.0).log_prob(z["s"]),
    {"x": vi.Latent((3,)), "s": vi.Latent((), constraints.positive)},
)


def shaken(guide):
    """Parameters away from the start, where every layer is the identity."""
    params = vi.init_params(guide.declared, KEY)
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(KEY, len(leaves))
    moved = [x + 0.3 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(treedef, moved)


def test_layers_have_an_inverse_and_its_determinant():
    masks = coupling_masks(5, 4)
    shapes = Layers((5, 4, 6), (5, 6), (5, 6, 2, 4), (5, 2, 4))
    layers = Layers(
        *(jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))
    )
    e = jax.random.normal(KEY, (4,))
    h, stretched = coupled(layers, masks, e)
    back, again = uncoupled(layers, masks, h)
    jacobian = jax.jacobian(lambda e: coupled(layers, masks, e)[0])(e)
    np.testing.assert_allclose(back, e, atol=1e-3)
    np.testing.assert_allclose(stretched, np.linalg.slogdet(jacobian)[1], rtol=1e-3)
    np.testing.assert_allclose(again, stretched, rtol=1e-3)


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_every_coordinate_is_moved_and_left(dim):
    """Of two neighbours, one layer moves what the other leaves."""
    masks = coupling_masks(6, dim)
    np.testing.assert_array_equal(masks[::2], ~masks[1::2])


def test_density_is_that_of_the_map():
    """log q of a draw is that of its noise over |du/de| and |dz/du|, by all three ways."""
    guide = vi.guides.flow(TARGET, 3, hidden=5)
    params = shaken(guide)
    flat = vi.flat(TARGET)
    for i in range(3):
        e = guide.noise(jax.random.key(i), 1)[0]
        draw = guide.transform(params, e)

        def vector(e):
            latents = guide.transform(params, e).latents
            return jnp.concatenate([latents["x"], latents["s"][None]])

        exact = dist.Normal().log_prob(e).sum() - np.linalg.slogdet(jax.jacobian(vector)(e))[1]
        assert flat.dim == e.size
        for log_q in (
            draw.log_prob,
            guide.rescore(params, draw),
            guide.log_prob(params, draw.latents),
        ):
            np.testing.assert_allclose(log_q, exact, rtol=1e-3)


def test_it_begins_as_a_gaussian():
    """Whatever the networks' first layers are, the map is loc + C e."""
    guide = vi.guides.flow(TARGET, 4, init={"x": jnp.ones(3), "s": 1.0}, init_scale=0.5)
    draws = vi.draws(TARGET, guide, vi.init_params(guide.declared, KEY), KEY, 20_000)
    np.testing.assert_allclose(draws["x"].mean(0), np.ones(3), atol=0.02)
    np.testing.assert_allclose(draws["x"].std(0), 0.5 * np.ones(3), rtol=0.03)


def funnel(values, latents, data):
    v, x = latents["z"]
    return dist.Normal(0.0, 1.5).log_prob(v) + dist.Normal(0.0, jnp.exp(v / 2)).log_prob(x)


@pytest.mark.slow
def test_it_follows_a_funnel():
    """The ELBO comes near the evidence, which no Gaussian's does; moments are in closed form."""
    target = vi.target(funnel, {"z": vi.Latent((2,))})
    guide = vi.guides.flow(target, 6, hidden=16)
    objective = vi.elbo(
        target, guide, estimator=vi.estimators.sticking_the_landing(), num_particles=64
    )
    rate = optax.cosine_decay_schedule(1e-2, 2000)
    fit = vi.fit(
        objective,
        optax.adam(rate),
        key=KEY,
        num_steps=2000,
        stop=vi.stopping.never(),
        progress=False,
    )
    found = vi.diagnose(target, guide, fit.params, KEY)
    assert found.elbo > -0.1
    draws = vi.draws(target, guide, fit.params, KEY, 20_000)["z"]
    np.testing.assert_allclose(draws[:, 0].mean(), 0.0, atol=0.15)
    np.testing.assert_allclose(draws[:, 0].std(), 1.5, rtol=0.1)


@pytest.mark.slow
def test_approximate_goes_on_with_a_flow_if_asked():
    target = vi.target(funnel, {"z": vi.Latent((2,))})
    rough = vi.approximate(target, KEY, polish=False)
    found = vi.approximate(target, KEY, polish=False, flow=True)
    assert not rough.trustworthy
    assert "flow" in str(found)
    assert float(found.diagnosis.elbo) > float(rough.diagnosis.elbo) + 0.1
    np.testing.assert_allclose(float(found.diagnosis.log_evidence), 0.0, atol=0.1)


@pytest.mark.parametrize("options", [{"num_layers": 0}, {"hidden": 0}, {"init_scale": 0.0}])
def test_wrong_arguments_are_refused(options):
    (name,) = options
    with pytest.raises(ValueError, match=name):
        vi.guides.flow(TARGET, **options)
