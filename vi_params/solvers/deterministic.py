"""Variational inference at fixed draws: the ELBO as a deterministic function, minimised by Newton.

With e_1 .. e_M drawn once, the mean-field ELBO of u = m + exp(w) * e is a smooth function of (m, w)
with a Hessian (`fixed_draws`): no learning rate, and an end that can be told. Giordano, Ingram and
Broderick (2024), Black box variational inference with a deterministic objective, JMLR 25(18). The
draws are antithetic, with sample moments made exact (`vi.noise`), so that quadratic log densities
have their exact optimum; steps are measured in the current standard deviations, so that the units
of a latent do not matter.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vi_params._cache import program
from vi_params._check import explain, require_count, require_key, require_names
from vi_params._compile import Quick
from vi_params._tree import strong
from vi_params.guide import Guide
from vi_params.guides import mean_field
from vi_params.noise import Noise, moment_matched, orthogonal
from vi_params.params.declare import Declared
from vi_params.params.maps import abstract_params
from vi_params.solvers.fixed_draws import FEW
from vi_params.solvers.lanes import search
from vi_params.solvers.layout import Layout
from vi_params.solvers.solution import Solution, require_mean_field
from vi_params.solvers.start import data_of, nats, unchanging
from vi_params.target import Target, flat, whole

FEWEST = 32
"""The smallest number of draws chosen by default."""

MORE, AT_ONCE = 16, 2**22
"""How many times as many draws there are where the default number leaves the ELBO short, and how
many numbers these are at most."""

FULL_FRAME = 256
"""The largest dimension at which the default draws hold a whole orthogonal frame."""


def deterministic(
    target: Target,
    key: jax.Array,
    data: Any = None,
    *,
    num_draws: int | None = None,
    noise: Noise | None = None,
    lanes: int = 4,
    init: Any = None,
    fixed: Any = None,
    tolerance: float | None = None,
    max_steps: int = 200,
    name: str = "guide",
) -> Solution:
    """The mean-field optimum at fixed draws, by trust-region Newton-CG from several starts.

    Pure in (key, data); under `jax.vmap` take `solution.params` and `solution.info` out, since the
    guide is no array. For full data only: the draws stay the same, and so must the data. Its
    locations are good, its scales are those of mean-field: `vi.linear_response` corrects them. On a
    CPU lanes begin at 4 draws, where those are a part of all, and of lanes that found the same
    optimum there the best one goes on at all draws, for the others too.
    Where the log density has a gradient but no second derivative in JAX, Hessians are differences
    of gradients.

    Args:
        target: what to approximate; its own parameters, if any, are optimised along.
        key: a typed random key: of the draws and of the starts.
        data: the data; the target's own where None.
        num_draws: how many draws, an even number; by default twice the dimension, at least 32 and
            a multiple of 4 (32 above dimension 256), and on a CPU, in up to 8192 dimensions and
            with the default noise, sixteen times as many where the ELBO at the optimum of these is
            more than 0.05 nats short of the best one, as a Newton step at others tells.
            `info.details` says how many; `solution.noise` are the first of them, and where linear
            response is computed from these, the sampling error that it tells is theirs.
        noise: their scheme; `vi.noise.orthogonal()`, or `moment_matched()` above dimension 256.
        lanes: from how many starts, the first the family's own, the next three drawn in towards
            zero, in unconstrained coordinates.
        init: where the first lane starts, as in `vi.guides.mean_field`; or a `Solution` of this
            solver, at other draws perhaps, at whose parameters it starts.
        fixed: those of the target's own parameters that stay as they are, unconstrained, by name.
        tolerance: stop after a Newton step promising less than this, in nats; by default 1e-6 in
            float64 and 1e-5 in float32. At few draws lanes stop at 0.1.
        max_steps: how many steps a lane tries at most, in each of its stages; `info.steps` has
            those of all.
        name: the name of the family's parameters.

    Returns:
        A `Solution` with a `vi.guides.mean_field` guide; `info.status` says how it ended.

    Raises:
        ValueError: lanes, num_draws or max_steps < 1, an odd num_draws, tolerance <= 0, a start
            outside its support, or data that are a batch of rows.
        KeyError: `init`, `fixed` or `data` hold unknown names, or `data` lack one.
        TypeError: `key` is not a typed key, or `target` is no target.

    Example:
        >>> def log_density(values, latents, data):
        ...     return -0.5 * jnp.sum(((latents["z"] - 3.0) / 2.0) ** 2)
        >>> target = vi.target(log_density, {"z": vi.Latent((2,))})
        >>> solution = vi.solvers.deterministic(target, jax.random.key(0))
        >>> values = vi.constrain(solution.guide.declared, solution.params)["guide"]
        >>> bool(jnp.allclose(values["loc"], 3.0)), bool(jnp.allclose(values["scale"], 2.0))
        (True, True)
    """
    data = data_of(target, data)
    require_key(key, "solvers.deterministic")
    fixed = dict(fixed or {})
    require_names(
        list(fixed), list(target.declared), what="parameters", where="fixed", complete=False
    )
    start = None
    if isinstance(init, Solution):
        own = require_mean_field(init, "solvers.deterministic, init")
        start, init = {**init.params, name: init.params[own]}, None
    _require_shapes(fixed, target.declared, "fixed")
    fixed = jax.tree.map(lambda leaf: strong(jnp.asarray(leaf, float)), fixed)
    if start is not None:
        _require_shapes(
            start, {**target.declared, **mean_field(target, name=name).declared}, "init"
        )
    guide, solve = prepared(
        target, num_draws, noise, lanes, init, tolerance, max_steps, name, tuple(sorted(fixed))
    )
    return Solution(guide, *solve(key, data, fixed, start, np.arange(lanes, dtype=np.int32)))


def _require_shapes(params: Any, declared: Declared, where: str) -> None:
    """Raises where parameters are not in the shapes that are declared."""
    expected = abstract_params({n: declared[n] for n in declared if n in params or where == "init"})
    told = jax.tree.map(jnp.shape, {n: params[n] for n in expected if n in params})
    known = jax.tree.map(lambda leaf: leaf.shape, expected)
    if told != known:
        raise ValueError(
            explain(
                "Parameters have the wrong shapes.",
                expected=f"unconstrained arrays of shapes {known}",
                received=f"{told}",
                where=f"solvers.deterministic, {where}",
                hint="parameters of the same target: solution.params, or "
                "vi.unconstrain(target.declared, values)",
            )
        )


def prepared(
    target: Target,
    num_draws: int | None = None,
    noise: Noise | None = None,
    lanes: int = 4,
    init: Any = None,
    tolerance: float | None = None,
    max_steps: int = 200,
    name: str = "guide",
    fixed: tuple[str, ...] = (),
) -> tuple[Guide, Quick]:
    """The guide, and the program `(key, data, fixed, start, numbers) -> the fields of the Solution
    after its guide`, for fixed parameters of these names and, unless None, a start of the first of
    the lanes that are searched, those of these numbers. Parts of the lanes have the same draws."""
    require_count(lanes, "lanes", "solvers.deterministic")
    require_count(max_steps, "max_steps", "solvers.deterministic")
    target = whole(target)
    dim = flat(target).dim
    goes_on = num_draws is None and noise is None
    if num_draws is None:
        num_draws = default_draws(dim)
        goes_on = goes_on and MORE * num_draws * dim <= AT_ONCE
    require_count(num_draws, "num_draws", "solvers.deterministic")
    if num_draws % 2:
        raise ValueError(
            explain(
                "The fixed draws come in pairs.",
                expected="an even num_draws",
                received=str(num_draws),
                where="solvers.deterministic",
            )
        )
    tolerance = nats(tolerance, "solvers.deterministic")
    scheme = noise or (orthogonal() if dim <= FULL_FRAME else moment_matched())
    alike = scheme, unchanging(init), fixed
    return program(
        _build, target, num_draws, goes_on, lanes, tolerance, max_steps, name, alike=alike
    )


def default_draws(dim: int) -> int:
    """How many draws there are by default: up to a whole orthogonal frame, as many as blocks of few
    need."""
    wanted = max(FEWEST, 2 * dim) if dim <= FULL_FRAME else FEWEST
    return wanted + -wanted % FEW


def _build(
    target: Target,
    num_draws: int,
    goes_on: bool,
    lanes: int,
    tolerance: float,
    max_steps: int,
    name: str,
    scheme: Noise,
    init: Any,
    fixed_names: tuple[str, ...],
) -> tuple[Guide, Quick]:
    guide = mean_field(target, init=init, name=name)
    layout = Layout(target, guide, fixed_names)
    # Of a few sets exact moments count, of many that every draw is normal: in more dimensions
    # moments count still.
    normal = orthogonal(normal_lengths=True) if layout.dim <= FULL_FRAME else scheme

    @Quick
    def solve(key: jax.Array, data: Any, fixed: Any, start: Any, numbers: jax.Array) -> tuple:
        of_draws, of_fresh = (jax.random.fold_in(key, lanes + i) for i in range(2))
        draws, fresh = scheme.draw(of_draws, num_draws, layout.dim), None
        if goes_on:
            first, *more = jax.random.split(of_fresh, MORE - 1)
            fresh = lax.map(lambda key: normal.draw(key, num_draws, layout.dim), jnp.stack(more))
            # Where the first draws leave no error since their moments are exact, this finds none.
            exact = scheme.draw(first, num_draws, layout.dim)
            fresh = jnp.concatenate([exact[None], fresh])
        found, best, many = search(
            layout,
            layout.log_density(data, fixed),
            layout.size(data),
            draws,
            key,
            numbers,
            tolerance=tolerance,
            max_steps=max_steps,
            start=start,
            fresh=fresh,
        )
        number = jnp.where(many, MORE * num_draws, num_draws).astype(jnp.int32)
        return layout.result(found, best, draws, number, fixed)

    return guide, solve
