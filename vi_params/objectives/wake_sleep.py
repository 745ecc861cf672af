"""Forward KL: reweighted wake-sleep, and neural posterior estimation.

The divergence KL(p(z | x) || q(z)) averages over the posterior, which is not there to draw from.
Two stand-ins are: the guide's own draws, weighted by w_k = p(x, z_k) / q(z_k) (wake), and joint
draws of latents and data from the model (sleep).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from vi_params._check import explain, require_count
from vi_params.guide import Guide
from vi_params.matching import joint_data
from vi_params.noise import Noise
from vi_params.objectives.importance import model_bound, weight_aux, weighted_sum
from vi_params.objectives.objective import Measure, Objective, objective
from vi_params.objectives.pair import (
    Pair,
    at_fixed_draws,
    model_values,
    pair,
    require_apart,
    scored,
)
from vi_params.objectives.simulation import Simulate, require_simulate
from vi_params.target import Target


def reweighted_wake_sleep(
    target: Target,
    guide: Guide,
    *,
    num_importance: int = 10,
    num_particles: int = 1,
    wake: float = 1.0,
    sleep: float = 0.0,
    simulate: Simulate | None = None,
    num_simulations: int = 1,
    noise: Noise | None = None,
    batch_size: int | None = None,
) -> Objective:
    """Reweighted wake-sleep as an objective: model and guide, each on its own loss.

        wake-theta: -log( 1/K sum_k w_k )                         for the model's parameters,
        wake-phi:   -sum_k w_k log q(z_k) / sum_k w_k             for the guide's, draws held fixed,
        sleep-phi:  -log q(z | x), (z, x) drawn from the model    for the guide's.

    The guide descends `wake` times the second plus `sleep` times the third; the model the first. No
    gradient passes through a draw, so that any guide will do: discrete, not reparameterised.

    Bornschein and Bengio (2015), Reweighted wake-sleep, eq. 3 to 7; Le et al. (2019), Revisiting
    reweighted wake-sleep.

    Args:
        target: what to approximate.
        guide: by what; for the sleep part one that looks at the data.
        num_importance: K, draws that are weighted together; at least 2. Few draws bias the wake
            part towards the guide as it is.
        num_particles: how many such estimates are averaged.
        wake: the weight of wake-phi.
        sleep: the weight of sleep-phi.
        simulate: `(values, key, data) -> (latents, data)`: a draw from the model, for the sleep
            part; a `from_numpyro` target brings its own.
        num_simulations: joint draws for an evaluation of the sleep part.
        noise: how the draws depend on each other: `vi.noise.iid()` (the default), ...
        batch_size: how many draws of the guide are evaluated at once; all where None.

    Returns:
        An `Objective`. The wake part is reported as the estimate of KL(p || q) that it is up to
        terms without gradient, sum_k w_k log w_k / sum_k w_k - log(1/K sum_k w_k); `aux.value` is
        the log evidence estimate, `aux.elbo` the average log weight, in nats.

    Raises:
        ValueError: both weights are zero, or one is negative; target and guide do not fit, or share
            a parameter; the sleep part lacks a simulator or a guide that looks at the data.
        TypeError: an argument is of the wrong kind.

    Example:
        >>> target = vi.target(lambda v, z, d: -0.5 * jnp.sum(z["z"] ** 2), {"z": vi.Latent((2,))})
        >>> guide = vi.guides.mean_field(target)
        >>> objective = vi.reweighted_wake_sleep(target, guide, num_importance=20)
        >>> params = vi.init_params(objective.declared, jax.random.key(0))
        >>> loss, aux = objective.loss(params, jax.random.key(1))
        >>> bool(loss >= 0)
        True
    """
    where = "vi.reweighted_wake_sleep"
    if not (wake >= 0 and sleep >= 0 and wake + sleep > 0):
        raise ValueError(
            explain(
                "The weights of wake-phi and sleep-phi are not a mixture.",
                expected="wake >= 0 and sleep >= 0, not both zero",
                received=f"wake={wake!r}, sleep={sleep!r}",
                where=where,
            )
        )
    fitted = pair(
        target,
        guide,
        where,
        num_particles=num_particles,
        num_importance=num_importance,
        noise=noise,
        batch_size=batch_size,
        fewest=2,
    )
    require_apart(fitted, where)
    require_count(num_simulations, "num_simulations", where)
    dream = require_simulate(fitted, simulate, where) if sleep else None

    def draw_noise(key: jax.Array) -> Any:
        if dream is None:
            return fitted.noise(key)
        awake, asleep = jax.random.split(key)
        return fitted.noise(awake), jax.random.split(asleep, num_simulations)

    def evaluate(params: Any, noise: Any, data: Any) -> Any:
        awake, asleep = (noise, None) if dream is None else noise
        loss, aux = _wake(fitted, params, awake, data, wake)
        if dream is not None:
            loss += sleep * _sleep(fitted, dream, params, asleep, data)
        return loss, aux

    measure = Measure("wake-sleep loss", 1)
    return objective(
        fitted.declared, fitted.data, draw_noise, evaluate, target, fitted.guide, measure
    )


def neural_posterior(
    target: Target,
    guide: Guide,
    *,
    simulate: Simulate | None = None,
    num_simulations: int = 100,
) -> Objective:
    """Neural posterior estimation as an objective: an amortised guide, taught by simulations.

        loss = -E log q(z | x; params),   (z, x) drawn from the model together,

    which is E KL(p(z | x) || q(z | x)) up to a constant. The observed values are never used: the
    one guide serves all data sets that the model can produce. The same loss is the sleep phase of
    wake-sleep. A model's own parameters stay as they are.

    Papamakarios and Murray (2016), Fast epsilon-free inference of simulation models, eq. 4.

    Args:
        target: the model; its density is not used.
        guide: one that looks at the data, as `vi.guide(declared, lambda values, data: ...)` does.
        simulate: `(values, key, data) -> (latents, data)`: one draw of latents and data from the
            model, `values` the constrained model parameters, `data` what is not simulated (a
            design, sizes); a `from_numpyro` target brings its own.
        num_simulations: joint draws for one evaluation.

    Returns:
        An `Objective`, minus whose loss is the expected log q; aux is empty.

    Raises:
        ValueError: there is no simulator, the guide does not look at the data, or the draws do not
            have the structure of latents and data.
        TypeError: an argument is of the wrong kind.

    Example:
        >>> import numpyro, numpyro.distributions as dist
        >>> def model(y):
        ...     mu = numpyro.sample("mu", dist.Normal(0, 1))
        ...     numpyro.sample("y", dist.Normal(mu, 1), obs=y)
        >>> target = vi.from_numpyro(model, jnp.array(0.5))
        >>> declared = {"slope": jnp.array(0.1)}
        >>> guide = vi.guide(declared, lambda v, data: {"mu": dist.Normal(v["slope"] * data["y"])})
        >>> objective = vi.neural_posterior(target, guide)
        >>> objective.measure.name
        'expected log q'
    """
    where = "vi.neural_posterior"
    fitted = pair(target, guide, where)
    require_count(num_simulations, "num_simulations", where)
    dream = require_simulate(fitted, simulate, where)

    def evaluate(params: Any, noise: Any, data: Any) -> tuple[jax.Array, tuple]:
        return _sleep(fitted, dream, params, noise, data), ()

    return objective(
        fitted.declared,
        joint_data(target, guide),
        lambda key: jax.random.split(key, num_simulations),
        evaluate,
        target,
        fitted.guide,
        Measure("expected log q", -1),
    )


def _wake(fitted: Pair, params: Any, noise: Any, data: Any, wake: float) -> Any:
    """The wake losses of model and guide, and the report."""
    found = scored(fitted, at_fixed_draws, params, noise, data)
    log_weights = stop_gradient(found.log_weight)
    shares = jax.nn.softmax(log_weights, axis=1)
    bound = jnp.mean(model_bound(found))
    held = jnp.mean(weighted_sum(shares, stop_gradient(found.log_density))) - stop_gradient(bound)
    loss = wake * (held - jnp.mean(weighted_sum(shares, found.log_prob)))
    if fitted.target.declared:
        loss -= bound
    return loss, weight_aux(stop_gradient(bound), log_weights)


def _sleep(fitted: Pair, dream: Simulate, params: Any, keys: Any, data: Any) -> jax.Array:
    """Minus the average log q of latents at data simulated with them."""
    values = stop_gradient(model_values(fitted, params))

    def one(key: jax.Array) -> jax.Array:
        latents, simulated = dream(values, key, data)
        return fitted.guide.log_prob(params, latents, simulated)

    return -jnp.mean(jax.vmap(one)(keys))
