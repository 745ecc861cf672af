"""Base noise: moments that are promised to be exact, and rows that are standard normal."""

import functools

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import vi_params as vi

enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64

SCHEMES = {
    "iid": vi.noise.iid(),
    "antithetic": vi.noise.antithetic(),
    "moment_matched": vi.noise.moment_matched(),
    "orthogonal": vi.noise.orthogonal(),
    "sobol": vi.noise.sobol(),
}
NORMAL_ROWS = ("iid", "antithetic", "sobol")
PAIRED = ("antithetic", "moment_matched", "orthogonal")

compiled = functools.cache(lambda name: jax.jit(SCHEMES[name].draw, static_argnums=(1, 2)))

every_scheme = pytest.mark.parametrize("name", SCHEMES)


def draws(name, num_keys, num_particles, dim, seed=0):
    """Independent arrays of noise, shape (num_keys, num_particles, dim)."""
    keys = jax.random.split(jax.random.key(seed), num_keys)
    draw = SCHEMES[name].draw
    return np.asarray(jax.jit(jax.vmap(lambda key: draw(key, num_particles, dim)))(keys))


@every_scheme
@pytest.mark.parametrize(("num_particles", "dim"), [(2, 3), (8, 3)])
def test_every_row_has_mean_zero_and_covariance_identity(name, num_particles, dim):
    """E[e_i] = 0 and E[e_i e_i'] = I for each row, with fewer and with more draws than axes."""
    e = draws(name, 4000, num_particles, dim)
    for row in np.moveaxis(e, 1, 0):
        products = row[:, :, None] * row[:, None, :]
        for sample, expected in ((row, np.zeros(dim)), (products, np.eye(dim))):
            error = sample.std(0) / np.sqrt(len(sample))
            # one row of moment-matched pairs is -1 or 1: its squares have no spread
            assert np.all(np.abs(sample.mean(0) - expected) < 4 * error + 1e-5)


@pytest.mark.parametrize("name", NORMAL_ROWS)
def test_every_row_is_standard_normal(name):
    """Each entry of each row passes a Kolmogorov-Smirnov test against N(0, 1)."""
    e = draws(name, 4000, 4, 2, seed=1)
    for i in range(4):
        for j in range(2):
            # eight tests of each scheme: a level of 1e-4 is about 4 standard errors
            assert scipy.stats.kstest(e[:, i, j], "norm").pvalue > 1e-4


@pytest.mark.parametrize("name", ["moment_matched", "orthogonal"])
def test_moment_matching_gives_up_the_normal_law_of_a_row(name):
    """Exact moments from as few draws as axes pin the rows' lengths: fourth moments are not 3.

    The documentation says that expectations of other than quadratics are biased: this is why.
    """
    e = draws(name, 4000, 4, 2)
    assert (e**4).mean() < 2.5


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("dim", [1, 3, 9])
def test_pairs_are_antithetic(name, dim):
    """Row h + i is minus row i, so that the sum of every odd function is exactly zero."""
    e = SCHEMES[name].draw(jax.random.key(0), 8, dim)
    np.testing.assert_array_equal(e[4:], -e[:4])
    assert len(np.unique(np.abs(e[:, 0]))) > 1


@pytest.mark.parametrize("name", PAIRED)
def test_an_odd_number_of_draws_cannot_be_paired(name):
    """The error says what is expected, what came, where, and the way out."""
    with pytest.raises(ValueError, match="come in pairs") as error:
        SCHEMES[name].draw(jax.random.key(0), 5, 2)
    for fragment in ("Expected: an even num_particles", "Received: 5", name, "num_particles=6"):
        assert fragment in str(error.value)


@pytest.mark.parametrize("num_particles", [2, 6, 16])
def test_moment_matched_moments_are_exact(num_particles):
    """Mean 0 and mean square 1 in each coordinate, in each single array."""
    e = draws("moment_matched", 5, num_particles, 4)
    np.testing.assert_allclose(e.mean(1), 0.0, atol=1e-6)
    np.testing.assert_allclose((e**2).mean(1), 1.0, rtol=1e-5)


@pytest.mark.parametrize(("num_particles", "dim"), [(2, 1), (6, 3), (10, 3), (16, 8)])
def test_orthogonal_moments_are_exact(num_particles, dim):
    """With M >= 2 d: mean 0 and covariance I, off the diagonal too, in each single array."""
    e = draws("orthogonal", 5, num_particles, dim)
    np.testing.assert_allclose(e.mean(1), 0.0, atol=1e-6)
    covariance = np.einsum("kmi,kmj->kij", e, e) / num_particles
    np.testing.assert_allclose(covariance, np.broadcast_to(np.eye(dim), (5, dim, dim)), atol=1e-5)


def test_orthogonal_rows_are_orthogonal_with_few_draws():
    """With M < 2 d the rows of a half are orthogonal and of length sqrt(d)."""
    e = draws("orthogonal", 5, 4, 6)[:, :2]
    gram = np.einsum("kmi,kni->kmn", e, e)
    np.testing.assert_allclose(gram, np.broadcast_to(6.0 * np.eye(2), (5, 2, 2)), atol=1e-4)


