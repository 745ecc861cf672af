"""From a model to posterior moments: `vi.approximate` against NumPyro's NUTS.

    python benchmarks/approximate.py [--posteriors FOLDER] [--names NAME ...] [--output FILE]

Every posterior of FOLDER (posteriors.py, moments.json) and every model of this repository, in
float64. Each side runs in a process of its own: once cold, with tracing and compilation, to moments
or NUTS's draws; then with other keys, everything compiled (target and kernel are made in the cold
run): ours seven times, the median; NUTS, whose 8,000 transitions average by themselves, once. NUTS:
4 chains, vectorised or sequential, whichever was the faster, 1,000 warm-up steps and 1,000 draws
each. `draws s` is what 4,000 draws take beyond, compiled. Errors are the largest over all
parameters: of means in reference standard deviations, of log standard deviations. The reference of
a model of this repository is a run of NUTS of 4 chains with 5,000 draws each. `trust` is the
verdict on the first run; `right` whether errors are below 0.1 and 0.15, of moments and of draws.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from reference import errors, of_draws, own, posteriors

REPEATS = 7
DRAWS = 4000
MEAN, LOG_SD = 0.1, 0.15


def known(options):
    """Name -> posterior."""
    found = posteriors(options.posteriors) if options.posteriors else {}
    return own(options.moments) | found


def one_side(options, name, side):
    """What one side measures in this process, as a mapping."""
    import jax

    jax.config.update("jax_enable_x64", True)
    posterior = known(options)[name]
    if side == "reference":
        return posterior.run()
    from numpyro.infer import MCMC, NUTS

    import vi_params as vi

    model, args, kwargs = posterior.make()
    told = {}

    def approximate(seed):
        if "target" not in told:
            told["target"] = vi.from_numpyro(model, *args, **kwargs)
        told["now"] = vi.approximate(told["target"], jax.random.key(seed))
        told.setdefault("found", told["now"])
        return told["now"].moments(jax.random.key(100 + seed))

    def further(seed):
        began = time.perf_counter()
        draws = jax.block_until_ready(told["now"].draws(jax.random.key(100 + seed), DRAWS))
        return draws, time.perf_counter() - began

    def nuts(seed, method=side):
        if "mcmc" not in told:
            told["mcmc"] = MCMC(
                NUTS(model),
                num_warmup=1000,
                num_samples=1000,
                num_chains=4,
                chain_method=method,
                progress_bar=False,
            )
        told["mcmc"].run(jax.random.key(seed), *args, **kwargs)
        return jax.block_until_ready(told["mcmc"].get_samples())

    run = approximate if side == "vi" else nuts
    began = time.perf_counter()
    first = run(0)
    cold = time.perf_counter() - began
    draws = further(0)[0] if side == "vi" else first
    seconds, of_draws_seconds = [], []
    for seed in range(1, (REPEATS if side == "vi" else 1) + 1):
        began = time.perf_counter()
        run(seed)
        seconds.append(time.perf_counter() - began)
        if side == "vi":
            of_draws_seconds.append(further(seed)[1])
    mean, log_sd = errors(posterior, *of_draws(draws))
    result = {"cold": cold, "hot": statistics.median(seconds)}
    result |= {"draws mean": mean, "draws log sd": log_sd}
    if side == "vi":
        found = told["found"]
        mean, log_sd = errors(posterior, first.mean, first.sd)
        result |= {
            "mean": mean,
            "log sd": log_sd,
            "draws": statistics.median(of_draws_seconds),
            "trust": found.trustworthy,
            "k_hat": float(found.diagnosis.k_hat),
            "ess": float(found.diagnosis.ess) / float(found.diagnosis.num_draws),
            "dim": vi.flat(told["target"]).dim,
        }
    return result


def measure(options, name):
    """One row: both sides, each in fresh processes."""
    sides = {}
    needed = ("reference",) if hasattr(known(options)[name], "run") else ()
    for side in (*needed, "vi", "vectorized", "sequential"):
        command = [sys.executable, __file__, "--moments", options.moments, "--one", name, side]
        command += ["--posteriors", options.posteriors] if options.posteriors else []
        out = subprocess.run(command, capture_output=True, text=True, check=False)
        if out.returncode:
            raise RuntimeError(f"{name}, {side}:\n{out.stderr[-3000:]}")
        sides[side] = json.loads(out.stdout.splitlines()[-1])
    ours = sides["vi"]
    cold = min(sides["vectorized"]["cold"], sides["sequential"]["cold"])
    hot = min(sides["vectorized"]["hot"], sides["sequential"]["hot"])
    return {
        "name": name,
        "dim": ours["dim"],
        "trust": ours["trust"],
        "right": all(ours[of] < MEAN for of in ("mean", "draws mean"))
        and all(ours[of] < LOG_SD for of in ("log sd", "draws log sd")),
        "k-hat": ours["k_hat"],
        "mean error": ours["mean"],
        "log sd error": ours["log sd"],
        "mean error of draws": ours["draws mean"],
        "log sd error of draws": ours["draws log sd"],
        "cold s": ours["cold"],
        "NUTS cold s": cold,
        "cold ratio": ours["cold"] / cold,
        "hot s": ours["hot"],
        "NUTS hot s": hot,
        "hot ratio": ours["hot"] / hot,
        "draws s": ours["draws"],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--posteriors", help="a folder with posteriors.py")
    parser.add_argument("--names", nargs="*", help="only these")
    parser.add_argument("--output", default="approximate.json")
    parser.add_argument("--moments", help=argparse.SUPPRESS)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one_side(options, *options.one)))
        return
    with tempfile.TemporaryDirectory() as options.moments:
        report(measured(options))


def measured(options):
    """The rows of the table, written to a file as they come."""
    rows = []
    for name in options.names or list(known(options)):
        rows.append(measure(options, name))
        pathlib.Path(options.output).write_text(json.dumps(rows, indent=1))
        print(name, file=sys.stderr)
    return rows


def report(rows):
    """Prints the table."""
    columns = list(rows[0])
    table = [columns] + [
        [value if isinstance(value, str) else f"{value:.3g}" for value in row.values()]
        for row in rows
    ]
    widths = [max(len(row[i]) for row in table) for i in range(len(columns))]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
    trusted = [row for row in rows if row["trust"]]
    print(f"trusted {len(trusted)} of {len(rows)}, ", end="")
    print(f"of these right {sum(row['right'] for row in trusted)}; ", end="")
    cold = statistics.median(row["cold ratio"] for row in rows)
    hot = statistics.median(row["hot ratio"] for row in rows)
    print(f"median ratio of seconds to NUTS: cold {cold:.3g}, compiled {hot:.3g}")


if __name__ == "__main__":
    main()
