"""What a step costs: vi_params, NumPyro's SVI and the bare gradient, in one run.

    python benchmarks/step_cost.py [--quick] [--repeats 15] [--output FILE]

Same model, same family (independent normals in unconstrained space), one particle, Adam at 1e-2,
float32. NumPyro runs at its best: `svi.update` under one jitted `lax.scan`, no progress bar. The
floor is the bare `value_and_grad` of the log density, Jacobian included, under `lax.scan`. Times
of a step are taken in one process, the rivals in turn, and a ratio is the median over the turns of
the ratio within a turn. The time to the first step (tracing, initialisation and compilation) is
taken in a fresh process for each side. Prints one table and writes JSON.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpyro
import optax
from jax import lax
from models import MODELS
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

import vi_params as vi

STEPS = {
    "eight schools": 20_000,
    "logistic 5000 x 50": 300,
    "80 scalar sites": 500,
    "hierarchy, 200 groups": 2_000,
}


def prepare_vi(name, steps):
    """A compiled run of that many steps, and the seconds from the model to it."""
    model, args = MODELS[name]()
    began = time.perf_counter()
    target = vi.from_numpyro(model, *args)
    objective = vi.elbo(target, vi.guides.mean_field(target))
    svi = vi.svi(objective, optax.adam(1e-2))
    state = svi.init(jax.random.key(0))
    run = jax.jit(lambda state, key, data: vi.run(svi, state, key, steps, data))
    key = jax.random.key(1)
    compiled = run.lower(state, key, objective.data).compile()
    seconds = time.perf_counter() - began
    return (lambda: compiled(state, key, objective.data)), seconds


def prepare_numpyro(name, steps):
    """The same for NumPyro's SVI with AutoNormal."""
    model, args = MODELS[name]()
    args = tuple(jnp.asarray(arg) for arg in args)
    began = time.perf_counter()
    svi = SVI(model, AutoNormal(model), optax.adam(1e-2), Trace_ELBO())
    state = svi.init(jax.random.key(0), *args)

    def scan(state, args):
        return lax.scan(lambda state, _: svi.update(state, *args), state, None, length=steps)

    compiled = jax.jit(scan).lower(state, args).compile()
    seconds = time.perf_counter() - began
    return (lambda: compiled(state, args)), seconds


def prepare_floor(name, steps):
    """The bare gradient, with the smallest step that keeps the compiler from skipping it."""
    model, args = MODELS[name]()
    target = vi.from_numpyro(model, *args)
    flat = vi.flat(target)

    def scan(u, data):
        def body(u, _):
            value, gradient = jax.value_and_grad(flat.log_density)(u, {}, data)
            return u + 1e-6 * gradient, value

        return lax.scan(body, u, None, length=steps)

    u = jnp.zeros(flat.dim)
    compiled = jax.jit(scan).lower(u, target.data).compile()
    return lambda: compiled(u, target.data)


def seconds_of(call):
    """How long one call takes, until its result is there."""
    began = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - began


def interleaved(calls, repeats):
    """Seconds of every call in every turn: name -> list."""
    for call in calls.values():
        jax.block_until_ready(call())
    turns = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            turns[name].append(seconds_of(call))
    return turns


def ratio(turns, above, below):
    """The median over the turns of the ratio within a turn."""
    return statistics.median(a / b for a, b in zip(turns[above], turns[below], strict=True))


def measure_steps(name, repeats, quick):
    """Microseconds a step of all three, their ratios, and NumPyro's time to the first step."""
    steps = STEPS[name]
    rivals = {}
    numpyro_first = None
    if not (quick and name == "80 scalar sites"):
        rivals["numpyro"], numpyro_first = prepare_numpyro(name, steps)
    rivals["vi"], _ = prepare_vi(name, steps)
    rivals["floor"] = prepare_floor(name, steps)
    turns = interleaved(rivals, repeats)
    micro = {side: 1e6 * statistics.median(times) / steps for side, times in turns.items()}
    return {
        "model": name,
        "microseconds": micro,
        "vi / numpyro": ratio(turns, "vi", "numpyro") if "numpyro" in turns else None,
        "vi / floor": ratio(turns, "vi", "floor"),
        "numpyro first step (s)": numpyro_first,
    }


