"""Reference posteriors: a folder whose posteriors.py has `POSTERIORS`, name -> posterior.

A posterior has `make() -> (model, args, kwargs)`, `reference()` (`mean`, `sd`: parameter -> array;
`mean_field_elbo`, `full_rank_elbo`) and `params`: parameter -> the NumPyro site that holds it.
The models of this repository are posteriors too (`own`), their moments those of a long run of NUTS.
"""

import importlib.util
import json
import pathlib
import sys

import numpy as np

CHAINS, WARMUP, SAMPLES = 4, 1000, 5000


def posteriors(folder):
    """Name -> posterior."""
    file = pathlib.Path(folder) / "posteriors.py"
    spec = importlib.util.spec_from_file_location("posteriors", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["posteriors"] = module
    spec.loader.exec_module(module)
    return module.POSTERIORS


class Own:
    """A model of this repository as a posterior."""

    def __init__(self, name, folder):
        """Keeps its moments in a file of that folder."""
        self.name = name
        self.file = pathlib.Path(folder) / f"{name}.json"

    def make(self):
        from models import MODELS

        return (*MODELS[self.name](), {})

    def reference(self):
        return json.loads(self.file.read_text())

    @property
    def params(self):
        return {site: site for site in self.reference()["mean"]}

    def run(self):
        """The long run of NUTS, whose moments are kept."""
        import jax
        from numpyro.infer import MCMC, NUTS

        model, args, kwargs = self.make()
        kernel = NUTS(model)
        mcmc = MCMC(
            kernel,
            num_warmup=WARMUP,
            num_samples=SAMPLES,
            num_chains=CHAINS,
            chain_method="vectorized",
            progress_bar=False,
        )
        mcmc.run(jax.random.key(1), *args, **kwargs)
        draws = mcmc.get_samples()
        moments = {
            "mean": {site: np.asarray(x.mean(0)).tolist() for site, x in draws.items()},
            "sd": {site: np.asarray(x.std(0)).tolist() for site, x in draws.items()},
        }
        self.file.write_text(json.dumps(moments))


def own(folder):
    """Name -> posterior of a model of this repository; what they need is kept in that folder."""
    from models import MODELS

    return {name: Own(name, folder) for name in MODELS}


def of_draws(draws):
    """The means and the standard deviations of draws, by site."""
    arrays = {site: np.asarray(x) for site, x in draws.items()}
    return tuple({site: f(x, axis=0) for site, x in arrays.items()} for f in (np.mean, np.std))


def errors(posterior, means, sds):
    """The largest error of a mean, in standard deviations, and of a log standard deviation."""
    reference = posterior.reference()
    of_mean, of_log_sd = [], []
    for parameter, site in posterior.params.items():
        mean, sd = (np.asarray(reference[what][parameter]) for what in ("mean", "sd"))
        found, spread = (np.reshape(of[site], mean.shape) for of in (means, sds))
        of_mean.append(np.max(np.abs(found - mean) / sd))
        of_log_sd.append(np.max(np.abs(np.log(spread / sd))))
    return float(np.max(of_mean)), float(np.max(of_log_sd))  # NaN where one is
