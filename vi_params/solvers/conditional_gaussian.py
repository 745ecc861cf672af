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
from vi_params.solvers.active import scores
from vi_params.solvers.conditional_frame import bent, conditional_frame
from vi_params.solvers.mixture_families import Mixture, contaminated, require_room
from vi_params.solvers.nested_frame import along, whitened
from vi_params.solvers.slopes import GRADIENTS, gradient_at, slopes_at
from vi_params.solvers.solution import Slopes, Solution, own_name
from vi_params.solvers.start import data_of
from vi_params.solvers.third_derivative import fixed_directions, third_derivative
from vi_params.target import Target, flat, whole

WHERE = "solvers.conditional_gaussian"

DIRECTIONS, LATENTS = "directions", "latents"
"""What it can be given."""


def conditional_gaussian(
    target: Target,
    solution: Solution,
    key: jax.Array | None = None,
    data: Any = None,
    *,
    num_active: int = 2,
    num_draws: int = GRADIENTS,
    given: str = DIRECTIONS,
    num_fits: int = 1,
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

    Instead of directions it may be given latents, those without which the third derivatives of the
    log density at the solution's location are smallest: in hierarchies scales, in item response
    models discriminations, of which there may be many. And it may be fitted again, to gradients at
    its own draws.

    Tan, Bhaskaran and Nott (2020), Conditionally structured variational Gaussian approximation with
    importance weights, Statistics and Computing 30, learn such a family by stochastic gradients.

    Args:
        target: what was approximated.
        solution: what a dense `vi.linear_response` gave for it; with a key, any full-rank
            Gaussian.
        key: a typed random key, or None: the solution's own gradients then.
        data: the data, only with a key; the target's own where None.
        num_active: how many directions or latents, fewer than there are dimensions.
        num_draws: at how many draws gradients are computed for each fit, with a key.
        given: "directions", or with a key "latents", for up to about a hundred dimensions: third
            derivatives take dim^2 gradients and memory for dim^3 numbers.
        num_fits: how many fits there are, more than one only with a key: the first at draws of the
            solution, the others at those of the fit before.

    Returns:
        A `Solution` with a `vi.guides.active_mixture` guide; `info` is that of `solution`.

    Raises:
        ValueError: there is no key and the solution has no gradients; it is no full-rank Gaussian;
            `num_active` is not among 1 .. dim - 1; num_draws < 25; num_fits < 1; `given` is
            another word; data that are a batch; data, latents or several fits without a key.
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
    require_count(num_fits, "num_fits", WHERE)
    if given not in (DIRECTIONS, LATENTS):
        raise ValueError(
            explain(
                "It can be given directions or latents.",
                expected=f'given="{DIRECTIONS}" or "{LATENTS}"',
                received=f"given={given!r}",
                where=WHERE,
            )
        )
    if key is not None:
        require_key(key, WHERE)
        data = data_of(target, data)
    elif data is not None or given == LATENTS or num_fits > 1:
        raise ValueError(
            explain(
                "Without a key nothing is computed from the density.",
                expected="a key, for gradients at new draws; or no data, one fit, given directions",
                received="no key, with "
                + ("data" if data is not None else f"given={given!r}, num_fits={num_fits}"),
                where=WHERE,
                hint="give a key, or leave these out: the solution's gradients are of its own data",
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
    guide, find = program(_build, target, solution.guide, num_active, num_draws, given, num_fits)
    known = (solution.slopes, None, None) if key is None else (None, key, data)
    return solution._replace(guide=guide, params=find(solution.params, *known))


def conditional_guide(target: Target, name: str, num_active: int) -> Guide:
    """The guide of a conditional Gaussian."""
    return active_mixture(target, len(SCALES), num_active, name=name)


def conditional(
    own: Any, slopes: Slopes, num_active: int, xp: Any = jnp, directions: Any = None
) -> Mixture:
    """The conditional Gaussian of a Gaussian's constrained parameters, given the directions in
    which it differs most from the target or known ones; in a program or on the host."""
    loc, scale_tril = require_gaussian(own, f"{WHERE}, solution")
    if directions is None:
        frame = conditional_frame(loc, scale_tril, slopes, num_active, xp)
    else:
        seen = scores(loc, scale_tril, slopes, xp)
        frame = bent(along(loc, scale_tril, directions, xp), seen, xp)
    return contaminated(frame, xp)


def _build(
    target: Target, start: Guide, num_active: int, num_draws: int, given: str, num_fits: int
) -> tuple[Guide, Quick]:
    (name,) = start.declared
    guide = conditional_guide(target, name, num_active)
    wide = contaminated_normal(target, name=name)

    @Quick
    def find(params: Any, slopes: Slopes | None, key: Any, data: Any) -> Any:
        own = constrain(start.declared, pick(params, start.declared))[name]
        others = {key: params[key] for key in params if key != name}

        def params_of(found: Mixture) -> Any:
            return {**others, **unconstrain(guide.declared, {name: found.values})}

        if slopes is not None:
            return params_of(conditional(own, slopes, num_active))
        values = constrain(target.declared, pick(params, target.declared))
        size = at_once(num_draws, target, data)

        def slopes_of(guide: Guide, params: Any, key: jax.Array) -> Slopes:
            noise = guide.noise(key, num_draws)
            drawn = weigh(target, guide, params, noise, data, size, nan_is_outside=True)
            return slopes_at(target, values, drawn.position, drawn.smoothed.log_weights, data)

        directions = None
        if given == LATENTS:
            loc, scale_tril = require_gaussian(own, f"{WHERE}, solution")
            at = whitened(gradient_at(target, values, data), loc, scale_tril, None)
            directions, _ = fixed_directions(third_derivative(at, len(loc)), scale_tril, num_active)
        drawn_by, found = wide, params
        for one in jax.random.split(key, num_fits):
            slopes = slopes_of(drawn_by, found, one)
            found = params_of(conditional(own, slopes, num_active, directions=directions))
            drawn_by = guide
        return found

    return guide, find
