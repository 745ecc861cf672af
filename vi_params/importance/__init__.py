"""Importance sampling from a guide towards its target."""

from vi_params.importance.psis import Smoothed, psis
from vi_params.importance.weigh import Weighted, at_once, pick_draws, weigh

__all__ = ["Smoothed", "Weighted", "at_once", "pick_draws", "psis", "weigh"]
