"""How long until the Gaussian posterior is there: untuned solvers against NumPyro's best Adam.

    python benchmarks/time_to_posterior.py [--posteriors FOLDER] [--models NAME ...]
        [--families mean-field full-rank] [--output FILE]

Wall seconds until the ELBO is within 0.1 nat of the best one of the family, in float64, data as
arguments. vi_params: `vi.solvers.deterministic` for mean-field, `vi.solvers.natural_gradient` for
full-rank, with no option set. NumPyro: SVI with AutoNormal or AutoMultivariateNormal, Adam at 1e-3,
1e-2 and 1e-1 with 1 and 10 particles, at most 10,000 steps in jitted scans of 500, its ELBO looked
at between the scans and the looking not timed; of the six the one that is there first, chosen in
hindsight. Seconds are given compiled, and with tracing and compilation. The best ELBO is the
reference's (`FOLDER/moments.json`) or, for the models of this repository, the largest that any of
the runs here reached. Prints one table a family and writes JSON.
"""

import argparse
import copy
import json
import math
import pathlib
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from models import MODELS
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from numpyro.optim import Adam
from reference import posteriors

import vi_params as vi

RATES = (1e-3, 1e-2, 1e-1)
PARTICLES = (1, 10)
STEPS = 10_000
CHUNK = 500
WITHIN = 0.1
REPEATS = 5
DRAWS, FEWER = 10_000, 2_000
LARGE = 10_000


def problems(folder, names, family="mean-field"):
    """Name -> (model, args, kwargs, best ELBO or None)."""
    found = {name: (*make(), {}, None) for name, make in MODELS.items()}
    if folder:
        for name, posterior in posteriors(folder).items():
            found[name] = (*posterior.make(), posterior.reference()[BEST[family]])
    return {name: found[name] for name in names or found}


def normal(target, found):
    """AutoNormal's parameters as those of `vi.guides.mean_field`."""
    flat = {}
    for what in ("loc", "scale"):
        parts = [jnp.ravel(found[f"{name}_auto_{what}"]) for name in target.latents]
        flat[what] = jnp.concatenate(parts)
    return flat


def multivariate_normal(target, found):
    """AutoMultivariateNormal's parameters, which take the latents by name, in our order."""
    sizes = {n: math.prod(x.unconstrained_shape or ()) for n, x in target.latents.items()}
    places, begin = {}, 0
    for name in sorted(sizes):
        places[name] = np.arange(begin, begin + sizes[name])
        begin += sizes[name]
    order = np.concatenate([places[name] for name in target.latents])
    root = found["auto_scale_tril"][order]
    return {"loc": found["auto_loc"][order], "scale_tril": jnp.linalg.cholesky(root @ root.T)}


BEST = {"mean-field": "mean_field_elbo", "full-rank": "full_rank_elbo"}
SOLVERS = {"mean-field": vi.solvers.deterministic, "full-rank": vi.solvers.natural_gradient}
GUIDES = {
    "mean-field": (vi.guides.mean_field, AutoNormal, normal),
    "full-rank": (vi.guides.full_rank, AutoMultivariateNormal, multivariate_normal),
}


def judge(target, guide, params):
    """The ELBO by draws that are common to all; fewer where there are many data."""
    key = jax.random.key(11)
    size = sum(leaf.size for leaf in jax.tree.leaves(target.data))
    draws = FEWER if size > LARGE else DRAWS
    return float(vi.diagnose(target, guide, params, key, num_draws=draws, batch_size=100).elbo)


def run_vi(target, solver):
    """(ELBO, seconds compiled, seconds from cold) of the solver."""

    def solve(key):
        solution = solver(target, key)
        return jax.block_until_ready(solution.params), solution

    began = time.perf_counter()
    _, solution = solve(jax.random.key(0))
    cold = time.perf_counter() - began
    seconds = []
    for repeat in range(REPEATS):
        began = time.perf_counter()
        solve(jax.random.key(repeat))
        seconds.append(time.perf_counter() - began)
    return judge(target, solution.guide, solution.params), statistics.median(seconds), cold


