"""A Gaussian given a few directions, or skewed, from gradients of the log density
(`conditional_frame`)."""

from typing import Any

import jax
import jax.numpy as jnp

from vi_params._cache import program
from vi_params._check import explain, require_count, require_instance, require_key
from vi_params._compile import Quick
from vi_params._tree import pick
from vi_params.guide import Guide
from vi_params.guides import active_mixture, contaminated_normal
from vi_params.guides.contaminated import SCALES
from vi_params.guides.location_scale import require_gaussian
from vi_params.importance import at_once, weigh
from vi_params.params import constrain, unconstrain
from vi_params.solvers.conditional_frame import conditional_frame
from vi_params.solvers.mixture_families import Mixture, contaminated, require_room
from vi_params.solvers.slopes import GRADIENTS, slopes_at
from vi_params.solvers.solution import Slopes, Solution, own_name
from vi_params.solvers.start import data_of
from vi_params.target import Target, flat, whole

WHERE = "solvers.conditional_gaussian"


def conditional_gaussian(
    target: Target,
    solution: Solution,
    key: jax.Array | None = None,
    data: Any = None,
    *,
    num_active: int = 2,
    num_draws: int = GRADIENTS,
) -> Solution:
    """A Gaussian whose mean and scales across a few directions follow them, and that may be skewed.

    For hierarchies, whose scales stretch many latents at once, and where the data of each latent
    are few counts, which skew it: what linear response leaves out. Without a key it is found from
    the gradients that this has at its fixed draws, and no density is evaluated; in hundreds of
    dimensions those are few. With a key it is found from gradients at new draws of the solution,
    widened (`vi.guides.contaminated_normal`), by a power of their importance weights. Along the
    directions, those in which posterior and Gaussian differ most, it is a contaminated normal.
    Whether it is the better approximation, `vi.diagnose` tells; `vi.solvers.population_monte_carlo`
    goes on from it.

    Tan, Bhaskaran and Nott (2020), Conditionally structured variational Gaussian approximation with
    importance weights, Statistics and Computing 30, learn such a family by stochastic gradients.

    Args:
        target: what was approximated.
        solution: what a dense `vi.linear_response` gave for it; with a key, any full-rank
            Gaussian.
        key: a typed random key, or None: the solution's own gradients then.
        data: the data, only with a key; the target's own where None.
        num_active: how many directions, fewer than there are dimensions.
        num_draws: at how many draws gradients are computed, with a key.

    Returns:
        A `Solution` with a `vi.guides.active_mixture` guide; `info` is that of `solution`.

    Raises:
        ValueError: there is no key and the solution has no gradients; it is no full-rank Gaussian;
            `num_active` is not among 1 .. dim - 1; num_draws < 25; data that are a
            batch, or without a key.
        KeyError: `data` has unknown names, or lacks one.
        TypeError: the solution is none, or `key` is not a typed key.

    Example:
        >>> def funnel(values, latents, data):
        ...     x, y = latents["scale"], latents["rest"]
        ...     return -0.5 * x**2 - 0.5 * jnp.sum(y**2) * jnp.exp(-x) - 2.5 * x
        >>> target = vi.target(funnel, {"scale": vi.Latent(()), "rest": vi.Latent((5,))})
        >>> mean_field = vi.solvers.deterministic(target, jax.random.key(0))
        >>> gaussian = vi.linear_response(target, mean_field)
        >>> found = vi.solvers.conditional_gaussian(target, gaussian, num_active=1)
        >>> ess = [
        ...     vi.diagnose(target, one.guide, one.params, jax.random.key(1)).ess
        ...     for one in (gaussian, found)
        ... ]
        >>> bool(ess[1] > 2 * ess[0])
        True
    """
    where = f"{WHERE}, solution"
    require_instance(solution, Solution, "vi.linear_response(...)", where)
    name, target = own_name(solution.guide, where), whole(target)
    require_room(num_active, flat(target).dim, WHERE)
    require_count(num_draws, "num_draws", WHERE, least=25)
    if key is not None:
        require_key(key, WHERE)
        data = data_of(target, data)
    elif data is not None:
        raise ValueError(
            explain(
                "Data are asked for nothing without a key.",
                expected="a key, for gradients at new draws, or no data",
                received="data without a key",
                where=WHERE,
                hint="give a key, or leave the data out: the solution's gradients are of its own",
            )
        )
    if "scale_tril" not in solution.params[name] or (key is None and solution.slopes is None):
        raise ValueError(
            explain(
                "The solution has no gradients to learn from, or no dense covariance.",
                expected="what a dense vi.linear_response returns; with a key, any full-rank one",
                received=f"parameters {sorted(solution.params[name])}"
                + (" without slopes" if solution.slopes is None else ""),
                where=where,
                hint="call vi.linear_response(target, solution) without a rank",
            )
        )
    guide, find = program(_build, target, solution.guide, num_active, num_draws)
    known = (solution.slopes, None, None) if key is None else (None, key, data)
    return solution._replace(guide=guide, params=find(solution.params, *known))


def conditional_guide(target: Target, name: str, num_active: int) -> Guide:
    """The guide of a conditional Gaussian."""
    return active_mixture(target, len(SCALES), num_active, name=name)


def conditional(own: Any, slopes: Slopes, num_active: int, xp: Any = jnp) -> Mixture:
    """The conditional Gaussian of a Gaussian's constrained parameters, in a program or on the
    host."""
    loc, scale_tril = require_gaussian(own, f"{WHERE}, solution")
    return contaminated(conditional_frame(loc, scale_tril, slopes, num_active, xp), xp)


def _build(target: Target, start: Guide, num_active: int, num_draws: int) -> tuple[Guide, Quick]:
    (name,) = start.declared
    guide = conditional_guide(target, name, num_active)
    wide = contaminated_normal(target, name=name)

    @Quick
    def find(params: Any, slopes: Slopes | None, key: Any, data: Any) -> Any:
        own = constrain(start.declared, pick(params, start.declared))[name]
        if slopes is None:
            noise, size = wide.noise(key, num_draws), at_once(num_draws, target, data)
            drawn = weigh(target, wide, params, noise, data, size, nan_is_outside=True)
            values = constrain(target.declared, pick(params, target.declared))
            slopes = slopes_at(target, values, drawn.position, drawn.smoothed.log_weights, data)
        found = conditional(own, slopes, num_active).values
        others = {key: params[key] for key in params if key != name}
        return {**others, **unconstrain(guide.declared, {name: found})}

    return guide, find
