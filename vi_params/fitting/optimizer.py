"""The optimiser for those who do not want to choose one."""

import functools

import optax
import optax.contrib


@functools.cache
def default_optimizer() -> optax.GradientTransformationExtraArgs:
    """Adam whose rate is halved whenever the loss has not fallen for a while."""
    return optax.chain(
        optax.adam(0.05),
        optax.contrib.reduce_on_plateau(
            factor=0.5, patience=3, accumulation_size=100, rtol=0.0, atol=1e-6, min_scale=1e-3
        ),
    )
