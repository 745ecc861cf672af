"""The models of the benchmarks: NumPyro programs with data made from fixed seeds."""

import numpy as np
import numpyro
import numpyro.distributions as dist


def eight_schools():
    """Non-centred eight schools (Rubin, 1981): 10 latents, 8 observations."""
    y = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], np.float32)
    sigma = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], np.float32)

    def model(sigma, y):
        mu = numpyro.sample("mu", dist.Normal(0, 5))
        tau = numpyro.sample("tau", dist.HalfCauchy(5))
        with numpyro.plate("schools", 8):
            standard = numpyro.sample("standard", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(mu + tau * standard, sigma), obs=y)

    return model, (sigma, y)


def logistic_regression(rows=5000, columns=50):
    """Logistic regression: 50 coefficients, 5,000 rows."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, columns)).astype(np.float32)
    weights = rng.normal(size=columns) / np.sqrt(columns)
    y = (rng.uniform(size=rows) < 1 / (1 + np.exp(-x @ weights))).astype(np.float32)

    def model(x, y):
        beta = numpyro.sample("beta", dist.Normal(0, 1).expand([columns]).to_event(1))
        numpyro.sample("y", dist.Bernoulli(logits=x @ beta), obs=y)

    return model, (x, y)


def scalar_sites(number=80):
    """A model of 80 scalar sample sites, half of them positive, and one observation."""

    def model(y):
        total = 0.0
        for i in range(number):
            prior = dist.LogNormal(0, 1) if i % 2 else dist.Normal(0, 1)
            total = total + numpyro.sample(f"x{i}", prior)
        numpyro.sample("y", dist.Normal(total, 1.0), obs=y)

    return model, (np.float32(50.0),)


def hierarchy(groups=200, rows=4000):
    """A linear regression with a varying intercept and slope in each of 200 groups."""
    rng = np.random.default_rng(1)
    group = rng.integers(groups, size=rows)
    x = rng.normal(size=rows).astype(np.float32)
    intercept = rng.normal(1.0, 0.5, size=groups)
    slope = rng.normal(-0.5, 0.3, size=groups)
    y = (intercept[group] + slope[group] * x + rng.normal(0, 0.4, size=rows)).astype(np.float32)

    def model(group, x, y):
        means = numpyro.sample("means", dist.Normal(0, 1).expand([2]).to_event(1))
        scales = numpyro.sample("scales", dist.HalfNormal(1).expand([2]).to_event(1))
        noise = numpyro.sample("noise", dist.HalfNormal(1))
        with numpyro.plate("groups", groups):
            standard = numpyro.sample("standard", dist.Normal(0, 1).expand([2]).to_event(1))
        effects = means + scales * standard
        mean = effects[group, 0] + effects[group, 1] * x
        numpyro.sample("y", dist.Normal(mean, noise), obs=y)

    return model, (group, x, y)


MODELS = {
    "eight schools": eight_schools,
    "logistic 5000 x 50": logistic_regression,
    "80 scalar sites": scalar_sites,
    "hierarchy, 200 groups": hierarchy,
}
