"""Solvers: approximations found otherwise than by stochastic gradient steps."""

from vi_params.solvers.batch_and_match import batch_and_match, score_matching
from vi_params.solvers.conditional_gaussian import conditional_gaussian
from vi_params.solvers.deterministic import deterministic
from vi_params.solvers.laplace import laplace
from vi_params.solvers.linear_response import linear_response
from vi_params.solvers.merge import merge
from vi_params.solvers.natural_gradient import natural_gradient
from vi_params.solvers.nested_laplace import nested_laplace
from vi_params.solvers.pathfinder import pathfinder
from vi_params.solvers.population_monte_carlo import population_monte_carlo
from vi_params.solvers.quantity_response import QuantityResponse, quantity_response
from vi_params.solvers.refine import refine
from vi_params.solvers.solution import Solution, SolverInfo, SolverStatus
from vi_params.solvers.svgd import Kernel, Particles, imq, rbf, svgd

__all__ = [
    "Kernel",
    "Particles",
    "QuantityResponse",
    "Solution",
    "SolverInfo",
    "SolverStatus",
    "batch_and_match",
    "conditional_gaussian",
    "deterministic",
    "imq",
    "laplace",
    "linear_response",
    "merge",
    "natural_gradient",
    "nested_laplace",
    "pathfinder",
    "population_monte_carlo",
    "quantity_response",
    "rbf",
    "refine",
    "score_matching",
    "svgd",
]
