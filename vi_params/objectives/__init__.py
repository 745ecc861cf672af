"""Objectives: what is minimised, functions of a target and a guide."""

from vi_params.objectives.elbo import elbo
from vi_params.objectives.objective import Measure, Objective
from vi_params.objectives.renyi import cubo, iwae, renyi

__all__ = ["Measure", "Objective", "cubo", "elbo", "iwae", "renyi"]
