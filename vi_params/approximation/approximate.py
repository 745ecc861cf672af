"""The one call for people who do not want to choose."""

from typing import Any

import jax

from vi_params._arrays import on_host
from vi_params._check import explain, require_count, require_key
from vi_params._compile import compiler
from vi_params._table import Table
from vi_params.approximation.candidate import Candidate, best_of
from vi_params.approximation.result import Approximation
from vi_params.approximation.stages import tried
from vi_params.approximation.verdict import verdict
from vi_params.solvers.start import data_of
from vi_params.target import Target, flat, recentring, whole

GUIDE = "guide"
"""What the guide's parameters are called."""


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

    Tried one after the other, until one is good enough:

    - fixed-draw mean-field from several starts, covariances by linear response (in 33 to 1000
      dimensions from Hessians at eight of the fixed draws, in more along 64 directions), its tails
      widened (`vi.guides.contaminated_normal`, in up to 1000 dimensions); of distinct optima their
      mixture;
    - of one optimum in more than 8 dimensions, a Gaussian whose scales follow two directions, and
      skewed across them (`vi.solvers.conditional_gaussian`), in more than 32 from gradients at 1000
      draws, taken only where it is good and the spread with the heaviest tail has a standard error
      of at most 0.03, or where nothing else is to be trusted; left out in up to 100 dimensions
      where less than 2 % of the draws of linear response are effective;
    - in 9 to 100 dimensions, where up to four latents leave less than half of the squared third
      derivatives, a nested Laplace approximation given these (`vi.solvers.nested_laplace`) and,
      along them, a mixture of Student-t distributions by population Monte Carlo, its nodes moved to
      where the draws are; of several optima only where it misses no mass that their mixture has
      found. Where it is to be trusted and more than half of its draws are effective, nothing
      follows;
    - there, too, where that is not enough, a Gaussian given those up to twelve latents that leave
      less than a tenth of the squared third derivatives, or given the few, its means and scales
      across them fitted to gradients at 2000 draws of linear response and then, twice, at its own;
    - a mixture polished so in up to 32 dimensions in all directions, or along those two where three
      times as many draws of the conditional Gaussian are effective as of linear response; in up to
      500 along two to four, across which it is conditional as well. It has 16 components, or 32
      where they are free in all directions and less than a tenth of the draws that it starts from
      are effective.

    Each is judged by Pareto-smoothed importance sampling: a Gaussian by twice 4000 draws, a
    conditional one that is not yet good enough by twice 8000, one given several latents, where
    latents and data are at most about 500 numbers, by up to twice 64000, a mixture by more, or once
    where that shows that it is not to be trusted. Where latents and data are more than about 500
    numbers, a clear case, k-hat below 0.3 and half of the draws effective, is judged by twice 1000,
    and a Gaussian that is followed by a conditional one by 1000 where these do not trust it. Good
    is a k-hat below 0.5, a fifth of the draws effective and no spread that other draws might show;
    for a conditional Gaussian, one given several latents and mixtures, which gain little more, 0.65
    and 35 %, 0.65 and 20 %, and 0.6 and 40 %.

    Trusted is what has a k-hat below 0.7 in two independent judgements, 15 % of the draws effective
    and spreads that show; of several, of those whose log evidence shows that they miss no mass, one
    whose spreads show before others, and then the most effective, a k-hat above 0.5 counted against
    it. The spread of a latent shows where the standard error of the logarithm of its standard
    deviation is at most 0.045, or 0.03 if the k-hat of its second moment exceeds 0.7, 0.02 if it
    exceeds 0.8, and where its kurtosis is such that 4000 draws of the posterior itself have it with
    at most 0.045, or where draws are resampled in its order and that k-hat is at most 0.3. Where a
    trusted mixture does not show one, up to two more rounds fit it to what second moments depend
    on.

    Hierarchies of NumPyro programs are approximated in partially centred coordinates where
    `vi.recentred` has them; how far each latent is centred, a pilot decides by how much the data
    say of it. The latents, `draws` and `nuts_start` are in the program's own.

    It runs on the host; the pieces are pure: `vi.solvers.deterministic`, `vi.linear_response`,
    `vi.merge`, `vi.solvers.conditional_gaussian`, `vi.solvers.nested_laplace`,
    `vi.solvers.population_monte_carlo`, `vi.diagnose`, `vi.resample`. A second call with data of
    the same shapes compiles nothing that the first one needed.

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
        An `Approximation`: print it. `moments(key)` gives means and standard deviations, of the
        weighted draws that it was judged by, `draws(key, n)` draws, importance-resampled where that
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
        >>> moments = posterior.moments(jax.random.key(1))  # it is Gamma(14, 4)
        >>> bool(abs(moments.mean["rate"] - 3.5) < 0.1), bool(abs(moments.sd["rate"] - 0.935) < 0.1)
        (True, True)
        >>> posterior.draws(jax.random.key(1), 2000)["rate"].shape
        (2000,)
    """
    data = data_of(target, data)
    require_key(key, "approximate")
    require_count(lanes, "lanes", "approximate")
    target = _usable(whole(target))
    given, target = target, recentring(target) or target
    with compiler() as pool, on_host():
        candidates = tried(pool, given, target, key, data, lanes, polish, flow)
    return _conclude(given, target, candidates, data)


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
        batches=tuple(batch._replace(position=None) for batch in best.batches),
        sorted_by=best.spread.order if best.is_trustworthy and best.spread else None,
    )
