"""How the parameters of a target and a mean-field guide lie in one vector."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from vi_params.guide import Guide
from vi_params.guides.starts import start_vectors
from vi_params.matching import joint_declared
from vi_params.params import constrain, init_params
from vi_params.params.declare import Declared
from vi_params.params.maps import abstract_params
from vi_params.solvers.fixed_draws import Response, units
from vi_params.solvers.solution import SolverInfo
from vi_params.solvers.start import RADII
from vi_params.solvers.trust_region import Minimum
from vi_params.target import EMPTY, Target, flat

TRIES = 25
"""How many starts a lane has: it goes on from the first of finite loss and gradient."""


class Layout:
    """The vector (m, w, theta): locations, log scales, the target's own parameters."""

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
        blank = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), model)
        self.num_model = sum(leaf.size for leaf in jax.tree.leaves(model))
        self.length = 2 * self.dim + self.num_model
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

    def starts(self, key: jax.Array, radius: jax.Array) -> jax.Array:
        """Vectors as the guide starts at, shape (TRIES, n), locations times the radius; where it is
        zero those of the first only, and the next ones times the smallest other one."""
        of_latents, of_model, of_scale = jax.random.split(key, 3)
        loc, scale = (self.declared[self.name][what] for what in ("loc", "scale"))
        radii = jnp.where(jnp.arange(TRIES) > 0, jnp.maximum(radius, RADII[1]), radius)
        locs = radii[:, None] * start_vectors(loc.init, of_latents, TRIES)
        scales = init_params({"scale": scale}, of_scale)["scale"]
        parts = [locs, jnp.broadcast_to(scales, locs.shape)]
        if self.num_model:
            draw = jax.vmap(lambda key: ravel_pytree(init_params(self.free, key))[0])
            parts.append(draw(jax.random.split(of_model, TRIES)))
        return jnp.concatenate(parts, axis=1)

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

    def result(
        self, found: Minimum, best: jax.Array, draws: jax.Array, number: jax.Array, fixed: Any
    ) -> tuple:
        """The fields of a `Solution` after its guide, of the minima of all lanes, the number of the
        best one, the first of its draws and how many these are."""
        entropy = 0.5 * self.dim * (1 + math.log(2 * math.pi))
        at_best = jax.tree.map(lambda leaf: leaf[best], found)
        info = SolverInfo(
            status=at_best.status,
            elbo=entropy - at_best.value,
            steps=at_best.steps,
            lane_elbos=jnp.where(jnp.isfinite(found.value), entropy - found.value, jnp.nan),
            lane_statuses=found.status,
            sampling_error=jnp.full((), jnp.nan, found.value.dtype),
            details=number,
        )
        params = jax.vmap(lambda x: {**fixed, **self.params(x)})(found.x)
        responses = None
        if isinstance(found.curvature, Response):
            hessian, scores, slopes = found.curvature
            both = 2 * self.dim
            responses = Response(hessian[:, :both, :both], scores[:, :, :both], slopes)
        own, response = jax.tree.map(lambda leaf: leaf[best], (params, responses))
        return own, info, draws, response, (params, responses)
