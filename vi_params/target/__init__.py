"""Targets: what is to be approximated, a log density over named latents."""

from vi_params.target.core import (
    EMPTY,
    Target,
    build,
    require_draw,
    require_latents,
    shape_at,
    whole,
)
from vi_params.target.flat import FlatTarget, flat, ravel, split_vector
from vi_params.target.minibatch import Minibatch, minibatch
from vi_params.target.plain import target
from vi_params.target.recentred import CENTRING, recentred, recentring

__all__ = [
    "CENTRING",
    "EMPTY",
    "FlatTarget",
    "Minibatch",
    "Target",
    "build",
    "flat",
    "minibatch",
    "ravel",
    "recentred",
    "recentring",
    "require_draw",
    "require_latents",
    "shape_at",
    "split_vector",
    "target",
    "whole",
]
