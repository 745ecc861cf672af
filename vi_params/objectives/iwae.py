"""The importance-weighted bound, over whole draws or row by row."""

from vi_params.estimators import Estimator
from vi_params.guide import Guide
from vi_params.noise import Noise
from vi_params.objectives.importance import importance_weighted
from vi_params.objectives.objective import Measure, Objective
from vi_params.objectives.pair import pair
from vi_params.objectives.renyi import power_bound
from vi_params.objectives.rows import by_rows
from vi_params.target import Target


def iwae(
    target: Target,
    guide: Guide,
    *,
    num_importance: int = 10,
    num_particles: int = 1,
    plate: str | None = None,
    estimator: Estimator | None = None,
    noise: Noise | None = None,
    batch_size: int | None = None,
) -> Objective:
    """The importance-weighted lower bound of K draws as an objective.

        L_K = E log( 1/K sum_k p(x, z_k) / q(z_k) ),   ELBO = L_1 <= L_2 <= ... <= log p(x).

    A tighter bound trains a model's own parameters on less biased evidence; the guide itself need
    not improve: with `pathwise` gradients its signal-to-noise ratio falls with K (Rainforth et al.,
    2018), with `doubly_reparameterised` ones it does not.

    Weights of whole draws lose with every row of the data. Where latents z_i belong to the rows of
    a plate, `plate` names it and each row has weights of its own,

        L_K = E_g [ log p(x_0, g) / q(g) + sum_i log( 1/K sum_k p(x_i, z_ik | g) / q(z_ik | g) ) ],

    which is as tight for many rows as for one. The latents g outside the plate are drawn once for
    the K draws and enter as they do in the ELBO. Again L_1 is the ELBO and L_K rises with K, to the
    ELBO of g alone with all z_i integrated out, itself at most log p(x). Given g, rows must be
    independent in target and guide; that is checked. `doubly_reparameterised` then takes log q(g)
    as sticking the landing does, and differentiates through g as it is.

    Burda, Grosse and Salakhutdinov (2016), Importance weighted autoencoders, eq. 8; Geffner and
    Domke (2022), Variational inference with locally enhanced bounds for hierarchical models.

    Args:
        target: what to approximate.
        guide: by what.
        num_importance: K, draws under the logarithm.
        num_particles: how many such estimates are averaged.
        plate: the plate whose rows have their own weights, of a NumPyro model or of a plain target
            with `per_row`; the guide is `vi.guides.mean_field` or written by hand. None for weights
            of whole draws.
        estimator: `vi.estimators.pathwise()` (the default), `doubly_reparameterised()`, or
            `vimco()` for guides that are not reparameterised.
        noise: how the draws depend on each other: `vi.noise.iid()` (the default), or with the
            pathwise gradient others, whose bound is another one.
        batch_size: how many draws are evaluated at once; all where None.

    Returns:
        An `Objective`; `aux.value` is the bound, `aux.elbo` the average log weight, in nats.

    Raises:
        ValueError: target and guide do not fit, the guide lacks what the estimator needs, or the
            plate's rows are tied together.
        KeyError: there is no such plate.
        TypeError: an argument is of the wrong kind.

    Example:
        >>> target = vi.target(lambda v, z, d: -0.5 * jnp.sum(z["z"] ** 2), {"z": vi.Latent((2,))})
        >>> objective = vi.iwae(target, vi.guides.mean_field(target), num_importance=5)
        >>> params = vi.init_params(objective.declared, jax.random.key(0))
        >>> loss, aux = objective.loss(params, jax.random.key(1))
        >>> bool(loss == -aux.value), bool(aux.elbo <= aux.value)
        (True, True)
    """
    fitted = pair(
        target,
        guide,
        "vi.iwae",
        num_particles=num_particles,
        num_importance=num_importance,
        noise=noise,
        batch_size=batch_size,
    )
    if plate is not None:
        fitted = by_rows(fitted, plate, "vi.iwae")
    combination = power_bound(0.0, Measure("IWAE bound", -1))
    return importance_weighted(fitted, combination, estimator, "vi.iwae")
