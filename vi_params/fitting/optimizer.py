"""The optimiser for those who do not want to choose one."""

import optax
import optax.contrib


def default_optimizer() -> optax.GradientTransformationExtraArgs:
    """Adam at rate 0.1, halved whenever the loss has not fallen for 300 to 400 steps.

    The second moments are remembered for a hundred steps (b2 = 0.99) instead of a thousand: the
    gradients at a far start can be 10^6 times those near the optimum, and Adam's usual memory keeps
    its steps tiny for ten thousand steps after.

    A rate that is halved where the fit stands still is the scheme of RAABBVI (Welandawe, Andersen,
    Vehtari and Huggins, 2022, Robust, automated, and accurate black-box variational inference),
    with a plateau of the loss in place of its tests of stationarity.

    It was chosen by `benchmarks/optimizers.py`, against Adam with a cosine schedule and the
    optimisers of `optax.contrib` that need no tuning. Wrapped in `vi.averaged` it is as good after
    fewer steps.

    Returns:
        An optax transformation with extra arguments; it reads `value`.

    Example:
        >>> target = vi.target(lambda v, z, d: -0.5 * jnp.sum(z["z"] ** 2), {"z": vi.Latent((2,))})
        >>> objective = vi.elbo(target, vi.guides.mean_field(target))
        >>> optimizer = vi.averaged(vi.default_optimizer())
        >>> fit = vi.fit(
        ...     objective, optimizer, key=jax.random.key(0), num_steps=1000, progress=False
        ... )
    """
    return optax.chain(
        optax.adam(0.1, b2=0.99),
        optax.contrib.reduce_on_plateau(
            factor=0.5, patience=3, accumulation_size=100, rtol=0.0, atol=1e-6, min_scale=1e-3
        ),
    )
