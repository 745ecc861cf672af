"""Importance sampling from a guide towards its target."""

from vi_params.importance.psis import Smoothed, psis, psis_on_host
from vi_params.importance.weigh import Weighted, at_once, compared, pick_draws, weigh

__all__ = [
    "Smoothed",
    "Weighted",
    "at_once",
    "compared",
    "pick_draws",
    "psis",
    "psis_on_host",
    "weigh",
]
