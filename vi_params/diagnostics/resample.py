"""Draws of a guide turned into draws of the posterior by importance resampling."""

from collections.abc import Callable
from typing import Any

import jax

from vi_params._cache import program
from vi_params._check import require_count, require_key
from vi_params._compile import precise
from vi_params._over import over
from vi_params._tree import pick
from vi_params.guide import Guide
from vi_params.importance.weigh import pick_draws, weigh
from vi_params.matching import given_data, matched
from vi_params.params import constrain
from vi_params.target import Target


def resample(
    target: Target,
    guide: Guide,
    params: Any,
    key: jax.Array,
    num_draws: int,
    data: Any = None,
    *,
    num_proposals: int | None = None,
    batch_size: int | None = None,
) -> dict[str, jax.Array]:
    """Draws of a guide, resampled by Pareto-smoothed importance weights.

    Proposals are drawn from the guide, weighted, and taken as often as their weights say
    (systematic resampling). It helps where k-hat is below 0.7; above, the weights themselves
    cannot be relied on: see `vi.diagnose`.

    Args:
        target: what was approximated.
        guide: by what.
        params: unconstrained parameters, `fit.params`.
        key: a typed random key.
        num_draws: how many draws to return.
        data: the data; the target's own where None.
        num_proposals: how many draws of the guide to choose from, at least 25; by default four
            times `num_draws` and at least 4000. With fewer a draw is repeated more often.
        batch_size: how many proposals are evaluated at once; all where None.

    Returns:
        name -> array with leading axis `num_draws`: the constrained latents, then the target's
        deterministic sites.

    Raises:
        ValueError: num_draws < 1, num_proposals < 25.
        TypeError: `key` is not a typed key.

    Example:
        >>> target = vi.target(lambda v, z, d: -0.5 * jnp.sum(z["z"] ** 2), {"z": vi.Latent((2,))})
        >>> guide = vi.guides.mean_field(target, init={"z": jnp.full(2, 0.3)}, init_scale=1.2)
        >>> params = vi.init_params(guide.declared, jax.random.key(0))
        >>> draws = vi.resample(target, guide, params, jax.random.key(1), 2000)
        >>> bool(jnp.all(jnp.abs(draws["z"].mean(0)) < 0.1))
        True
    """
    require_key(key, "resample")
    require_count(num_draws, "num_draws", "resample")
    if num_proposals is None:
        num_proposals = max(4 * num_draws, 4000)
    require_count(num_proposals, "num_proposals", "resample", least=25)
    if batch_size is not None:
        require_count(batch_size, "batch_size", "resample")
    data = given_data(target, guide, data, "resample")
    sizes = num_draws, num_proposals, batch_size
    return program(_resample, target, guide, *sizes)(params, key, data)


def _resample(
    target: Target, guide: Guide, num_draws: int, num_proposals: int, batch_size: int | None
) -> Callable:
    guide = matched(target, guide)

    @jax.jit
    @precise
    def compiled(params: Any, key: jax.Array, data: Any) -> dict[str, jax.Array]:
        propose, choose = jax.random.split(key)
        noise = guide.noise(propose, num_proposals)
        weighted = weigh(target, guide, params, noise, data, batch_size)
        chosen = pick_draws(choose, weighted.smoothed.log_weights, num_draws)
        values = constrain(target.declared, pick(params, target.declared))

        def one(index: jax.Array) -> dict[str, jax.Array]:
            latents = jax.tree.map(lambda leaf: leaf[index], weighted.latents)
            return {**latents, **target.deterministic(values, latents, data)}

        return over(one, chosen, batch_size)

    return compiled
