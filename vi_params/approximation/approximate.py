"""The one call for people who do not want to choose."""

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from vi_params._cache import program
from vi_params._check import explain, require_count, require_instance, require_key
from vi_params._compile import Quick
from vi_params._table import Table
from vi_params.approximation.ahead import compile_usual
from vi_params.approximation.result import BATCH, Approximation, judge
from vi_params.diagnostics import Diagnosis, check
from vi_params.diagnostics.diagnose import threshold
from vi_params.importance import Weighted
from vi_params.objectives.objective import resolve
from vi_params.solvers.deterministic import deterministic
from vi_params.solvers.linear_response import linear_response
from vi_params.solvers.merge import merge
from vi_params.solvers.optima import distinct
from vi_params.solvers.population_monte_carlo import GOOD_K_HAT, GOOD_SHARE, population
from vi_params.solvers.solution import Solution, SolverStatus
from vi_params.target import Target, flat

COMPONENTS = 8
"""How many components the mixture has that polishes an approximation."""

DF = 7
"""Their degrees of freedom."""

MIXTURE = 32
"""The largest dimension in which a mixture is tried."""

ROUNDS = 10
"""How many rounds of population Monte Carlo are made at most."""

EFFECTIVE = 0.05
"""The smallest share of effective draws at which resampling them is worth it."""

POLISHED = "population Monte Carlo"
"""What the polished mixture is called."""

TOLERABLE = 0.5
"""The largest sampling error of the fixed draws, in posterior standard deviations: above it they
are doubled (Giordano, Ingram and Broderick, 2024, section 3.3)."""

DOUBLINGS = 3
"""How often they are doubled at most."""

DENSE = 1000
"""The largest dimension in which linear response holds every covariance."""

RANK = 64
"""How many directions it holds above."""


class Candidate(NamedTuple):
    """An approximation that was tried.

    Attributes:
        name: how it was found.
        solution: the guide and its parameters.
        diagnosis: the worse of two judgements by independent draws: one can be lucky.
        drawn: the draws of the first.
    """

    name: str
    solution: Solution
    diagnosis: Diagnosis
    drawn: Weighted

    @property
    def share(self) -> float:
        """How many of the draws are effective."""
        return float(self.diagnosis.ess) / BATCH

    @property
    def is_good(self) -> bool:
        """Whether there is nothing left to gain.

        What was fitted to its own weighted draws is asked for more: a tail that they do not reach
        is missing from the fit and from the weights alike.
        """
        limit = GOOD_K_HAT if self.name == POLISHED else threshold(BATCH)
        return float(self.diagnosis.k_hat) < limit and self.share > GOOD_SHARE

    @property
    def is_trustworthy(self) -> bool:
        """Whether its weighted draws are the posterior's."""
        if self.name == POLISHED:
            return self.is_good
        return float(self.diagnosis.k_hat) < threshold(BATCH) and self.share > EFFECTIVE


def approximate(
    target: Target, key: jax.Array, data: Any = None, *, lanes: int = 4, polish: bool = True
) -> Approximation:
    """A posterior approximation with a verdict, nothing to be tuned.

    Fixed-draw mean-field from several starts, covariances by linear response, a judgement by
    Pareto-smoothed importance sampling; where distinct optima were found, their mixture; where that
    is not good enough, a mixture of Student-t distributions polished by population Monte Carlo. It
    stops at the first that is good: k-hat below 0.7 (0.5 for the mixture, which was fitted to such
    weights) in two independent judgements, and half of the draws effective.

    It runs on the host; the pieces are pure: `vi.solvers.deterministic`, `vi.linear_response`,
    `vi.merge`, `vi.solvers.population_monte_carlo`, `vi.diagnose`, `vi.resample`. A second call
    with data of the same shapes compiles nothing new.

    Args:
        target: what to approximate, with all its data at once.
        key: a typed random key.
        data: the data; the target's own where None.
        lanes: from how many starts.
        polish: whether to go on after linear response where it is not good enough.

    Returns:
        An `Approximation`: print it. `draws(key, n)` gives draws, importance-resampled where that
        can be relied on; where it is not to be trusted, `nuts_start(key)` gives MCMC a start.

    Raises:
        ValueError: no start has a finite density and gradient, or lanes < 1.
        KeyError: `data` has unknown names, or lacks one.
        TypeError: `key` is not a typed key, or `target` is no target.

    Example:
        >>> from numpyro import distributions as dist
        >>> def log_density(values, latents, data):
        ...     prior = dist.Gamma(2.0, 1.0).log_prob(latents["rate"])
        ...     return prior + dist.Poisson(latents["rate"]).log_prob(data).sum()
        >>> latents = {"rate": vi.Latent((), dist.constraints.positive)}
        >>> target = vi.target(log_density, latents, data=jnp.array([3.0, 5.0, 4.0]))
        >>> posterior = vi.approximate(target, jax.random.key(0))
        >>> posterior.trustworthy
        True
        >>> draws = posterior.draws(jax.random.key(1), 2000)["rate"]  # it is Gamma(14, 4)
        >>> bool(abs(draws.mean() - 3.5) < 0.1), bool(abs(draws.var() - 0.875) < 0.1)
        (True, True)
    """
    require_instance(target, Target, "vi.target or vi.from_numpyro", "approximate, target")
    require_key(key, "approximate")
    require_count(lanes, "lanes", "approximate")
    data = resolve(target, data)
    keys = (jax.random.fold_in(key, i) for i in itertools.count())
    if flat(target).dim <= DENSE:
        compile_usual(target, key, data, lanes)

    first = next(keys)
    solution, modes = _respond(target, first, data, lanes)
    _require_valid(target, first, solution, data)
    candidates = [_judge("linear response", target, solution, keys, data)]
    if len(modes) > 1:
        merged = merge(target, modes, next(keys), data, num_draws=BATCH)
        candidates.append(_judge(f"{len(modes)} optima merged", target, merged, keys, data))
    best = _best(candidates)
    if polish and not best.is_good and flat(target).dim <= MIXTURE:
        candidates.append(_polish(target, best, keys, data))
        trusted = [candidate for candidate in candidates if candidate.is_trustworthy]
        best = _best(trusted or candidates)
    return _conclude(target, candidates, best, data)


