"""A guide of your own, written twice, for a posterior that is known in closed form.

Six groups with one measurement each, around a common mean (normal distributions throughout):

    mu ~ Normal(0, 10),   theta_j ~ Normal(mu, 2),   y_j ~ Normal(theta_j, 4).

- `vi.guide(declared, q)`: distributions, one for each latent, *independent* of each other. Such a
  guide finds the right means, and standard deviations that are too small by a known amount.
- `vi.numpyro_guide(program, y, declared=...)`: a NumPyro program, in which theta follows mu and the
  data. It contains the exact posterior: the fit must find it, and its ELBO must be the log evidence
  with no noise at all.

Parameters are declared with a start and a constraint; what is trained is a mapping of plain
unconstrained arrays, and the guide is a pure function of it and a random key. The functions
`test_...` show what that buys: a guide can be tested like any other function. They run with the
script, `python examples/custom_guide.py`, or under `pytest examples/custom_guide.py`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints

import vi_params as vi

PRIOR, BETWEEN, WITHIN = 10.0, 2.0, 4.0
Y = np.array([8.0, -1.0, 3.5, 12.0, 5.0, 1.5], dtype=np.float32)


def model(y):
    mu = numpyro.sample("mu", dist.Normal(0, PRIOR))
    with numpyro.plate("groups", len(y)):
        theta = numpyro.sample("theta", dist.Normal(mu, BETWEEN))
        numpyro.sample("y", dist.Normal(theta, WITHIN), obs=y)


# First guide: what is learnable, where it starts and where it may go; then one distribution for
# each latent, from the constrained values.
INDEPENDENT = {
    "mu": {"loc": vi.Param(0.0), "scale": vi.Param(1.0, constraint=constraints.positive)},
    "theta": {
        "loc": vi.Param(lambda key: jax.random.normal(key, Y.shape)),
        "scale": vi.Param(jnp.ones(Y.shape), constraint=constraints.positive),
    },
}


def independent(values):
    return {name: dist.Normal(values[name]["loc"], values[name]["scale"]) for name in values}


# Second guide: theta_j is pulled from mu towards its measurement, by a share between 0 and 1.
STRUCTURED = {
    "loc": vi.Param(0.0),
    "scale": vi.Param(1.0, constraint=constraints.positive),
    "pull": vi.Param(0.5, constraint=constraints.unit_interval),
    "spread": vi.Param(1.0, constraint=constraints.positive),
}


def structured(values, y):
    mu = numpyro.sample("mu", dist.Normal(values["loc"], values["scale"]))
    with numpyro.plate("groups", len(y)):
        centre = values["pull"] * y + (1 - values["pull"]) * mu
        numpyro.sample("theta", dist.Normal(centre, values["spread"]))


GUIDES = {
    "independent": vi.guide(INDEPENDENT, independent),
    "structured": vi.numpyro_guide(structured, Y, declared=STRUCTURED),
}


class Posterior(NamedTuple):
    """The joint normal posterior of (mu, theta_1, ..., theta_6), and log p(y)."""

    mean: np.ndarray
    covariance: np.ndarray
    precision: np.ndarray
    log_evidence: float


def posterior() -> Posterior:
    """The posterior by linear algebra: precisions add up."""
    n = len(Y)
    precision = np.zeros((n + 1, n + 1))
    precision[0, 0] = 1 / PRIOR**2 + n / BETWEEN**2
    precision[0, 1:] = precision[1:, 0] = -1 / BETWEEN**2
    precision[1:, 1:] = np.eye(n) * (1 / BETWEEN**2 + 1 / WITHIN**2)
    covariance = np.linalg.inv(precision)
    mean = covariance @ np.concatenate([[0.0], Y / WITHIN**2])
    marginal = PRIOR**2 + (BETWEEN**2 + WITHIN**2) * np.eye(n)
    evidence = dist.MultivariateNormal(jnp.zeros(n), jnp.array(marginal)).log_prob(Y)
    return Posterior(mean, covariance, precision, float(evidence))


def exact_structure() -> dict[str, float]:
    """The structured guide's values at which it is the posterior."""
    p = posterior()
    pull = BETWEEN**2 / (BETWEEN**2 + WITHIN**2)
    spread = pull**0.5 * WITHIN
    scale = p.covariance[0, 0] ** 0.5
    return {"loc": p.mean[0], "scale": scale, "pull": pull, "spread": spread}


# A guide is a pure function: each fact below is a few calls and an assertion.


def start(guide: vi.Guide):
    return vi.init_params(guide.declared, jax.random.key(0))


def assert_close(first, second):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), first, second)


def test_guide_is_pure():
    """Same parameters and key, same draw: once more, compiled, and among others in a batch."""
    for guide in GUIDES.values():
        params, key = start(guide), jax.random.key(1)
        before = jax.tree.map(np.array, params)
        first, second = guide.sample(params, key), guide.sample(params, key)
        jax.tree.map(np.testing.assert_array_equal, first, second)
        jax.tree.map(np.testing.assert_array_equal, before, params)

        assert_close(first, jax.jit(guide.sample)(params, key))
        keys = jnp.stack([jax.random.key(2), key])
        batch = jax.jit(jax.vmap(guide.sample, in_axes=(None, 0)))(params, keys)
        assert_close(first, jax.tree.map(lambda leaf: leaf[1], batch))


