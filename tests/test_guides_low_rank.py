"""The low-rank Gaussian family, against dense multivariate normals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro import distributions as dist
from numpyro.distributions import constraints

import vi_params as vi
from vi_params.guides.low_rank import root

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def target():
    return vi.target(
        lambda v, z, d: -jnp.sum(z["z"] ** 2) - z["rate"],
        {"z": vi.Latent((3,)), "rate": vi.Latent((), constraints.positive)},
    )


@pytest.fixture(scope="module")
def family(target):
    guide = vi.guides.low_rank(target, rank=2)
    params = vi.init_params(guide.declared, KEY)
    own = params["guide"]
    factor = jax.random.normal(jax.random.key(1), own["factor"].shape)
    return guide, {"guide": {**own, "factor": factor}}


def covariance(guide, params):
    own = vi.constrain(guide.declared, params)["guide"]
    scaled = np.asarray(own["scale"][:, None] * own["factor"])
    return np.asarray(own["loc"]), np.diag(np.asarray(own["scale"]) ** 2) + scaled @ scaled.T


def test_the_density_is_that_of_a_dense_normal(target, family):
    """log q equals the multivariate normal's minus the Jacobian of the positive latent; rescoring
    a draw, and scoring its latents afresh, agree with what the draw came with."""
    guide, params = family
    loc, dense = covariance(guide, params)
    draw = guide.sample(params, jax.random.key(2))
    reference = dist.MultivariateNormal(loc, dense).log_prob(draw.position)
    reference = reference - jnp.log(draw.latents["rate"])
    for found in (
        draw.log_prob,
        guide.log_prob(params, draw.latents),
        guide.rescore(params, draw),
    ):
        np.testing.assert_allclose(found, reference, rtol=1e-4)


def test_the_draws_have_the_covariance(family):
    """The map from noise to draws is linear, and its square is D (I + W W^T) D."""
    guide, params = family
    _, dense = covariance(guide, params)
    positions = jax.vmap(lambda e: guide.transform(params, e).position)(jnp.eye(4))
    origin = guide.transform(params, jnp.zeros(4)).position
    np.testing.assert_allclose((positions - origin).T @ (positions - origin), dense, rtol=1e-4)


def test_the_entropy_is_closed(family):
    """Over the unconstrained coordinates -E[log q] is (1/2) log det(2 pi e Cov)."""
    guide, params = family
    _, dense = covariance(guide, params)
    draw = guide.transform(params, jnp.zeros(4))
    exact = 0.5 * np.linalg.slogdet(2 * np.pi * np.e * dense)[1]
    np.testing.assert_allclose(
        guide.entropy(params, draw), exact + jnp.log(draw.latents["rate"]), rtol=1e-4
    )


@pytest.mark.parametrize("rank", [1, 3])
def test_the_root_and_its_inverse(rank):
    """C C^T = I + W W^T, C^-1 undoes C, det C^2 is the determinant; W = 0 has finite gradients."""
    factor = 2.0 * jax.random.normal(KEY, (4, rank))
    c = jax.vmap(root(factor).times, in_axes=1, out_axes=1)(jnp.eye(4))
    dense = np.eye(4) + factor @ factor.T
    np.testing.assert_allclose(c @ c.T, dense, atol=1e-4)
    turned = jax.vmap(root(factor).transposed, in_axes=1, out_axes=1)(jnp.eye(4))
    np.testing.assert_allclose(turned, c.T, atol=1e-4)
    back = jax.vmap(root(factor).solve, in_axes=1, out_axes=1)(c)
    np.testing.assert_allclose(back, np.eye(4), atol=1e-4)
    np.testing.assert_allclose(2 * root(factor).log_det(), np.linalg.slogdet(dense)[1], rtol=1e-4)
    slope = jax.grad(lambda w: root(w).times(jnp.ones(4)).sum())(jnp.zeros((4, rank)))
    assert np.all(np.isfinite(slope))


@pytest.mark.slow
def test_a_fit_finds_a_factor_model():
    """Of a Gaussian of the family itself the ELBO reaches the log evidence, zero."""
    w = jnp.array([1.0, -2.0, 0.5, 1.5])
    dense = jnp.diag(jnp.array([1.0, 0.5, 2.0, 1.0])) + jnp.outer(w, w)
    target = vi.target(
        lambda v, z, d: dist.MultivariateNormal(jnp.ones(4), dense).log_prob(z["z"]),
        {"z": vi.Latent((4,))},
    )
    guide = vi.guides.low_rank(target, rank=1)
    objective = vi.elbo(
        target, guide, num_particles=16, estimator=vi.estimators.sticking_the_landing()
    )
    fit = vi.fit(objective, key=KEY, num_steps=3000, progress=False)
    assert abs(float(vi.diagnose(target, guide, fit.params, KEY).elbo)) < 0.01


@pytest.mark.parametrize(
    ("options", "kind", "fragment"),
    [
        ({"rank": 0}, ValueError, "rank"),
        ({"rank": 5}, ValueError, "exceeds"),
        ({"rank": 1.5}, TypeError, "rank"),
        ({"init_scale": -1.0}, ValueError, "init_scale"),
        ({"init": {"y": 0.0}}, KeyError, "y"),
    ],
)
def test_wrong_arguments_are_refused(target, options, kind, fragment):
    with pytest.raises(kind, match=fragment):
        vi.guides.low_rank(target, **options)
