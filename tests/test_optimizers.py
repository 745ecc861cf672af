"""Every optax transformation, one law: it lowers the loss, and its state keeps its types."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib as contrib
import pytest

import vi_params as vi

KEY = jax.random.key(0)
MEAN = jnp.array([1.0, -2.0, 0.5])
STEPS = 300

OPTIMIZERS = {
    "adabelief": lambda: optax.adabelief(0.05),
    "adafactor": lambda: optax.adafactor(0.05),
    "adagrad": lambda: optax.adagrad(0.5),
    "adam": lambda: optax.adam(0.05),
    "adamw": lambda: optax.adamw(0.05),
    "lamb": lambda: optax.lamb(0.05),
    "lbfgs": lambda: optax.lbfgs(),
    "lion": lambda: optax.lion(0.02),
    "nadam": lambda: optax.nadam(0.05),
    "noisy_sgd": lambda: optax.noisy_sgd(0.02, key=0),
    "polyak_sgd": lambda: optax.polyak_sgd(max_learning_rate=0.05, f_min=-3.0),
    "radam": lambda: optax.radam(0.05),
    "rmsprop": lambda: optax.rmsprop(0.02),
    "sgd": lambda: optax.sgd(0.05, momentum=0.5),
    "yogi": lambda: optax.yogi(0.05),
    "cocob": lambda: contrib.cocob(),
    "dog": lambda: contrib.dog(1.0, init_step=("heuristic", 1e-2)),
    "dowg": lambda: contrib.dowg(1.0, init_estim_sq_dist=1e-2),
    "madgrad": lambda: contrib.madgrad(0.05),
    "mechanize": lambda: contrib.mechanize(optax.adam(0.05), s_init=1e-2),
    "momo": lambda: contrib.momo(0.05, lower_bound=-3.0),
    "muon": lambda: contrib.muon(0.05),
    "prodigy": lambda: contrib.prodigy(1.0, estim_lr0=1e-3),
    # optax 0.2.8 types SAM as taking extra arguments, which it does not.
    "sam": lambda: optax.GradientTransformation(*contrib.sam(optax.adam(0.05), optax.sgd(0.01))),
    "schedule_free_adamw": lambda: contrib.schedule_free_adamw(0.1),
    "schedule_free_sgd": lambda: contrib.schedule_free_sgd(0.1),
    "sophia": lambda: with_obj_fn(contrib.sophia(0.05)),
    "reduce_on_plateau": lambda: optax.chain(
        optax.adam(0.05), contrib.reduce_on_plateau(patience=5, accumulation_size=20)
    ),
    "averaged": lambda: vi.averaged(optax.adam(0.05)),
    "apply_every": lambda: optax.chain(optax.adam(0.02), optax.apply_every(4)),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(0.05), 5),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.05)),
    "frozen": lambda: vi.freeze(optax.adam(0.05), OBJECTIVE.declared, "scale"),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=0.05),
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(0.1), 4),
    "multi_transform": lambda: optax.multi_transform(
        {"fast": optax.adam(0.05), "slow": optax.sgd(0.01)},
        {"guide": {"loc": "fast", "scale": "slow"}},
    ),
    "schedule": lambda: optax.adam(optax.cosine_decay_schedule(0.1, STEPS)),
}


def with_obj_fn(rule):
    """Sophia calls `obj_fn` what line searches call `value_fn`."""

    def update(updates, state, params=None, *, value_fn, **extra):
        return rule.update(updates, state, params, obj_fn=value_fn)

    return optax.GradientTransformationExtraArgs(rule.init, update)


def log_density(values, latents, data):
    return -0.5 * jnp.sum((latents["z"] - data) ** 2)


TARGET = vi.target(log_density, {"z": vi.Latent((3,))}, data=MEAN)
OBJECTIVE = vi.elbo(
    TARGET, vi.guides.mean_field(TARGET), num_particles=8, noise=vi.noise.antithetic()
)
START = {"guide": {"loc": jnp.array([3.0, 1.0, -2.0]), "scale": jnp.full(3, -1.0)}}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_lowers_the_loss(name):
    """A few hundred steps bring the loss of a Gaussian target at least halfway from the start to
    the optimum, -log evidence = -1.5 log 2 pi; every loss is finite."""
    svi = vi.svi(OBJECTIVE, OPTIMIZERS[name]())

    @jax.jit
    def fit(key):
        state = svi.init(key, START)
        end, losses = vi.run(svi, state, key, STEPS)
        return state, end, losses

    start, end, losses = fit(KEY)
    optimum = -1.5 * np.log(2 * np.pi)
    assert np.all(np.isfinite(losses))
    assert np.mean(losses[-50:]) - optimum < 0.5 * (losses[0] - optimum)
    assert jax.tree.map(jnp.result_type, end) == jax.tree.map(jnp.result_type, start)