def test_density_of_a_draw():
    """The density that comes with a draw is the guide's density there, and the one by hand."""
    for name, guide in GUIDES.items():
        params = start(guide)
        draw = guide.sample(params, jax.random.key(1))
        assert_close(draw.log_prob, guide.log_prob(params, draw.latents))

        mu, theta = draw.latents["mu"], draw.latents["theta"]
        centre = params["theta"]["loc"] if name == "independent" else 0.5 * Y + 0.5 * mu
        by_hand = dist.Normal(0, 1).log_prob(mu) + jnp.sum(dist.Normal(centre, 1).log_prob(theta))
        assert_close(draw.log_prob, by_hand)


def test_density_matches_draws():
    """E_q[r / q] = 1 for every density r: here r is the guide itself at other parameters."""
    for guide in GUIDES.values():
        params = start(guide)
        other = jax.tree.map(lambda leaf: leaf - 0.1, params)

        @jax.jit
        def weight(key, guide=guide, params=params, other=other):
            draw = guide.sample(params, key)
            return jnp.exp(guide.log_prob(other, draw.latents) - draw.log_prob)

        weights = jax.vmap(weight)(jax.random.split(jax.random.key(2), 10_000))
        error = abs(float(jnp.mean(weights)) - 1)
        assert error < 4 * float(jnp.std(weights)) / 100, error


def test_all_parameters_are_allowed():
    """Unconstrained parameters anywhere give values inside their constraints."""
    for guide in GUIDES.values():
        params = jax.tree.map(lambda leaf: leaf - 3, start(guide))
        values = vi.constrain(guide.declared, params)
        for param, value in zip(
            jax.tree.leaves(guide.declared), jax.tree.leaves(values), strict=True
        ):
            assert jnp.all(param.constraint(value))


def test_ratio_is_constant_at_the_posterior():
    """At the exact posterior log p(y, z) - log q(z) is the log evidence, at every single draw."""
    target, guide = vi.from_numpyro(model, Y), GUIDES["structured"]
    params = vi.unconstrain(guide.declared, exact_structure())
    for seed in range(3):
        draw = guide.sample(params, jax.random.key(seed))
        ratio = target.log_density({}, draw.latents, target.data) - draw.log_prob
        assert_close(ratio, posterior().log_evidence)


TESTS = (
    test_guide_is_pure,
    test_density_of_a_draw,
    test_density_matches_draws,
    test_all_parameters_are_allowed,
    test_ratio_is_constant_at_the_posterior,
)


class Result(NamedTuple):
    """A fitted guide: its values, its verdict, and moments of (mu, theta_1, ...) under it."""

    values: dict[str, jax.Array]
    diagnosis: vi.Diagnosis
    mean: np.ndarray
    sd: np.ndarray


def approximate(target: vi.Target, guide: vi.Guide, key: jax.Array) -> Result:
    fit_key, diagnose_key, draws_key = jax.random.split(key, 3)
    # No gradient noise is left by this estimator where the guide is the posterior.
    estimator = vi.estimators.sticking_the_landing()
    objective = vi.elbo(target, guide, num_particles=10, estimator=estimator)
    fit = vi.fit(objective, key=fit_key, progress=False)
    diagnosis = vi.diagnose(target, guide, fit.params, diagnose_key)
    draws = vi.draws(target, guide, fit.params, draws_key, 20_000)
    both = np.column_stack([draws["mu"], draws["theta"]])
    return Result(vi.constrain(guide.declared, fit.params), diagnosis, both.mean(0), both.std(0))


def main() -> dict[str, Result]:
    print("== what is declared: independent, structured")
    print(vi.describe(INDEPENDENT), end="\n\n")
    print(vi.describe(STRUCTURED), end="\n\n")

    print("== the guides are pure functions")
    for test in TESTS:
        test()
        print(f"passed: {test.__name__}")

    target = vi.from_numpyro(model, Y)
    keys = jax.random.split(jax.random.key(3), len(GUIDES))
    results = {
        name: approximate(target, guide, key)
        for (name, guide), key in zip(GUIDES.items(), keys, strict=True)
    }
    for name, result in results.items():
        print(f"\n== {name}\n{result.diagnosis}")

    p, first, second = posterior(), results["independent"], results["structured"]
    sd = np.sqrt(np.diag(p.covariance))
    names = ("mu", *(f"theta[{j}]" for j in range(len(Y))))
    columns = ("latent", "mean: exact", "independent", "structured")
    columns += ("sd: exact", "independent", "structured")
    numbers = (p.mean, first.mean, second.mean, sd, first.sd, second.sd)
    rows = tuple((name, *(round(float(x[i]), 2) for x in numbers)) for i, name in enumerate(names))
    print("\n== moments of the posterior")
    print(vi.Table(columns, rows))
    rows = tuple((n, float(second.values[n]), float(v)) for n, v in exact_structure().items())
    print("\n== parameters of the structured guide")
    print(vi.Table(("parameter", "fitted", "closed form"), rows))

    print(f"\nThe log evidence is {p.log_evidence:.3f}. The structured guide reaches it: it is the")
    print(
        "posterior. The independent one has the right means; its standard deviations are those of"
    )
    print(
        "each latent with all others held fixed, too small wherever latents depend on each other,"
    )
    print(
        "and its ELBO stays below by the Kullback-Leibler divergence, however long it is trained."
    )
    return results


if __name__ == "__main__":
    main()
