"""Mean-field families site by site: what estimators and bounds use that look inside a guide.

A family over unconstrained coordinates is, latent by latent, the image of a normal under the
bijector onto the latent's support:

    z = T(u),   u = loc + scale e,   q(z) = N(u; loc, scale) / |det T'(u)|.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from numpyro import distributions as dist

from vi_params.batches.batch import row_scale
from vi_params.params import Latent
from vi_params.params.declare import bijector, is_unbounded
from vi_params.sites import Site, plate_axes
from vi_params.target import EMPTY, Target

Standardised = Callable[[Any, Any, Any], Mapping[str, Any]]
"""`(params, noise, data) -> name -> (loc, scale, e)`, in the latent's unconstrained shape."""


def sites_of_normals(
    target: Target, standardised: Standardised
) -> Callable[..., dict[str, Site]] | None:
    """`Guide.sites` of independent normals; None where a support follows another latent, which no
    distribution of its own can tell.

    Args:
        target: whose latents they are.
        standardised: their moments and noise at the rows of the data.
    """
    if any(latent.is_dynamic for latent in target.latents.values()):
        return None

    def sites(
        params: Any, noise: Any, data: Any = None, given: Mapping[str, Any] = EMPTY
    ) -> dict[str, Site]:
        found = {}
        for name, (loc, scale, e) in standardised(params, noise, data).items():
            latent = target.latents[name]
            q = _image(latent, name, dist.Normal(loc, scale))
            if name in given:
                z, middle = given[name], []
            else:
                z, middle = _draw(q, loc + scale * e)
            log_q = jnp.asarray(q.log_prob(z, middle) if middle else q.log_prob(z))
            axes = plate_axes(latent.plates, jnp.ndim(log_q))
            weight = row_scale(latent.plates, jnp.shape(z), target.plates)
            found[name] = Site(z, log_q, q, axes, weight)
        return found

    return sites


def _image(latent: Latent, name: str, normal: dist.Normal) -> dist.Distribution:
    """The distribution of a latent whose unconstrained coordinates are normal."""
    if is_unbounded(latent.support):
        return normal.to_event(latent.support.event_dim)
    return dist.TransformedDistribution(normal, bijector(latent.support, name))


def _draw(q: dist.Distribution, u: Any) -> tuple[Any, list]:
    """The image of u, with what its density needs to be found without an inverse."""
    if not isinstance(q, dist.TransformedDistribution):
        return u, []
    (bijection,) = q.transforms
    z, middle = bijection.call_with_intermediates(u)
    return z, [[u, middle]]
