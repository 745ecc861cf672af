"""Logistic regression: what an approximate posterior is good for, and what to check first.

569 tumours, 30 measurements each, benign or malignant. The measurements are strongly correlated
(radius, perimeter and area of the same cell nuclei), so the posterior of their weights is too:

    strength ~ HalfNormal(1),   weight_j ~ Normal(0, strength),   bias ~ Normal(0, 2),
    benign_i ~ Bernoulli(sigmoid(bias + x_i . weight)).

Two families are fitted to 80 % of the tumours and compared twice:

- by how well they predict the other 20 %, with the predictions averaged over draws of the weights:
  accuracy, and the log predictive density, which punishes confident errors;
- by `vi.diagnose`, which asks how close they are to the posterior itself.

The answers differ: predictions forgive much that the posterior of a single weight does not.

Run it with `python examples/logistic_regression.py`. It needs scikit-learn for the data.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist

import vi_params as vi

try:
    from sklearn.datasets import load_breast_cancer
    from sklearn.model_selection import train_test_split
    from sklearn.preprocessing import StandardScaler
except ImportError as error:
    raise SystemExit(
        "This example takes its data from scikit-learn. Install the examples extra:\n"
        "    pip install 'vi_params[examples]'"
    ) from error


def model(x, benign):
    strength = numpyro.sample("strength", dist.HalfNormal(1))
    bias = numpyro.sample("bias", dist.Normal(0, 2))
    with numpyro.plate("measurements", x.shape[1]):
        weight = numpyro.sample("weight", dist.Normal(0, strength))
    logits = numpyro.deterministic("logits", bias + x @ weight)
    with numpyro.plate("tumours", x.shape[0]):
        numpyro.sample("benign", dist.Bernoulli(logits=logits), obs=benign)


class Result(NamedTuple):
    """One approximation, its judgement and its predictions."""

    fit: vi.Fit
    diagnosis: vi.Diagnosis
    draws: dict[str, jax.Array]
    accuracy: float
    log_predictive_density: float


def load_data():
    """Training and held-out data, standardised by the training data's means and scales."""
    x, benign = load_breast_cancer(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(
        x, benign, test_size=0.2, random_state=0, stratify=benign
    )
    scaler = StandardScaler().fit(x_train)
    train = {"x": scaler.transform(x_train), "benign": y_train}
    held_out = {"x": scaler.transform(x_test), "benign": y_test}
    return train, held_out


def predict(logits: jax.Array, benign: jax.Array) -> tuple[float, float]:
    """Accuracy and mean log predictive density, from logits of shape (draws, tumours).

    The predictive probability is the mean over draws of the probability, not the probability at the
    mean weights: where the draws disagree it moves towards one half.
    """
    log_prob = dist.Bernoulli(logits=logits).log_prob(benign)
    log_density = jax.scipy.special.logsumexp(log_prob, axis=0) - jnp.log(len(logits))
    probability = jnp.mean(jax.nn.sigmoid(logits), axis=0)
    return float(jnp.mean((probability > 0.5) == benign)), float(jnp.mean(log_density))


def main() -> dict[str, Result]:
    train, held_out = load_data()
    target = vi.from_numpyro(model, **train)
    print(vi.check(target, jax.random.key(0)), end="\n\n")

    results = {}
    families = {"mean-field": vi.guides.mean_field, "full-rank": vi.guides.full_rank}
    for name, family in families.items():
        fit_key, diagnose_key, draws_key = jax.random.split(jax.random.key(1), 3)
        guide = family(target)
        objective = vi.elbo(target, guide, num_particles=10)
        fit = vi.fit(objective, key=fit_key, progress=False)
        diagnosis = vi.diagnose(target, guide, fit.params, diagnose_key)
        # The same model at other data: its deterministic site "logits" follows them.
        draws = vi.draws(target, guide, fit.params, draws_key, 2000, data=held_out)
        results[name] = Result(fit, diagnosis, draws, *predict(draws["logits"], held_out["benign"]))
        print(f"== {name}\n{fit}\n{diagnosis}", end="\n\n")

    columns = ("family", "accuracy", "log density a tumour", "elbo", "k-hat", "sd of weight[0]")
    rows = tuple(
        (
            name,
            result.accuracy,
            result.log_predictive_density,
            float(result.diagnosis.elbo),
            float(result.diagnosis.k_hat),
            float(jnp.std(result.draws["weight"][:, 0])),
        )
        for name, result in results.items()
    )
    print(f"== {len(held_out['benign'])} tumours that were held out")
    print(vi.Table(columns, rows))
    print("(always guessing the more frequent class: ", end="")
    print(f"accuracy {max(held_out['benign'].mean(), 1 - held_out['benign'].mean()):.4g})\n")

    first, second = results.values()
    ratio = float(jnp.mean(jnp.std(second.draws["weight"], 0) / jnp.std(first.draws["weight"], 0)))
    print(
        "Both predict about equally well. The families differ in the weights themselves: full-rank"
    )
    print(
        f"finds them {ratio:.1f} times as uncertain as mean-field, which cannot let one correlated"
    )
    print("measurement stand in for another. For predictions either will do; for a statement about")
    print("a single weight, go by the diagnosis.")
    return results


if __name__ == "__main__":
    main()
