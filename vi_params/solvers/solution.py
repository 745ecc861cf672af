"""What every solver returns."""

import enum
from typing import Any, NamedTuple

import jax
import numpy as np

from vi_params._check import explain, require_instance
from vi_params.guide import Guide


class SolverStatus(enum.IntEnum):
    """How a solver ended."""

    CONVERGED = 0
    MAX_STEPS = 1
    STALLED = 2
    INVALID_START = 3
    INDEFINITE = 4
    DIVERGED = 5


ENDED = (SolverStatus.CONVERGED, SolverStatus.STALLED)
"""How a search has ended that may have found an optimum: in float32 one can stall there, and what
that is worth, importance weights tell."""

MESSAGES = {
    SolverStatus.CONVERGED: "converged",
    SolverStatus.MAX_STEPS: "not converged: max_steps was reached; give it more",
    SolverStatus.STALLED: "not converged: no step of any length lowers the loss; the log density "
    "is not smooth there, or float32 is too coarse (jax_enable_x64)",
    SolverStatus.INVALID_START: "no start has a finite loss and gradient: vi.check(target, key) "
    "says why, init= gives a start",
    SolverStatus.INDEFINITE: "the Hessian at the solution is not positive definite: the scales are "
    "those of mean-field or of the Hessian's diagonal, without covariances",
    SolverStatus.DIVERGED: "diverged: the approximation spreads without end, or the log density is "
    "not finite at its draws; the posterior may be improper",
}


def own_name(guide: Guide, where: str) -> str:
    """The name of the parameters of a guide that has one family of them.

    Raises:
        ValueError: it has none, or several.
    """
    if len(guide.declared) != 1:
        raise ValueError(
            explain(
                "A guide of one family was expected.",
                expected="one by vi.guides, as the solvers return",
                received=f"a guide with parameters {sorted(guide.declared)}",
                where=where,
            )
        )
    return next(iter(guide.declared))


class SolverInfo(NamedTuple):
    """How a solver got on.

    Attributes:
        status: a `SolverStatus`.
        elbo: the ELBO at the solver's own draws, in nats; of `laplace` and `merge`, a log evidence.
        steps: how many steps the best lane took.
        lane_elbos: the ELBO each lane ended at, shape (lanes,); NaN where its start was invalid.
        lane_statuses: the `SolverStatus` of each lane, shape (lanes,).
        sampling_error: the largest standard error of a location due to the draws being so few, in
            posterior standard deviations; NaN where it was not estimated.
        details: what the solver tells besides, as its docstring says; None for most.
    """

    status: jax.Array
    elbo: jax.Array
    steps: jax.Array
    lane_elbos: jax.Array
    lane_statuses: jax.Array
    sampling_error: jax.Array
    details: Any = None

    @property
    def message(self) -> str:
        """The status in words."""
        if np.ndim(self.status):
            counts = [(s, int(np.sum(np.asarray(self.status) == s))) for s in SolverStatus]
            return "; ".join(f"{n} x {MESSAGES[s]}" for s, n in counts if n)
        return MESSAGES[SolverStatus(int(self.status))]


class Slopes(NamedTuple):
    """Where the gradient of the log density over unconstrained vectors is known.

    Attributes:
        position: the vectors, shape (n, dim).
        gradient: of the log density there, shape (n, dim).
        weights: how they count, shape (n,), adding up to one.
    """

    position: Any
    gradient: Any
    weights: Any


class Solution(NamedTuple):
    """An approximation: a guide and its parameters, as every later call takes them.

    Attributes:
        guide: the family.
        params: the joint parameters of target and guide, unconstrained.
        info: a `SolverInfo`.
        noise: the fixed draws behind it, shape (num_draws, dim); none, num_draws = 0, where a
            solver draws anew at every step.
        response: the `Response` at the solution, for `vi.linear_response`; None where the Hessian
            would be large, and for other solvers.
        lanes: `(params, response)` of every lane of `vi.solvers.deterministic`, leading axis the
            lanes; None for other solvers.
        slopes: the `Slopes` at the fixed draws, of a dense `vi.linear_response`; None for others.
    """

    guide: Guide
    params: Any
    info: SolverInfo
    noise: jax.Array
    response: Any = None
    lanes: Any = None
    slopes: Slopes | None = None

    def __str__(self) -> str:
        error = self.info.sampling_error
        told = "" if np.any(np.isnan(error)) else f", sampling error {np.max(error):.3f} sd"
        return f"{self.info.message} after {np.max(self.info.steps)} steps{told}"


def require_mean_field(solution: Solution, where: str) -> str:
    """The name of the family of a mean-field solution at antithetic draws."""
    require_instance(solution, Solution, "vi.solvers.deterministic(...)", where)
    name = own_name(solution.guide, where)
    num_draws = len(solution.noise)
    if set(solution.params[name]) != {"loc", "scale"} or num_draws == 0 or num_draws % 2:
        raise ValueError(
            explain(
                "A mean-field solution at antithetic draws was expected.",
                expected="what vi.solvers.deterministic returns",
                received=f"parameters {sorted(solution.params[name])}, {num_draws} draws",
                where=where,
            )
        )
    return name
