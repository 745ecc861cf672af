"""A point estimate as a guide."""

from typing import Any

import jax
import jax.numpy as jnp

from vi_params.guide import Draw, Guide, pick_own, sampler
from vi_params.guides.starts import model_values, require_whole_plates, start_vector
from vi_params.noise import Noise
from vi_params.params import Param
from vi_params.target import Target, flat


def delta(target: Target, *, init: Any = None, name: str = "guide") -> Guide:
    """All mass at one point: the maximum a posteriori (MAP) estimate of the latents.

    log q is taken as 0 at the point, so that the ELBO is the log density itself and its maximum the
    mode in the *constrained* space (no Jacobian), as for NumPyro's AutoDelta.

    Args:
        target: what to maximise.
        init: where the point starts, as in `mean_field`.
        name: the name of the family's parameters, `{"loc": (dim,)}`, unconstrained.

    Returns:
        A `Guide`.

    Example:
        >>> target = vi.target(lambda v, z, d: -jnp.sum((z["z"] - 3) ** 2), {"z": vi.Latent((1,))})
        >>> guide = vi.guides.delta(target, init={"z": jnp.zeros(1)})
        >>> params = vi.init_params(guide.declared, jax.random.key(0))
        >>> guide.sample(params, jax.random.key(1)).latents
        {'z': Array([0.], dtype=float32)}
    """
    require_whole_plates(target, "vi.guides.delta")
    flat_target = flat(target)
    declared = {name: {"loc": Param(start_vector(target, init))}}

    def noise(key: jax.Array, num_particles: int, scheme: Noise | None = None) -> jax.Array:
        return jnp.zeros((num_particles, 0))

    def transform(params: Any, e: jax.Array, data: Any = None) -> Draw:
        u = pick_own(params, declared)[name]["loc"]
        latents = flat_target.constrain(u, model_values(target, params), data)
        return Draw(latents, jnp.zeros(()), u)

    return Guide(
        declared=declared,
        sample=sampler(noise, transform),
        log_prob=lambda params, latents, data=None: jnp.zeros(()),
        rescore=lambda params, draw, data=None: jnp.zeros(()),
        noise=noise,
        transform=transform,
        entropy=lambda params, draw, data=None: jnp.zeros(()),
        is_point=True,
    )
