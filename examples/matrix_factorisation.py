"""Matrix factorisation with a million users: local latents with rows of their own, on minibatches.

A million users have answered half of 20 questions each. The answer of user u to question i is
normal around theta_u . beta_i + offset_i, with two traits theta_u of every user: two million local
latents, four million variational parameters, twelve million numbers with Adam's moments. A step
looks at 20,000 users and gathers, differentiates and updates their rows alone.

    python examples/matrix_factorisation.py
"""

import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax

import vi_params as vi

USERS, ITEMS, TRAITS, BATCH, STEPS = 1_000_000, 20, 2, 20_000, 1_500


def model(answers, asked):
    """The joint density; the plate takes the rows of a batch."""
    items = dist.Normal(0.0, 1.0).expand([ITEMS, TRAITS]).to_event(2)
    beta = numpyro.sample("beta", items)
    offset = numpyro.sample("offset", dist.Normal(0.0, 1.0).expand([ITEMS]).to_event(1))
    noise = numpyro.sample("noise", dist.LogNormal(0.0, 1.0))
    with numpyro.plate("users", answers.shape[0], subsample_size=BATCH):
        y, mask = numpyro.subsample(answers, 1), numpyro.subsample(asked, 1)
        theta = numpyro.sample("theta", dist.Normal(0.0, 1.0).expand([TRAITS]).to_event(1))
        mean = theta @ beta.T + offset
        numpyro.sample("answers", dist.Normal(mean, noise).mask(mask).to_event(1), obs=y)


class Truth(NamedTuple):
    """What the answers are drawn from."""

    answers: jax.Array
    asked: jax.Array
    mean: jax.Array
    noise: float


@jax.jit
def simulate(key):
    """Answers of everyone to everything, and which of them are seen."""
    keys = jax.random.split(key, 5)
    theta = jax.random.normal(keys[0], (USERS, TRAITS))
    beta = jax.random.normal(keys[1], (ITEMS, TRAITS))
    mean = theta @ beta.T + jax.random.normal(keys[2], (ITEMS,))
    noise = 0.5
    answers = mean + noise * jax.random.normal(keys[3], mean.shape)
    asked = jax.random.bernoulli(keys[4], 0.5, mean.shape)
    return Truth(answers, asked, mean, noise)


class Result(NamedTuple):
    """What was found.

    Attributes:
        noise: the estimate of the noise's standard deviation.
        error: the root mean square error for the means of the questions not asked.
        baseline: that of every question's average answer.
        coverage: how often a 90 % interval for such a mean holds it.
        seconds: what the fit took.
        fit: the fit.
    """

    noise: float
    error: float
    baseline: float
    coverage: float
    seconds: float
    fit: vi.Fit


def optimizer(declared):
    """A row is seen 30 times in all: its own rate is high, with a short memory.

    Batches are large, so that the questions do not move far between two visits of a user.
    """
    local = optax.adam(optax.cosine_decay_schedule(0.2, STEPS), b1=0.5, b2=0.9)
    rest = optax.adam(optax.cosine_decay_schedule(0.03, STEPS))
    labels = vi.labels(declared, {"theta": "local", ".*": "rest"})
    return optax.multi_transform({"local": local, "rest": rest}, labels)


def main():
    """Fits and reports."""
    truth = simulate(jax.random.key(0))
    seen = jnp.where(truth.asked, truth.answers, 0.0)
    target = vi.from_numpyro(model, seen, truth.asked)
    guide = vi.guides.mean_field(target, init={"theta": jnp.zeros((USERS, TRAITS))}, init_scale=0.3)
    print(vi.describe(guide.declared))

    objective = vi.elbo(target, guide)
    began = time.perf_counter()
    fit = vi.fit(
        objective,
        optimizer(objective.declared),
        key=jax.random.key(1),
        num_steps=STEPS,
        stop=vi.stopping.never(),
        progress=False,
    )
    seconds = time.perf_counter() - began
    print(fit)

    # The trained rows of some users: guide and parameters are all that is needed.
    some = vi.Batch(target.data, {"users": jnp.arange(2_000)})
    draws = jax.jit(jax.vmap(lambda key: guide.sample(fit.params, key, some).latents))(
        jax.random.split(jax.random.key(2), 100)
    )
    mean = jnp.einsum("sut,sit->sui", draws["theta"], draws["beta"]) + draws["offset"][:, None]
    hidden = np.asarray(~truth.asked[:2_000])
    true = np.asarray(truth.mean[:2_000])
    low, high = np.quantile(np.asarray(mean), [0.05, 0.95], axis=0)
    average = np.asarray(seen.sum(0) / truth.asked.sum(0))
    result = Result(
        noise=float(jnp.mean(draws["noise"])),
        error=float(np.sqrt(np.mean((np.asarray(mean.mean(0)) - true)[hidden] ** 2))),
        baseline=float(np.sqrt(np.mean((average - true)[hidden] ** 2))),
        coverage=float(np.mean(((low < true) & (true < high))[hidden])),
        seconds=seconds,
        fit=fit,
    )
    print(f"{STEPS} steps on {USERS:,} users in {seconds:.1f} s, compilation included")
    print(f"noise {result.noise:.3f} (true {truth.noise})")
    print(f"means not asked for: error {result.error:.3f}, by question alone {result.baseline:.3f}")
    print(f"90 % intervals hold {100 * result.coverage:.0f} % of them")
    return result


if __name__ == "__main__":
    main()
