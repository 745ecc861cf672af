"""Where solvers start: data checked, points of finite density, Gaussians given by the caller."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vi_params._check import explain, require_instance, require_names, require_positive
from vi_params._tree import all_finite, is_traced, pick
from vi_params.batches import Batch
from vi_params.guides.location_scale import require_gaussian
from vi_params.objectives.objective import resolve
from vi_params.params import constrain
from vi_params.solvers.solution import Solution
from vi_params.target import Target, flat

RADII = (1.0, 0.15, 0.5, 0.0)
"""The starts of the first lanes, as multiples of the family's start."""

TRIES = 100
"""How many starts are drawn until one has a finite density and gradient."""


class Given(NamedTuple):
    """A Gaussian in unconstrained coordinates, and the parameters of the model beside it.

    Attributes:
        loc: shape (dim,).
        scale_tril: a lower triangle whose square is the covariance, shape (dim, dim).
        model: the target's own parameters, unconstrained; empty where it has none.
    """

    loc: jax.Array
    scale_tril: jax.Array
    model: Any


def data_of(target: Target, data: Any) -> Any:
    """The data to use: those given, checked and as strongly typed arrays, or the target's own.

    Raises:
        TypeError: `target` is no target.
        ValueError: the data are a batch of rows; solvers take all of them.
    """
    require_instance(target, Target, "vi.target or vi.from_numpyro", "target")
    sizes = {plate: (n, target.plates[plate]) for plate, n in target.streamed.items()}
    if isinstance(data, Batch):
        sizes |= {plate: (jnp.size(i), target.plates.get(plate)) for plate, i in data.index.items()}
    batches = {plate: f"{n} of {all_} rows" for plate, (n, all_) in sizes.items() if n != all_}
    if batches:
        raise ValueError(
            explain(
                "This takes all data at once: a posterior of a few rows would be too wide.",
                expected="a target built from all rows, and data that are no batch",
                received=", ".join(f"plate {plate!r}: {n}" for plate, n in batches.items()),
                where="data",
                hint="vi.fit learns from batches",
            )
        )
    return resolve(target, data)


def lane_radii(numbers: jax.Array) -> jax.Array:
    """How far from zero the lanes of these numbers start, as a multiple of the family's start."""
    return jnp.array((*RADII, 1.0))[jnp.minimum(numbers, len(RADII))]


def nats(tolerance: float | None, where: str) -> float:
    """The promise of a Newton step below which a solver stops: by default what dtypes resolve."""
    if tolerance is None:
        return 1e-6 if jnp.result_type(float) == jnp.float64 else 1e-5
    require_positive(tolerance, "tolerance", where)
    return tolerance


def log_density(target: Target) -> Callable[[jax.Array, Any, Any], jax.Array]:
    """`(u, model, data) -> log p` over the flat unconstrained vector, the Jacobian included.

    `model` are the target's own parameters, unconstrained.
    """
    flat_target = flat(target)

    def density(u: jax.Array, model: Any, data: Any) -> jax.Array:
        return flat_target.log_density(u, constrain(target.declared, model), data)

    return density


def first_finite(
    density: Callable[[Any], jax.Array], start: Callable[[jax.Array], Any], key: jax.Array
) -> Any:
    """The first of `start(key_i)` with a finite density and gradient; the last where none has."""

    def attempt(carry: tuple) -> tuple:
        tries, _, _ = carry
        x = start(jax.random.fold_in(key, tries))
        value, gradient = jax.value_and_grad(density)(x)
        return tries + 1, x, all_finite(value, gradient)

    shapes = jax.eval_shape(start, key)
    blank = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return lax.while_loop(
        lambda carry: (carry[0] < TRIES) & ~carry[2],
        attempt,
        (jnp.int32(0), blank, jnp.bool_(False)),
    )[1]


