"""From a target to draws and a verdict in one call."""

from vi_params.approximation.approximate import approximate
from vi_params.approximation.moments import Moments
from vi_params.approximation.result import Approximation, NutsStart

__all__ = ["Approximation", "Moments", "NutsStart", "approximate"]
