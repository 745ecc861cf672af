"""Scouts at few draws, then lanes at all: one program, the optima of the solver itself."""

import jax
import jax.numpy as jnp
import numpy as np

import vi_params as vi
from vi_params.solvers.fixed_draws import Used, fixed_draws, units
from vi_params.solvers.scouts import scouted, staged

KEY = jax.random.key(0)


def modes(heights):
    """Two normals in the plane, far apart."""

    def log_density(values, latents, data):
        z = latents["z"]
        first = data[0] - 0.5 * jnp.sum((z + 6.0) ** 2)
        second = data[1] - 0.5 * jnp.sum((z - 6.0) ** 2)
        return jnp.logaddexp(first, second)

    return vi.target(log_density, {"z": vi.Latent((2,))}, data=jnp.asarray(heights))


def test_the_first_blocks_alone_count():
    """Of padded draws the value, gradient and Hessian are those of the draws that count, with a
    Hessian that is held as a matrix and with products."""
    draws = vi.noise.moment_matched().draw(KEY, 4, 2)
    rows = jnp.array([0, 1, 6, 7])
    padded = jnp.full((12, 2), 7.0).at[rows].set(draws)
    x, v = jnp.array([0.3, -0.2, -0.5, 0.1]), jnp.array([1.0, 2.0, -1.0, 0.5])

    def log_density(u, theta):
        return -jnp.sum(u**4) - jnp.prod(u)

    for size in (1, 2**30):  # all at once; one by one
        plain = fixed_draws(log_density, draws, size, 0)
        first = fixed_draws(log_density, padded, size, 0, Used(4, jnp.int32(1)))
        for f, g in zip(plain.expand(x)[:2], first.expand(x)[:2], strict=True):
            np.testing.assert_allclose(f, g, rtol=1e-5)
        found = (f.product(f.expand(x)[2], v) for f in (plain, first))
        np.testing.assert_allclose(*found, rtol=1e-5)
    response = first.expand(x)[2]
    np.testing.assert_allclose(response.slopes[rows], plain.expand(x)[2].slopes, rtol=1e-5)
    assert units(x, 2).shape == x.shape


def test_every_optimum_is_found_the_best_first():
    found = scouted(modes([0.0, 1.0]), KEY, jnp.array([0.0, 1.0]), {}, 8)
    elbos = [float(one.info.elbo) for one in found]
    # log of height times mass, 2 pi in the plane.
    expected = sorted([np.log(2 * np.pi), 1.0 + np.log(2 * np.pi)], reverse=True)
    np.testing.assert_allclose(elbos, expected, atol=1e-3)
    locs = np.array([one.params["guide"]["loc"] for one in found])
    np.testing.assert_allclose(locs, [[6.0, 6.0], [-6.0, -6.0]], atol=1e-2)


def test_both_stages_are_one_program(compilations):
    target = modes([0.0, 0.0])
    found = staged(target, ())
    scout = found.solve(KEY, target.data, {}, found.blank, np.int32(0))
    other = np.array([1.0, 0.5], np.float32)
    with compilations() as seen:
        _, info, *_ = found.solve(KEY, other, {}, scout[0], np.int32(-1))
    assert seen == []
    assert np.any(np.isclose(info.elbo, other + np.log(2 * np.pi), atol=1e-3))


def test_large_hessians_have_no_such_program():
    target = vi.target(lambda v, z, d: -0.5 * jnp.sum(z["z"] ** 2), {"z": vi.Latent((40,))})
    assert staged(target, ()) is None
