"""How heavy the tails of single latents are, for moments estimated by weighted draws."""

import jax
import jax.numpy as jnp

from vi_params._over import divisor, over
from vi_params.importance.psis import psis
from vi_params.importance.weigh import BLOCK, Weighted


def second_moment_k_hats(weighted: Weighted) -> dict[str, jax.Array]:
    """Pareto k-hats of w (x - mean)^2 for every number x of the latents, by name.

    What k-hat of the weights w says of estimates of bounded functions, this says of the variance of
    x: from 1 on there is no finite expectation to be estimated. Vehtari, Simpson, Gelman, Yao and
    Gabry (2024), Pareto smoothed importance sampling, JMLR 25(72), section 3.

    Args:
        weighted: draws of a guide, at least 25.
    """
    log_weights = weighted.smoothed.log_weights
    weights = jnp.exp(log_weights)
    num_draws = len(weights)

    def one(x: jax.Array) -> jax.Array:
        x = jnp.where(weights > 0, x, 0.0)
        away = jnp.where(weights > 0, jnp.abs(x - weights @ x), 1.0)
        return psis(log_weights + 2 * jnp.log(away)).k_hat

    def of_latent(x: jax.Array) -> jax.Array:
        rows = x.reshape(num_draws, -1).T
        if not len(rows):
            return jnp.zeros(x.shape[1:])
        return over(one, rows, divisor(len(rows), BLOCK // num_draws)).reshape(x.shape[1:])

    return {name: of_latent(x) for name, x in weighted.latents.items()}
