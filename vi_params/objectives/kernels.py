"""Kernels between observations, as values.

Each is a function of the distance between two observations, in units of a bandwidth. By default the
bandwidth is the median distance between observed rows (Gretton et al., 2012, section 8).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vi_params._check import require_positive


class Kernel(NamedTuple):
    """A kernel of a distance.

    Attributes:
        name: what it is called in messages.
        of: `distance / bandwidth -> k`, elementwise.
        bandwidth: the unit of distance; the median heuristic where None.
    """

    name: str
    of: Callable[[jax.Array], jax.Array]
    bandwidth: float | None = None


def gaussian(bandwidth: float | None = None) -> Kernel:
    """k = exp(-d^2 / (2 h^2)).

    Example:
        >>> vi.kernels.gaussian(2.0).bandwidth
        2.0
    """
    return Kernel("gaussian", lambda d: jnp.exp(-0.5 * d**2), _positive(bandwidth))


def laplace(bandwidth: float | None = None) -> Kernel:
    """k = exp(-d / h): sees finer detail than the Gaussian.

    Example:
        >>> vi.kernels.laplace().name
        'laplace'
    """
    return Kernel("laplace", lambda d: jnp.exp(-d), _positive(bandwidth))


def rational_quadratic(bandwidth: float | None = None, *, alpha: float = 1.0) -> Kernel:
    """k = (1 + d^2 / (2 alpha h^2))^-alpha: a mixture of Gaussians of all bandwidths.

    Example:
        >>> vi.kernels.rational_quadratic(alpha=0.5).name
        'rational_quadratic'
    """
    return Kernel(
        "rational_quadratic",
        lambda d: (1 + d**2 / (2 * alpha)) ** -alpha,
        _positive(bandwidth),
    )


def negative_distance() -> Kernel:
    """k = -d, the kernel of the energy distance; it has no bandwidth.

    Example:
        >>> vi.kernels.negative_distance().bandwidth
        1.0
    """
    return Kernel("negative_distance", lambda d: -d, 1.0)


def _positive(bandwidth: float | None) -> float | None:
    if bandwidth is not None:
        require_positive(bandwidth, "bandwidth", "vi.kernels", "None is the median heuristic")
    return bandwidth
