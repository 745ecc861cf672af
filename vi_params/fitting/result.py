"""What a fit hands back."""

import dataclasses
import enum
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from vi_params._table import Table
from vi_params.averaging import evaluation_params
from vi_params.objectives.objective import ELBO, Measure
from vi_params.svi import State

EMPTY: Mapping[str, np.ndarray] = MappingProxyType({})


class Status(enum.Enum):
    """How a restart ended; the value is the message."""

    RUNNING = "is running"
    CONVERGED = "the loss has levelled off"
    NUM_STEPS = "all steps were made; the loss may still be falling"
    INTERRUPTED = "interrupted; this is what was reached"
    DATA_ENDED = "the data ended before all steps were made"
    DATA_FAILED = "a batch could not be used; this is what was reached before it"
    STUCK = "no step could be taken any more: loss, gradient or update were not finite"
    INVALID_START = "no start with a finite loss and gradient was found"


class Progress(NamedTuple):
    """What callbacks are told.

    Attributes:
        step: how many steps were made.
        losses: the losses since the last call, shape `(restarts, steps)`; NaN where a restart had
            stopped.
        running: which restarts go on, shape `(restarts,)`.
    """

    step: int
    losses: np.ndarray
    running: np.ndarray


@dataclasses.dataclass(frozen=True)
class Fit:
    """A finished fit: the best restart, and all of them.

    Attributes:
        params: the unconstrained parameters of the best restart: averages where the optimiser keeps
            them (`vi.averaged`, `optax.contrib.schedule_free`), else its last iterate.
        state: its `State`, to go on from; it holds the iterate.
        losses: its losses, shape `(steps,)`.
        status: how it ended.
        steps: how many steps it made.
        skipped: how many of them were not taken because something was not finite.
        elbo: minus its loss at the end, in nats, which is the ELBO where that is what was fitted:
            by common random numbers where there were several restarts or averages, else the average
            over the last steps.
        elbo_se: the standard error of `elbo`.
        best: which restart it was.
        restarts: a table of all restarts.
        message: how it went, in words.
        all_states: the states of all restarts, leading axis the restarts.
        all_losses: their losses, shape `(restarts, steps)`, NaN after a restart had stopped.
        measure: what the loss estimates; the summary speaks of that.
    """

    params: Any
    state: State
    losses: np.ndarray
    status: Status
    steps: int
    skipped: int
    elbo: float
    elbo_se: float
    best: int
    restarts: Table
    message: str
    all_states: State
    all_losses: np.ndarray
    measure: Measure = ELBO

    def __repr__(self) -> str:
        figures = ".3f" if self.measure.tolerance >= 0.01 else ".3g"
        text = (
            f"Fit: {self.status.name}, {self.status.value}.\n"
            f"{self.measure.name} {self.measure.of(-self.elbo):{figures}} "
            f"(se {self.elbo_se:{figures}}) after {self.steps} steps"
        )
        if self.skipped:
            text += f", {self.skipped} of them skipped (not finite)"
        text += f".\n{self.message}" if self.message else "."
        if len(self.restarts) > 1:
            text += f"\n{self.restarts}"
        return text

    __str__ = __repr__


class Final(NamedTuple):
    """The ELBOs of all restarts at the end.

    Attributes:
        elbos: in nats, shape `(restarts,)`.
        ses: their standard errors.
        differences_se: the standard errors of the paired differences from the best.
        lost: the share of draws that were not finite and are left out.
    """

    elbos: np.ndarray
    ses: np.ndarray
    differences_se: np.ndarray
    lost: np.ndarray


def assemble(
    states: State,
    losses: np.ndarray,
    statuses: list[Status],
    skipped: np.ndarray,
    final: Final,
    measure: Measure = ELBO,
    told: str = "",
    options: Mapping[str, np.ndarray] = EMPTY,
) -> Fit:
    """The `Fit` of all restarts: the best chosen, the others compared with it.

    Args:
        states: the states of all restarts.
        losses: shape `(restarts, steps)`.
        statuses: how each ended.
        skipped: how many steps of each were skipped.
        final: their ELBOs, or what else minus their losses are.
        measure: what the loss estimates.
        told: what else a reader must know.
        options: name -> the value of a swept option, one a restart.
    """
    steps = np.asarray(states.step)
    rank = np.where(np.isfinite(final.elbos), final.elbos, -np.inf)
    best = int(np.argmax(rank))
    state = jax.tree.map(lambda leaf: leaf[best], states)
    shown, ses = measure.of(-final.elbos), final.ses
    swept = [[float(f"{value:.6g}") for value in values] for values in options.values()]
    rows = tuple(
        (
            i,
            *(values[i] for values in swept),
            float(shown[i]),
            float(ses[i]),
            int(steps[i]),
            int(skipped[i]),
            statuses[i].name,
        )
        for i in np.argsort(-rank, kind="stable").tolist()
    )
    shown_as = "elbo" if measure == ELBO else measure.name
    columns = ("restart", *options, shown_as, "se", "steps", "skipped", "status")
    return Fit(
        params=evaluation_params(state.opt_state, state.params),
        state=state,
        losses=losses[best, : int(steps[best])],
        status=statuses[best],
        steps=int(steps[best]),
        skipped=int(skipped[best]),
        elbo=float(final.elbos[best]),
        elbo_se=float(ses[best]),
        best=best,
        restarts=Table(columns, rows),
        message=f"{told}\n{_message(final, best, measure)}".strip(),
        all_states=states,
        all_losses=losses,
        measure=measure,
    )


AGREEMENT = 10
"""Restarts agree if their ELBOs differ by less than this many tolerances, or by noise."""


def _message(final: Final, best: int, measure: Measure) -> str:
    """What a reader must know beside the numbers, in words."""
    told = _compare(final, best, measure) if len(final.elbos) > 1 else ""
    if 0 < final.lost[best] < 1:
        told += (
            f"\n{100 * final.lost[best]:.2g} % of the draws behind this {measure.name} were not "
            "finite and are left out of it; vi.check(target, key) helps to find the site."
        )
    return told.strip()


def _compare(final: Final, best: int, measure: Measure) -> str:
    """Whether the restarts agree, in words."""
    elbos, differences_se = final.elbos, final.differences_se
    gap = elbos[best] - elbos
    finite = np.isfinite(gap)
    noise = np.where(np.isfinite(differences_se), differences_se, 0.0)
    near = finite & (gap <= np.maximum(AGREEMENT * measure.tolerance, 3 * noise))
    told = f"{int(near.sum())} of {len(elbos)} restarts agree on the best {measure.name}"
    if near.all():
        return told + "."
    far = finite & ~near
    told += ": the restarts DISAGREE"
    if far.any():
        worst, way = float(gap[far].max()), "lower" if measure.sign < 0 else "higher"
        told += f" (the worst ended {worst:.3g} {measure.unit} {way})"
    if not finite.all():
        told += f"; {int((~finite).sum())} failed"
    return told + ". Several optima, or not converged: look at fit.restarts."