def unchanging(init: Any) -> Any:
    """What `init` says now: values of a mapping as arrays that nobody writes into."""
    if not isinstance(init, Mapping):
        return init
    changing = (np.ndarray, np.generic, list, tuple)
    return {n: jnp.array(x) if isinstance(x, changing) else x for n, x in init.items()}


def is_gaussian(target: Target, init: Any) -> bool:
    """Whether `init` gives a Gaussian to start from, rather than a point or a strategy."""
    if isinstance(init, Mapping):
        return "loc" in init and not set(init) <= set(target.latents)
    return isinstance(init, Solution)


def given_gaussian(target: Target, init: Any, where: str) -> Given:
    """The Gaussian of a `Solution`, or of a mapping with `loc` and `scale` or `scale_tril`.

    Raises:
        KeyError: the mapping has other names.
        TypeError: a solution holds no Gaussian.
        ValueError: the shapes are not those of the target, or the target has parameters of its own
            and no solution brings them.
    """
    model = {}
    if isinstance(init, Solution):
        names = [name for name in init.guide.declared if name in init.params]
        values = constrain(init.guide.declared, pick(init.params, names))
        own = next((value for value in values.values() if isinstance(value, Mapping)), {})
        if "loc" not in own:
            raise TypeError(
                explain(
                    "The solution to start from holds no Gaussian.",
                    expected="a solution with a guide of vi.guides: mean_field, full_rank, "
                    "low_rank",
                    received=f"parameters {sorted(names)}",
                    where=where,
                )
            )
        model = pick(init.params, [name for name in target.declared if name in init.params])
    else:
        own = {name: jnp.asarray(value, float) for name, value in init.items()}
    scale = {"scale_tril"} if "scale_tril" in own else {"scale"}
    known = {"loc"} | scale | ({"factor"} if scale == {"scale"} and "factor" in own else set())
    require_names(sorted(own), sorted(known), what="parameters of a Gaussian", where=where)
    require_model(target, model, where)
    given = Given(*require_gaussian(own, where), model)
    dim = flat(target).dim
    shapes = (jnp.shape(given.loc), jnp.shape(given.scale_tril))
    if shapes != ((dim,), (dim, dim)):
        raise ValueError(
            explain(
                "The Gaussian to start from has the wrong shape.",
                expected=f"loc ({dim},) and scale ({dim},) or scale_tril ({dim}, {dim})",
                received=f"loc {shapes[0]}, a triangle {shapes[1]}",
                where=where,
                hint="over the unconstrained vector of vi.flat(target)",
            )
        )
    if not is_traced(given) and not bool(_usable(given)):
        raise ValueError(
            explain(
                "The Gaussian to start from is not one.",
                expected="finite numbers, positive scales, scale_tril a lower triangle",
                received="a scale that is not positive, a number that is not finite, or one above "
                "the diagonal",
                where=where,
                hint="of a covariance take jnp.linalg.cholesky",
            )
        )
    return given


def require_model(target: Target, model: Any, where: str) -> None:
    """Raises unless `model` holds all the target's own parameters: the solver keeps them fixed."""
    if set(model) != set(target.declared):
        missing = sorted(set(target.declared) - set(model))
        raise ValueError(
            explain(
                "The target has parameters of its own, which this solver keeps fixed.",
                expected=f"init=, a Solution that brings {missing}",
                received="no values for them",
                where=where,
                hint="init=vi.solvers.laplace(target, key) estimates them",
            )
        )


def _usable(given: Given) -> jax.Array:
    root = given.scale_tril
    is_lower = jnp.all(root == jnp.tril(root))
    return all_finite(given.loc, root) & jnp.all(jnp.diagonal(root) > 0) & is_lower


def model_from(target: Target, init: Any, where: str) -> tuple[Any, Any]:
    """The target's own parameters out of a `Solution`, and what else `init` says of the start."""
    if isinstance(init, Solution):
        model = pick(init.params, [name for name in target.declared if name in init.params])
        init = None
    else:
        model = {}
    require_model(target, model, where)
    return model, init
