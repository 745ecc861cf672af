"""The one call for people who do not want to choose."""

import itertools
from concurrent.futures import Executor
from typing import Any

import jax
import numpy as np

from vi_params._arrays import on_host
from vi_params._check import explain, require_count, require_key
from vi_params._compile import compiler
from vi_params._table import Table
from vi_params._tree import fold_in_name
from vi_params.approximation.ahead import compile_usual
from vi_params.approximation.candidate import (
    Candidate,
    best_of,
    judge_of,
    judged,
    with_wide_tails,
)
from vi_params.approximation.centring import non_centred, suited
from vi_params.approximation.conditional import (
    CONDITIONAL,
    can_condition,
    conditioned,
    with_gradients,
)
from vi_params.approximation.flow import can_flow, flowed
from vi_params.approximation.judge import BATCH
from vi_params.approximation.nested import NESTED, can_nest, nested
from vi_params.approximation.optima import HESSIANS, optima
from vi_params.approximation.polish import can_polish, start_of
from vi_params.approximation.polish import polish as polished
from vi_params.approximation.result import Approximation
from vi_params.approximation.tails import heaviest
from vi_params.approximation.verdict import verdict
from vi_params.diagnostics import check
from vi_params.solvers.linear_response import linear_response
from vi_params.solvers.merge import merge
from vi_params.solvers.refine import refine
from vi_params.solvers.solution import Solution
from vi_params.solvers.start import data_of
from vi_params.target import Target, flat, recentring, whole

GUIDE = "guide"
"""What the guide's parameters are called."""

DENSE = 1000
"""The largest dimension in which linear response holds every covariance."""

RANK = 64
"""How many directions it holds above."""


