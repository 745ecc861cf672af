"""Optimisers that need no tuning, on reference posteriors: how far from the best ELBO they end.

    python benchmarks/optimizers.py --posteriors FOLDER [--names NAME ...]
        [--optimizers NAME ...] [--output FILE]
    python benchmarks/optimizers.py --read FILE ...

Mean-field and full-rank ELBO fits with 10 particles and 10,000 steps, in float64, from the same
starts with the same noise, at three keys. All optimisers and keys are lanes of one program, whose
gradient is compiled once; a step that is not finite is not taken, as in `vi.svi`. All but the
schedule-free optimiser, which averages by itself, are wrapped in `vi.averaged`, which leaves their
steps as they are: the last iterate is judged, and the average. Nats are those by which the ELBO
(2,000 draws) stays below the best attainable, which `FOLDER/moments.json` holds; a run that ends at
an ELBO that is not finite has failed.

`adam 1e-1, halved` is in the manner of RAABBVI (Welandawe, Andersen, Vehtari and Huggins, 2022,
Robust, automated, and accurate black-box variational inference): Adam at a rate that is halved
whenever the loss, averaged over 200 steps, no longer falls, with averaged iterates.
"""

import argparse
import json
import math
import pathlib
import statistics
import sys

import jax
import jax.numpy as jnp
import optax
from jax import lax
from optax import contrib
from reference import posteriors

import vi_params as vi
from vi_params._tree import all_finite
from vi_params.fitting.optimizer import default_optimizer
from vi_params.state import Info, State, accept

STEPS, CHUNK, PARTICLES, KEYS = 10_000, 1000, 10, 3
LOOKS = (1000, 2000, 5000, 10_000)
DRAWS = 2000
WITHIN = 0.1
FAMILIES = {"mean-field": vi.guides.mean_field, "full-rank": vi.guides.full_rank}
OPTIMIZERS = {
    "default of vi.fit": default_optimizer(),
    "adam 1e-2, cosine": optax.adam(optax.cosine_decay_schedule(1e-2, STEPS)),
    "adam 1e-1, cosine": optax.adam(optax.cosine_decay_schedule(1e-1, STEPS)),
    "dowg": contrib.dowg(),
    "prodigy": contrib.prodigy(),
    "mechanize(adam 1.0)": contrib.mechanize(optax.adam(1.0), weight_decay=0.0),
    "schedule_free_adamw 5e-2": contrib.schedule_free_adamw(0.05),
    "cocob": contrib.cocob(),
    "adam 1e-1, halved": optax.chain(
        optax.adam(0.1),
        contrib.reduce_on_plateau(
            factor=0.5, patience=1, rtol=0.0, atol=1e-6, accumulation_size=200
        ),
    ),
}
OWN_AVERAGE = "schedule_free_adamw 5e-2"
RULES = {
    name: optax.with_extra_args_support(rule) if name == OWN_AVERAGE else vi.averaged(rule)
    for name, rule in OPTIMIZERS.items()
}


def lanes(objective, rules):
    """`(keys, data) -> iterates, averages`: leading axes (looks, optimisers, keys)."""
    starts = vi.svi(objective, optax.sgd(0.0))

    def loss(params, noise, data):
        value, _ = objective.evaluate(params, noise, data)
        return value

    gradients = jax.value_and_grad(loss)
    over_keys = jax.vmap(gradients, (0, 0, None))
    over_lanes = jax.vmap(over_keys, (0, None, None))

    def apply(rule, state, value, grads):
        updates, opt_state = rule.update(grads, state.opt_state, state.params, value=value)
        new = State(optax.apply_updates(state.params, updates), opt_state, state.step + 1)
        fine = all_finite(value, optax.global_norm(grads), new.params)
        return accept(state, new, Info(value, value, ~fine))

    def run(keys, data):
        params = jax.vmap(lambda key: starts.init(key, data=data).params)(keys)
        states = [
            jax.vmap(lambda p, rule=rule: State(p, rule.init(p), jnp.int32(0)))(params)
            for rule in rules.values()
        ]

        def step(states, i):
            noise = jax.vmap(lambda key: objective.noise(jax.random.fold_in(key, i)))(keys)
            params = stacked([state.params for state in states])
            values, grads = over_lanes(params, noise, data)
            states = [
                jax.vmap(lambda s, v, g, rule=rule: apply(rule, s, v, g))(
                    state, values[n], jax.tree.map(lambda g, n=n: g[n], grads)
                )
                for n, (rule, state) in enumerate(zip(rules.values(), states, strict=True))
            ]
            return states, None

        def chunk(states, first):
            states, _ = lax.scan(step, states, first + jnp.arange(CHUNK))
            iterates = [state.params for state in states]
            averages = [jax.vmap(vi.evaluation_params)(s.opt_state, s.params) for s in states]
            return states, (stacked(iterates), stacked(averages))

        return lax.scan(chunk, states, jnp.arange(0, STEPS, CHUNK))[1]

    return jax.jit(run)


