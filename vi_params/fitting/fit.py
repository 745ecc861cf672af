"""The host loop for people: compiled calls, a progress bar, a stopping rule, restarts."""

import functools
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm.auto import tqdm

from vi_params._cache import program
from vi_params._check import explain, require_count, require_instance, require_key
from vi_params._tree import fold_in_name
from vi_params.batches import Scheme
from vi_params.diagnostics.check import check_objective
from vi_params.fitting.interrupt import Interrupt
from vi_params.fitting.lanes import CONVERGED, INVALID, RUNNING, STUCK, Lanes, Programs, programs
from vi_params.fitting.optimizer import default_optimizer
from vi_params.fitting.result import Final, Fit, Progress, Status, assemble
from vi_params.fitting.stopping import Stopping, plateau
from vi_params.fitting.stream import feed, first_data
from vi_params.fitting.sweep import combinations, require_injected
from vi_params.objectives.objective import Measure, Objective
from vi_params.params import init_params
from vi_params.svi import TRIES, require_params
from vi_params.updates import Updates

CALL_SECONDS = 0.2
"""How long one compiled call should take: the bar moves, and Ctrl-C is heard, that often."""

OUTCOMES = {
    RUNNING: Status.NUM_STEPS,
    CONVERGED: Status.CONVERGED,
    STUCK: Status.STUCK,
    INVALID: Status.INVALID_START,
}


