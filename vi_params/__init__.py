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
from vi_params.averaging import averaged, evaluation_params
from vi_params.batches import Batch
from vi_params.diagnostics import (
    Check,
    Diagnosis,
    check,
    diagnose,
    draws,
    infer_discrete,
    resample,
    summary,
)
from vi_params.fitting import Fit, Progress, Status, default_optimizer, fit
from vi_params.guide import Draw, Guide, guide
from vi_params.interop.numpyro import from_numpyro, numpyro_guide
from vi_params.objectives import (
    Divergence,
    Kernel,
    Measure,
    Objective,
    cubo,
    divergences,
    elbo,
    energy_distance,
    f_divergence,
    fisher_divergence,
    iwae,
    kernels,
    mmd,
    neural_posterior,
    renyi,
    reweighted_wake_sleep,
    score_based_divergence,
    tail_adaptive,
)
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
from vi_params.solvers import (
    QuantityResponse,
    Solution,
    SolverInfo,
    SolverStatus,
    linear_response,
    merge,
    quantity_response,
)
from vi_params.svi import SVI, Info, Start, State, run, svi
from vi_params.target import FlatTarget, Minibatch, Target, flat, minibatch, target

__all__ = [
    "SVI",
    "Approximation",
    "Batch",
    "Check",
    "Diagnosis",
    "Divergence",
    "Draw",
    "Fit",
    "FlatTarget",
    "Guide",
    "Info",
    "Kernel",
    "Latent",
    "Measure",
    "Minibatch",
    "NutsStart",
    "Objective",
    "Param",
    "Progress",
    "QuantityResponse",
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
    "averaged",
    "batches",
    "check",
    "constrain",
    "constrain_with_log_det",
    "cubo",
    "default_optimizer",
    "describe",
    "diagnose",
    "diagnostics",
    "divergences",
    "draws",
    "elbo",
    "energy_distance",
    "estimators",
    "evaluation_params",
    "f_divergence",
    "fisher_divergence",
    "fit",
    "flat",
    "freeze",
    "from_numpyro",
    "guide",
    "guides",
    "infer_discrete",
    "init_params",
    "iwae",
    "kernels",
    "labels",
    "linear_response",
    "load_params",
    "merge",
    "minibatch",
    "mmd",
    "neural_posterior",
    "noise",
    "numpyro_guide",
    "objectives",
    "put_rows",
    "quantity_response",
    "renyi",
    "resample",
    "reweighted_wake_sleep",
    "run",
    "save_params",
    "score_based_divergence",
    "solvers",
    "stopping",
    "summary",
    "svi",
    "tail_adaptive",
    "take_rows",
    "target",
    "unconstrain",
    "updates",
]
