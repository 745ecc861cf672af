"""Variational families: each a function of a target."""

from vi_params.guides.active_mixture import active_mixture
from vi_params.guides.contaminated import contaminated_normal
from vi_params.guides.delta import delta
from vi_params.guides.flow import flow
from vi_params.guides.gaussian import full_rank, mean_field
from vi_params.guides.low_rank import low_rank
from vi_params.guides.mixture import mixture

__all__ = [
    "active_mixture",
    "contaminated_normal",
    "delta",
    "flow",
    "full_rank",
    "low_rank",
    "mean_field",
    "mixture",
]
