"""Every solver on reference posteriors: how far its moments are off, k-hat, and how long it takes.

    python benchmarks/solvers.py --posteriors FOLDER [--solvers laplace batch_and_match ...]
        [--only NAME ...]

Errors are the largest over all parameters: |mean - reference| / sd, and |log(sd / reference sd)|,
of 10,000 draws of the guide. Times are of the second call, compiled, and of the first, in seconds.
"""

import argparse
import math
import time

import jax
from reference import errors, of_draws, posteriors

import vi_params as vi


def _deterministic(target, key):
    return vi.linear_response(target, vi.solvers.deterministic(target, key))


def _polished(target, key):
    return vi.solvers.batch_and_match(target, key, init=_deterministic(target, key))


SOLVERS = {
    "linear_response": _deterministic,
    "batch_and_match": lambda target, key: vi.solvers.batch_and_match(target, key),
    "polished": _polished,
    "low_rank": lambda target, key: vi.solvers.batch_and_match(
        target, key, rank=max(1, math.isqrt(vi.flat(target).dim))
    ),
    "score_matching": lambda target, key: vi.solvers.score_matching(target, key),
    "pathfinder": lambda target, key: vi.solvers.pathfinder(target, key),
    "natural_gradient": lambda target, key: vi.solvers.natural_gradient(target, key),
    "laplace": lambda target, key: vi.solvers.laplace(target, key),
}


def timed(solve, target, seed):
    start = time.perf_counter()
    solution = jax.block_until_ready(solve(target, jax.random.key(seed)))
    return solution, time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--solvers", nargs="+", default=list(SOLVERS), choices=list(SOLVERS))
    parser.add_argument("--only", nargs="+", default=None)
    parser.add_argument("--posteriors", required=True, help="a folder with posteriors.py")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    print("posterior | solver | mean error | log-sd error | k-hat | run s | first s | status")
    for name, posterior in posteriors(options.posteriors).items():
        if options.only and name not in options.only:
            continue
        model, args, kwargs = posterior.make()
        target = vi.from_numpyro(model, *args, **kwargs)
        for solver in options.solvers:
            solve = SOLVERS[solver]
            _, first = timed(solve, target, 0)
            solution, again = timed(solve, target, 1)
            key = jax.random.key(2)
            found = vi.diagnose(target, solution.guide, solution.params, key)
            draws = vi.draws(target, solution.guide, solution.params, key, 10_000)
            mean, sd = errors(posterior, *of_draws(draws))
            print(
                f"{name} | {solver} | {mean:.3f} | {sd:.3f} | {float(found.k_hat):.2f} | "
                f"{again:.3f} | {first:.1f} | {vi.SolverStatus(int(solution.info.status)).name} "
                f"{int(solution.info.steps)}",
                flush=True,
            )


if __name__ == "__main__":
    main()