def _respond(
    target: Target, key: jax.Array, data: Any, lanes: int
) -> tuple[Solution, list[Solution]]:
    """The best solution with linear response, and that of every distinct optimum."""
    num_draws, rank = None, None if flat(target).dim <= DENSE else RANK
    for _ in range(1 + DOUBLINGS):
        solution = deterministic(target, key, data, lanes=lanes, num_draws=num_draws)
        best = linear_response(target, solution, data, rank=rank)
        if not float(best.info.sampling_error) > TOLERABLE:
            break
        num_draws = 2 * len(solution.noise)
    modes = [best]
    for i in distinct(solution):
        lane = jax.tree.map(lambda leaf, i=i: leaf[i], solution.lanes)
        info = solution.info._replace(status=solution.info.lane_statuses[i])
        other = solution._replace(params=lane[0], info=info, response=lane[1])
        modes.append(linear_response(target, other, data, rank=rank))
    return best, modes


def _judge(
    name: str, target: Target, solution: Solution, keys: Iterator[jax.Array], data: Any
) -> Candidate:
    weighted = judge(target, solution.guide)
    draws = [weighted(solution.params, next(keys), data) for _ in range(2)]
    judgements = [jax.device_get(diagnosis) for _, diagnosis in draws]
    worse = max(judgements, key=lambda d: np.nan_to_num(d.k_hat, nan=np.inf))
    return Candidate(name, solution, worse, draws[0][0])


def _best(candidates: list[Candidate]) -> Candidate:
    """The one whose weights have the lightest tail; among light ones, the most effective."""

    def rank(candidate: Candidate) -> tuple[float, float]:
        k_hat = np.nan_to_num(candidate.diagnosis.k_hat, nan=np.inf)
        return max(float(k_hat), GOOD_K_HAT), -candidate.share

    return min(candidates, key=rank)


def _polish(target: Target, start: Candidate, keys: Iterator[jax.Array], data: Any) -> Candidate:
    """The best mixture of some rounds of population Monte Carlo."""
    rounds = population(target, start.solution.guide, COMPONENTS, DF, BATCH)
    begin, refit = program(_compiled, rounds)
    key = next(keys)
    with ThreadPoolExecutor() as pool:  # as `compile_usual` does it
        params = begin.ahead(pool, start.solution.params, key, start.drawn)
        judge(target, rounds.guide).ahead(pool, params, key, data)
        refit.ahead(pool, params, start.drawn)
    params = begin(start.solution.params, key, start.drawn)
    drawn, tried = start.drawn, []
    for _ in range(ROUNDS):
        params = refit(params, drawn)
        solution = start.solution._replace(guide=rounds.guide, params=params)
        tried.append(_judge(POLISHED, target, solution, keys, data))
        drawn = tried[-1].drawn
        if tried[-1].is_good:
            break
    return _best(tried)


def _compiled(rounds: Any) -> tuple[Quick, Quick]:
    return Quick(rounds.begin), Quick(rounds.refit)


def _conclude(
    target: Target, candidates: list[Candidate], best: Candidate, data: Any
) -> Approximation:
    """The best candidate, with its verdict beside what else was tried."""
    rows = tuple(
        (
            "* " + one.name if one is best else one.name,
            float(one.diagnosis.k_hat),
            100 * one.share,
            float(one.diagnosis.elbo),
            float(one.diagnosis.log_evidence),
        )
        for one in candidates
    )
    return Approximation(
        guide=best.solution.guide,
        params=best.solution.params,
        diagnosis=best.diagnosis,
        trustworthy=best.is_trustworthy,
        resampled=best.is_trustworthy,
        verdict=_verdict(best),
        table=Table(("approximation", "k-hat", "ESS %", "ELBO", "log evidence"), rows),
        target=target,
        data=data,
    )


def _verdict(best: Candidate) -> str:
    k_hat, limit = float(best.diagnosis.k_hat), threshold(BATCH)
    found = f"{best.name}: k-hat {k_hat:.2f}, {100 * best.share:.0f} % of the draws effective"
    if best.is_trustworthy:
        return f"Trust this ({found}); draws are importance-resampled."
    reason = "the tail of the importance weights is too heavy"
    if k_hat < limit:
        reason = "too few draws count, or tails were not reached"
    info = best.solution.info
    told = ""
    if int(info.status) != SolverStatus.CONVERGED:
        told = f" The solver: {info.message}."
    return (
        f"Do not trust this ({found}): {reason}. Use MCMC; .nuts_start(key) gives it starting "
        f"points and a mass matrix. Draws are the guide's own, not resampled.{told}"
    )


def _require_valid(target: Target, key: jax.Array, solution: Solution, data: Any) -> None:
    """Raises, saying why, where no lane had a valid start."""
    if not np.all(np.isnan(np.asarray(solution.info.lane_elbos))):
        return
    report = check(target, key, data)
    raise ValueError(
        explain(
            "No start has a finite log density and gradient.",
            expected="a finite log density, gradient and Hessian at one of the starts",
            received="; ".join(report.problems) or "a gradient or Hessian that is not finite",
            where="approximate",
            hint=f"mend the model; vi.check(target, key) shows every site:\n{report}",
        )
    )
