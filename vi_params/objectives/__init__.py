"""Objectives: what is minimised, functions of a target and a guide."""

from vi_params.objectives import divergences, kernels
from vi_params.objectives.divergences import Divergence
from vi_params.objectives.elbo import elbo
from vi_params.objectives.f_divergence import f_divergence, tail_adaptive
from vi_params.objectives.fisher import fisher_divergence, score_based_divergence
from vi_params.objectives.iwae import iwae
from vi_params.objectives.kernels import Kernel
from vi_params.objectives.objective import Measure, Objective
from vi_params.objectives.renyi import cubo, renyi
from vi_params.objectives.sample_distance import energy_distance, mmd
from vi_params.objectives.wake_sleep import neural_posterior, reweighted_wake_sleep

__all__ = [
    "Divergence",
    "Kernel",
    "Measure",
    "Objective",
    "cubo",
    "divergences",
    "elbo",
    "energy_distance",
    "f_divergence",
    "fisher_divergence",
    "iwae",
    "kernels",
    "mmd",
    "neural_posterior",
    "renyi",
    "reweighted_wake_sleep",
    "score_based_divergence",
    "tail_adaptive",
]
