"""Variational families: each a function of a target."""

from vi_params.guides.delta import delta
from vi_params.guides.gaussian import full_rank, mean_field

__all__ = ["delta", "full_rank", "mean_field"]