def run_numpyro(family, model, args, kwargs, target, particles, best):
    """Rate -> (the ELBO after every scan, the seconds of one scan, those of tracing, compiling).

    One program for all rates. A rate is done with once it is within reach of `best`.
    """
    ours, theirs, read = GUIDES[family]
    guide, autoguide = ours(target), theirs(model)
    arrays = jax.tree.map(jnp.asarray, args)

    svi = SVI(model, autoguide, Adam(RATES[0]), Trace_ELBO(num_particles=particles))

    def scan(state, rate, arrays):
        stepping = copy.copy(svi)  # which has learnt the constraints in its init
        stepping.optim = Adam(rate)

        def body(state, _):
            return stepping.update(state, *arrays, **kwargs)

        return lax.scan(body, state, None, length=CHUNK)

    began = time.perf_counter()
    start = svi.init(jax.random.key(0), *arrays, **kwargs)
    compiled = jax.jit(scan).lower(start, RATES[0], arrays).compile()
    first = time.perf_counter() - began
    runs = {}
    for rate in RATES:
        state, elbos, seconds = start, [], []
        while len(elbos) < STEPS // CHUNK and first_within(elbos, best) >= len(elbos):
            began = time.perf_counter()
            state, _ = jax.block_until_ready(compiled(state, rate, arrays))
            seconds.append(time.perf_counter() - began)
            values = read(target, svi.get_params(state))
            params = vi.unconstrain(guide.declared, {"guide": values})
            elbos.append(judge(target, guide, params))
        runs[rate] = elbos, statistics.median(seconds), first
    return runs


def first_within(elbos, best):
    """How many scans until the ELBO is, and stays for the next look, within reach; or infinity."""
    if best is None:
        return math.inf
    near = [elbo > best - WITHIN for elbo in elbos]
    held = (i + 1 for i in range(len(near)) if near[i] and all(near[i : i + 2]))
    return next(held, math.inf)


def measure(name, problem, family):
    """One row of the table."""
    model, args, kwargs, best = problem
    target = vi.from_numpyro(model, *args, **kwargs)
    elbo, seconds, cold = run_vi(target, SOLVERS[family])
    rivals = {}
    for particles in PARTICLES:
        runs = run_numpyro(family, model, args, kwargs, target, particles, best)
        rivals |= {f"Adam {rate:g} x {particles}": run for rate, run in runs.items()}
    for option, (elbos, _, _) in rivals.items():
        print(f"{name}: {option} at {elbos[-1]:.2f}, {CHUNK * len(elbos)} steps", file=sys.stderr)
    if best is None:
        best = max(elbo, *(max(elbos) for elbos, _, _ in rivals.values()))
    times = {o: first_within(elbos, best) * each for o, (elbos, each, _) in rivals.items()}
    fastest = min(times, key=times.get)
    gaps = {option: best - elbos[-1] for option, (elbos, _, _) in rivals.items()}
    nearest = min(gaps, key=gaps.get)
    return {
        "name": name,
        "family": family,
        "vi gap": best - elbo,
        "vi s": seconds,
        "vi cold s": cold,
        "numpyro": fastest if times[fastest] < math.inf else f"none ({nearest})",
        "numpyro gap": gaps[fastest if times[fastest] < math.inf else nearest],
        "numpyro s": times[fastest],
        "numpyro cold s": times[fastest] + rivals[fastest][2],
        "ratio": times[fastest] / seconds if best - elbo < WITHIN else math.nan,
        "cold ratio": (times[fastest] + rivals[fastest][2]) / cold,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--posteriors", help="a folder with posteriors.py and moments.json")
    parser.add_argument("--models", nargs="*", help="only these")
    parser.add_argument("--families", nargs="*", choices=list(BEST), default=list(BEST))
    parser.add_argument("--output", default="time_to_posterior.json")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    rows = []
    for family in options.families:
        for name, problem in problems(options.posteriors, options.models, family).items():
            rows.append(measure(name, problem, family))
            pathlib.Path(options.output).write_text(json.dumps(rows, indent=1))
    for family in options.families:
        report([row for row in rows if row["family"] == family])


def report(rows):
    """Prints the table of one family."""
    columns = list(rows[0])
    table = [columns] + [
        [value if isinstance(value, str) else f"{value:.3g}" for value in row.values()]
        for row in rows
    ]
    widths = [max(len(row[i]) for row in table) for i in range(len(columns))]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
    reached = [row["ratio"] for row in rows if not math.isnan(row["ratio"])]
    print(f"vi_params reached {len(reached)} of {len(rows)}", end="")
    print(f"; median ratio {statistics.median(reached):.3g}" if reached else "")


if __name__ == "__main__":
    main()
