"""Log weights row by row: for targets whose every latent belongs to a row of one plate.

The density is then a product over rows given the parameters, log p = sum_i log p(x_i, z_i), and so
is the guide's: K joint draws are K draws for every row, and rows may be weighed apart.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from vi_params._check import explain, require_names
from vi_params._tree import abstract_key
from vi_params.objectives.pair import (
    Pair,
    Route,
    Scored,
    at_fixed_draws,
    model_values,
    over_draws,
    path,
    total,
)
from vi_params.params.maps import abstract_params
from vi_params.sites import Site, sum_onto


def by_rows(fitted: Pair, plate: str, where: str) -> Pair:
    """The pair with weights of its own for every row of a plate.

    Raises:
        KeyError: the target has no such plate.
        ValueError: target or guide is not known site by site, or has a site outside the plate.
    """
    target, guide = fitted.target, fitted.guide
    if target.sites is None or guide.sites is None:
        whole = "the target" if target.sites is None else "the guide"
        raise ValueError(
            explain(
                "Rows can only be weighed apart where densities are known site by site.",
                expected="a NumPyro model, and a guide by vi.guide or vi.numpyro_guide",
                received=f"{whole} is one density over all rows",
                where=f"{where}, plate={plate!r}",
            )
        )
    require_names([plate], list(target.plates), what="plates", where=where, complete=False)
    params = abstract_params(fitted.declared)
    noise = jax.eval_shape(lambda key: _first(fitted.noise(key)), abstract_key())
    outside: list[str] = []

    def look(params: Any, noise: Any, data: Any) -> None:
        drawn, seen = _sites(fitted, total, params, noise, data)
        for name, site in seen.items():
            if plate not in (site.plates or {}):
                outside.append(name)
        for name, site in drawn.items():
            if name not in seen or (site.plates is not None and plate not in site.plates):
                outside.append(f"{name} (guide)")

    jax.eval_shape(look, params, noise, fitted.data)
    if outside:
        raise ValueError(
            explain(
                "Rows that share something cannot be weighed apart.",
                expected=f"every sample site of model and guide inside plate {plate!r}",
                received=f"outside it: {outside}",
                where=where,
                hint="make what is shared a parameter (numpyro.param), or leave plate= out",
            )
        )
    return fitted._replace(plate=plate)


def scored_rows(fitted: Pair, route: Route, params: Any, noise: Any, data: Any) -> Scored:
    """All draws scored along a route, shape `(num_particles * rows, num_importance)`."""

    def one(noise: Any) -> Scored:
        return _score(fitted, route, params, noise, data)

    def apart(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(x, 1, 2).reshape(-1, x.shape[1])

    return jax.tree.map(apart, over_draws(one, noise, fitted.batch_size))


def _score(fitted: Pair, route: Route, params: Any, noise: Any, data: Any) -> Scored:
    """One draw's scores, shape `(rows,)`: a batch's rows are not yet multiplied by N / B."""
    plate, size = fitted.plate, fitted.target.plates[fitted.plate or ""]
    assert plate is not None
    drawn, seen = _sites(fitted, route, params, noise, data)

    def sum_rows(sites: Mapping[str, Site]) -> jax.Array:
        each = []
        for name, site in sites.items():
            if site.plates is None:  # counted once; axes from the left are those of the latent
                left = jnp.ndim(seen[name].log_prob) + (seen[name].plates or {})[plate]
                plates = {plate: left - jnp.ndim(site.log_prob)}
                each.append(sum_onto(site.log_prob, plates, [plate]))
            else:
                rows = sum_onto(site.scale * site.log_prob, site.plates, [plate])
                each.append(rows * (rows.shape[0] / size))
        return sum(each, start=jnp.zeros(()))

    return Scored(sum_rows(seen), sum_rows(drawn))


def _sites(
    fitted: Pair, route: Route, params: Any, noise: Any, data: Any
) -> tuple[Mapping[str, Site], Mapping[str, Site]]:
    """The sites of guide and target at one draw, differentiable along the route."""
    guide, target = fitted.guide, fitted.target
    assert guide.sites is not None
    assert target.sites is not None
    drawn = guide.sites(params, noise, data)
    latents = {name: site.value for name, site in drawn.items()}
    if route is not total:
        params = stop_gradient(params) if route is path else params
        latents = stop_gradient(latents) if route is at_fixed_draws else latents
        drawn = guide.sites(params, noise, data, latents)
    shown = {name: latents[name] for name in latents if name in target.latents}
    return drawn, target.sites(model_values(fitted, params), shown, data)


def _first(noise: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[0, 0], noise)
