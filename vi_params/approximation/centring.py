"""In which coordinates a hierarchy is approximated: how far it is centred, by a pilot.

In non-centred coordinates the prior of a latent has scale one, and the scale s that mean-field
finds for it is that of its posterior given all else: 1 - s^2 is the share of what is known of it
that comes from the data, and in a normal model the centring at which the spread of the coordinate
no longer depends on the scale of the prior. Papaspiliopoulos, Roberts and Skold (2007), A general
framework for the parametrization of hierarchical models, Statistical Science 22(1), section 2.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vi_params._cache import program
from vi_params._compile import Quick
from vi_params.approximation.optima import optima
from vi_params.params import unconstrain
from vi_params.solvers.solution import SolverStatus, own_name
from vi_params.target import CENTRING, Target, split_vector

EDGE = 1e-3
"""How close to zero and one a centring may be."""


def non_centred(target: Target) -> dict[str, Any]:
    """The parameters of the non-centred coordinates; none where the target has no centring."""
    if not target.is_recentred:
        return {}
    return program(_non_centred, target)


def _non_centred(target: Target) -> dict[str, Any]:
    shapes = {name: param.init.shape for name, param in target.declared[CENTRING].items()}
    return jax.jit(lambda: _params(target, {n: jnp.zeros(shape) for n, shape in shapes.items()}))()


def suited(target: Target, key: jax.Array, data: Any, lanes: int) -> dict[str, Any]:
    """The parameters of the coordinates that suit the data.

    Args:
        target: in coordinates with a centring, no plate of it subsampled.
        key: a typed random key, of the pilot.
        data: the data.
        lanes: from how many starts.
    """
    pilot = optima(target, key, data, non_centred(target), lanes)[0]
    own = pilot.params[own_name(pilot.guide, "approximate")]
    log_scales = np.array(own["scale"])
    if int(pilot.info.status) == SolverStatus.INVALID_START:
        log_scales[:] = np.nan
    return program(_suited, target)(log_scales)


def _suited(target: Target) -> Quick:
    @Quick
    def compiled(log_scales: jax.Array) -> dict[str, Any]:
        # A pilot that failed says nothing: half centred.
        variances = split_vector(target, jnp.nan_to_num(jnp.exp(2 * log_scales), nan=0.5))
        return _params(target, {n: 1 - variances[n] for n in target.declared[CENTRING]})

    return compiled


def _params(target: Target, centring: dict[str, Any]) -> dict[str, Any]:
    declared = {CENTRING: target.declared[CENTRING]}
    inside = {name: jnp.clip(c, EDGE, 1 - EDGE) for name, c in centring.items()}
    return unconstrain(declared, {CENTRING: inside})
