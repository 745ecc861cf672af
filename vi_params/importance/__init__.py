"""Importance sampling from a guide towards its target."""

from vi_params.importance.psis import Smoothed, psis
from vi_params.importance.weigh import Weighted, pick_draws, weigh

__all__ = ["Smoothed", "Weighted", "pick_draws", "psis", "weigh"]
