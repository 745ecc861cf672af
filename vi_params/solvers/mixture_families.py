"""Mixtures that population Monte Carlo fits: where they begin, in which coordinates they are free.

A guard of fixed weight, wider than the weighted draws, reaches tails that the other components have
not found yet (a defensive mixture: Hesterberg, 1995, Weighted average importance sampling and
defensive mixture distributions).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vi_params._check import explain, require_count
from vi_params._tree import all_finite, where_tree
from vi_params.guide import Guide
from vi_params.guides import active_mixture, mixture
from vi_params.guides.active_mixture import Across, Parts
from vi_params.guides.contaminated import SCALES, WEIGHTS
from vi_params.guides.frame import Frame, frame_of
from vi_params.guides.location_scale import require_gaussian
from vi_params.guides.mixture import Components, log_terms
from vi_params.importance import Smoothed
from vi_params.params import unconstrain
from vi_params.solvers.conditional_frame import conditional_frame
from vi_params.solvers.solution import Slopes, own_name
from vi_params.solvers.weighted_em import moments, prior_draws
from vi_params.target import Target

SPREAD = 0.8
"""The first scales of the components, in scales of the approximation they start from."""

GUARD, WIDE = 0.1, 3.0
"""The weight of the guard, and its scales in standard deviations of the weighted draws, where it
is wider (across the active directions it is not widened)."""


class Mixture(NamedTuple):
    """A mixture as the rounds see it.

    Attributes:
        parts: its components.
        frame: the coordinates they are in; None where these are the unconstrained ones.
    """

    parts: Parts
    frame: Frame | None

    def coordinates(self, u: Any, xp: Any = jnp) -> Any:
        """Those of rows u, shape (n, dim)."""
        return u if self.frame is None else self.frame.coordinates(u, xp)

    @property
    def values(self) -> dict[str, Any]:
        """The constrained parameters of `vi.guides.mixture` or, in a frame, `active_mixture`."""
        along, across = (part._asdict() for part in self.parts)
        if self.frame is None:
            return along
        return {"along": along, "across": across, "frame": self.frame.values}


class Family(NamedTuple):
    """What the rounds ask of a family of mixtures.

    Attributes:
        guide: the mixture, its guard included.
        begin: `(constrained parameters of the start, draws, slopes, xp) -> Mixture` of a component
            about each of these draws, no guard yet. `Slopes` are what a frame comes from.
        params: `Mixture -> params`, the guide's own.
    """

    guide: Guide
    begin: Callable[..., Mixture]
    params: Callable[[Mixture], Any]


def family(
    target: Target, start: Guide, num_components: int, df: int, num_active: int | None, where: str
) -> Family:
    """Mixtures free in all unconstrained coordinates, or along a few directions."""
    name = own_name(start, where)
    if num_active is None:
        guide = mixture(target, num_components + 1, df=df, name=name)
    else:
        guide = active_mixture(
            target,
            num_components + 1,
            num_active,
            df=df,
            num_nodes=num_nodes_of(start.declared[name]),
            name=name,
        )

    def begin(own: Any, chosen: Any, slopes: Slopes | None, xp: Any = jnp) -> Mixture:
        if num_active is None:
            return everywhere(own, chosen, df, where, xp)
        return along_few(own, chosen, slopes, num_active, where, xp)

    def params(found: Mixture) -> Any:
        return unconstrain(guide.declared, {name: found.values})

    return Family(guide, begin, params)


def num_nodes_of(own: Any) -> int | None:
    """How many nodes the splines of a guide have, from its parameters as declared; None without."""
    frame = own.get("frame", {})
    return len(frame["coupled"]["nodes"].init) if "coupled" in frame else None


def everywhere(own: Any, chosen: Any, df: int, where: str, xp: Any) -> Mixture:
    """Components about some draws of a Gaussian, or of a mixture, of its scales."""
    if set(own) == set(Components._fields):  # each has the scale of the part it came from
        before = Components(**own)
        scale_trils = before.scale_trils[xp.argmax(log_terms(before, chosen, df, xp), axis=0)]
    else:
        scale_tril = require_gaussian(own, where)[1]
        scale_trils = xp.tile(scale_tril, (len(chosen), 1, 1))
    nothing = xp.zeros((len(chosen), 0), chosen.dtype)
    along = Components(_equal(chosen, xp), chosen, SPREAD * scale_trils)
    return Mixture(Parts(along, Across(nothing, nothing)), None)


def along_few(own: Any, chosen: Any, slopes: Any, num_active: int, where: str, xp: Any) -> Mixture:
    """Components about some draws, along the directions in which a target differs most from a
    Gaussian and in the frame of its conditional Gaussian, or in that of an `active_mixture`."""
    if "frame" in own:
        frame = frame_of(own["frame"])
        require_directions(frame, num_active, where)
    else:
        loc, scale_tril = require_gaussian(own, f"{where}, with num_active")
        frame = conditional_frame(loc, scale_tril, slopes, num_active, xp)
    dim, dtype = frame.loc.size, frame.loc.dtype
    locs = frame.coordinates(chosen, xp)[:, :num_active]
    scale_trils = SPREAD * xp.tile(xp.eye(num_active, dtype=dtype), (len(chosen), 1, 1))
    blank = xp.zeros((len(chosen), dim - num_active), dtype)
    along = Components(_equal(chosen, xp), locs, scale_trils)
    return Mixture(Parts(along, Across(blank, xp.ones_like(blank))), frame)


def contaminated(frame: Frame, xp: Any = jnp) -> Mixture:
    """The frame's Gaussian along and across its directions, with wider parts along them."""
    num_active, dtype, number = frame.num_active, frame.loc.dtype, len(SCALES)
    scales = xp.asarray(SCALES, dtype)
    components = Components(
        xp.asarray(WEIGHTS, dtype),
        xp.zeros((number, num_active), dtype),
        scales[:, None, None] * xp.eye(num_active, dtype=dtype),
    )
    across = xp.zeros((number, len(frame.loc) - num_active), dtype)
    return Mixture(Parts(components, Across(across, xp.ones_like(across))), frame)