def approximate(
    target: Target,
    key: jax.Array,
    data: Any = None,
    *,
    lanes: int = 8,
    polish: bool = True,
    flow: bool = False,
) -> Approximation:
    """A posterior approximation with a verdict, nothing to be tuned.

    Fixed-draw mean-field from several starts, covariances by linear response (in 33 to 1000
    dimensions from Hessians at eight of the fixed draws, in more along 64 directions), a judgement
    by Pareto-smoothed importance sampling, its tails widened (`vi.guides.contaminated_normal`, in
    up to 1000 dimensions); where distinct optima were found, their mixture; where that is not good
    enough, of one optimum in more than 8 dimensions, a Gaussian whose scales follow two directions,
    skewed across them (`vi.solvers.conditional_gaussian`), in more than 32 dimensions from
    gradients at 1000 draws, which is taken only where it is good and the spread with the heaviest
    tail has a standard error of at most 0.03, or where nothing else is to be trusted; then a
    mixture of Student-t distributions polished by population Monte Carlo: in up to 32 dimensions in
    all directions, or along those two where three times as many draws of that Gaussian are
    effective as of linear response; in up to 500 along two to four, across which it is conditional
    as well. It has 16 components, or 32 where they are free in all directions and less than a tenth
    of the draws that it starts from are effective. It stops at the first that is good: k-hat below
    0.5, a fifth of the draws effective and no spread that other draws might show; for the last two,
    which gain little more, 0.65 and 35 %, and 0.6 and 40 %. A Gaussian is judged by twice 4000
    draws, a conditional one that is not yet good enough by twice 8000, a mixture by more; a clear
    case, k-hat below 0.3 and half of the draws effective, by twice 1000 where latents and data are
    more than about 500 numbers.

    Trusted is what has a k-hat below 0.7 in two independent judgements, 15 % of the draws effective
    and spreads that show; of several, of those whose log evidence shows that they miss no mass, one
    whose spreads show before others, and then the most effective, a k-hat above 0.5 counted against
    it. The spread of a latent shows where the standard error of the logarithm of its standard
    deviation is at most 0.045, or 0.03 if the k-hat of its second moment exceeds 0.7, 0.02 if it
    exceeds 0.8, and where its kurtosis is such that 4000 draws of the posterior itself have it with
    at most 0.045. Where a trusted mixture does not show one, up to two more rounds fit it to what
    second moments depend on.

    Hierarchies of NumPyro programs are approximated in partially centred coordinates where
    `vi.recentred` has them; how far each latent is centred, a pilot decides by how much the data
    say of it. The latents, `draws` and `nuts_start` are in the program's own.

    It runs on the host; the pieces are pure: `vi.solvers.deterministic`, `vi.linear_response`,
    `vi.merge`, `vi.solvers.conditional_gaussian`, `vi.solvers.population_monte_carlo`,
    `vi.diagnose`, `vi.resample`. A second call with data of the same shapes compiles nothing that
    the first one needed.

    Args:
        target: what to approximate, with all its data at once.
        key: a typed random key.
        data: the data; the target's own where None.
        lanes: from how many starts.
        polish: whether to go on after linear response where it is not good enough (with mixtures
            in up to 500 dimensions).
        flow: whether to go on with a normalising flow where nothing yet is to be trusted, in up to
            1000 dimensions; it takes thousands of gradient steps.

    Returns:
        An `Approximation`: print it. `draws(key, n)` gives draws, importance-resampled where that
        can be relied on; where it is not to be trusted, `nuts_start(key)` gives MCMC a start.

    Raises:
        ValueError: no start has a finite density and gradient, lanes < 1, the data are a batch of
            rows, or the target has no continuous latents or a parameter called "guide".
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
    data = data_of(target, data)
    require_key(key, "approximate")
    require_count(lanes, "lanes", "approximate")
    target = _usable(whole(target))
    given, target = target, recentring(target) or target
    with compiler() as pool, on_host():
        candidates = _tried(pool, given, target, key, data, lanes, polish, flow)
    return _conclude(given, target, candidates, data)


def _tried(
    pool: Executor,
    given: Target,
    target: Target,
    key: jax.Array,
    data: Any,
    lanes: int,
    polish: bool,
    flow: bool,
) -> list[Candidate]:
    """What was tried until one was good enough, linear response first."""
    keys = (jax.random.fold_in(key, i) for i in itertools.count())
    centring = non_centred(target)
    if flat(target).dim <= DENSE:
        compile_usual(
            pool,
            given,
            target,
            key,
            data,
            centring,
            lanes,
            polished=polish and bool(centring),  # for a hierarchy a Gaussian seldom does
        )
    if centring:
        centring = suited(target, next(keys), data, lanes)

    first = next(keys)
    modes = _respond(target, first, data, centring, lanes)
    _require_valid(given, first, modes[0], data)
    wide = with_wide_tails(target, modes[0])
    candidates = [judged("linear response", wide, judge_of(target, wide, data), keys)]
    if len(modes) > 1:
        merged = merge(target, modes, next(keys), data, num_draws=BATCH)
        name = f"{len(modes)} optima merged"
        candidates.append(judged(name, merged, judge_of(target, merged, data), keys))
    best = start = best_of(candidates)
    if polish and not best.is_enough and can_condition(target, best.solution):
        response = start = with_gradients(target, best, data)
        if len(modes) == 1:
            # Under a name of its own: the rounds have the same keys whether it is tried or not.
            named = fold_in_name(key, CONDITIONAL)
            candidates = [response, conditioned(target, response, named, data)]
            best, start = best_of(candidates), start_of(target, *candidates)
    is_done = best.is_enough
    if polish and not is_done and can_nest(target):
        merged = candidates[1:] if len(modes) > 1 else []
        named = fold_in_name(key, NESTED)
        found = nested(pool, target, candidates[0], merged, named, data)
        best = best_of([*candidates, *found])
        candidates += found
        is_done = best.is_enough or any(one.is_trustworthy and one.is_determined for one in found)
    if polish and not is_done and can_polish(target, start):
        candidates.append(polished(pool, target, start, keys, data))
        best = best_of(candidates)
    if flow and not best.is_trustworthy and can_flow(candidates[0]):
        candidates.append(flowed(target, candidates[0], keys, data))
    return candidates


def _usable(target: Target) -> Target:
    """The target, which must have what is approximated and leave the guide its name."""
    if not flat(target).dim:
        raise ValueError(
            explain(
                "There is nothing to approximate.",
                expected="a target with continuous latents",
                received=f"latents {sorted(target.latents)}, discrete ones summed out",
                where="approximate, target",
                hint="without them the log density is the log evidence, and "
                "vi.infer_discrete gives the discrete ones",
            )
        )
    if GUIDE in target.declared:
        raise ValueError(
            explain(
                "A parameter has the name of the guide's.",
                expected=f"parameters of the target under other names than {GUIDE!r}",
                received=f"parameters {sorted(target.declared)}",
                where="approximate, target",
                hint="rename it",
            )
        )
    return target


def _respond(target: Target, key: jax.Array, data: Any, fixed: Any, lanes: int) -> list[Solution]:
    """A solution with linear response for every distinct optimum, the best first."""
    rank, num_hessians = (None, HESSIANS) if flat(target).dim <= DENSE else (RANK, None)
    first, *others = optima(target, key, data, fixed, lanes)
    best = refine(target, key, data, init=first, fixed=fixed, rank=rank, num_hessians=num_hessians)
    rest = (
        linear_response(target, one, data, rank=rank, num_hessians=num_hessians) for one in others
    )
    return [best, *rest]


def _conclude(
    target: Target, coordinates: Target, candidates: list[Candidate], data: Any
) -> Approximation:
    """The best candidate, with its verdict beside what else was tried."""
    best = best_of(candidates)
    rows = tuple(
        (
            "* " + one.name if one is best else one.name,
            float(one.diagnosis.k_hat),
            100 * one.share,
            float(one.diagnosis.log_evidence),
        )
        for one in candidates
    )
    return Approximation(
        guide=best.solution.guide,
        params=best.solution.params,
        diagnosis=best.diagnosis,
        trustworthy=best.is_trustworthy and best.is_shown,
        resampled=best.is_trustworthy,
        verdict=verdict(best, candidates[0].solution.info),
        table=Table(("approximation", "k-hat", "ESS %", "log evidence"), rows),
        target=target,
        coordinates=coordinates,
        data=data,
        judge=best.judge,
        sorted_by=heaviest(best.batches[0]) if best.is_trustworthy else None,
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