def fit(
    objective: Objective,
    optimizer: optax.GradientTransformation | None = None,
    *,
    key: jax.Array,
    num_steps: int = 20_000,
    data: Any = None,
    restarts: int = 1,
    stop: Stopping | None = None,
    progress: bool = True,
    params: Any = None,
    callbacks: Sequence[Callable[[Progress], Any]] = (),
    batches: Scheme | None = None,
    updates: Updates | None = None,
    sweep: Mapping[str, Sequence[float]] | None = None,
) -> Fit:
    """The parameters that minimise an objective.

    The steps run in compiled calls; a second fit of the same `Objective`, an equal optimiser and
    the same shapes compiles nothing: build the objective once and pass new data as `data`.

    All restarts run in step in one program, each from its own start and with its own keys, and
    each is frozen when it has stopped. What a restart does depends on `key` and its number alone:
    not on how many others there are, nor on how the calls are cut.

    Args:
        objective: what to minimise.
        optimizer: any optax transformation (`vi.averaged` around it: the average is returned); by
            default Adam at rate 0.1, halved whenever the loss stays level.
        key: a typed random key.
        num_steps: how many steps to make at most.
        data: the data; the objective's own where None. Or batches: any Python iterable (a list, a
            generator, a torch DataLoader) of trees like the objective's data, one for each step:
            for a NumPyro model by the names of its arguments, and where parameters have rows of the
            plate that is fed a `vi.Batch(data, {plate: row numbers})`. The next one is made and
            sent while a step computes. What can be iterated again starts again at its end; a
            generator ends the fit. A batch that does not fit ends it too: what was reached is
            returned, with a warning and the status DATA_FAILED.
        restarts: how many starts to fit.
        stop: when to stop before `num_steps`: `vi.stopping.plateau()` by default (its tolerance
            that of the objective's measure), or `vi.stopping.never()`.
        progress: whether to show a progress bar.
        params: unconstrained parameters to start from, for one restart.
        callbacks: functions of a `Progress`, called after every call; True from one ends the fit.
        batches: how the rows of subsampled plates are drawn: `vi.batches.shuffled()` by default.
        updates: which rows a step updates: `vi.updates.rows()` by default, `vi.updates.dense()`.
        sweep: option -> values, of options that `optax.inject_hyperparams` put into the optimiser's
            state: every restart runs at every combination, with the same start and noise.

    Returns:
        A `Fit`: the restart with the lowest loss under common random numbers, and all others.
        Ctrl-C ends the fit and returns what was reached.

    Raises:
        ValueError: no restart had a finite loss and gradient at any of 100 starts; the message says
            which site is not finite. An iterable gives no first batch. num_steps or restarts < 1.
            `sweep` names an option that the optimiser's state does not hold.
        KeyError: names of `params` or `data` do not match.
        TypeError: `key` is not a typed key, or `optimizer` no optax transformation.

    Example:
        >>> target = vi.target(lambda v, z, d: -0.5 * jnp.sum(z["z"] ** 2), {"z": vi.Latent((2,))})
        >>> objective = vi.elbo(target, vi.guides.mean_field(target), num_particles=10)
        >>> fit = vi.fit(objective, key=jax.random.key(0), progress=False)
        >>> fit.status.name
        'CONVERGED'
    """
    require_instance(objective, Objective, "vi.elbo(target, guide)", "fit, objective")
    require_key(key, "fit")
    require_count(num_steps, "num_steps", "fit")
    require_count(restarts, "restarts", "fit")
    stream, data = first_data(objective, data)
    if params is not None:
        if restarts > 1:
            raise ValueError(
                explain(
                    "Given parameters are one start.",
                    expected="restarts=1 with params=",
                    received=f"restarts={restarts}",
                    where="fit",
                )
            )
        require_params(objective, params)
    measure = objective.measure
    stop = stop or plateau(tolerance=measure.tolerance)
    optimizer = default_optimizer() if optimizer is None else optimizer
    swept = combinations(sweep)
    if swept:
        require_injected(optimizer, objective.declared, list(swept))
    times = len(next(iter(swept.values()))) if swept else 1
    compiled: Programs = program(
        programs, objective, restarts * times, alike=(optimizer, stop, batches, updates)
    )

    start_keys, step_keys, final_key = _keys(key, restarts, times)
    options = {name: np.repeat(values, restarts) for name, values in swept.items()}
    lanes = compiled.begin(start_keys, params, data, options)
    _require_valid(objective, lanes, start_keys, params, data)

    ended = None
    if stream:
        bar = tqdm(total=num_steps, disable=not progress, file=sys.stderr, unit="step")
        with bar:
            tell = functools.partial(_tell, bar, callbacks, measure)
            fed = feed(compiled, stop.every, lanes, step_keys, num_steps, data, stream, tell)
        lanes, losses, interrupted, ended = fed
    else:
        lanes, losses, interrupted = _loop(
            compiled, stop, lanes, step_keys, num_steps, data, progress, callbacks, measure
        )
    statuses = [OUTCOMES[int(outcome)] for outcome in np.asarray(lanes.outcome)]
    early = Status.INTERRUPTED if interrupted else Status.NUM_STEPS
    if ended is not None:
        early = Status.DATA_FAILED if ended.failed else Status.DATA_ENDED
    statuses = [early if status is Status.NUM_STEPS else status for status in statuses]
    if len(statuses) > 1 or compiled.averages:
        compared = compiled.compare(lanes, final_key, data)
        final = Final(*(np.asarray(x) for x in compared))
    else:
        final = _tail(losses)
    told = ended.message if ended is not None else ""
    if ended is not None and ended.failed:
        warnings.warn(told, stacklevel=2)
    skipped = np.asarray(lanes.skipped)
    return assemble(lanes.state, losses, statuses, skipped, final, measure, told, options)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _keys(key: jax.Array, restarts: int, times: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Keys for starts and steps of every restart, all `times` over, and one for the comparison."""
    own = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(restarts))
    start, step = (jax.vmap(lambda k, n=n: fold_in_name(k, n))(own) for n in ("start", "step"))
    return jnp.tile(start, times), jnp.tile(step, times), fold_in_name(key, "compare")


def _loop(
    compiled: Programs,
    stop: Stopping,
    lanes: Lanes,
    keys: jax.Array,
    num_steps: int,
    data: Any,
    progress: bool,
    callbacks: Sequence[Callable[[Progress], Any]],
    measure: Measure,
) -> tuple[Lanes, np.ndarray, bool]:
    """Calls until all steps are made, all restarts have stopped, or someone wants to end.

    One call is always under way while the record of the one before it is read.
    """
    records: list[np.ndarray] = []
    sent = read = 0
    count = stop.every
    waiting: list[tuple[jax.Array, jax.Array, jax.Array]] = []
    ended = False
    bar = tqdm(total=num_steps, disable=not progress, file=sys.stderr, unit="step")
    with Interrupt() as interrupt, bar:
        before = time.perf_counter()
        while (sent < num_steps and not ended) or waiting:
            try:
                if sent < num_steps and not ended:
                    n = min(count, num_steps - sent)
                    lanes, losses, made = compiled.advance(lanes, keys, jnp.int32(n), data)
                    waiting.append((made, losses, lanes.outcome.copy()))
                    sent += n
                    if len(waiting) < 2 and sent < num_steps:
                        continue
                # Waited for before it is taken off: an interrupted wait loses nothing.
                made, losses, outcome = jax.device_get(waiting[0])
                waiting.pop(0)
                if made == 0:  # all had stopped in the call before
                    continue
                record, running = losses[:, :made], outcome == RUNNING
                records.append(record)
                read += int(made)
                now = time.perf_counter()
                count = _next_count(count, now - before, stop.every, compiled.capacity)
                before = now
                if _tell(bar, callbacks, measure, read, record, running) or interrupt.wanted:
                    interrupt.wanted = True
                    ended = True
                ended = ended or not running.any()
            except KeyboardInterrupt:
                interrupt.wanted = ended = True
    record = np.concatenate(records, axis=1) if records else np.zeros((len(keys), 0))
    return lanes, record, interrupt.wanted


def _tell(
    bar: tqdm,
    callbacks: Sequence[Callable],
    measure: Measure,
    step: int,
    record: np.ndarray,
    running: np.ndarray,
) -> bool:
    """Shows how far the fit is; whether a callback asks for the end."""
    bar.update(record.shape[1])
    bar.set_postfix_str(_postfix(record, running, measure), refresh=False)
    answers = [_is_true(callback(Progress(step, record, running))) for callback in callbacks]
    return any(answers)  # after all have been called


def _is_true(answer: Any) -> bool:
    """Whether a callback asks for the end: True itself, not just anything."""
    return isinstance(answer, (bool, np.bool_)) and bool(answer)


def _next_count(count: int, seconds: float, every: int, capacity: int) -> int:
    """How many steps the next call makes, for it to take about `CALL_SECONDS`; whole looks."""
    wanted = count * min(4.0, CALL_SECONDS / max(seconds, 1e-9))
    return min(capacity, max(1, round(wanted / every)) * every)


def _postfix(record: np.ndarray, running: np.ndarray, measure: Measure) -> str:
    """The best lane's recent ELBO (or other measure), and how many restarts go on."""
    recent = record[:, -100:]
    known = np.isfinite(recent)
    if not known.any():
        return ""
    means = [np.mean(row[ok]) for row, ok in zip(recent, known, strict=True) if ok.any()]
    text = f"{measure.name} {measure.of(min(means)):.2f}"
    return f"{text}, {running.sum()} of {len(running)} running" if len(running) > 1 else text


def _tail(losses: np.ndarray) -> Final:
    """The ELBO of a single restart: the average over its last steps that are finite."""
    last = losses[0, -max(1, min(1000, losses.shape[1] // 4)) :]
    known = last[np.isfinite(last)]
    if known.size == 0:
        return Final(np.full(1, np.nan), np.full(1, np.nan), np.zeros(1), np.ones(1))
    elbo, se = -known.mean(), known.std() / np.sqrt(known.size)
    lost = 1 - known.size / last.size
    return Final(np.array([elbo]), np.array([se]), np.zeros(1), np.array([lost]))


def _require_valid(
    objective: Objective, lanes: Lanes, keys: jax.Array, params: Any, data: Any
) -> None:
    """Raises, saying why, where no restart has a valid start."""
    if np.any(np.asarray(lanes.outcome) == RUNNING):
        return
    where = "the given params" if params is not None else f"one of {TRIES} starts"
    if params is None:
        params = init_params(objective.declared, jax.random.fold_in(keys[0], 0))
    report = check_objective(objective, params, keys[0], data)
    problems = "; ".join(report.problems) or "the gradient with respect to the parameters"
    raise ValueError(
        explain(
            "No start has a finite loss and gradient.",
            expected=f"a finite log density and gradient at {where}",
            received=problems,
            where="fit",
            hint="choose the start (init= of the guide) or mend the model; vi.check(target, key) "
            f"shows every site:\n{report}",
        )
    )
