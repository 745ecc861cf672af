"""Gradient estimators of the ELBO, as values."""

from vi_params.estimators.baselines import (
    Baseline,
    decaying_average,
    learned_baseline,
    leave_one_out,
    no_baseline,
)
from vi_params.estimators.enumerate import enumerate
from vi_params.estimators.estimator import Estimate, Estimator, Problem
from vi_params.estimators.importance import doubly_reparameterised, vimco
from vi_params.estimators.mixed import analytic_kl, mixed
from vi_params.estimators.pathwise import closed_form_entropy, pathwise, sticking_the_landing
from vi_params.estimators.score import score

__all__ = [
    "Baseline",
    "Estimate",
    "Estimator",
    "Problem",
    "analytic_kl",
    "closed_form_entropy",
    "decaying_average",
    "doubly_reparameterised",
    "enumerate",
    "learned_baseline",
    "leave_one_out",
    "mixed",
    "no_baseline",
    "pathwise",
    "score",
    "sticking_the_landing",
    "vimco",
]
