"""EM for a mixture of elliptical distributions, on weighted draws.

With weights w_i of draws y_i = (a_i, b_i), rho_ik the share of component k in q(y_i) and
gamma_ik = rho_ik (df + dim a) / (df + |L_k^-1 (a_i - m_k)|^2), a sweep sets

    w_k = sum_i w_i rho_ik
    m_k = sum_i w_i gamma_ik a_i / sum_i w_i gamma_ik
    L_k L_k' = sum_i w_i gamma_ik (a_i - m_k)(a_i - m_k)' / w_k

and, where there are coordinates b across, n_k and s_k^2 to their mean and variances under
w_i rho_ik / w_k. Cappe, Douc, Guillin, Marin and Robert (2008), Adaptive importance sampling in
general mixture classes, Statistics and Computing 18, sections 3 and 4.
"""

import jax
import jax.numpy as jnp
from jax import lax

from vi_params._tree import all_finite, where_tree
from vi_params.guides.active_mixture import Across, Parts, exact, log_normals
from vi_params.guides.mixture import Components, log_terms

SWEEPS = 3
"""How many sweeps are made."""

RARE = 1e-3
"""A component of less weight than this stays where it is."""

PRIOR = 10.0
"""For how many draws it counts that, across, a component is the standard normal."""


def weighted_em(now: Parts, y: jax.Array, weights: jax.Array, df: int) -> Parts:
    """Sweeps of EM.

    A component that few draws speak for is drawn towards what it was along, and towards the
    standard normal across.

    Args:
        now: where it starts.
        y: the draws, shape (num_draws, dim).
        weights: their normalised weights, shape (num_draws,).
        df: degrees of freedom along.
    """
    num_active = now.along.locs.shape[1]
    a, b = y[:, :num_active], y[:, num_active:]

    def shares(now: Parts) -> tuple[jax.Array, jax.Array]:
        """rho and gamma, with the weights in them, shape (K, num_draws)."""

        def one(component: Components) -> tuple[jax.Array, jax.Array]:
            single = jax.tree.map(lambda leaf: leaf[None], component)
            terms, squared = jax.vmap(lambda a: log_terms(single, a, df))(a)
            return terms[:, 0], squared[:, 0]

        # Component by component: what one of them needs fits into the caches.
        terms, squared = lax.map(one, now.along)
        terms = terms + jax.vmap(lambda b: log_normals(now.across, b), out_axes=1)(b)
        rho = weights * jax.nn.softmax(terms, axis=0)
        return rho, rho * (df + num_active) / (df + squared)

    def sweep(_: int, now: Parts) -> Parts:
        rho, gamma = shares(now)

        def one(parts: tuple) -> Parts:
            rho, gamma, b_sum, b_squares, old = parts
            weight = jnp.sum(rho)
            effective = weight**2 / jnp.sum(rho**2)
            loc = gamma @ a / jnp.sum(gamma)
            covariance = (gamma[:, None] * (a - loc)).T @ (a - loc) / weight
            kept = jnp.minimum(1.0, num_active / effective)
            before = old.along.scale_trils @ old.along.scale_trils.T
            root = jnp.linalg.cholesky((1 - kept) * covariance + kept * before)

            known = effective / (effective + PRIOR)
            centre = known * b_sum / weight
            spread = (b_squares - 2 * centre * b_sum) / weight + centre**2
            variance = known * spread + (1 - known)
            new = loc, root, Across(centre, jnp.sqrt(variance))
            usable = (weight > RARE) & all_finite(new)
            loc, root, across = where_tree(
                usable, new, (old.along.locs, old.along.scale_trils, old.across)
            )
            weight = jnp.maximum(weight, jnp.finfo(y.dtype).eps)
            return Parts(Components(weight, loc, root), across)

        new = lax.map(one, (rho, gamma, exact(rho, b), exact(rho, b**2), now))
        total = jnp.sum(new.along.weights)
        return new._replace(along=new.along._replace(weights=new.along.weights / total))

    new = lax.fori_loop(0, SWEEPS, sweep, now)
    return where_tree(all_finite(new), new, now)
