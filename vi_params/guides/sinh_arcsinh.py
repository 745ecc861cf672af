"""Skewed coordinates: sinh-arcsinh transforms of normal ones, standardised.

    x = (sinh(arcsinh z + e) - m(e)) / s(e),   z normal,

has mean zero and variance one for every tilt e; its tails are those of normals of scales in the
proportion exp(2 e). Jones and Pewsey (2009), Sinh-arcsinh distributions, Biometrika 96, section 2,
with tail weight one.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

LARGEST = 1.0
"""The largest tilt."""


def _moments() -> tuple[float, float, float, float]:
    """E r, var r, E z^2 (r - E r) and E (r - E r)^3, where r = sqrt(1 + z^2)."""
    z, weights = np.polynomial.hermite_e.hermegauss(100)
    weights, root = weights / weights.sum(), np.sqrt(1 + z**2)
    mean = weights @ root
    rest = root - mean
    found = mean, weights @ rest**2, weights @ (z**2 * rest), weights @ rest**3
    mean, variance, mixed, third = map(float, found)
    return mean, variance, mixed, third


MEAN, VARIANCE, MIXED, THIRD = _moments()


def tilted(z: Any, tilt: Any, xp: Any = jnp) -> Any:
    """x at normal coordinates z, of the tilts e."""
    mean, scale = _standard(tilt, xp)
    # sinh(arcsinh z + e), without a logarithm
    return (z * xp.cosh(tilt) + xp.sqrt(1 + z**2) * xp.sinh(tilt) - mean) / scale


def straightened(x: Any, tilt: Any, xp: Any = jnp) -> Any:
    """z at x."""
    mean, scale = _standard(tilt, xp)
    x = scale * x + mean
    return x * xp.cosh(tilt) - xp.sqrt(1 + x**2) * xp.sinh(tilt)


def log_slope(z: Any, tilt: Any, xp: Any = jnp) -> Any:
    """Log dx/dz at z."""
    scale = _standard(tilt, xp)[1]
    return xp.log((xp.cosh(tilt) + z / xp.sqrt(1 + z**2) * xp.sinh(tilt)) / scale)


def skewness(tilt: Any, xp: Any = jnp) -> Any:
    """E x^3."""
    sinh, cosh = xp.sinh(tilt), xp.cosh(tilt)
    return (3 * cosh**2 * sinh * MIXED + sinh**3 * THIRD) / _standard(tilt, xp)[1] ** 3


def tilt_of(third: Any, xp: Any = jnp) -> Any:
    """The tilt that has a skewness, or the largest one where none has."""
    return xp.interp(third, *(xp.asarray(table, third.dtype) for table in (SKEWNESSES, TILTS)))


def _standard(tilt: Any, xp: Any) -> tuple[Any, Any]:
    """The mean and the standard deviation of sinh(arcsinh z + e)."""
    sinh, cosh = xp.sinh(tilt), xp.cosh(tilt)
    return MEAN * sinh, xp.sqrt(cosh**2 + VARIANCE * sinh**2)


TILTS = np.linspace(-LARGEST, LARGEST, 201)
SKEWNESSES = skewness(TILTS, np)
"""What `tilt_of` reads: it grows with the tilt."""
