"""After the fit: draws, summaries, checks and the verdict."""

from vi_params.diagnostics.check import Check, check
from vi_params.diagnostics.diagnose import Diagnosis, diagnose
from vi_params.diagnostics.discrete import infer_discrete
from vi_params.diagnostics.draws import draws
from vi_params.diagnostics.resample import resample
from vi_params.diagnostics.summary import summary
from vi_params.importance import Smoothed, psis

__all__ = [
    "Check",
    "Diagnosis",
    "Smoothed",
    "check",
    "diagnose",
    "draws",
    "infer_discrete",
    "psis",
    "resample",
    "summary",
]
