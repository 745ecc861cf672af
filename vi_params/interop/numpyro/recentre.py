"""Partially centred coordinates of hierarchies, their centring a parameter.

A latent x ~ loc + scale * p whose scale other latents set has a neck where the scale is small: no
Gaussian in (x, scale) follows it. In the coordinates v of

    x = loc + scale^(1 - c) * (v - c * loc)

it is centred at c = 1 (v = x), non-centred at c = 0, and in between for latents of which the data
say something, but not all. Papaspiliopoulos, Roberts and Skold (2007), A general framework for the
parametrization of hierarchical models, Statistical Science 22(1); in this form, with c learnt:
Gorinova, Moore and Hoffman (2020), Automatic reparameterisation of probabilistic programs, ICML,
section 4.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import distributions as dist
from numpyro import handlers
from numpyro.distributions import constraints

from vi_params._check import Failure, explain
from vi_params._tree import pick
from vi_params.interop.numpyro.call import Call
from vi_params.interop.numpyro.coordinates import At, coordinates, support_map
from vi_params.interop.numpyro.dependence import depends
from vi_params.interop.numpyro.discover import Found, trace
from vi_params.params import Latent, Param, constrain
from vi_params.params.maps import abstract_params
from vi_params.target import CENTRING, Target

UNRESOLVED = 100
"""A scale of fewer roundings of the latent than this resolves nothing of it."""

FAMILIES = (
    dist.Normal,
    dist.StudentT,
    dist.Cauchy,
    dist.Laplace,
    dist.Logistic,
    dist.LogNormal,
)
"""Distributions of a location and a scale, over the real line or, of LogNormal, its exponential."""


def recentred(target: Target, at: At, call: Call, found: Found) -> Target | None:
    """The target in partially centred coordinates; None where no latent's scale is another's.

    Args:
        target: the target in the coordinates of its supports.
        at: the program at some data.
        call: how it is called.
        found: its sites.
    """
    names = _with_latent_scales(target, at)
    if not names or CENTRING in {*target.declared, *target.latents}:
        return None
    centring = {
        name: Param(np.full(target.latents[name].shape, 0.5), constraint=constraints.unit_interval)
        for name in names
    }

    def bijector(site: Mapping[str, Any], values: Any) -> Any:
        inner = support_map(site, values)
        prior = _location_scale(site) if site["name"] in names else None
        if prior is None:
            return inner
        loc, scale = prior
        if CENTRING not in values:
            raise Failure(
                explain(
                    "These coordinates need their centring.",
                    expected=f"values with {CENTRING!r}: name -> array, of {names}",
                    received=f"values {sorted(values)}",
                    where="a target of vi.recentred",
                    hint="vi.constrain(target.declared, params) gives them",
                )
            )
        c = values[CENTRING][site["name"]]
        return _Partial(loc, scale, c, inner)

    initial = {CENTRING: {name: param.init for name, param in centring.items()}}
    maps = coordinates(
        at, call, found, bijector, lambda values: pick(values, target.declared), initial
    )
    latents = {
        name: _following(latent) if name in names else latent
        for name, latent in target.latents.items()
    }
    return target._replace(
        latents=latents,
        declared={**target.declared, CENTRING: centring},
        constrain=maps.constrain,
        unconstrain=maps.unconstrain,
        start=maps.start,
        log_density=_without_centring(target.log_density),
        deterministic=_without_centring(target.deterministic),
        terms=_without_centring(target.terms),
        sites=target.sites and _without_centring(target.sites),
        simulate=None,
        recentre=None,
        is_recentred=True,
    )


@dataclasses.dataclass(frozen=True)
class _Partial:
    """The map from a coordinate v to the latent, as numpyro's transforms have theirs.

    Where rounding leaves nothing of x - loc in units of the scale, the density of x says nothing of
    v any more: there the map has no volume (log |det| is -inf), as outside of a support.
    """

    loc: Any
    scale: Any
    centring: Any
    inner: Any

    def __call__(self, v: jax.Array) -> jax.Array:
        return self.inner(self._moved(v))

    def inv(self, x: jax.Array) -> jax.Array:
        away = self.inner.inv(x) - self.loc
        return self.centring * self.loc + away / self._spread

    def log_abs_det_jacobian(self, v: jax.Array, x: jax.Array) -> jax.Array:
        moved = self._moved(v)
        rounding = UNRESOLVED * jnp.finfo(moved.dtype).eps * jnp.abs(moved)
        log_det = jnp.where(self.scale > rounding, jnp.log(self._spread), -jnp.inf)
        return jnp.sum(log_det) + jnp.sum(self.inner.log_abs_det_jacobian(moved, x))

    @property
    def _spread(self) -> jax.Array:
        return self.scale ** (1 - self.centring)

    def _moved(self, v: jax.Array) -> jax.Array:
        return self.loc + self._spread * (v - self.centring * self.loc)


def _without_centring(f: Any) -> Any:
    """`f(values, latents, data)` for values that hold a centring beside the model's own."""

    def plain(values: Any, latents: Any, data: Any) -> Any:
        return f({n: x for n, x in values.items() if n != CENTRING}, latents, data)

    return plain


def _with_latent_scales(target: Target, at: At) -> list[str]:
    """The latents of location-scale families whose scale depends on other latents."""

    def scales(latents: Any, values: Any, data: Any) -> dict[str, jax.Array]:
        program, args, kwargs = at(data)
        sites = trace(handlers.substitute(program, data={**values, **latents}), args, kwargs)
        pairs = {name: _location_scale(sites[name]) for name in target.latents}
        return {name: pair[1] for name, pair in pairs.items() if pair is not None}

    abstract = {
        name: jax.ShapeDtypeStruct(latent.shape, latent.dtype)
        for name, latent in target.latents.items()
    }
    values = jax.eval_shape(
        lambda params: constrain(target.declared, params), abstract_params(target.declared)
    )
    moved = depends(scales, abstract, values, target.data)
    return [name for name, is_moved in moved.items() if is_moved]


def _location_scale(site: Mapping[str, Any]) -> tuple[Any, Any] | None:
    """The location and scale of a site's prior; None where it has none. (The steps of a scan, which
    are one array outside of it, are left alone.)"""
    fn: Any = site["fn"]
    while isinstance(fn, (dist.Independent, dist.ExpandedDistribution)):
        fn = fn.base_dist
    if not isinstance(fn, FAMILIES) or site.get("_control_flow_done", False):
        return None
    return fn.loc, fn.scale


def _following(latent: Latent) -> Latent:
    """The latent, its coordinates following the model."""
    support = constraints.dependent(is_discrete=False, event_dim=latent.support.event_dim)
    return dataclasses.replace(latent, support=support)
