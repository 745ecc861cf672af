"""Skewed coordinates, against quadrature and autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from vi_params.guides.sinh_arcsinh import (
    LARGEST,
    log_slope,
    skewness,
    straightened,
    tilt_of,
    tilted,
)

TILTS = [-1.0, -0.3, 0.0, 0.7]
Z = np.linspace(-4.0, 4.0, 9)


@pytest.mark.parametrize("tilt", TILTS)
def test_moments(tilt):
    """Mean zero, variance one, and the skewness as told."""
    for power, expected in [(1, 0.0), (2, 1.0), (3, skewness(tilt, np))]:
        found = stats.norm.expect(lambda z, i=power: tilted(z, tilt, np) ** i)
        np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("tilt", TILTS)
def test_it_is_the_transform_and_can_be_undone(tilt):
    """An affine function of sinh(arcsinh z + tilt); its slope is that of autodiff, and the numbers
    of a program are the host's."""
    x = tilted(Z, tilt, np)
    direct = np.sinh(np.arcsinh(Z) + tilt)
    fit = np.polyfit(direct, x, 1)
    np.testing.assert_allclose(np.polyval(fit, direct), x, atol=1e-10)
    np.testing.assert_allclose(straightened(x, tilt, np), Z, atol=1e-10)
    slopes = jax.vmap(jax.grad(lambda z: tilted(z, tilt)))(jnp.asarray(Z))
    np.testing.assert_allclose(np.exp(log_slope(Z, tilt, np)), slopes, rtol=1e-4)
    np.testing.assert_allclose(tilted(jnp.asarray(Z), tilt), x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("xp", [np, jnp])
def test_tilts_of_skewnesses(xp):
    """They have it, as far as one can."""
    wanted = xp.asarray([-0.9, 0.0, 0.4])
    np.testing.assert_allclose(skewness(tilt_of(wanted, xp), xp), wanted, atol=1e-4)
    np.testing.assert_allclose(tilt_of(xp.asarray([-9.0, 9.0]), xp), [-LARGEST, LARGEST])
