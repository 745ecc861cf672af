"""Gaussian families over one flat unconstrained vector.

One array of noise a draw, one leaf for the optimiser where the covariance allows it.
"""

from typing import Any

import jax
import numpy as np
from numpyro.distributions import constraints

from vi_params._check import require_instance
from vi_params.batches.batch import split, take_axes
from vi_params.guide import Guide, pick_own
from vi_params.guides.by_site import sites_of_normals
from vi_params.guides.local import has_local, local_mean_field
from vi_params.guides.location_scale import DIAGONAL, TRIANGULAR, location_scale, positive
from vi_params.guides.starts import require_whole_plates, start_vector
from vi_params.params import Param, constrain
from vi_params.target import Target, flat, split_vector


def mean_field(
    target: Target, *, init: Any = None, init_scale: float = 0.1, name: str = "guide"
) -> Guide:
    """Independent normals in the unconstrained coordinates of the target's latents.

    Kucukelbir, Tran, Ranganath, Gelman and Blei (2017), Automatic differentiation variational
    inference, section 2.4, on numpyro's bijectors.

    Args:
        target: what to approximate.
        init: where `loc` starts: None (uniform on (-2, 2), unconstrained), a mapping from names to
            constrained values, or one of numpyro's `init_to_*` strategies.
        init_scale: where `scale` starts, a positive number in unconstrained units.
        name: the name of the family's parameters, `{"loc": (dim,), "scale": (dim,)}`.

    Latents in a subsampled plate have a location and a scale for every row, and a step on a batch
    moves its rows alone; the parameters are then `{latent: {"loc": ..., "scale": ...}}`, declared
    with their plates.

    Returns:
        A `Guide`.

    Raises:
        ValueError: `init_scale` is not positive, or a start lies outside its support.
        KeyError: `init` names an unknown latent.

    Example:
        >>> target = vi.target(lambda v, z, d: -0.5 * jnp.sum(z["z"] ** 2), {"z": vi.Latent((2,))})
        >>> guide = vi.guides.mean_field(target)
        >>> params = vi.init_params(guide.declared, jax.random.key(0))
        >>> guide.sample(params, jax.random.key(1)).latents["z"].shape
        (2,)
    """
    require_instance(target, Target, "vi.target or vi.from_numpyro", "vi.guides.mean_field, target")
    if has_local(target):
        return local_mean_field(target, init, positive(init_scale), name)
    dim = flat(target).dim
    scale = np.full(dim, positive(init_scale))
    declared = {
        name: {
            "loc": Param(start_vector(target, init)),
            "scale": Param(scale, constraint=constraints.positive),
        }
    }
    return _by_site(target, location_scale(target, declared, name, DIAGONAL), name)


def full_rank(
    target: Target, *, init: Any = None, init_scale: float = 0.1, name: str = "guide"
) -> Guide:
    """One multivariate normal in the unconstrained coordinates of all the target's latents.

    Kucukelbir et al. (2017), section 2.4; the Cholesky factor is a unit triangle whose rows are
    scaled, so that a change of units changes the scales alone.

    Args:
        target: what to approximate.
        init: where `loc` starts, as in `mean_field`.
        init_scale: where the marginal scales start, a positive number in unconstrained units.
        name: the name of the family's parameters, `{"loc": (dim,), "scale_tril": (dim, dim)}`.

    Returns:
        A `Guide`.

    Raises:
        ValueError: `init_scale` is not positive, or a start lies outside its support.
        KeyError: `init` names an unknown latent.

    Example:
        >>> target = vi.target(lambda v, z, d: -0.5 * jnp.sum(z["z"] ** 2), {"z": vi.Latent((2,))})
        >>> print(vi.describe(vi.guides.full_rank(target).declared))
        path              shape  dtype    constraint                 plates  size
        guide/loc         (2,)   float32  Real()                                2
        guide/scale_tril  (3,)   float32  ScaledUnitLowerCholesky()             3
    """
    require_whole_plates(target, "vi.guides.full_rank")
    dim = flat(target).dim
    scale_tril = positive(init_scale) * np.eye(dim)
    declared = {
        name: {
            "loc": Param(start_vector(target, init)),
            "scale_tril": Param(scale_tril, constraint=constraints.scaled_unit_lower_cholesky),
        }
    }
    return location_scale(target, declared, name, TRIANGULAR)


def _by_site(target: Target, family: Guide, name: str) -> Guide:
    """A diagonal family that is known latent by latent too."""

    def standardised(params: Any, e: jax.Array, data: Any) -> dict[str, Any]:
        own = constrain(family.declared, pick_own(params, family.declared))[name]
        index = split(data)[1]
        vectors = own["loc"], own["scale"], e[: own["loc"].size]
        loc, scale, e_parts = (split_vector(target, x) for x in vectors)
        return {
            site: tuple(
                take_axes(part[site], latent.plates, index) for part in (loc, scale, e_parts)
            )
            for site, latent in target.latents.items()
        }

    return family._replace(sites=sites_of_normals(target, standardised))
