"""Reference posteriors: a folder whose posteriors.py has `POSTERIORS`, name -> posterior.

A posterior has `make() -> (model, args, kwargs)`, `reference()` (`mean`, `sd`: parameter -> array;
`mean_field_elbo`, `full_rank_elbo`) and `params`: parameter -> the NumPyro site that holds it.
"""

import importlib.util
import pathlib
import sys

import numpy as np


def posteriors(folder):
    """Name -> posterior."""
    file = pathlib.Path(folder) / "posteriors.py"
    spec = importlib.util.spec_from_file_location("posteriors", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["posteriors"] = module
    spec.loader.exec_module(module)
    return module.POSTERIORS


def errors(posterior, draws):
    """The largest error of a mean, in standard deviations, and of a log standard deviation."""
    reference = posterior.reference()
    of_mean = of_log_sd = 0.0
    for parameter, site in posterior.params.items():
        mean, sd = (np.asarray(reference[what][parameter]) for what in ("mean", "sd"))
        found = np.asarray(draws[site]).reshape(-1, *mean.shape)
        of_mean = max(of_mean, float(np.max(np.abs(found.mean(0) - mean) / sd)))
        of_log_sd = max(of_log_sd, float(np.max(np.abs(np.log(found.std(0) / sd)))))
    return of_mean, of_log_sd
