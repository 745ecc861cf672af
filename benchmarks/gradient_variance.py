"""How much the gradient of the ELBO varies: our estimators against NumPyro's, on the same guides.

    python benchmarks/gradient_variance.py [--draws 20000] [--output FILE]

Same model, same guide program, same parameters, same number of particles; the gradient is taken in
the same unconstrained coordinates, at the start and after a short fit. For every component of the
gradient the ratio of variances (ours over NumPyro's) is estimated with a standard error from blocks
of draws. The table has its median and its largest value over the components, and how many of them
are above one by more than four standard errors; components that do not vary for either are left
out. Means are compared too: the largest difference in standard errors. Prints one table and writes
JSON.

Eight schools is fitted by NumPyro's AutoNormal; `mixture` has discrete labels in a plate and a
global switch; `chain` has choices that depend on choices. Sticking the landing is there to show
both its sides: it promises no variance at the optimum of a family that holds the posterior, and has
much of it far from there.
"""

import argparse
import json

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from models import eight_schools
from numpyro.infer import Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from numpyro.infer.autoguide import AutoNormal

import vi_params as vi

BLOCKS = 20
E = vi.estimators


def schools():
    model, args = eight_schools()
    args = tuple(jnp.asarray(arg) for arg in args)
    return model, AutoNormal(model), args


def mixture():
    """Labels of 20 rows, a switch that says how common the second component is, its location."""
    rng = np.random.default_rng(0)
    y = jnp.asarray(np.where(rng.uniform(size=20) < 0.4, 2.5, 0.0) + rng.normal(size=20))

    def model(y):
        mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
        common = numpyro.sample("common", dist.Bernoulli(0.4))
        with numpyro.plate("rows", y.size):
            k = numpyro.sample("k", dist.Bernoulli(0.2 + 0.4 * common))
            numpyro.sample("y", dist.Normal(mu * k, 1.0), obs=y)

    def guide(y):
        loc, log_scale = numpyro.param("loc", 1.0), numpyro.param("log_scale", -1.0)
        numpyro.sample("mu", dist.Normal(loc, jnp.exp(log_scale)))
        numpyro.sample("common", dist.Bernoulli(logits=numpyro.param("common_logit", 0.1)))
        logits = numpyro.param("logits", 0.3 * jnp.sin(jnp.arange(1.0, y.size + 1)))
        with numpyro.plate("rows", y.size):
            numpyro.sample("k", dist.Bernoulli(logits=logits))

    return model, guide, (y,)


def chain():
    """A hidden Markov chain of five binary states, and a guide with the same structure."""
    y = jnp.array([0.2, 1.4, 1.1, -0.3, 0.8])

    def model(y):
        k = 0
        for i in range(5):
            k = numpyro.sample(f"k{i}", dist.Bernoulli(0.3 + 0.4 * k))
            numpyro.sample(f"y{i}", dist.Normal(k, 0.7), obs=y[i])

    def guide(y):
        logits, slopes = (
            numpyro.param("logits", 0.1 * jnp.arange(1.0, 6.0)),
            numpyro.param("slopes", 0.5 * jnp.ones(5)),
        )
        k = 0
        for i in range(5):
            k = numpyro.sample(f"k{i}", dist.Bernoulli(logits=logits[i] + slopes[i] * k))

    return model, guide, (y,)


MODELS = {"eight schools": schools, "mixture": mixture, "chain": chain}

PAIRS = {
    "eight schools": [
        ("pathwise", E.pathwise(), Trace_ELBO, 1),
        ("sticking_the_landing", E.sticking_the_landing(), Trace_ELBO, 1),
        ("analytic_kl", E.analytic_kl(), TraceMeanField_ELBO, 1),
        ("analytic_kl", E.analytic_kl(), Trace_ELBO, 1),
    ],
    "mixture": [
        ("mixed, no baseline", E.mixed(baseline=E.no_baseline()), TraceGraph_ELBO, 4),
        ("mixed", E.mixed(), TraceGraph_ELBO, 4),
        ("analytic_kl", E.analytic_kl(), TraceGraph_ELBO, 4),
        ("enumerate", E.enumerate(), TraceGraph_ELBO, 4),
    ],
    "chain": [
        ("mixed, no baseline", E.mixed(baseline=E.no_baseline()), TraceGraph_ELBO, 4),
        ("mixed", E.mixed(), TraceGraph_ELBO, 4),
        ("enumerate", E.enumerate(), TraceGraph_ELBO, 4),
    ],
}


