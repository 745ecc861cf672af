"""What a step on a batch costs when parameters have many rows: time and memory.

    python benchmarks/local_rows.py [--quick] [--repeats 7] [--output FILE]

The model has a latent vector of 8 numbers for every row, in a plate of which 100 rows are looked at
in a step, and the guide a location and a scale for each of them: y_i ~ N(z_i, 1), z_i ~ N(m, 1).
Adam, one particle, float32, data as arguments.

- time: microseconds a step of `vi.run` under jit with a donated state, for several numbers of rows,
  measured in turns; the median of each, and the median of the ratios within a turn;
- NumPyro's SVI on the same model and guide at 10^6 rows, `svi.update` in a jitted scan, in the same
  turns;
- memory: what the compiled call of `vi.fit` needs beyond its arguments (XLA's own account), and how
  far the process grew during a run of `vi.run` (Linux), in copies of the largest leaf;
- indices: microseconds to draw a batch of 100 rows, for several numbers of rows.
"""

import argparse
import json
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax
from jax import lax
from numpyro.distributions import constraints
from numpyro.infer import SVI, Trace_ELBO

import vi_params as vi
from vi_params.fitting.lanes import programs

BATCH, COLUMNS = 100, 8
STEPS = 1000
RIVAL_STEPS = 3


def model(y):
    mean = numpyro.sample("mean", dist.Normal(jnp.zeros(COLUMNS), 10.0).to_event(1))
    with numpyro.plate("rows", y.shape[0], subsample_size=BATCH):
        z = numpyro.sample("z", dist.Normal(mean, 1.0).to_event(1))
        numpyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=numpyro.subsample(y, 1))


def guide(y):
    loc = numpyro.param("mean_loc", jnp.zeros(COLUMNS))
    scale = numpyro.param("mean_scale", jnp.full(COLUMNS, 0.1), constraint=constraints.positive)
    numpyro.sample("mean", dist.Normal(loc, scale).to_event(1))
    shape = (y.shape[0], COLUMNS)
    with numpyro.plate("rows", y.shape[0], subsample_size=BATCH):
        loc = numpyro.param("loc", lambda key: jnp.zeros(shape), event_dim=1)
        scale = numpyro.param(
            "scale", lambda key: jnp.full(shape, 0.5), constraint=constraints.positive, event_dim=1
        )
        numpyro.sample("z", dist.Normal(loc, scale).to_event(1))


class Ours:
    """A run of the package at some number of rows."""

    def __init__(self, size):
        y = jnp.ones((size, COLUMNS))
        target = vi.from_numpyro(model, y)
        self.objective = vi.elbo(target, vi.numpyro_guide(guide, y))
        self.svi = vi.svi(self.objective, optax.adam(1e-2))
        run = jax.jit(
            lambda state, key, data: vi.run(self.svi, state, key, STEPS, data), donate_argnums=0
        )
        self.data = self.objective.data
        self.state = self.svi.init(jax.random.key(0))
        self.compiled = run.lower(self.state, jax.random.key(1), self.data).compile()
        self.turn()

    def turn(self):
        """Microseconds a step."""
        began = time.perf_counter()
        self.state, losses = self.compiled(self.state, jax.random.key(1), self.data)
        losses.block_until_ready()
        return (time.perf_counter() - began) / STEPS * 1e6


class Rival:
    """NumPyro's SVI at some number of rows."""

    def __init__(self, size):
        self.y = jnp.ones((size, COLUMNS))
        svi = SVI(model, guide, numpyro.optim.optax_to_numpyro(optax.adam(1e-2)), Trace_ELBO())
        self.state = jax.jit(svi.init)(jax.random.key(0), self.y)

        def run(state, y):
            return lax.scan(lambda s, _: svi.update(s, y), state, None, length=RIVAL_STEPS)

        self.run = jax.jit(run, donate_argnums=0)
        self.turn()

    def turn(self):
        """Microseconds a step."""
        began = time.perf_counter()
        self.state, losses = self.run(self.state, self.y)
        losses.block_until_ready()
        return (time.perf_counter() - began) / RIVAL_STEPS * 1e6


def resident(label):
    """Bytes of this process's memory, by the kernel's account; None elsewhere."""
    status = pathlib.Path("/proc/self/status")
    if not status.exists():
        return None
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(lines[label].split()[0]) * 1024


def memory(run):
    """Bytes beyond state and data: XLA's account, and the growth of the process."""
    leaf = max(x.nbytes for x in jax.tree.leaves(run.state))
    whole = programs(run.objective, 1, optax.adam(1e-2), vi.stopping.never())
    keys = jax.random.split(jax.random.key(0), 1)
    lanes = jax.eval_shape(whole.begin, keys, None, run.data, {})
    account = whole.advance.lower(lanes, keys, jnp.int32(1), run.data).compile().memory_analysis()
    extra = account.temp_size_in_bytes + account.output_size_in_bytes - account.alias_size_in_bytes
    found = {
        "largest leaf, bytes": leaf,
        "state, bytes": sum(x.nbytes for x in jax.tree.leaves(run.state)),
        "fit beyond its arguments, leaves": extra / leaf,
    }
    clear = pathlib.Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")  # the peak is that from now on
        before = resident("VmRSS")
        run.turn()
        found["growth of the process, leaves"] = (resident("VmHWM") - before) / leaf
    return found


def drawing(size):
    """A compiled function that draws the indices of 1000 batches."""
    draw = vi.batches.shuffled().draw
    steps = jnp.arange(1000) % (size // BATCH)

    @jax.jit
    def many(key):
        return jax.vmap(lambda i: draw(key, i, {"rows": (size, BATCH)})["rows"])(steps)

    many(jax.random.key(0)).block_until_ready()

    def turn():
        began = time.perf_counter()
        many(jax.random.key(1)).block_until_ready()
        return (time.perf_counter() - began) / 1000 * 1e6

    return turn


def in_turns(things, repeats):
    """Name -> the times of its turns, all things taking turns."""
    times = {name: [] for name in things}
    for _ in range(repeats):
        for name, turn in things.items():
            times[name].append(turn())
    return times


def ratio(times, a, b):
    return statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rows, to see that it runs")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output")
    args = parser.parse_args()
    small, middle, large = (10**3, 10**4, 10**5) if args.quick else (10**4, 10**6, 10**7)

    draws = in_turns({n: drawing(n) for n in (10**3, 10**7)}, 3 * args.repeats)
    ours = {size: Ours(size) for size in (small, middle, large)}
    rival = Rival(middle)
    turns = {size: run.turn for size, run in ours.items()} | {"NumPyro": rival.turn}
    times = in_turns(turns, args.repeats)
    report = {
        "step, microseconds": {str(name): statistics.median(t) for name, t in times.items()},
        f"step at {large:.0e} rows to {small:.0e}": ratio(times, large, small),
        f"NumPyro's step to ours at {middle:.0e} rows": ratio(times, "NumPyro", middle),
        "indices, microseconds": {str(n): statistics.median(t) for n, t in draws.items()},
        "indices of 1e7 rows to 1e3": ratio(draws, 10**7, 10**3),
        "memory": memory(ours[large]),
    }
    print(json.dumps(report, indent=2))
    if args.output:
        pathlib.Path(args.output).write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