def require_room(num_active: int, dim: int, where: str) -> None:
    """Raises unless directions leave something across them."""
    require_count(num_active, "num_active", where)
    if num_active >= dim:
        raise ValueError(
            explain(
                "Nothing is left across the directions.",
                expected=f"fewer directions than dimensions, of which there are {dim}",
                received=f"num_active={num_active}",
                where=where,
            )
        )


def require_directions(frame: Frame, num_active: int, where: str) -> None:
    """Raises where a frame has another number of directions."""
    if frame.num_active != num_active:
        raise ValueError(
            explain(
                "The solution to begin with has directions of its own.",
                expected=f"num_active={frame.num_active}, as it has",
                received=f"num_active={num_active}",
                where=where,
            )
        )


def with_guard(found: Mixture, y: Any, smoothed: Smoothed, xp: Any = jnp) -> Mixture:
    """The components with the guard behind them, from weighted draws at coordinates y."""
    weights = xp.exp(smoothed.log_weights)
    along, across = found.parts
    num_active = along.locs.shape[1]
    centre, root = moments(y[:, :num_active], weights, xp)
    mean = weights @ y[:, num_active:]
    known = smoothed.ess / (smoothed.ess + prior_draws(across.locs.shape[1]))
    variance = known * (weights @ (y[:, num_active:] - mean) ** 2) + (1 - known)
    guard = centre, WIDE * root, mean, xp.sqrt(variance)
    instead = along.locs[0], WIDE * along.scale_trils[0], across.locs[0], across.scales[0]
    centre, root, mean, scale = where_tree(all_finite(guard, xp=xp), guard, instead, xp)
    along = Components(
        xp.append((1 - GUARD) * along.weights, GUARD),
        xp.concatenate([along.locs, centre[None]]),
        xp.concatenate([along.scale_trils, root[None]]),
    )
    across = Across(
        xp.concatenate([across.locs, mean[None]]), xp.concatenate([across.scales, scale[None]])
    )
    return found._replace(parts=Parts(along, across))


def without_guard(found: Mixture, xp: Any = jnp) -> Mixture:
    """The components alone."""
    along, across = jax.tree.map(lambda leaf: leaf[:-1], found.parts)
    weights = along.weights / xp.sum(along.weights)
    return found._replace(parts=Parts(along._replace(weights=weights), across))


def _equal(chosen: Any, xp: Any) -> Any:
    return xp.full(len(chosen), 1 / len(chosen), chosen.dtype)
