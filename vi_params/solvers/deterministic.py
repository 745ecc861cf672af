"""Variational inference at fixed draws: the ELBO as a deterministic function, minimised by Newton.

With e_1 .. e_M drawn once, the mean-field ELBO of u = m + exp(w) * e is a smooth function of (m, w)
with a Hessian (`fixed_draws`): no learning rate, and an end that can be told. Giordano, Ingram and
Broderick (2024), Black box variational inference with a deterministic objective, JMLR 25(18). The
draws are antithetic, with sample moments made exact (`vi.noise`), so that quadratic log densities
have their exact optimum; steps are measured in the current standard deviations, so that the units
of a latent do not matter.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from vi_params._cache import program
from vi_params._check import explain, require_count, require_key, require_names
from vi_params._compile import Quick
from vi_params._over import lanes_at_once, over_lanes
from vi_params._tree import strong
from vi_params.guide import Guide
from vi_params.guides import mean_field
from vi_params.matching import joint_declared
from vi_params.noise import Noise, moment_matched, orthogonal
from vi_params.params import constrain, init_params
from vi_params.params.declare import Declared
from vi_params.params.maps import abstract_params
from vi_params.solvers.fixed_draws import Response, fixed_draws, units
from vi_params.solvers.solution import Solution, SolverInfo, require_mean_field
from vi_params.solvers.start import data_of, lane_radii, nats, unchanging
from vi_params.solvers.trust_region import Minimum, minimise
from vi_params.target import EMPTY, Target, flat, whole

FEWEST = 32
"""The smallest number of draws chosen by default."""

FULL_FRAME = 256
"""The largest dimension at which the default draws hold a whole orthogonal frame."""


TRIES = 25
"""How many starts a lane tries until one has a finite loss and gradient."""


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
    locations are good, its scales are those of mean-field: `vi.linear_response` corrects them.
    Where the log density has a gradient but no second derivative in JAX, Hessians are differences
    of gradients.

    Args:
        target: what to approximate; its own parameters, if any, are optimised along.
        key: a typed random key: of the draws and of the starts.
        data: the data; the target's own where None.
        num_draws: how many draws, an even number; by default twice the dimension and at least 32
            (32 above dimension 256).
        noise: their scheme; `vi.noise.orthogonal()`, or `moment_matched()` above dimension 256.
        lanes: from how many starts, the first the family's own, the next ones drawn in towards
            zero, in unconstrained coordinates.
        init: where the first lane starts, as in `vi.guides.mean_field`; or a `Solution` of this
            solver, at other draws perhaps, at whose parameters it starts.
        fixed: those of the target's own parameters that stay as they are, unconstrained, by name.
        tolerance: stop after a Newton step promising less than this, in nats; by default 1e-6 in
            float64 and 1e-5 in float32.
        max_steps: how many steps a lane tries at most.
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
    return Solution(guide, *solve(key, data, fixed, start))


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
    """The guide, and the program `(key, data, fixed, start) -> the fields of the Solution after its
    guide`, for fixed parameters of these names and, unless None, a start of the first lane."""
    require_count(lanes, "lanes", "solvers.deterministic")
    require_count(max_steps, "max_steps", "solvers.deterministic")
    target = whole(target)
    dim = flat(target).dim
    if num_draws is None:
        num_draws = max(FEWEST, 2 * dim) if dim <= FULL_FRAME else FEWEST
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
    return program(_build, target, num_draws, lanes, tolerance, max_steps, name, alike=alike)


def _build(
    target: Target,
    num_draws: int,
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
    radii = lane_radii(lanes)

    @Quick
    def solve(key: jax.Array, data: Any, fixed: Any, start: Any) -> tuple:
        draws = scheme.draw(jax.random.fold_in(key, lanes), num_draws, layout.dim)
        f = fixed_draws(
            layout.log_density(data, fixed),
            draws,
            lanes_at_once(lanes) * layout.size(data),
            layout.num_model,
        )

        def lane(at: tuple[jax.Array, jax.Array]) -> Any:
            i, radius = at
            keys = jax.random.split(jax.random.fold_in(key, i), TRIES)
            starts = jax.vmap(lambda key: layout.vector(init_params(layout.declared, key)))(keys)
            starts = starts.at[:, : layout.dim].multiply(radius)
            if start is not None:
                starts = starts.at[0].set(jnp.where(i == 0, layout.vector(start), starts[0]))
            return minimise(f, starts, layout.units, tolerance=tolerance, max_steps=max_steps)

        found = over_lanes(lane, (jnp.arange(lanes), radii))
        return layout.result(found, draws, fixed)

    return guide, solve


class Layout:
    """How the parameters of target and mean-field guide lie in one vector (m, w, theta)."""

    def __init__(self, target: Target, guide: Guide, fixed: tuple[str, ...] = ()) -> None:
        """Reads names and shapes off the declarations, but for parameters that are fixed."""
        (self.name,) = guide.declared
        self.target = target
        joint = joint_declared(target, guide)
        self.declared: Declared = {n: joint[n] for n in joint if n not in fixed}
        self.free = {n: target.declared[n] for n in target.declared if n not in fixed}
        self.flat = flat(target)
        self.dim = self.flat.dim
        model = abstract_params(self.free)
        blank = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), model)
        self.num_model = sum(leaf.size for leaf in jax.tree.leaves(model))
        self.unravel = ravel_pytree(blank)[1] if self.num_model else lambda theta: {}

    def vector(self, params: Any) -> jax.Array:
        """Parameters as (m, w, theta)."""
        own = params[self.name]
        parts = [own["loc"], own["scale"]]
        if self.num_model:  # old versions of JAX ravel nothing into a scalar
            parts.append(ravel_pytree({key: params[key] for key in self.free})[0])
        return jnp.concatenate(parts)

    def params(self, x: jax.Array) -> dict[str, Any]:
        """Parameters of a vector (m, w, theta)."""
        own = {"loc": x[: self.dim], "scale": x[self.dim : 2 * self.dim]}
        return {**self.unravel(x[2 * self.dim :]), self.name: own}

    def units(self, x: jax.Array) -> jax.Array:
        """The unit of every parameter, of (m, w) alone too."""
        return units(x, self.dim)

    def log_density(self, data: Any, fixed: Any = EMPTY) -> Any:
        """`(u, theta) -> scalar`, at the parameters that are fixed."""

        def at(u: jax.Array, theta: jax.Array) -> jax.Array:
            values = constrain(self.target.declared, {**self.unravel(theta), **fixed})
            return self.flat.log_density(u, values, data)

        return at

    def size(self, data: Any) -> int:
        """About how many numbers one evaluation of the log density handles."""
        return self.dim + self.num_model + sum(leaf.size for leaf in jax.tree.leaves(data))

    def result(self, found: Minimum, draws: jax.Array, fixed: Any) -> tuple:
        """The fields of a `Solution` after its guide, of the minima of all lanes."""
        entropy = 0.5 * self.dim * (1 + math.log(2 * math.pi))
        best = jnp.argmin(found.value)
        at_best = jax.tree.map(lambda leaf: leaf[best], found)
        info = SolverInfo(
            status=at_best.status,
            elbo=entropy - at_best.value,
            steps=at_best.steps,
            lane_elbos=jnp.where(jnp.isfinite(found.value), entropy - found.value, jnp.nan),
            lane_statuses=found.status,
            sampling_error=jnp.full((), jnp.nan, found.value.dtype),
        )
        params = jax.vmap(lambda x: {**fixed, **self.params(x)})(found.x)
        responses = None
        if isinstance(found.curvature, Response):
            hessian, scores, slopes = found.curvature
            both = 2 * self.dim
            responses = Response(hessian[:, :both, :both], scores[:, :, :both], slopes)
        own, response = jax.tree.map(lambda leaf: leaf[best], (params, responses))
        return own, info, draws, response, (params, responses)
