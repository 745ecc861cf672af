"""NumPyro programs as targets and as guides."""

from vi_params.interop.numpyro.model import from_numpyro
from vi_params.interop.numpyro.program import numpyro_guide

__all__ = ["from_numpyro", "numpyro_guide"]
