"""Declared parameters: what they are, their maps, their rows, their labels, their files."""

from vi_params.params.declare import Latent, Param
from vi_params.params.describe import describe
from vi_params.params.files import load_params, save_params
from vi_params.params.labels import freeze, labels
from vi_params.params.maps import constrain, constrain_with_log_det, init_params, unconstrain
from vi_params.params.rows import put_rows, take_rows

__all__ = [
    "Latent",
    "Param",
    "constrain",
    "constrain_with_log_det",
    "describe",
    "freeze",
    "init_params",
    "labels",
    "load_params",
    "put_rows",
    "save_params",
    "take_rows",
    "unconstrain",
]