def measure_fit(repeats):
    """`vi.fit` on eight schools: the cost of its progress bar, and of 100 restarts."""
    model, args = MODELS["eight schools"]()
    target = vi.from_numpyro(model, *args)
    objective = vi.elbo(target, vi.guides.mean_field(target))
    optimizer, stop, key = optax.adam(1e-2), vi.stopping.never(), jax.random.key(0)

    def fit(progress, restarts, num_steps):
        return lambda: (
            vi.fit(
                objective,
                optimizer,
                key=key,
                num_steps=num_steps,
                stop=stop,
                progress=progress,
                restarts=restarts,
            ).params
        )

    bars = interleaved({"bar": fit(True, 1, 100_000), "bare": fit(False, 1, 100_000)}, repeats)
    lanes = interleaved({"100": fit(False, 100, 10_000), "1": fit(False, 1, 10_000)}, repeats)

    svi = SVI(model, AutoNormal(model), optax.adam(1e-2), Trace_ELBO())
    numpyro_args = tuple(jnp.asarray(arg) for arg in args)

    def numpyro_run(bar):
        return lambda: svi.run(key, 2_000, *numpyro_args, progress_bar=bar).params

    theirs = interleaved({"bar": numpyro_run(True), "bare": numpyro_run(False)}, 3)
    return {
        "fit with bar / without": ratio(bars, "bar", "bare"),
        "fit, 100 restarts / 1": ratio(lanes, "100", "1"),
        "fit, 1 restart, 10,000 steps (s)": statistics.median(lanes["1"]),
        "numpyro run with bar / without (2,000 steps, both compile)": ratio(theirs, "bar", "bare"),
    }


def worker(task, name, repeats, quick):
    """One measurement in this process, printed as JSON."""
    if task == "steps":
        result = measure_steps(name, repeats, quick)
    elif task == "first":
        result = {"vi first step (s)": prepare_vi(name, STEPS[name])[1]}
    else:
        result = measure_fit(repeats)
    print("RESULT " + json.dumps(result))


def in_fresh_process(task, name, repeats, quick):
    """The worker's result, from a process of its own."""
    command = [sys.executable, os.path.abspath(__file__), "--worker", task, "--model", name]
    command += ["--repeats", str(repeats), *(["--quick"] if quick else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise RuntimeError(f"{task} of {name} failed:\n{done.stdout}\n{done.stderr}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="few repeats, no 80-site NumPyro")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--output", default="step_cost.json")
    parser.add_argument("--worker", choices=["steps", "first", "fit"], help=argparse.SUPPRESS)
    parser.add_argument("--model", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    repeats = 3 if options.quick else options.repeats
    if options.worker:
        worker(options.worker, options.model, repeats, options.quick)
        return

    rows, results = [], []
    for name in options.models:
        first = in_fresh_process("first", name, repeats, options.quick)
        result = {**in_fresh_process("steps", name, repeats, options.quick), **first}
        theirs = result["numpyro first step (s)"]
        result["first step, vi / numpyro"] = theirs and result["vi first step (s)"] / theirs
        results.append(result)
        micro = result["microseconds"]
        rows.append(
            (
                name,
                micro["vi"],
                micro.get("numpyro", float("nan")),
                micro["floor"],
                result["vi / numpyro"] or float("nan"),
                result["vi / floor"],
                result["vi first step (s)"],
                theirs or float("nan"),
                result["first step, vi / numpyro"] or float("nan"),
            )
        )
        print(f"{name}: done", file=sys.stderr)
    fit = in_fresh_process("fit", "", repeats, options.quick)
    columns = (
        "model",
        "vi us/step",
        "numpyro us/step",
        "floor us/step",
        "vi/numpyro",
        "vi/floor",
        "vi first s",
        "numpyro first s",
        "first ratio",
    )
    print(vi.Table(columns, tuple(rows)))
    print(vi.Table(("vi.fit on eight schools", "value"), tuple(fit.items())))
    record = {
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "numpyro": numpyro.__version__,
            "optax": optax.__version__,
            "vi_params": vi.__version__,
        },
        "device": jax.devices()[0].device_kind,
        "repeats": repeats,
        "models": results,
        "fit": fit,
    }
    with open(options.output, "w") as file:
        json.dump(record, file, indent=1)


if __name__ == "__main__":
    main()
