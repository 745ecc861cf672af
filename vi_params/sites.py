"""Densities by their sites: what estimators use that look inside a target or a guide.

A log density is a sum over sites, and a site's share a sum over the rows of the plates it is in:

    log p(x, z) = sum_sites scale * sum_rows log_prob.

Kept apart, the shares tell which of them a latent can change at all, and row by row.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from numpyro import distributions as dist


class Site(NamedTuple):
    """One random choice of a program, or one factor of its density.

    Attributes:
        value: what was drawn or observed.
        log_prob: its log density under `distribution`, not summed over the batch shape, not scaled.
        distribution: the numpyro distribution; None for a part of a plain density.
        plates: plate -> the negative axis of `log_prob` that indexes it.
        scale: what the log density is multiplied by, a number or an array.
        is_observed: whether the value is data.
    """

    value: Any
    log_prob: jax.Array
    distribution: Any
    plates: Mapping[str, int]
    scale: Any = 1.0
    is_observed: bool = False

    @property
    def has_gradient(self) -> bool:
        """Whether a draw carries the gradient of the distribution's parameters."""
        return self.distribution.has_rsample


class Term(NamedTuple):
    """A share of a bound before it is summed.

    Attributes:
        value: the share, scaled, with the sign it has in the bound.
        plates: plate -> the negative axis of `value` that indexes it.
    """

    value: jax.Array
    plates: Mapping[str, int]


def is_point_mass(distribution: Any) -> bool:
    """Whether a distribution is a point mass, wrapped or not."""
    while (base := getattr(distribution, "base_dist", None)) is not None:
        distribution = base
    return isinstance(distribution, dist.Delta)


def plate_axes(plates: Sequence[str | None], rank: int) -> dict[str, int]:
    """Plate -> negative axis of a log density of that rank, from the plates of its value's leading
    axes; without those that lie in the value's event."""
    return {
        plate: axis - rank for axis, plate in enumerate(plates) if plate is not None and axis < rank
    }


def plates_in_order(plates: Mapping[str, int]) -> list[str]:
    """The names of plates by their axes, from left to right."""
    return sorted(plates, key=lambda name: plates[name])


def sum_onto(value: jax.Array, plates: Mapping[str, int], names: Sequence[str]) -> jax.Array:
    """`value` with exactly the axes of the plates `names`, in that order, everything else summed;
    axes of length one stand for plates that it is not in."""
    rank = jnp.ndim(value)
    axes = {name: rank + axis for name, axis in plates.items() if -axis <= rank}
    kept = [name for name in names if name in axes]
    left = sorted(axes[name] for name in kept)
    value = jnp.sum(value, axis=tuple(axis for axis in range(rank) if axis not in left))
    value = jnp.transpose(value, [left.index(axes[name]) for name in kept])
    absent = tuple(i for i, name in enumerate(names) if name not in axes)
    return jnp.expand_dims(value, absent)


def spread(value: jax.Array, plates: Mapping[str, int], rank: int) -> jax.Array:
    """`value`, whose axes are `plates_in_order`, at those axes of an array of the given rank."""
    shape = [1] * rank
    for name, size in zip(plates_in_order(plates), value.shape, strict=True):
        shape[rank + plates[name]] = size
    return value.reshape(shape)
