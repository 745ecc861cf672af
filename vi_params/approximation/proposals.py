"""What guides draw, and how likely that is, on the host.

Draws of an elliptical distribution and its density take less time in numpy than programs for them
take to compile, so that the one program a judgement needs is the target's own density.
"""

from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

import jax
import numpy as np

from vi_params._arrays import logsumexp
from vi_params._cache import program
from vi_params._compile import Quick
from vi_params._tree import pick
from vi_params.guide import Guide
from vi_params.guides.active_mixture import Across, Parts, part_terms
from vi_params.guides.contaminated import SCALES, WEIGHTS
from vi_params.guides.frame import frame_of
from vi_params.guides.mixture import Components, log_elliptical
from vi_params.params import Param, constrain, unconstrain
from vi_params.solvers.mixture_families import Mixture
from vi_params.solvers.solution import Solution

Proposal = Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]
"""A distribution over unconstrained vectors: `(generator, num_draws) -> (vectors, log densities)`,
shapes (num_draws, dim) and (num_draws,). Only all rows together are a sample: they may be sorted by
component. Densities are found from what the vectors were made of, without a way back from them, and
are those before any rounding to float32."""


def contaminated_normal(loc: np.ndarray, scale_tril: np.ndarray) -> Proposal:
    """That of `vi.guides.contaminated_normal`."""
    dim = len(loc)
    weights, scales = np.asarray(WEIGHTS), np.asarray(SCALES)
    log_det = np.sum(np.log(np.diagonal(scale_tril)))

    def draw(random: np.random.Generator, num_draws: int) -> tuple[np.ndarray, np.ndarray]:
        size = random.choice(scales, num_draws, p=weights)
        y = size[:, None] * random.standard_normal((num_draws, dim))
        terms = log_elliptical(np.sum(y**2, axis=1) / scales[:, None] ** 2, dim, None, np)
        terms = terms.T + np.log(weights) - dim * np.log(scales)
        return loc + y @ scale_tril.T, logsumexp(terms, axis=1, xp=np) - log_det

    return draw


def mixture(found: Mixture, df: int | None) -> Proposal:
    """That of `vi.guides.mixture` or `active_mixture`."""
    (weights, locs, scale_trils), across = found.parts
    num_active, rest = locs.shape[1], across.locs.shape[1]
    frame = found.frame
    root = None if frame is None else frame.root(np)

    def draw(random: np.random.Generator, num_draws: int) -> tuple[np.ndarray, np.ndarray]:
        counts = random.multinomial(num_draws, weights / np.sum(weights))
        normal = random.standard_normal((num_draws, num_active + rest))
        if df is not None:
            normal[:, :num_active] *= np.sqrt(df / random.chisquare(df, (num_draws, 1)))
        y, edges = np.empty_like(normal), np.cumsum(counts)
        for k, (end, count) in enumerate(zip(edges, counts, strict=True)):
            rows = slice(end - count, end)
            y[rows, :num_active] = locs[k] + normal[rows, :num_active] @ scale_trils[k].T
            y[rows, num_active:] = across.locs[k] + across.scales[k] * normal[rows, num_active:]
        log_q = logsumexp(part_terms(found.parts, y, df, np), xp=np)
        if frame is None:
            return y, log_q
        u, log_det = frame.unconstrained_with_log_det(y, np, root)
        return u, log_q - log_det

    return draw


def log_density_of(solution: Solution, df: int | None) -> Callable[[np.ndarray], np.ndarray]:
    """The log density over rows of unconstrained vectors of a mixture, of normals or of Student-t
    distributions."""
    found = _mixture_of(values_of(solution))

    def log_density(u: np.ndarray) -> np.ndarray:
        y = found.coordinates(u, np)
        log_q = logsumexp(part_terms(found.parts, y, df, np), xp=np)
        return log_q if found.frame is None else log_q - found.frame.log_det(y, np)

    return log_density


def proposal_of(solution: Solution) -> Proposal | None:
    """That of a solution of this pipeline: of the contaminated normal with its default parts, or of
    a mixture of normals; None where its parameters are those of another family."""
    (name,) = solution.guide.declared
    fields = set(solution.params[name])
    if fields == {"loc", "scale_tril"}:
        return contaminated_normal(**values_of(solution))
    if fields == set(Components._fields):
        return mixture(_mixture_of(values_of(solution)), None)
    return None


def _mixture_of(values: dict[str, Any]) -> Mixture:
    """The mixture whose constrained parameters these are: what `Mixture.values` gives."""
    if "frame" in values:
        along, across = Components(**values["along"]), Across(**values["across"])
        return Mixture(Parts(along, across), frame_of(values["frame"]))
    along = Components(**values)
    nothing = np.zeros((len(along.weights), 0))
    return Mixture(Parts(along, Across(nothing, nothing)), None)


def values_of(solution: Solution) -> dict[str, Any]:
    """The constrained parameters of a guide's family, on the host in float64."""
    guide = solution.guide
    (name,) = guide.declared
    values = jax.device_get(program(_values, guide)(pick(solution.params, guide.declared)))
    return jax.tree.map(lambda leaf: np.asarray(leaf, float), values[name])


def compile_values(pool: Executor, guide: Guide, params: Any) -> None:
    """Has the program of `values_of` compiled by a thread of `pool`."""
    program(_values, guide).ahead(pool, pick(params, guide.declared))


def _values(guide: Guide) -> Quick:
    return Quick(lambda params: constrain(guide.declared, params))


def params_of(guide: Guide, found: Mixture) -> dict[str, Any]:
    """The parameters of a guide that is a mixture."""
    return program(_params, guide)(found.values)


def compile_params(pool: Executor, guide: Guide) -> None:
    """Has the program of `params_of` compiled by a thread of `pool`."""
    program(_params, guide).ahead(pool, program(_shapes, guide))


def _shapes(guide: Guide) -> Any:
    """Of the constrained parameters of a guide's family, as arrays that are not there."""
    key, dtype = jax.eval_shape(lambda: jax.random.key(0)), jax.dtypes.canonicalize_dtype(float)

    def shape(param: Param) -> Any:
        init = param.init
        where = jax.eval_shape(init, key).shape if callable(init) else np.shape(init)
        return jax.ShapeDtypeStruct(where, dtype)

    (own,) = guide.declared.values()
    return jax.tree.map(shape, own, is_leaf=lambda leaf: isinstance(leaf, Param))


def _params(guide: Guide) -> Quick:
    (name,) = guide.declared
    return Quick(lambda values: unconstrain(guide.declared, {name: values}))
