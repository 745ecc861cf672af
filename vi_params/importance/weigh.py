"""Draws of a guide with their importance weights towards the target."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vi_params._over import divisor, over
from vi_params._tree import pick
from vi_params.guide import Guide
from vi_params.importance.psis import Smoothed, psis
from vi_params.params import constrain
from vi_params.target import Target

BLOCK = 2**24
"""About how many numbers an array may hold while draws are weighted side by side."""


class Weighted(NamedTuple):
    """Draws of a guide, and how they count as draws of the posterior.

    Attributes:
        latents: name -> array with leading axis the draws.
        position: what the draws were made at, as in `Draw`.
        log_ratios: log p(x, z) - log q(z), shape (num_draws,).
        smoothed: their Pareto-smoothed weights.
    """

    latents: Any
    position: Any
    log_ratios: Any
    smoothed: Smoothed


def weigh(
    target: Target,
    guide: Guide,
    params: Any,
    noise: Any,
    data: Any,
    batch_size: int | None = None,
    *,
    nan_is_outside: bool = False,
) -> Weighted:
    """The draws of a guide at `noise`, weighted.

    Args:
        target: what they are weighted towards.
        guide: what draws.
        params: the joint parameters, unconstrained.
        noise: of all draws.
        data: the data.
        batch_size: how many draws are evaluated at once; all where None.
        nan_is_outside: whether a draw whose ratio is not a number counts as outside the support,
            with weight zero, instead of making all weights NaN.
    """
    latents, position, log_ratios = compared(
        target, guide, params, noise, data, batch_size, nan_is_outside=nan_is_outside
    )
    return Weighted(latents, position, log_ratios, psis(log_ratios))


def compared(
    target: Target,
    guide: Guide,
    params: Any,
    noise: Any,
    data: Any,
    batch_size: int | None = None,
    *,
    nan_is_outside: bool = False,
) -> tuple[Any, Any, jax.Array]:
    """The latents and positions of draws, and their log ratios; as `weigh` takes its arguments."""
    values = constrain(target.declared, pick(params, target.declared))

    def one(noise: Any) -> Any:
        draw = guide.transform(params, noise, data)
        log_ratio = target.log_density(values, draw.latents, data) - draw.log_prob
        return draw.latents, draw.position, log_ratio

    latents, position, log_ratios = over(one, noise, batch_size)
    if nan_is_outside:
        log_ratios = jnp.where(jnp.isnan(log_ratios), -jnp.inf, log_ratios)
    return latents, position, log_ratios


def at_once(num_draws: int, target: Target, data: Any) -> int:
    """How many draws are weighted side by side, in equal blocks that fit into the memory."""
    sizes = [math.prod(latent.shape) for latent in target.latents.values()]
    size = sum(sizes) + sum(leaf.size for leaf in jax.tree.leaves(data))
    return divisor(num_draws, BLOCK // max(size, 1))


def pick_draws(key: jax.Array, log_weights: jax.Array, num_draws: int) -> jax.Array:
    """The indices of `num_draws` draws, each as often as its weight says, to the nearest whole
    number: systematic resampling (Kitagawa, 1996), in random order."""
    place, order = jax.random.split(key)
    edges = jnp.cumsum(jnp.exp(log_weights))
    levels = (jnp.arange(num_draws) + jax.random.uniform(place)) / num_draws
    chosen = jnp.searchsorted(edges, levels * edges[-1])
    shuffled = jnp.argsort(jax.random.bits(order, (num_draws,)))
    return jnp.minimum(chosen, len(log_weights) - 1)[shuffled]
