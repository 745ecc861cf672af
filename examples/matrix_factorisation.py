"""Matrix factorisation with a million users: local latents with rows of their own, on minibatches.

A million users have answered half of 20 questions each. The answer of user u to question i is
normal around theta_u . beta_i + offset_i, with two traits theta_u of every user: two million local
latents, four million variational parameters, twelve million numbers with Adam's moments. A step
looks at 20,000 users and gathers, differentiates and updates their rows alone.

A user is in one batch of fifty. While the questions are still moving, what a user's row has learnt
is out of date when the row is seen again, and what it has not learnt yet passes for noise. So the
fit has two parts:

1. questions and users together, on the same 20,000 users in every step, `data=[vi.Batch(...)]`:
   200,000 answers say enough about 20 questions;
2. the questions frozen, `vi.freeze`, every user's row on its own.

Rows and questions learn at rates of their own (`vi.labels` with `optax.multi_transform`).

    python examples/matrix_factorisation.py
"""

import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax

import vi_params as vi

USERS, ITEMS, TRAITS, BATCH = 1_000_000, 20, 2, 20_000
FIRST, THEN = 500, 1_500


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

    beta: jax.Array
    offset: jax.Array
    mean: jax.Array
    noise: float
    answers: jax.Array
    asked: jax.Array


@jax.jit
def simulate(key):
    """Answers of everyone to everything, and which of them are seen."""
    keys = jax.random.split(key, 5)
    theta = jax.random.normal(keys[0], (USERS, TRAITS))
    beta = jax.random.normal(keys[1], (ITEMS, TRAITS))
    offset = jax.random.normal(keys[2], (ITEMS,))
    mean, noise = theta @ beta.T + offset, 0.5
    answers = mean + noise * jax.random.normal(keys[3], mean.shape)
    asked = jax.random.bernoulli(keys[4], 0.5, mean.shape)
    return Truth(beta, offset, mean, noise, answers, asked)


class Result(NamedTuple):
    """What was found, for the means of questions that were not asked.

    Attributes:
        noise: the estimate of the noise's standard deviation.
        error: the root mean square error for such means.
        baseline: that of every question's average answer.
        limit: that of the exact posterior given the true questions and noise.
        coverage: how often a 90 % interval for such a mean holds it.
        seconds: what the fit took.
        fit: the second part of the fit.
    """

    noise: float
    error: float
    baseline: float
    limit: float
    coverage: float
    seconds: float
    fit: vi.Fit


def optimizer(declared, steps):
    """A rate for the questions; a higher one, with a short memory, for the rows seen 30 times."""
    rest = optax.adam(optax.cosine_decay_schedule(0.05, steps))
    rows = optax.adam(optax.cosine_decay_schedule(0.2, steps), b1=0.7, b2=0.95)
    labels = vi.labels(declared, {"theta": "rows", ".*": "rest"})
    return optax.multi_transform({"rows": rows, "rest": rest}, labels)


def fit_in_two(objective):
    """The questions on the first users, then the rows of all users."""
    declared, options = objective.declared, {"stop": vi.stopping.never(), "progress": False}
    first = vi.fit(
        objective,
        optimizer(declared, FIRST),
        key=jax.random.key(1),
        num_steps=FIRST,
        data=[vi.Batch(objective.data, {"users": jnp.arange(BATCH)})],
        **options,
    )
    return vi.fit(
        objective,
        vi.freeze(optimizer(declared, THEN), declared, "beta|offset|noise"),
        key=jax.random.key(2),
        num_steps=THEN,
        params=first.params,
        **options,
    )


@jax.jit
def exact_means(truth, users):
    """The posterior means of all answers of some users, the questions and the noise being known."""

    def one(answers, asked):
        seen = truth.beta * asked[:, None] / truth.noise**2
        precision = jnp.eye(TRAITS) + seen.T @ truth.beta
        return truth.beta @ jnp.linalg.solve(precision, seen.T @ (answers - truth.offset))

    return jax.vmap(one)(truth.answers[users], truth.asked[users]) + truth.offset


def main():
    """Fits and reports."""
    truth = simulate(jax.random.key(0))
    seen = jnp.where(truth.asked, truth.answers, 0.0)
    target = vi.from_numpyro(model, seen, truth.asked)
    guide = vi.guides.mean_field(target, init={"theta": jnp.zeros((USERS, TRAITS))}, init_scale=0.3)
    print(vi.describe(guide.declared))

    objective = vi.elbo(target, guide, estimator=vi.estimators.closed_form_entropy())
    began = time.perf_counter()
    fit = fit_in_two(objective)
    seconds = time.perf_counter() - began
    print(fit)

    # The trained rows of some users: guide and parameters are all that is needed.
    users = jnp.arange(USERS - 2_000, USERS)
    some = vi.Batch(target.data, {"users": users})
    draws = jax.jit(jax.vmap(lambda key: guide.sample(fit.params, key, some).latents))(
        jax.random.split(jax.random.key(3), 100)
    )
    mean = jnp.einsum("sut,sit->sui", draws["theta"], draws["beta"]) + draws["offset"][:, None]
    low, high = jnp.quantile(mean, jnp.array([0.05, 0.95]), axis=0)
    true, hidden = truth.mean[users], ~truth.asked[users]

    def error(found):
        return float(jnp.sqrt(jnp.mean((found - true) ** 2, where=hidden)))

    result = Result(
        noise=float(jnp.mean(draws["noise"])),
        error=error(mean.mean(0)),
        baseline=error(seen.sum(0) / truth.asked.sum(0)),
        limit=error(exact_means(truth, users)),
        coverage=float(jnp.mean((low < true) & (true < high), where=hidden)),
        seconds=seconds,
        fit=fit,
    )
    print(f"{FIRST + THEN} steps on {USERS:,} users in {seconds:.1f} s, compilation included")
    print(f"noise {result.noise:.3f} (true {truth.noise})")
    print(
        f"means not asked for: error {result.error:.3f}; by question alone {result.baseline:.3f},"
    )
    print(f"by the exact posterior given the true questions {result.limit:.3f}")
    print(f"90 % intervals hold {100 * result.coverage:.0f} % of them")
    return result


if __name__ == "__main__":
    main()
