"""A Gaussian given the latents that keep a posterior from being one (`nested_frame`)."""

from typing import Any

import jax.numpy as jnp

from vi_params._cache import program
from vi_params._check import explain, require_instance
from vi_params._compile import Quick
from vi_params._tree import pick
from vi_params.guide import Guide
from vi_params.guides import active_mixture
from vi_params.guides.contaminated import SCALES
from vi_params.guides.location_scale import require_gaussian
from vi_params.params import constrain, unconstrain
from vi_params.solvers.mixture_families import contaminated, require_room
from vi_params.solvers.nested_frame import (
    along,
    nested_frame,
    num_nodes_for,
    rounding_of,
    whitened,
)
from vi_params.solvers.slopes import gradient_at
from vi_params.solvers.solution import Solution, own_name
from vi_params.solvers.start import data_of
from vi_params.solvers.third_derivative import fixed_directions, third_derivative
from vi_params.target import Target, flat, whole

WHERE = "solvers.nested_laplace"


def nested_laplace(
    target: Target, solution: Solution, data: Any = None, *, num_active: int = 2
) -> Solution:
    """A Gaussian given a few latents, whose mean and precision follow these, from a Gaussian.

    The latents are those given which the third derivatives of the log density are smallest, such as
    the scales of a hierarchy or the hyperparameters of a Gaussian process; along them it is the
    Gaussian's marginal, with wider parts as in `vi.guides.contaminated_normal`. For up to about a
    hundred dimensions: every Hessian takes 2 dim gradients, and there are hundreds. Where too few
    conditional modes are found, nothing follows. `vi.solvers.population_monte_carlo` fits what
    is along. Pure in params and data.

    Args:
        target: what was approximated; its own parameters stay as they are.
        solution: a full-rank Gaussian, such as `vi.linear_response` gives.
        data: the data; the target's own where None.
        num_active: how many latents, fewer than there are dimensions.

    Returns:
        A `Solution` with a `vi.guides.active_mixture` guide with nodes; `info` is that of
        `solution`.

    Raises:
        ValueError: the solution is no full-rank Gaussian; `num_active` is not among 1 .. dim - 1;
            data that are a batch of rows.
        KeyError: `data` has unknown names, or lacks one.
        TypeError: the solution is none.

    Example:
        >>> def hierarchy(values, latents, data):  # two coupled latents, and their scale
        ...     x, (y, z) = latents["scale"], latents["rest"]
        ...     quadratic = jnp.exp(-x) * (y**2 + (z - 0.8 * y) ** 2)
        ...     return -0.5 * (x**2 + quadratic) - x
        >>> target = vi.target(hierarchy, {"scale": vi.Latent(()), "rest": vi.Latent((2,))})
        >>> mean_field = vi.solvers.deterministic(target, jax.random.key(0))
        >>> gaussian = vi.linear_response(target, mean_field)
        >>> found = vi.solvers.nested_laplace(target, gaussian, num_active=1)
        >>> diagnosis = vi.diagnose(target, found.guide, found.params, jax.random.key(1))
        >>> bool(diagnosis.ess > 0.8 * diagnosis.num_draws)
        True
    """
    where = f"{WHERE}, solution"
    require_instance(solution, Solution, "vi.linear_response(...)", where)
    name, target, data = own_name(solution.guide, where), whole(target), data_of(target, data)
    require_room(num_active, flat(target).dim, WHERE)
    if "scale_tril" not in solution.params[name]:
        raise ValueError(
            explain(
                "The solution has no dense covariance.",
                expected="what a dense vi.linear_response returns, or any full-rank Gaussian",
                received=f"parameters {sorted(solution.params[name])}",
                where=where,
                hint="call vi.linear_response(target, solution) without a rank",
            )
        )
    guide, find = program(_build, target, solution.guide, num_active)
    return solution._replace(guide=guide, params=find(solution.params, data), slopes=None)


def _build(target: Target, start: Guide, num_active: int) -> tuple[Guide, Quick]:
    (name,) = start.declared
    guide = nested_guide(target, name, num_active)

    @Quick
    def find(params: Any, data: Any) -> Any:
        own = constrain(start.declared, pick(params, start.declared))[name]
        values = constrain(target.declared, pick(params, target.declared))
        loc, scale_tril = require_gaussian(own, f"{WHERE}, solution")
        gradient = gradient_at(target, values, data)
        third = third_derivative(whitened(gradient, loc, scale_tril, None, jnp), len(loc))
        directions, _ = fixed_directions(third, scale_tril, num_active)
        frame, _ = nested_frame(along(loc, scale_tril, directions), gradient, rounding_of(loc))
        others = {key: params[key] for key in params if key != name}
        found = {name: contaminated(frame).values}
        return {**others, **unconstrain(guide.declared, found)}

    return guide, find


def nested_guide(target: Target, name: str, num_active: int) -> Guide:
    """The guide of a nested Laplace approximation."""
    num_nodes = num_nodes_for(num_active)
    return active_mixture(target, len(SCALES), num_active, num_nodes=num_nodes, name=name)
