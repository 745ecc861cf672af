"""EM for a mixture of elliptical distributions, on weighted draws.

With weights w_i of draws y_i = (a_i, b_i), rho_ik the share of component k in q(y_i) and
gamma_ik = rho_ik (df + dim a) / (df + |L_k^-1 (a_i - m_k)|^2), a sweep sets

    w_k = sum_i w_i rho_ik
    m_k = sum_i w_i gamma_ik a_i / sum_i w_i gamma_ik
    L_k L_k' = sum_i w_i gamma_ik (a_i - m_k)(a_i - m_k)' / w_k

and, where there are coordinates b across, n_k and s_k^2 to their mean and variances under w_i
rho_ik / w_k; covariances are drawn towards those before, and what is across towards the standard
normal, as few draws speak for them. Cappe, Douc, Guillin, Marin and Robert (2008), Adaptive
importance sampling in general mixture classes, Statistics and Computing 18, sections 3 and 4.

On the host, in float64, squared distances and covariances come from the products of the coordinates
of a_i, in which they are linear and which are made once: what is left of a sweep are products of
matrices. In float32 that would lose narrow components: programs take differences.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vi_params._arrays import cholesky, exact, in_turn, inverse_lower, repeated
from vi_params._tree import all_finite, where_tree
from vi_params.guides.active_mixture import Across, Parts, log_normals
from vi_params.guides.mixture import Components, log_elliptical, log_weights

SWEEPS = 2
"""How many sweeps are made: more of them follow the noise of few effective draws."""

RARE = 1e-3
"""A component of less weight than this stays where it is."""

BEFORE = 4.0
"""For how many draws a direction it counts, along, that a component has the covariance that it had:
the first rounds have hardly one effective draw for every number of a covariance."""

PRIOR, PRIOR_PER_SCALE = 10.0, 0.5
"""For how many draws it counts that, across, a component is the standard normal: for at least so
many, and for so many a coordinate. The logarithm of a scale found by n draws is off by about
1 / sqrt(2 n), and the errors of many scales add up."""

PLANE = 0.1
"""How much a covariance of draws is drawn towards its diagonal: few of them can lie in a plane."""


def weighted_em(now: Parts, y: Any, weights: Any, df: int, xp: Any = jnp) -> Parts:
    """Sweeps of EM.

    A component that few draws speak for is drawn towards what it was along, and towards the
    standard normal across.

    Args:
        now: where it starts.
        y: the draws, shape (num_draws, dim).
        weights: their normalised weights, shape (num_draws,).
        df: degrees of freedom along.
        xp: jax.numpy, or numpy for arrays on the host.
    """
    num_active = now.along.locs.shape[1]
    a, b = y[:, :num_active], y[:, num_active:]
    b_squares, prior = b**2, prior_draws(b.shape[1])
    # In units of the draws themselves.
    mean, root = moments(a, weights, xp)
    root = where_tree(all_finite(root, xp=xp), root, xp.eye(num_active, dtype=y.dtype), xp)
    inverse = inverse_lower(root, xp)
    a = inverse @ (a - mean).T
    quadratic = _differences(a.T) if xp is jnp else _products(a)

    def shares(now: Parts) -> tuple[Any, Any]:
        """rho and gamma, with the weights in them, shape (K, num_draws)."""
        along, across = now
        inverses = in_turn(lambda root: inverse_lower(root, xp), along.scale_trils, xp)
        squared = quadratic.distances(along.locs, inverses)
        log_dets = xp.sum(xp.log(xp.diagonal(along.scale_trils, axis1=1, axis2=2)), axis=1)
        terms = log_elliptical(squared, num_active, df, xp) + log_normals(across, b, xp)
        terms = terms + (log_weights(along.weights, xp) - log_dets)[:, None]
        parts = xp.exp(terms - xp.max(terms, axis=0))
        rho = parts * (weights / xp.sum(parts, axis=0))
        return rho, rho * (df + num_active) / (df + squared)

    def sweep(now: Parts) -> Parts:
        rho, gamma = shares(now)
        masses = xp.sum(gamma, axis=1)
        locs = exact(gamma, a.T, xp) / masses[:, None]
        scatters = quadratic.scatters(locs, gamma)

        def one(parts: tuple) -> Parts:
            rho, loc, scatter, b_sum, b_sum_of_squares, old = parts
            weight = xp.sum(rho)
            effective = weight**2 / xp.sum(rho**2)
            covariance = scatter / weight
            learnt = effective / (effective + BEFORE * num_active)
            before = old.along.scale_trils @ old.along.scale_trils.T
            root = cholesky(learnt * covariance + (1 - learnt) * before, xp)

            known = effective / (effective + prior)
            centre = known * b_sum / weight
            spread = (b_sum_of_squares - 2 * centre * b_sum) / weight + centre**2
            variance = known * spread + (1 - known)
            new = loc, root, Across(centre, xp.sqrt(variance))
            usable = (weight > RARE) & all_finite(new, xp=xp)
            before = old.along.locs, old.along.scale_trils, old.across
            loc, root, across = where_tree(usable, new, before, xp)
            weight = xp.maximum(weight, xp.finfo(y.dtype).eps)
            return Parts(Components(weight, loc, root), across)

        rows = rho, locs, scatters, exact(rho, b, xp), exact(rho, b_squares, xp), now
        new = in_turn(one, rows, xp)
        weights = new.along.weights / xp.sum(new.along.weights)
        return new._replace(along=new.along._replace(weights=weights))

    along = now.along._replace(
        locs=(now.along.locs - mean) @ inverse.T, scale_trils=inverse @ now.along.scale_trils
    )
    along, across = repeated(SWEEPS, sweep, Parts(along, now.across), xp)
    along = along._replace(locs=along.locs @ root.T + mean, scale_trils=root @ along.scale_trils)
    return where_tree(all_finite((along, across), xp=xp), Parts(along, across), now, xp)


def prior_draws(num_across: int) -> float:
    """For how many draws the prior of as many scales counts."""
    return max(PRIOR, PRIOR_PER_SCALE * num_across)


class _Quadratic(NamedTuple):
    """Quadratic forms of the draws.

    Attributes:
        distances: `(locs, inverses of the roots) -> squared distances`, shape (K, num_draws).
        scatters: `(locs, gamma) -> sum_i gamma_i (a_i - m)(a_i - m)'`, shape (K, dim, dim).
    """

    distances: Callable[[Any, Any], Any]
    scatters: Callable[[Any, Any], Any]


def _products(a: np.ndarray) -> _Quadratic:
    """From the products of the coordinates of draws, shape (dim, num_draws), where m is the mean
    under gamma."""
    dim = len(a)
    rows, columns = np.tril_indices(dim)
    products = a[rows] * a[columns]
    times = np.where(rows == columns, 1.0, 2.0)
    place = np.zeros((dim, dim), int)
    place[rows, columns] = place[columns, rows] = np.arange(len(rows))

    def distances(locs: np.ndarray, inverses: np.ndarray) -> np.ndarray:
        precisions = inverses.swapaxes(1, 2) @ inverses
        linear = np.sum(precisions * locs[:, None], axis=2)
        squares = (precisions[:, rows, columns] * times) @ products
        squared = squares - 2 * linear @ a + np.sum(linear * locs, axis=1)[:, None]
        return np.maximum(squared, 0.0)

    def scatters(locs: np.ndarray, gamma: np.ndarray) -> np.ndarray:
        masses = np.sum(gamma, axis=1)[:, None, None]
        return (gamma @ products.T)[:, place] - masses * locs[:, :, None] * locs[:, None]

    return _Quadratic(distances, scatters)


def _differences(a: jax.Array) -> _Quadratic:
    """From differences, component by component: what one of them needs fits into the caches."""

    def distances(locs: jax.Array, inverses: jax.Array) -> jax.Array:
        def one(part: tuple) -> jax.Array:
            loc, inverse = part
            return jnp.sum(((a - loc) @ inverse.T) ** 2, axis=1)

        return lax.map(one, (locs, inverses))

    def scatters(locs: jax.Array, gamma: jax.Array) -> jax.Array:
        def one(part: tuple) -> jax.Array:
            loc, gamma = part
            return (gamma[:, None] * (a - loc)).T @ (a - loc)

        return lax.map(one, (locs, gamma))

    return _Quadratic(distances, scatters)


def moments(y: Any, weights: Any, xp: Any = jnp) -> tuple[Any, Any]:
    """The mean of weighted draws and a root of their covariance, drawn towards its diagonal."""
    mean = weights @ y
    centred = y - mean
    covariance = (weights[:, None] * centred).T @ centred
    covariance = (1 - PLANE) * covariance + PLANE * xp.diag(xp.diagonal(covariance))
    return mean, cholesky(covariance, xp)
