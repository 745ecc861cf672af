"""A Gaussian mixture: labels nobody gave, summed out for the fit and drawn afterwards.

150 irises, 4 measurements of each, three species (Anderson, 1935). The model is told the
measurements only:

    weights ~ Dirichlet(5, 5, 5),   mean_k ~ Normal(0, 2),   scale_k ~ LogNormal(-0.5, 0.5),
    correlation_k ~ LKJ(2),   species_i ~ Categorical(weights),
    flower_i ~ MultivariateNormal(mean, scale and correlation of species_i).

The species of a flower is a discrete latent, and discrete latents have no gradient. With
`vi.from_numpyro(..., enumerate=True)` they are summed out exactly, flower by flower: what is left
has continuous latents only, and every guide applies. Once it is fitted, `vi.infer_discrete` draws
the species of all flowers given the draws of the rest. Together they are draws of the joint
posterior: how often a flower gets a species is how probable that is.

The order of the parts means nothing to the model: the posterior has 3! = 6 equal modes. The fit
settles in one of them, which is all that is wanted here. The parts are matched with the botanists'
species at the end, to count errors, and scikit-learn's maximum likelihood is the judge.

Run it with `python examples/mixture.py`. It needs scikit-learn for the data and funsor for the sum.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

import vi_params as vi

try:
    from sklearn.datasets import load_iris
    from sklearn.mixture import GaussianMixture
except ImportError as error:
    raise SystemExit(
        "This example takes its data from scikit-learn. Install the examples extra:\n"
        "    pip install 'vi_params[examples]'"
    ) from error

NUM_SPECIES = 3


def model(flowers):
    num_features = flowers.shape[1]
    weights = numpyro.sample("weights", dist.Dirichlet(5.0 * jnp.ones(NUM_SPECIES)))
    with numpyro.plate("species", NUM_SPECIES):
        mean = numpyro.sample("mean", dist.Normal(0, 2).expand([num_features]).to_event(1))
        scale = numpyro.sample(
            "scale", dist.LogNormal(-0.5, 0.5).expand([num_features]).to_event(1)
        )
        correlation = numpyro.sample("correlation", dist.LKJCholesky(num_features, 2.0))
    cholesky = scale[:, :, None] * correlation
    with numpyro.plate("flowers", len(flowers)):
        species = numpyro.sample("label", dist.Categorical(weights))
        law = dist.MultivariateNormal(mean[species], scale_tril=cholesky[species])
        numpyro.sample("flower", law, obs=flowers)
    numpyro.deterministic("counts", jnp.sum(jax.nn.one_hot(species, NUM_SPECIES), axis=-2))


class Result(NamedTuple):
    """What was found: a probability of each species for each flower, and how it was found."""

    fit: vi.Fit
    diagnosis: vi.Diagnosis
    draws: dict[str, jax.Array]
    discrete: dict[str, jax.Array]
    probability: np.ndarray
    errors: int
    errors_of_scikit_learn: int


def match(probability: np.ndarray, species: np.ndarray) -> np.ndarray:
    """The columns in the order that agrees best with the species given."""
    orders = [list(order) for order in itertools.permutations(range(NUM_SPECIES))]
    return max(
        (probability[:, order] for order in orders),
        key=lambda p: np.sum(np.argmax(p, axis=1) == species),
    )


def main() -> Result:
    iris = load_iris()
    flowers = (iris.data - iris.data.mean(0)) / iris.data.std(0)
    target = vi.from_numpyro(model, flowers, enumerate=True)
    print(f"The target's latents: {', '.join(target.latents)}; the labels are summed out.\n")

    # A mixture has poor optima beside its good ones, and restarts that disagree show it. Points are
    # cheap: many starts, and from the best of them on a distribution.
    keys = iter(jax.random.split(jax.random.key(0), 6))
    point = vi.guides.delta(target)
    search = vi.fit(vi.elbo(target, point), key=next(keys), restarts=10, progress=False)
    print(f"{search}\n")
    best = point.sample(search.params, next(keys)).latents

    guide = vi.guides.full_rank(target, init=best)
    objective = vi.elbo(target, guide, num_particles=4)
    fit = vi.fit(objective, key=next(keys), num_steps=8000, progress=False)
    diagnosis = vi.diagnose(target, guide, fit.params, next(keys))
    print(f"{fit}\n{diagnosis}\n")
    draws = vi.draws(target, guide, fit.params, next(keys), 1000)
    discrete = vi.infer_discrete(target, draws, next(keys))
    labels = np.asarray(discrete["label"])
    probability = np.mean(labels[:, :, None] == np.arange(NUM_SPECIES), axis=0)
    probability = match(probability, iris.target)
    guess = np.argmax(probability, axis=1)
    counts = np.zeros((NUM_SPECIES, NUM_SPECIES), int)
    np.add.at(counts, (iris.target, guess), 1)
    rows = tuple((str(name), *row) for name, row in zip(iris.target_names, counts, strict=True))
    print(vi.Table(("species", "part 1", "part 2", "part 3"), rows), end="\n\n")
    errors = int(np.sum(guess != iris.target))
    expected = float(np.sum(1 - np.max(probability, axis=1)))
    parts = GaussianMixture(NUM_SPECIES, n_init=10, random_state=0).fit_predict(flowers)
    theirs = np.argmax(match(np.eye(NUM_SPECIES)[parts], iris.target), axis=1)
    rival = int(np.sum(theirs != iris.target))
    print(
        f"{errors} of 150 flowers are in another part than their species; the draws of the labels"
    )
    print(f"expect {expected:.1f} such errors. scikit-learn's GaussianMixture makes {rival}.")
    low, high = np.quantile(np.asarray(discrete["counts"])[:, 0], [0.05, 0.95])
    print(f"Flowers in the first part, 90 % interval over draws: {low:.0f} to {high:.0f}.")
    return Result(fit, diagnosis, draws, discrete, probability, errors, rival)


if __name__ == "__main__":
    main()
