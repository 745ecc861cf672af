"""The unconstrained coordinates of a program's latents, followed through the program itself.

The coordinates of one latent may depend on others: on bounds of its support, on the location and
scale of its prior.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from numpyro import handlers
from numpyro.distributions import biject_to

from vi_params._check import require_names
from vi_params.batches.batch import row_scale, split
from vi_params.interop.numpyro.call import Call, blaming_shapes
from vi_params.interop.numpyro.discover import Found, trace
from vi_params.target import EMPTY

At = Callable[[Any], tuple[Callable, tuple, dict[str, Any]]]
"""`data -> (program, args, kwargs)`: the program at the rows of the data."""


class Coordinates(NamedTuple):
    """Maps of a target, as `Target` has them: `constrain`, `unconstrain`, `start`."""

    constrain: Callable[[Any, Any, Any], tuple[dict[str, jax.Array], jax.Array]]
    unconstrain: Callable[[Any, Any, Any], dict[str, jax.Array]]
    start: Callable[[Callable, jax.Array], dict[str, jax.Array]]


def support_map(site: Mapping[str, Any], values: Any) -> Any:
    """The bijector from the unconstrained numbers to the support of a site."""
    return biject_to(site["fn"].support)


def coordinates(
    at: At,
    call: Call,
    found: Found,
    bijector: Callable[[Mapping[str, Any], Any], Any] = support_map,
    own: Callable[[Any], dict[str, Any]] = dict,
    initial: Mapping[str, Any] = EMPTY,
) -> Coordinates:
    """The coordinates that a bijector of every latent's site gives.

    Args:
        at: the program at some data.
        call: how it is called.
        found: its sites.
        bijector: `(site, values) -> transform`, from the coordinates to the latent.
        own: `values -> values` of the program's own parameters among them.
        initial: the values where a start is looked for.
    """
    names = list(found.latents)

    def constrain(values: Any, u: Any, data: Any) -> tuple[dict[str, jax.Array], jax.Array]:
        def forward(site: Any) -> Any:
            if site["type"] == "sample" and site["name"] in u:
                return bijector(site, values)(u[site["name"]])
            return None

        program, args, kwargs = at(data)
        fixed = handlers.substitute(program, data=own(values))
        sites = trace(handlers.substitute(fixed, substitute_fn=forward), args, kwargs)
        latents = {name: sites[name]["value"] for name in names}
        log_dets = [
            row_scale(found.latents[name].plates, jnp.shape(u[name]), found.plates)
            * jnp.sum(bijector(sites[name], values).log_abs_det_jacobian(u[name], latents[name]))
            for name in names
        ]
        return latents, sum(log_dets, start=jnp.zeros(()))

    def unconstrain(values: Any, latents: Any, data: Any) -> dict[str, jax.Array]:
        require_names(list(latents), names, what="latents", where="unconstrain")
        program, args, kwargs = at(data)
        fixed = handlers.substitute(program, data={**own(values), **latents})
        with blaming_shapes(call, split(data)[0]):
            sites = trace(fixed, args, kwargs)
        return {name: bijector(sites[name], values).inv(latents[name]) for name in names}

    def start(strategy: Callable, key: jax.Array) -> dict[str, jax.Array]:
        program, args, kwargs = at(call.data)
        seeded = handlers.substitute(handlers.seed(program, key), substitute_fn=strategy)
        sites = trace(seeded, args, kwargs)
        return {
            name: bijector(sites[name], initial).inv(jnp.asarray(sites[name]["value"], float))
            for name in names
        }

    return Coordinates(constrain, unconstrain, start)
