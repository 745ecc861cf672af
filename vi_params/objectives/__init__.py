"""Objectives: what is minimised, functions of a target and a guide."""

from vi_params.objectives.elbo import elbo
from vi_params.objectives.objective import Objective

__all__ = ["Objective", "elbo"]
