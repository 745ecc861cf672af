"""Importance sampling from a guide towards its target."""

from vi_params.importance.psis import Smoothed, psis
from vi_params.importance.weigh import Weighted, over_noise, pick_draws, weigh

__all__ = ["Smoothed", "Weighted", "over_noise", "pick_draws", "psis", "weigh"]