def flat_gradients(loss, params, draws, key):
    """Gradients from that many keys, one row each."""

    def slope(key):
        return jax.flatten_util.ravel_pytree(jax.grad(loss)(params, key))[0]

    keys = jax.random.split(key, draws)
    return np.asarray(jax.jit(lambda keys: jax.lax.map(slope, keys, batch_size=500))(keys), float)


def block_variances(gradients):
    """Variances within blocks of draws, shape (blocks, components)."""
    blocks = np.array_split(gradients, BLOCKS)
    return np.stack([block.var(axis=0, ddof=1) for block in blocks])


def compare(ours, theirs):
    """The ratio of variances component by component, and how far the means are apart."""
    a, b = block_variances(ours), block_variances(theirs)
    varies = (a.mean(axis=0) > 1e-10) | (b.mean(axis=0) > 1e-10)
    a, b = a[:, varies], b[:, varies]
    ratio = a.mean(axis=0) / b.mean(axis=0)
    relative = np.sqrt(
        (a.std(axis=0, ddof=1) / np.maximum(a.mean(axis=0), 1e-30)) ** 2
        + (b.std(axis=0, ddof=1) / b.mean(axis=0)) ** 2
    ) / np.sqrt(BLOCKS)
    error = np.sqrt((ours.var(axis=0) + theirs.var(axis=0)) / len(ours))[varies]
    apart = np.abs(ours.mean(axis=0) - theirs.mean(axis=0))[varies] / error
    return {
        "components": int(varies.sum()),
        "median": float(np.median(ratio)),
        "largest": float(ratio.max()),
        "above_one": int(np.sum(ratio * (1 - 4 * relative) > 1)),
        "means_apart": float(apart.max()),
    }


def measure(name, draws):
    """All pairs of estimators on one model, at the start and after a short fit."""
    model, program, args = MODELS[name]()
    target, guide = vi.from_numpyro(model, *args), vi.numpyro_guide(program, *args)
    fitted = vi.elbo(target, guide, num_particles=8, estimator=E.mixed())
    svi = vi.svi(fitted, optax.adam(0.02))
    start = svi.init(jax.random.key(0))
    after, _ = jax.jit(lambda s, k: vi.run(svi, s, k, 1000))(start, jax.random.key(1))
    rows = []
    for place, params in (("start", start.params), ("fitted", after.params)):
        theirs = {}
        for ours, estimator, rival, particles in PAIRS[name]:
            objective = vi.elbo(target, guide, num_particles=particles, estimator=estimator)
            if rival not in theirs:
                elbo = rival(num_particles=particles)

                def numpyro_loss(params, key, elbo=elbo):
                    values = vi.constrain(guide.declared, params)
                    return elbo.loss(key, values, model, program, *args)

                theirs[rival] = flat_gradients(numpyro_loss, params, draws, jax.random.key(2))
            found = flat_gradients(
                lambda p, key, o=objective: o.loss(p, key)[0], params, draws, jax.random.key(3)
            )
            row = {"model": name, "at": place, "ours": ours, "rival": rival.__name__}
            rows.append(row | {"particles": particles} | compare(found, theirs[rival]))
            print_row(rows[-1])
    return rows


COLUMNS = {
    "model": "model",
    "at": "at",
    "ours": "ours",
    "rival": "NumPyro",
    "particles": "particles",
    "median": "median ratio",
    "largest": "largest ratio",
    "above_one": "above one",
    "means_apart": "means apart (se)",
}


def print_row(row):
    """A line of the table."""
    cells = [f"{row[c]:.3g}" if isinstance(row[c], float) else str(row[c]) for c in COLUMNS]
    print("| " + " | ".join(cells) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--draws", type=int, default=20_000)
    parser.add_argument("--output")
    options = parser.parse_args()
    print("| " + " | ".join(COLUMNS.values()) + " |")
    print("|" + " --- |" * len(COLUMNS))
    rows = [row for name in MODELS for row in measure(name, options.draws)]
    if options.output:
        with open(options.output, "w") as file:
            json.dump({"draws": options.draws, "jax": jax.__version__, "rows": rows}, file)


if __name__ == "__main__":
    main()