@pytest.mark.parametrize(("num_particles", "dim"), [(16, 3), (6, 3), (4, 6)])
def test_orthogonal_rows_can_have_the_lengths_of_normal_vectors(num_particles, dim):
    """Every draw is then standard normal: squared lengths are chi-square, fourth moments 3; within
    a half of no more draws than axes they stay orthogonal."""
    scheme = vi.noise.orthogonal(normal_lengths=True)
    keys = jax.random.split(jax.random.key(5), 4000)
    e = np.asarray(jax.vmap(lambda key: scheme.draw(key, num_particles, dim))(keys))
    half = num_particles // 2
    np.testing.assert_array_equal(e[:, half:], -e[:, :half])
    lengths = (e[:, 0] ** 2).sum(-1)
    assert scipy.stats.kstest(lengths, scipy.stats.chi2(dim).cdf).pvalue > 1e-3
    np.testing.assert_allclose((e[:, 0] ** 4).mean(), 3.0, rtol=0.1)
    if half <= dim:
        gram = np.einsum("kmi,kni->kmn", e[:, :half], e[:, :half])
        off = gram - np.einsum("kmm->km", gram)[:, :, None] * np.eye(half)
        np.testing.assert_allclose(off, 0.0, atol=1e-4)


def test_orthogonal_frames_are_uniform():
    """The frame has no preferred orientation: each entry of Q has mean 0 and second moment 1/h."""
    q = draws("orthogonal", 4000, 6, 3)[:, :3] / np.sqrt(3)
    error = 4 / np.sqrt(4000)
    assert np.all(np.abs(q.mean(0)) < error * q.std(0))
    assert np.all(np.abs((q**2).mean(0) - 1 / 3) < error * (q**2).std(0))


def test_sobol_integrates_a_smooth_function_better_than_iid():
    """The mean square error of E[exp(-|e|^2 / 2)] = 2^(-3/2) over keys is a tenth of iid's."""
    error = {}
    for name in ("iid", "sobol"):
        e = draws(name, 200, 64, 3)
        estimates = np.exp(-0.5 * (e**2).sum(-1)).mean(-1)
        error[name] = np.mean((estimates - 2**-1.5) ** 2)
    assert error["sobol"] < 0.1 * error["iid"]


def test_sobol_is_a_net_of_its_cells():
    """Of 16 draws, each of the 16 equal cells of every axis holds exactly one, for every key."""
    u = scipy.stats.norm.cdf(draws("sobol", 20, 16, 3))
    cells = np.sort(np.floor(u * 16), axis=1)
    np.testing.assert_array_equal(cells, np.broadcast_to(np.arange(16)[:, None], (20, 16, 3)))


def test_sobol_ends_at_a_largest_dimension():
    """Beyond the tabulated direction numbers the error names the limit and the alternatives."""
    with pytest.raises(ValueError, match="Expected: dim <= 21201") as error:
        vi.noise.sobol().draw(jax.random.key(0), 2, 30_000)
    for fragment in ("Received: 30000", "vi.noise.sobol", "antithetic"):
        assert fragment in str(error.value)


@every_scheme
def test_jit_and_vmap_change_nothing(name):
    """A draw depends on its key alone: jitted, vmapped or neither, up to rounding."""
    keys = jax.random.split(jax.random.key(7), 3)
    together = jax.jit(jax.vmap(lambda key: SCHEMES[name].draw(key, 4, 3)))(keys)
    for key, row in zip(keys, together, strict=True):
        np.testing.assert_allclose(SCHEMES[name].draw(key, 4, 3), row, atol=1e-5)
    assert not np.allclose(together[0], together[1])


@every_scheme
@pytest.mark.parametrize("implementation", ["rbg", "unsafe_rbg"])
def test_any_key_implementation_works(name, implementation):
    """Keys of every implementation of JAX give finite draws that differ from key to key."""
    one, two = (compiled(name)(jax.random.key(seed, impl=implementation), 4, 2) for seed in (0, 1))
    assert np.all(np.isfinite(one))
    assert not np.allclose(one, two)


@every_scheme
def test_draws_have_the_default_float_dtype(name):
    """float32, and float64 with x64 on: there the promised moments hold to its precision."""
    assert compiled(name)(jax.random.key(0), 6, 3).dtype == jnp.float32
    with enable_x64(True):
        e = compiled(name)(jax.random.key(0), 6, 3)
        assert e.dtype == jnp.float64
        if name in ("moment_matched", "orthogonal"):
            np.testing.assert_allclose((e**2).mean(0), 1.0, rtol=1e-13)


@every_scheme
@pytest.mark.parametrize(("num_particles", "dim"), [(2, 0), (12, 5)])
def test_shapes_are_draws_by_dimensions(name, num_particles, dim):
    """The array is (num_particles, dim), for no dimensions and for no power of two as well."""
    e = compiled(name)(jax.random.key(0), num_particles, dim)
    assert e.shape == (num_particles, dim)
    assert np.all(np.isfinite(e))


@pytest.mark.parametrize("name", ["iid", "sobol"])
def test_one_draw_is_allowed_where_draws_are_not_paired(name):
    """A single particle is the usual number of stochastic gradients."""
    assert compiled(name)(jax.random.key(0), 1, 3).shape == (1, 3)
