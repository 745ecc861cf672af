"""After the fit: draws, summaries, checks and the verdict."""

from vi_params.diagnostics.check import Check, check
from vi_params.diagnostics.diagnose import Diagnosis, diagnose
from vi_params.diagnostics.draws import draws
from vi_params.diagnostics.psis import Smoothed, psis
from vi_params.diagnostics.summary import summary

__all__ = ["Check", "Diagnosis", "Smoothed", "check", "diagnose", "draws", "psis", "summary"]