def stacked(trees):
    """Trees of one structure as one, with a leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def elbos(objective):
    """`(params, key, data) -> ELBO` of many parameters, at common draws."""

    def one(params, noise, data):
        values = lax.map(lambda e: -objective.evaluate(params, e, data)[0], noise)
        return jnp.mean(values)

    def many(params, key, data):
        noise = jax.vmap(objective.noise)(jax.random.split(key, DRAWS // PARTICLES))
        return jax.vmap(lambda p: one(p, noise, data))(params)

    return jax.jit(many)


def measure(posterior, family, rules):
    """Rows: optimiser, which parameters, key, nats at every look."""
    model, args, kwargs = posterior.make()
    target = vi.from_numpyro(model, *args, **kwargs)
    objective = vi.elbo(target, FAMILIES[family](target), num_particles=PARTICLES)
    best = posterior.reference()[family.replace("-", "_") + "_elbo"]
    keys = jax.random.split(jax.random.key(0), KEYS)
    judged = lanes(objective, rules)(keys, objective.data)
    at = jnp.array([look // CHUNK - 1 for look in LOOKS])
    shape = len(LOOKS), len(rules), KEYS
    judge, rows = elbos(objective), []
    for which, params in zip(("last", "average"), judged, strict=True):
        flat = jax.tree.map(lambda x: x[at].reshape(-1, *x.shape[3:]), params)
        nats = best - judge(flat, jax.random.key(1), objective.data).reshape(shape)
        for n, name in enumerate(rules):
            for k in range(KEYS):
                told = [float(x) if math.isfinite(x) else math.inf for x in nats[:, n, k]]
                rows.append([posterior.name, family, name, which, k, told])
    return rows


def report(rows):
    """One line for every optimiser, family and choice of parameters."""
    print(
        "optimiser | judged | family | median | worst | within 0.1 | at 1,000 2,000 5,000 | failed"
    )
    for name in RULES:
        for which in ("average",) if name == OWN_AVERAGE else ("last", "average"):
            for family in FAMILIES:
                runs = [r[5] for r in rows if r[1:4] == [family, name, which]]
                if not runs:
                    continue
                ends = [run[-1] for run in runs]
                near = [sum(run[i] < WITHIN for run in runs) for i in range(len(LOOKS))]
                finite = [end for end in ends if math.isfinite(end)]
                print(
                    f"{name} | {which} | {family} | {statistics.median(ends):.3f} | "
                    f"{max(finite, default=math.inf):.3g} | {near[-1]} of {len(ends)} | "
                    f"{near[0]} {near[1]} {near[2]} | {len(ends) - len(finite)}"
                )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--posteriors", help="a folder with posteriors.py")
    parser.add_argument("--names", nargs="*", help="only these")
    parser.add_argument("--optimizers", nargs="*", choices=list(RULES), help="only these")
    parser.add_argument("--output", default="optimizers.json")
    parser.add_argument("--read", nargs="*", default=[], help="report what was measured before")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    rows = [row for file in options.read for row in json.loads(pathlib.Path(file).read_text())]
    if options.posteriors:
        rules = {name: RULES[name] for name in options.optimizers or RULES}
        known = posteriors(options.posteriors)
        for name in options.names or list(known):
            for family in FAMILIES:
                rows += measure(known[name], family, rules)
                pathlib.Path(options.output).write_text(json.dumps(rows))
                print(name, family, file=sys.stderr)
    report(rows)


if __name__ == "__main__":
    main()
