"""Where a family starts: an unconstrained vector from a key."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vi_params._check import Failure, explain, require_instance, require_names
from vi_params._tree import fold_in_words, is_traced, name_words, pick, strong
from vi_params.params import Latent, constrain, init_params
from vi_params.params.declare import bijector, constraint_name
from vi_params.target import Target, flat, ravel

RADIUS = 2.0
"""Half the width of the default start in every unconstrained coordinate, as in Stan and NumPyro."""


@dataclasses.dataclass(frozen=True, eq=False)
class Uniform:
    """The default start: uniform in every unconstrained coordinate."""

    target: Target

    def __call__(self, key: jax.Array) -> jax.Array:
        """The vector, shape (dim,)."""
        return ravel(_uniform(self.target, key))


def start_vectors(
    start: Callable[[jax.Array], jax.Array], key: jax.Array, number: int
) -> jax.Array:
    """Independent starts, shape (number, dim).

    Uniform ones come of one key for all: the keys of every latent compile for long.

    Args:
        start: as `start_vector` gives it.
        key: a typed random key.
        number: how many.
    """
    if isinstance(start, Uniform):
        shape = number, flat(start.target).dim
        return jax.random.uniform(key, shape, minval=-RADIUS, maxval=RADIUS)
    return jax.vmap(start)(jax.random.split(key, number))


def start_vector(target: Target, init: Any) -> Callable[[jax.Array], jax.Array]:
    """The start of a family's location as a function of a key.

    Args:
        target: the target whose latents start.
        init: None (uniform on (-2, 2) in every unconstrained coordinate, each latent by a key of
            its own), a mapping from names to constrained values (latents that it lacks start
            uniformly), or one of numpyro's `init_to_*` strategies.

    Raises:
        KeyError: the mapping names an unknown latent.
        ValueError: a value has the wrong shape, or lies outside its latent's support.
        TypeError: `init` is none of these.
    """
    if init is None:
        return Uniform(target)
    if isinstance(init, Mapping):
        require_names(
            list(init), list(target.latents), what="latents in init", where="init", complete=False
        )
        # Copied: the caller may write into an array before the start is traced.
        init = {n: x.copy() if isinstance(x, np.ndarray) else x for n, x in init.items()}
        for name, value in init.items():
            _require_inside(target.latents[name], value, f"init, latent {name!r}")
        return lambda key: ravel(_at_values(target, init, key))
    if callable(init):
        return lambda key: ravel(target.start(init, key))
    raise TypeError(
        explain(
            "A start strategy was expected.",
            expected="None, a mapping from names to values, or numpyro.infer.init_to_*",
            received=f"{init!r} ({type(init).__name__})",
            where="init",
        )
    )


def model_values(target: Target, params: Any) -> dict[str, Any]:
    """The model's own values where a support may depend on them, out of the joint parameters."""
    dynamic = any(latent.is_dynamic for latent in target.latents.values())
    if not dynamic or not target.declared:
        return {}
    if not set(target.declared) <= set(params):
        raise Failure(
            explain(
                "Parameters that the guide's coordinates need are missing.",
                expected=f"parameters with {sorted(target.declared)}",
                received=f"{sorted(params)}",
                where="guide",
                hint="a guide goes with the target that it was built from; that of vi.approximate "
                "with posterior.coordinates",
            )
        )
    return constrain(target.declared, pick(params, target.declared))


def require_whole_plates(target: Target, where: str) -> None:
    """Raises where a latent has the rows of one batch only, which come from outside."""
    require_instance(target, Target, "vi.target or vi.from_numpyro", f"{where}, target")
    for name, latent in target.latents.items():
        for plate, rows in zip(latent.plates, latent.shape, strict=False):
            if plate is not None and target.plates.get(plate, rows) != rows:
                raise ValueError(
                    explain(
                        "A latent has the rows of a batch that comes from outside.",
                        expected=f"all {target.plates[plate]} rows of plate {plate!r}",
                        received=f"shape {latent.shape}",
                        where=f"{where}, latent {name!r}",
                        hint="vi.guides.mean_field gives every row parameters; or use a guide that "
                        "computes the latent from the batch (vi.numpyro_guide)",
                    )
                )


def _uniform(target: Target, key: jax.Array) -> dict[str, jax.Array]:
    """Every number from a key of its own, folded in from its latent's name and its place there.

    One vectorised draw for all: a draw for each latent would compile the generator as often.
    """
    shapes = {name: latent.unconstrained_shape or () for name, latent in target.latents.items()}
    sizes = [math.prod(shape) for shape in shapes.values()]
    words = np.repeat(np.array([name_words(name) for name in shapes]).reshape(-1, 2), sizes, axis=0)
    place = np.concatenate([np.arange(0), *(np.arange(size) for size in sizes)])

    def draw(words: jax.Array, place: jax.Array) -> jax.Array:
        own = fold_in_words(key, (*words, place))
        return jax.random.uniform(own, minval=-RADIUS, maxval=RADIUS)

    u = jax.vmap(draw)(jnp.asarray(words, jnp.uint32), jnp.asarray(place, jnp.uint32))
    parts = jnp.split(u, np.cumsum(sizes)[:-1]) if sizes else []
    return {
        name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }


def _at_values(target: Target, init: Mapping[str, Any], key: jax.Array) -> dict[str, jax.Array]:
    u = _uniform(target, key)
    # The other latents' uniform values fix what a support that depends on them looks like.
    latents, _ = target.constrain(_no_values(target, key), u, target.data)
    given = {name: strong(jnp.asarray(value, float)) for name, value in init.items()}
    start = target.unconstrain(_no_values(target, key), {**latents, **given}, target.data)
    return {name: start[name] if name in init else u[name] for name in u}


def _require_inside(latent: Latent, value: Any, where: str) -> None:
    """Raises unless `value` has the latent's shape and lies in the interior of its support."""
    if jnp.shape(value) != latent.shape:
        raise ValueError(
            explain(
                "A start has the wrong shape.",
                expected=f"shape {latent.shape}",
                received=f"shape {jnp.shape(value)}",
                where=where,
            )
        )
    if latent.is_dynamic:
        return

    @jax.jit
    def is_inside(x: jax.Array) -> jax.Array:
        free = bijector(latent.support, where).inv(x)
        return jnp.all(latent.support(x)) & jnp.all(jnp.isfinite(free))

    with jax.ensure_compile_time_eval():
        inside = is_inside(jnp.asarray(value, float))
    if not is_traced(inside) and not inside:
        raise ValueError(
            explain(
                "A start lies outside its latent's support.",
                expected=f"finite values in the interior of {constraint_name(latent.support)}",
                received=np.array2string(np.asarray(value), threshold=8),
                where=where,
            )
        )


def _no_values(target: Target, key: jax.Array) -> dict[str, Any]:
    """The model's own parameters at their start: supports may depend on them."""
    return constrain(target.declared, init_params(target.declared, key))
