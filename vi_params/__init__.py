"""Variational inference on JAX with no hidden state.

Parameters live in an immutable pytree of unconstrained values, declared beside their constraints;
guides are pure functions of `(params, key)`; a fit is one compiled program.

    target = vi.from_numpyro(model, *args)
    guide = vi.guides.full_rank(target)
    fit = vi.fit(vi.elbo(target, guide, num_particles=10), key=jax.random.key(0))
    vi.diagnose(target, guide, fit.params, jax.random.key(1))
"""

from vi_params import (
    batches,
    diagnostics,
    estimators,
    guides,
    noise,
    objectives,
    solvers,
    stopping,
    updates,
)
from vi_params._table import Table
from vi_params._version import __version__
from vi_params.approximation import Approximation, NutsStart, approximate
from vi_params.batches import Batch
from vi_params.diagnostics import Check, Diagnosis, check, diagnose, draws, resample, summary
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
from vi_params.solvers import Solution, SolverInfo, SolverStatus, linear_response, merge
from vi_params.svi import SVI, Info, Start, State, run, svi
from vi_params.target import FlatTarget, Minibatch, Target, flat, minibatch, target

__all__ = [
    "SVI",
    "Approximation",
    "Batch",
    "Check",
    "Diagnosis",
    "Draw",
    "Fit",
    "FlatTarget",
    "Guide",
    "Info",
    "Latent",
    "Minibatch",
    "NutsStart",
    "Objective",
    "Param",
    "Progress",
    "Solution",
    "SolverInfo",
    "SolverStatus",
    "Start",
    "State",
    "Status",
    "Table",
    "Target",
    "__version__",
    "approximate",
    "batches",
    "check",
    "constrain",
    "constrain_with_log_det",
    "describe",
    "diagnose",
    "diagnostics",
    "draws",
    "elbo",
    "estimators",
    "fit",
    "flat",
    "freeze",
    "from_numpyro",
    "guide",
    "guides",
    "init_params",
    "labels",
    "linear_response",
    "load_params",
    "merge",
    "minibatch",
    "noise",
    "numpyro_guide",
    "objectives",
    "put_rows",
    "resample",
    "run",
    "save_params",
    "solvers",
    "stopping",
    "summary",
    "svi",
    "take_rows",
    "target",
    "unconstrain",
    "updates",
]
