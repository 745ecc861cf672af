"""Log weights row by row, along the routes of gradients, and what is in no row.

The routes are those of whole draws, with one addition: latents outside the plate, which the K draws
of a particle share, carry their gradient along all of them but `path`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from vi_params.estimators.estimator import fixed
from vi_params.objectives.pair import (
    Pair,
    Route,
    Scored,
    at_fixed_draws,
    model_values,
    over_draws,
    path,
    through_model,
    total,
)
from vi_params.sites import Site, sum_onto


class Draws(NamedTuple):
    """The randomness of the K draws of one particle.

    Attributes:
        noise: a draw's own.
        shared: the latents outside the plate, by name: the same for all K draws.
    """

    noise: Any
    shared: Any


def scored_rows(fitted: Pair, route: Route, params: Any, noise: Any, data: Any) -> Scored:
    """All rows scored along a route, shape `(num_particles * rows, num_importance)`."""
    num_importance = jax.tree.leaves(noise)[0].shape[1]

    def shared(first: Any) -> Any:
        drawn = _guide_sites(fitted, params, first, data)
        found = {name: site.value for name, site in drawn.items() if name not in fitted.local}
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (num_importance, *x.shape)), found)

    draws = Draws(noise, jax.vmap(lambda keys: shared(_first(keys)))(noise))

    def one(draws: Draws) -> Scored:
        drawn, seen = _ROUTES[route](fitted, params, draws, data)
        return Scored(_sum_rows(fitted, seen), _sum_rows(fitted, drawn))

    def apart(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(x, 1, 2).reshape(-1, x.shape[1])

    return jax.tree.map(apart, over_draws(one, draws, fitted.batch_size))


def scored_shared(fitted: Pair, params: Any, noise: Any, data: Any, *, landing: bool) -> jax.Array:
    """log p(x_0, g) - log q(g) of every particle, shape `(num_particles,)`.

    Args:
        fitted: a pair with a plate.
        params: the parameters of both.
        noise: that of all draws.
        data: the data.
        landing: whether log q's own parameters are held fixed (sticking the landing).
    """

    def one(noise: Any) -> jax.Array:
        drawn = _guide_sites(fitted, params, noise, data)
        seen = _target_sites(fitted, params, drawn, data)
        if landing:
            drawn = _guide_sites(fitted, fixed(fitted.guide, params), noise, data, _values(drawn))
        return _sum_shared(fitted, seen) - _sum_shared(fitted, drawn)

    return jax.vmap(lambda noise: one(_first(noise)))(noise)


Sites = Mapping[str, Site]


def _total(fitted: Pair, params: Any, draws: Draws, data: Any) -> tuple[Sites, Sites]:
    drawn = _guide_sites(fitted, params, draws.noise, data, draws.shared)
    return drawn, _target_sites(fitted, params, drawn, data)


def _path(fitted: Pair, params: Any, draws: Draws, data: Any) -> tuple[Sites, Sites]:
    held, shared = stop_gradient((params, draws.shared))
    drawn = _guide_sites(fitted, params, draws.noise, data, shared)
    again = _guide_sites(fitted, held, draws.noise, data, _values(drawn))
    return again, _target_sites(fitted, held, again, data)


def _at_fixed_draws(fitted: Pair, params: Any, draws: Draws, data: Any) -> tuple[Sites, Sites]:
    """Rows are held fixed; what is drawn outside the plate carries its gradient."""
    held = stop_gradient(_values(_guide_sites(fitted, params, draws.noise, data, draws.shared)))
    again = _guide_sites(fitted, params, draws.noise, data, {**held, **draws.shared})
    return again, _target_sites(fitted, params, again, data)


def _through_model(fitted: Pair, params: Any, draws: Draws, data: Any) -> tuple[Sites, Sites]:
    """Through the model's parameters and through what is drawn outside the plate."""
    held = fixed(fitted.guide, params)
    drawn = _guide_sites(fitted, held, draws.noise, data, draws.shared)
    return drawn, _target_sites(fitted, params, drawn, data)


_ROUTES: Mapping[Route, Callable[..., tuple[Sites, Sites]]] = {
    total: _total,
    path: _path,
    at_fixed_draws: _at_fixed_draws,
    through_model: _through_model,
}


def _guide_sites(
    fitted: Pair, params: Any, noise: Any, data: Any, given: Mapping[str, Any] | None = None
) -> Sites:
    assert fitted.guide.sites is not None
    return fitted.guide.sites(params, noise, data, given or {})


def _target_sites(fitted: Pair, params: Any, drawn: Sites, data: Any) -> Sites:
    assert fitted.target.sites is not None
    return fitted.target.sites(model_values(fitted, params), _values(drawn), data)


def _values(drawn: Sites) -> dict[str, Any]:
    return {name: site.value for name, site in drawn.items()}


def _sum_rows(fitted: Pair, sites: Sites) -> jax.Array:
    """What each row has, shape `(rows,)`: those of a batch are not yet multiplied by N / B."""
    plate = fitted.plate or ""
    size = fitted.target.plates[plate]
    each = [
        sum_onto(site.scale * site.log_prob, site.plates, [plate])
        for site in sites.values()
        if plate in site.plates
    ]
    return sum((x * (x.shape[0] / size) for x in each), start=jnp.zeros(()))


def _sum_shared(fitted: Pair, sites: Sites) -> jax.Array:
    """What is in no row."""
    shares = (site.scale * site.log_prob for site in sites.values())
    outside = [fitted.plate not in site.plates for site in sites.values()]
    return sum(
        (jnp.sum(share) for share, is_outside in zip(shares, outside, strict=True) if is_outside),
        start=jnp.zeros(()),
    )


def _first(noise: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[0], noise)
