"""Fitting for people: the host loop and what it hands back."""

from vi_params.fitting.fit import fit
from vi_params.fitting.optimizer import default_optimizer
from vi_params.fitting.result import Fit, Progress, Status

__all__ = ["Fit", "Progress", "Status", "default_optimizer", "fit"]
