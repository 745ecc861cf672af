"""When the stopping rule of `vi.fit` ends a fit, on reference posteriors: too early, or never?

    python benchmarks/stopping.py --posteriors FOLDER [--names NAME ...] [--output FILE]

Mean-field and full-rank ELBO fits with 10 particles, the default optimiser and the default rule, at
most 20,000 steps, in float64, at three keys. Nats are those by which the ELBO (2,000 draws, common
to all) stays below the best attainable, which `FOLDER/moments.json` holds: where the rule ended the
fit, and where all 20,000 steps from the same start with the same noise do. Early is a fit that the
rule ended more than 0.1 nat below what the further steps reach; one that it did not end has
made all steps, and says so.
"""

import argparse
import json
import pathlib
import statistics
import sys

import jax
from reference import posteriors

import vi_params as vi

STEPS, PARTICLES, KEYS, DRAWS = 20_000, 10, 3, 2000
EARLY = 0.1
FAMILIES = {"mean-field": vi.guides.mean_field, "full-rank": vi.guides.full_rank}


def measure(posterior, family):
    """One row for every key."""
    model, args, kwargs = posterior.make()
    target = vi.from_numpyro(model, *args, **kwargs)
    guide = FAMILIES[family](target)
    objective = vi.elbo(target, guide, num_particles=PARTICLES)
    best = posterior.reference()[family.replace("-", "_") + "_elbo"]

    def nats(fit):
        told = vi.diagnose(target, guide, fit.params, jax.random.key(11), num_draws=DRAWS)
        return best - float(told.elbo)

    rows = []
    for i in range(KEYS):
        options = {"key": jax.random.key(i), "num_steps": STEPS, "progress": False}
        ended = vi.fit(objective, **options)
        full = vi.fit(objective, stop=vi.stopping.never(), **options)
        rows.append(
            {
                "name": posterior.name,
                "family": family,
                "key": i,
                "status": ended.status.name,
                "steps": ended.steps,
                "nats": nats(ended),
                "nats after all steps": nats(full),
            }
        )
    return rows


def report(rows):
    """A line for every posterior and family, then the totals."""
    for family in FAMILIES:
        of_family = [row for row in rows if row["family"] == family]
        for name in dict.fromkeys(row["name"] for row in of_family):
            mine = [row for row in of_family if row["name"] == name]
            ends = ", ".join(f"{row['status']} {row['steps']}" for row in mine)
            gaps = ", ".join(f"{row['nats']:.2f}/{row['nats after all steps']:.2f}" for row in mine)
            print(f"{family} {name}: {ends}; nats {gaps}")
    ended = [row for row in rows if row["status"] == "CONVERGED"]
    early = [row for row in ended if row["nats"] - row["nats after all steps"] > EARLY]
    print(f"{len(rows)} fits; ended by the rule {len(ended)}, of these early {len(early)}", end="")
    if ended:
        steps = sorted(row["steps"] for row in ended)
        print(f"; their steps: median {statistics.median(steps):.0f}, {steps[0]} to {steps[-1]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--posteriors", required=True, help="a folder with posteriors.py")
    parser.add_argument("--names", nargs="*", help="only these")
    parser.add_argument("--output", default="stopping.json")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    known, rows = posteriors(options.posteriors), []
    for name in options.names or list(known):
        for family in FAMILIES:
            rows += measure(known[name], family)
            pathlib.Path(options.output).write_text(json.dumps(rows, indent=1))
            print(name, family, file=sys.stderr)
    report(rows)


if __name__ == "__main__":
    main()
