"""Eight schools: the same model written twice, approximated in one call and by hand, and judged.

Eight schools each tried a coaching programme and reported an effect y with a standard error sigma
(Rubin, 1981). The hierarchical model pools them,

    mu ~ Normal(0, 5),   tau ~ HalfCauchy(5),
    theta_j ~ Normal(mu, tau),   y_j ~ Normal(theta_j, sigma_j).

Written like this (*centred*), the posterior is a funnel: where tau is small, all theta are squeezed
together, and no Gaussian follows that. Written with theta = mu + tau * z, z ~ Normal(0, 1)
(*non-centred*), it is the same model over other coordinates, and nearly Gaussian.

A fit always returns numbers. This script shows how to tell which of them to believe. First
`vi.approximate` does everything in one call and says whether to trust it; it sees that theta has a
scale that is a latent itself, and centres it as far as the data ask. Then by hand, with Gaussians
in the program's own coordinates:

1. `vi.check` looks at the model before anything is fitted,
2. `vi.fit` with restarts shows whether the optimiser finds the same place again,
3. `vi.diagnose` holds the approximation against the model by importance sampling.

Run it with `python examples/eight_schools.py`. With matplotlib it also draws eight_schools.png.
"""

import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist

import vi_params as vi

Y = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
PICTURE = pathlib.Path(__file__).with_suffix(".png")


def centred(sigma, y):
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    with numpyro.plate("schools", len(sigma)):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def non_centred(sigma, y):
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    with numpyro.plate("schools", len(sigma)):
        z = numpyro.sample("z", dist.Normal(0, 1))
        theta = numpyro.deterministic("theta", mu + tau * z)
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


class Result(NamedTuple):
    """One approximation and everything that is known about it."""

    target: vi.Target
    guide: vi.Guide
    fit: vi.Fit
    diagnosis: vi.Diagnosis
    draws: dict[str, jax.Array]


def approximate(target: vi.Target, family: Any, key: jax.Array) -> Result:
    """Fits one family to one target, from ten starts, and judges the best of them."""
    fit_key, diagnose_key, draws_key = jax.random.split(key, 3)
    guide = family(target)
    objective = vi.elbo(target, guide, num_particles=10)
    fit = vi.fit(objective, key=fit_key, restarts=10, progress=False)
    diagnosis = vi.diagnose(target, guide, fit.params, diagnose_key)
    draws = vi.draws(target, guide, fit.params, draws_key, 4000)
    return Result(target, guide, fit, diagnosis, draws)


def compare(results: dict[tuple[str, str], Result]) -> vi.Table:
    """One row an approximation."""
    columns = ("model", "family", "elbo", "se", "k-hat", "ESS", "log evidence", "verdict")
    rows = tuple(
        (
            *name,
            round(float(result.diagnosis.elbo), 2),
            round(float(result.diagnosis.elbo_se), 2),
            round(float(result.diagnosis.k_hat), 2),
            round(float(result.diagnosis.ess)),
            round(float(result.diagnosis.log_evidence), 2),
            result.diagnosis.verdict.split(":")[0].split(" (")[0],
        )
        for name, result in results.items()
    )
    return vi.Table(columns, rows)


def conclude(results: dict[tuple[str, str], Result], best: tuple[str, str]) -> None:
    """Says which approximations to trust."""
    trusted, refused = [], []
    for name, result in results.items():
        (trusted if result.diagnosis.trustworthy else refused).append(", ".join(name))
    print(f"Trust: {'; '.join(trusted) or 'none of them; use MCMC'}.")
    print(f"Closest to the posterior (highest ELBO): {', '.join(best)}.")
    print(f"Do not trust: {'; '.join(refused) or 'none to be named'}.")
    print()
    print("Every fit converged and its restarts agree; that alone says nothing about the answer.")
    print("The centred fits miss the neck of the funnel, where tau is small. 1 % quantiles of tau:")
    for name, result in results.items():
        print(f"  {float(np.quantile(result.draws['tau'], 0.01)):5.2f}  {', '.join(name)}")


def draw_picture(results: dict[tuple[str, str], Result], best: tuple[str, str]) -> bool:
    """Intervals of the school effects and the losses, if matplotlib is there."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, (name, result) in enumerate(results.items()):
        theta = np.asarray(result.draws["theta"])
        low, middle, high = np.quantile(theta, [0.05, 0.5, 0.95], axis=0)
        at = np.arange(len(Y)) + 0.15 * (i - 1.5)
        label = ", ".join(name) + (" (best)" if name == best else "")
        left.errorbar(at, middle, [middle - low, high - middle], fmt="o", ms=3, label=label)
        smooth = np.convolve(result.fit.losses, np.full(100, 0.01), "valid")
        right.plot(smooth, label=label)
    left.plot(np.arange(len(Y)), Y, "kx", label="observed effect")
    left.set(xlabel="school", ylabel="effect theta (median, 90 % interval)")
    left.legend(fontsize=7)
    lowest = min(-float(result.diagnosis.elbo) for result in results.values())
    right.set(xlabel="step", ylabel="loss = -ELBO (mean of 100 steps)")
    right.set_ylim(lowest - 0.3, lowest + 4)
    figure.savefig(PICTURE, dpi=120)
    return True


def main() -> dict[tuple[str, str], Result]:
    models = {"non-centred": non_centred, "centred": centred}
    families = {"mean-field": vi.guides.mean_field, "full-rank": vi.guides.full_rank}
    targets = {name: vi.from_numpyro(model, SIGMA, Y) for name, model in models.items()}

    # The whole way in one call.
    for i, (name, target) in enumerate(targets.items()):
        print(f"== in one call: {name}")
        posterior = vi.approximate(target, jax.random.key(i))
        print(posterior)
        if posterior.trustworthy:
            draws = posterior.draws(jax.random.key(2), 4000)
            print(vi.summary({name: draws[name] for name in ("mu", "tau", "theta")}))
        print()

    # By hand. Before anything is fitted: is the model finite where a fit would start?
    for name, target in targets.items():
        print(f"== check: {name}")
        print(vi.check(target, jax.random.key(0)), end="\n\n")

    results = {}
    for model_name, target in targets.items():
        for family_name, family in families.items():
            key = jax.random.fold_in(jax.random.key(1), len(results))
            result = approximate(target, family, key)
            results[model_name, family_name] = result
            print(f"== {model_name}, {family_name}")
            print(f"{result.fit.status.name} after {result.fit.steps} steps. {result.fit.message}")
            print(result.diagnosis, end="\n\n")

    print("== comparison")
    print(compare(results), end="\n\n")

    # All four approximate the same posterior: log evidence and ELBO can be compared directly. The
    # highest ELBO is the smallest Kullback-Leibler divergence from the posterior.
    best = max(results, key=lambda name: float(results[name].diagnosis.elbo))
    chosen = results[best]
    print(f"== the best: {', '.join(best)}")
    print(vi.summary({name: chosen.draws[name] for name in ("mu", "tau", "theta")}), end="\n\n")
    print("its parameters, as they are trained (unconstrained):")
    print(vi.describe(chosen.guide.declared, chosen.fit.params), end="\n\n")

    if draw_picture(results, best):
        print(f"Picture: {PICTURE}\n")
    else:
        print("No picture: matplotlib is not installed (pip install 'vi_params[plot]').\n")

    print("== which to trust")
    conclude(results, best)
    return results


if __name__ == "__main__":
    main()
