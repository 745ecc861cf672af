"""EM for a mixture of elliptical distributions, on weighted draws.

With weights w_i of draws y_i = (a_i, b_i), rho_ik the share of component k in q(y_i) and
gamma_ik = rho_ik (df + dim a) / (df + |L_k^-1 (a_i - m_k)|^2), a sweep sets

    w_k = sum_i w_i rho_ik
    m_k = sum_i w_i gamma_ik a_i / sum_i w_i gamma_ik
    L_k L_k' = sum_i w_i gamma_ik (a_i - m_k)(a_i - m_k)' / w_k

and, where there are coordinates b across, n_k and s_k^2 to their mean and variances under
w_i rho_ik / w_k. Cappe, Douc, Guillin, Marin and Robert (2008), Adaptive importance sampling in
general mixture classes, Statistics and Computing 18, sections 3 and 4.

Squared distances and covariances are linear in the products of the coordinates of a_i, which are
made once: what is left of a sweep are products of matrices.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from vi_params._arrays import cholesky, in_turn, inverse_lower, repeated
from vi_params._tree import all_finite, where_tree
from vi_params.guides.active_mixture import Across, Parts, exact, log_normals
from vi_params.guides.mixture import Components, log_elliptical, log_weights

SWEEPS = 3
"""How many sweeps are made."""

RARE = 1e-3
"""A component of less weight than this stays where it is."""

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
    # In units of the draws themselves little is lost where squares are multiplied out.
    mean, root = moments(a, weights, xp)
    root = where_tree(all_finite(root, xp=xp), root, xp.eye(num_active, dtype=y.dtype), xp)
    inverse = inverse_lower(root, xp)
    a = inverse @ (a - mean).T
    rows, columns = np.tril_indices(num_active)
    products = a[rows] * a[columns]
    times = np.where(rows == columns, 1.0, 2.0).astype(y.dtype)
    place = np.zeros((num_active, num_active), int)
    place[rows, columns] = place[columns, rows] = np.arange(len(rows))

    def shares(now: Parts) -> tuple[Any, Any]:
        """rho and gamma, with the weights in them, shape (K, num_draws)."""
        along, across = now
        inverses = in_turn(lambda root: inverse_lower(root, xp), along.scale_trils, xp)
        precisions = inverses.swapaxes(1, 2) @ inverses
        linear = xp.sum(precisions * along.locs[:, None], axis=2)
        squared = exact(precisions[:, rows, columns] * times, products, xp)
        squared = squared - 2 * exact(linear, a, xp) + xp.sum(linear * along.locs, 1)[:, None]
        squared = xp.maximum(squared, 0.0)
        log_dets = xp.sum(xp.log(xp.diagonal(along.scale_trils, axis1=1, axis2=2)), axis=1)
        terms = log_elliptical(squared, num_active, df, xp) + log_normals(across, b, xp)
        terms = terms + (log_weights(along.weights, xp) - log_dets)[:, None]
        parts = xp.exp(terms - xp.max(terms, axis=0))
        rho = parts * (weights / xp.sum(parts, axis=0))
        return rho, rho * (df + num_active) / (df + squared)

    def sweep(now: Parts) -> Parts:
        rho, gamma = shares(now)
        masses = xp.sum(gamma, axis=1)
        sums, squares = exact(gamma, a.T, xp), exact(gamma, products.T, xp)[:, place]

        def one(parts: tuple) -> Parts:
            rho, mass, a_sum, a_squares, b_sum, b_sum_of_squares, old = parts
            weight = xp.sum(rho)
            effective = weight**2 / xp.sum(rho**2)
            loc = a_sum / mass
            covariance = (a_squares - mass * loc[:, None] * loc) / weight
            kept = xp.minimum(1.0, num_active / effective)
            before = old.along.scale_trils @ old.along.scale_trils.T
            root = cholesky((1 - kept) * covariance + kept * before, xp)

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

        rows = rho, masses, sums, squares, exact(rho, b, xp), exact(rho, b_squares, xp), now
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


def moments(y: Any, weights: Any, xp: Any = jnp) -> tuple[Any, Any]:
    """The mean of weighted draws and a root of their covariance."""
    mean = weights @ y
    centred = y - mean
    covariance = (weights[:, None] * centred).T @ centred
    covariance = (1 - PLANE) * covariance + PLANE * xp.diag(xp.diagonal(covariance))
    return mean, cholesky(covariance, xp)
