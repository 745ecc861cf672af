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

__all__ = [
    "EMPTY",
    "FlatTarget",
    "Minibatch",
    "Target",
    "build",
    "flat",
    "minibatch",
    "ravel",
    "require_draw",
    "require_latents",
    "shape_at",
    "split_vector",
    "target",
    "whole",
]
