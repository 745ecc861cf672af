"""Draws from a trained guide."""

from collections.abc import Callable
from typing import Any

import jax

from vi_params._cache import program
from vi_params._check import require_count, require_key
from vi_params._over import over
from vi_params._tree import pick
from vi_params.guide import Guide
from vi_params.matching import given_data, matched
from vi_params.params import constrain
from vi_params.target import Target


def draws(
    target: Target,
    guide: Guide,
    params: Any,
    key: jax.Array,
    num_draws: int,
    data: Any = None,
    *,
    batch_size: int | None = None,
) -> dict[str, jax.Array]:
    """Draws of the latents, with the quantities that the model computes from them.

    Args:
        target: what was approximated.
        guide: by what.
        params: unconstrained parameters, `fit.params`.
        key: a typed random key.
        num_draws: how many.
        data: the data of the model's deterministic sites; the target's own where None. Subsampled
            plates have all their rows, unless a `vi.Batch` names some.
        batch_size: how many draws are made at once; all where None.

    Returns:
        name -> array with leading axis `num_draws`: the constrained latents, then the target's
        deterministic sites.

    Raises:
        ValueError: num_draws < 1.
        TypeError: `key` is not a typed key.

    Example:
        >>> target = vi.target(lambda v, z, d: -0.5 * jnp.sum(z["z"] ** 2), {"z": vi.Latent((2,))})
        >>> guide = vi.guides.mean_field(target)
        >>> params = vi.init_params(guide.declared, jax.random.key(0))
        >>> vi.draws(target, guide, params, jax.random.key(1), 5)["z"].shape
        (5, 2)
    """
    require_key(key, "draws")
    require_count(num_draws, "num_draws", "draws")
    if batch_size is not None:
        require_count(batch_size, "batch_size", "draws")
    data = given_data(target, guide, data, "draws")
    return program(_draws, target, guide, num_draws, batch_size)(params, key, data)


def _draws(target: Target, guide: Guide, num_draws: int, batch_size: int | None) -> Callable:
    guide = matched(target, guide)

    @jax.jit
    def compiled(params: Any, key: jax.Array, data: Any) -> dict[str, jax.Array]:
        values = constrain(target.declared, pick(params, target.declared))

        def one(noise: Any) -> dict[str, jax.Array]:
            latents = guide.transform(params, noise, data).latents
            return {**latents, **target.deterministic(values, latents, data)}

        return over(one, guide.noise(key, num_draws), batch_size)

    return compiled
