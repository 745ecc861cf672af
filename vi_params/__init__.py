"""Variational inference on JAX with no hidden state."""

from vi_params._version import __version__

from vi_params import diagnostics, estimators, fitting, guides, noise, objectives, stopping
from vi_params._table import Table
from vi_params.diagnostics import Check, Diagnosis, check, diagnose, draws, summary
from vi_params.fitting import Fit, Progress, Status, fit
from vi_params.guide import Draw, Guide, guide
from vi_params.interop.numpyro import from_numpyro, numpyro_guide
from vi_params.objectives import Objective, elbo
from vi_params.params import (
    Latent,
    Param,
    constrain,
    constrain_with_log_det,
    describe,
    freeze,
    init_params,
    labels,
    load_params,
    put_rows,
    save_params,
    take_rows,
    unconstrain,
)
from vi_params.svi import SVI, Info, State, run, svi
from vi_params.target import FlatTarget, Target, flat, target
