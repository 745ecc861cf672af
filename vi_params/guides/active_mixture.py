"""Mixtures along a few directions of a Gaussian, normal or skewed across them.

In the coordinates y of a Gaussian, those along the active directions before those across
(`Frame`),

    q(y) = sum_k w_k t(y_A; m_k, L_k L_k', df) N(y_B; n_k, diag(s_k)^2).

In many dimensions a posterior often departs from a Gaussian along few directions, the active ones
of the log ratio of both: the leading eigenvectors of E[g g'], g its gradient in y (Constantine,
2015, Active Subspaces, section 3.1; Zahm, Cui, Law, Spantini and Marzouk, 2022, Certified dimension
reduction in nonlinear Bayesian inverse problems, Mathematics of Computation 91). What lies across
them may still follow along, or be skewed: the frame may bend and tilt, and every component has a
place and scales of its own there.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import constraints

from vi_params._arrays import exact, logsumexp
from vi_params._check import explain, require_count
from vi_params.guide import Draw, Guide, pick_own, sampler
from vi_params.guides.frame import Frame, frame_of
from vi_params.guides.location_scale import positive
from vi_params.guides.mixture import Components, at_noise, component_of, log_terms, mixture_noise
from vi_params.guides.starts import model_values, require_whole_plates, start_vector
from vi_params.noise import Noise
from vi_params.params import Param, constrain
from vi_params.target import Target, flat


class Across(NamedTuple):
    """The normal parts of the components, across the active directions.

    Attributes:
        locs: n_k, shape (K, dim - num_active).
        scales: s_k, shape (K, dim - num_active).
    """

    locs: Any
    scales: Any


class Parts(NamedTuple):
    """The components in the coordinates y.

    Attributes:
        along: over the active directions, the first coordinates.
        across: over the rest; may be empty.
    """

    along: Components
    across: Across


def active_mixture(
    target: Target,
    num_components: int,
    num_active: int,
    *,
    df: int | None = None,
    num_nodes: int | None = None,
    init: Any = None,
    init_scale: float = 0.1,
    name: str = "guide",
) -> Guide:
    """A mixture along a few directions in unconstrained coordinates, normal across them in a frame
    that may bend and be skewed.

    Like `vi.guides.mixture` its draws have no gradient: `vi.solvers.population_monte_carlo` with
    `num_active` finds directions and components.

    Args:
        target: what to approximate.
        num_components: how many, K.
        num_active: how many directions, the first columns of the frame's rotation.
        df: degrees of freedom along them, a whole number; None for normal components.
        num_nodes: between how many nodes along the splines are by which means, scales and
            regressions across follow, as those of `vi.solvers.nested_laplace` do; None for linear
            log scales and precisions times means, and no regressions.
        init: where the frame's `loc` starts, as in `vi.guides.mean_field`.
        init_scale: where its scales start, a positive number in unconstrained units.
        name: the name of the parameters `{"along": {"weights", "locs", "scale_trils"}, "across":
            {"locs", "scales"}, "frame": {"loc", "scale_tril", "rotation", "shifts",
            "log_scales", "tilts"}}`, with nodes "coupled" in the frame, too: {"weights", "nodes",
            "centre", "unit"}; the rotation must stay orthogonal.

    Returns:
        A `Guide`.

    Raises:
        ValueError: a number is not a positive whole one, `num_active` exceeds the dimension,
            `init_scale` is not positive, or a start lies outside its support.
        KeyError: `init` names an unknown latent.

    Example:
        >>> target = vi.target(lambda v, z, d: -0.5 * jnp.sum(z["z"] ** 2), {"z": vi.Latent((9,))})
        >>> guide = vi.guides.active_mixture(target, 3, 2, df=7)
        >>> params = vi.init_params(guide.declared, jax.random.key(0))
        >>> guide.sample(params, jax.random.key(1)).latents["z"].shape
        (9,)
    """
    where = "guides.active_mixture"
    require_whole_plates(target, f"vi.{where}")
    require_count(num_components, "num_components", where)
    require_count(num_active, "num_active", where)
    for number, what in [(df, "df"), (num_nodes, "num_nodes")]:
        if number is not None:
            require_count(number, what, where)
    flat_target = flat(target)
    dim = flat_target.dim
    if num_active > dim:
        raise ValueError(
            explain(
                "There are not as many directions.",
                expected=f"num_active from 1 to {dim}, the dimension",
                received=str(num_active),
                where=where,
            )
        )
    num, rest = num_components, dim - num_active
    terms, splines = 1 + num_active, {}
    if num_nodes is not None:
        terms += num_nodes
        splines["coupled"] = {
            "weights": Param(np.zeros((terms, rest, rest))),
            "nodes": Param(np.zeros((num_nodes, num_active))),
            "centre": Param(np.zeros(num_active)),
            "unit": Param(np.ones(num_active)),
        }
    declared = {
        name: {
            "along": {
                "weights": Param(np.full(num, 1 / num), constraint=constraints.simplex),
                "locs": Param(np.zeros((num, num_active))),
                "scale_trils": Param(
                    np.tile(np.eye(num_active), (num, 1, 1)), constraint=constraints.lower_cholesky
                ),
            },
            "across": {
                "locs": Param(np.zeros((num, rest))),
                "scales": Param(np.ones((num, rest)), constraint=constraints.positive),
            },
            "frame": {
                "loc": Param(start_vector(target, init)),
                "scale_tril": Param(
                    positive(init_scale) * np.eye(dim), constraint=constraints.lower_cholesky
                ),
                "rotation": Param(np.eye(dim)),
                "shifts": Param(np.zeros((terms, rest))),
                "log_scales": Param(np.zeros((terms, rest))),
                "tilts": Param(np.zeros(rest)),
                **splines,
            },
        }
    }

    def read(params: Any) -> tuple[Parts, Frame]:
        own = constrain(declared, pick_own(params, declared))[name]
        parts = Parts(Components(**own["along"]), Across(**own["across"]))
        return parts, frame_of(own["frame"])

    def noise(key: jax.Array, num_particles: int, scheme: Noise | None = None) -> Any:
        return mixture_noise(key, num_particles, dim, df, scheme)

    def jacobian(params: Any, u: jax.Array, data: Any) -> Any:
        return flat_target.constrain_with_log_det(u, model_values(target, params), data)

    def transform(params: Any, one: Any, data: Any = None) -> Draw:
        parts, frame = read(params)
        k = component_of(parts.along, one)
        normal = one["normal"]
        along = at_noise(parts.along, {**one, "normal": normal[:num_active]}, df)
        across = parts.across.locs[k] + parts.across.scales[k] * normal[num_active:]
        y = jax.lax.stop_gradient(jnp.concatenate([along, across]))
        u, log_det = jax.lax.stop_gradient(frame.unconstrained_with_log_det(y))
        latents, log_abs_det = jacobian(params, u, data)
        log_q = logsumexp(part_terms(parts, y, df)) - log_det
        return Draw(latents, log_q - log_abs_det, u)

    def rescore(params: Any, draw: Draw, data: Any = None) -> jax.Array:
        parts, frame = read(params)
        u = draw.position
        y = frame.coordinates(u)
        log_q = logsumexp(part_terms(parts, y, df)) - frame.log_det(y)
        return log_q - jacobian(params, u, data)[1]

    def log_prob(params: Any, latents: Any, data: Any = None) -> jax.Array:
        u = flat_target.unconstrain(latents, model_values(target, params), data)
        return rescore(params, Draw(latents, jnp.zeros(()), u), data)

    return Guide(
        declared=declared,
        sample=sampler(noise, transform),
        log_prob=log_prob,
        rescore=rescore,
        noise=noise,
        transform=transform,
        is_reparameterised=False,
    )


def part_terms(parts: Parts, y: Any, df: int | None, xp: Any = jnp) -> Any:
    """The components' shares log [w_k q_k(y)], shape (K,), or (K, n) of n rows y."""
    num_active = parts.along.locs.shape[1]
    terms = log_terms(parts.along, y[..., :num_active], df, xp)
    return terms + log_normals(parts.across, y[..., num_active:], xp)


def log_normals(across: Across, b: Any, xp: Any = jnp) -> Any:
    """The components' log N(b; n_k, diag(s_k)^2), shape (K,), or (K, n) of n rows b, the squares
    multiplied out: of many b these are products of matrices, far faster than as many
    differences."""
    locs, scales = across
    precisions = scales**-2
    at_centre = xp.sum(precisions * locs**2, axis=1)
    log_det = xp.sum(xp.log(scales), axis=1)
    squared = exact(precisions, (b**2).T, xp) - 2 * exact(precisions * locs, b.T, xp)
    constants = 0.5 * (at_centre + b.shape[-1] * math.log(2 * math.pi)) + log_det
    return (-0.5 * squared.T - constants).T
