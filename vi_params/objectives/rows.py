"""Importance weights row by row of a plate.

Let z_i be the latents of row i of the plate and g all others. Where target and guide are

    p(x, g, z) = p(x_0, g) prod_i p(x_i, z_i | g),    q(g, z) = q(g) prod_i q(z_i | g),

every particle draws g once and K rows of latents z_ik under it:

    L_K = E_g [ log p(x_0, g) - log q(g) + sum_i log( 1/K sum_k p(x_i, z_ik | g) / q(z_ik | g) ) ].

By Jensen's inequality a row's term is at most log p(x_i | g) in the mean, and what then remains is
the ELBO of g with all z integrated out: L_K <= log p(x). L_1 is the ELBO, and L_K rises with K to
that of g alone. The bound is tight per row, where weights of whole draws lose with every row.

Geffner and Domke (2022), Variational inference with locally enhanced bounds for hierarchical
models.
"""

from typing import Any

import jax

from vi_params._check import explain, require_names
from vi_params._tree import abstract_key
from vi_params.estimators.estimator import Problem
from vi_params.estimators.rows import joined_rows
from vi_params.estimators.shares import dependence, shares_of
from vi_params.matching import without_gradient
from vi_params.noise import iid
from vi_params.objectives.pair import Pair
from vi_params.params.maps import abstract_params


def by_rows(fitted: Pair, plate: str, where: str) -> Pair:
    """The pair with weights of its own for every row of a plate.

    Raises:
        KeyError: the target has no such plate.
        ValueError: target or guide is not known site by site, no latent has the plate, or rows are
            tied together.
    """
    _require_sites(fitted, plate, where)
    require_names([plate], list(fitted.target.plates), what="plates", where=where, complete=False)
    fitted = fitted._replace(plate=plate)
    if not fitted.local:
        raise ValueError(
            explain(
                "No latent has rows to weigh.",
                expected=f"a latent in plate {plate!r}",
                received=", ".join(
                    f"{name!r} in {[p for p in latent.plates if p]}"
                    for name, latent in fitted.target.latents.items()
                ),
                where=where,
                hint="leave plate= out, or declare it: vi.Latent(shape, plates=(plate,))",
            )
        )
    tied = _tied(fitted)
    if tied:
        raise ValueError(
            explain(
                "Rows that are tied together cannot be weighed apart.",
                expected=f"row i of plate {plate!r} in target and guide to see the latents of row "
                "i and those outside the plate alone, and these no latent of a row",
                received="; ".join(tied),
                where=where,
                hint="leave plate= out; or, in vi.target, move what latents of rows enter into "
                "per_row",
            )
        )
    return fitted


def require_reparameterised_shared(fitted: Pair, where: str) -> None:
    """Raises where a latent outside the plate does not carry the gradient: VIMCO scores rows."""
    stuck = [
        name for name in without_gradient(fitted.target, fitted.guide) if name not in fitted.local
    ]
    if stuck:
        raise ValueError(
            explain(
                "Only latents of rows may be drawn without reparameterisation.",
                expected=f"distributions with has_rsample outside of plate {fitted.plate!r}",
                received=f"none at {stuck}",
                where=where,
                hint="leave plate= out, or vi.elbo with vi.estimators.mixed()",
            )
        )


def _require_sites(fitted: Pair, plate: str, where: str) -> None:
    if fitted.target.sites is not None and fitted.guide.sites is not None:
        return
    plain = fitted.target.sites is None
    raise ValueError(
        explain(
            "Rows can only be weighed apart where their densities are known one by one.",
            expected="a model of vi.from_numpyro, or vi.target(..., per_row=) with its data marked "
            "by vi.minibatch"
            if plain
            else "a guide of vi.guides.mean_field, vi.guide or vi.numpyro_guide",
            received=f"{'a target' if plain else 'a guide'} that is one density over all rows",
            where=f"{where}, plate={plate!r}",
        )
    )


def _tied(fitted: Pair) -> list[str]:
    """What ties the rows together, in words."""
    local, plate = fitted.local, fitted.plate or ""
    problem = Problem(fitted.target, fitted.guide, 1, iid())
    noise = jax.eval_shape(
        lambda key: jax.tree.map(lambda leaf: leaf[0, 0], fitted.noise(key)), abstract_key()
    )
    found: list[str] = []

    def name_of(key: tuple[str, str]) -> str:
        return f"{key[1]!r} of the {'target' if key[0] == 'model' else 'guide'}"

    def look(params: Any, noise: Any, data: Any) -> None:
        def run(given: Any = None) -> Any:
            return shares_of(problem, params, noise, data, given=given)

        shares = run()
        depends = dependence(run, shares.guide)
        for name, site in shares.guide.items():
            if name not in fitted.target.latents:
                found.append(f"{name!r}, drawn by the guide alone")
            elif (name in local) != (plate in site.plates):
                found.append(f"{name!r} of the guide is not in the plate, the latent is")
        for key, term in shares.terms.items():
            seen = [name for name in local if name in depends.terms[key]]
            if plate not in term.plates and seen and key not in {("guide", n) for n in local}:
                found.append(f"{name_of(key)}, outside the plate, sees {seen}")

    params = abstract_params(fitted.declared)
    jax.eval_shape(look, params, noise, fitted.data)
    if not found:
        for key, where in sorted(joined_rows(problem)):
            if where == plate:
                found.append(f"rows of {name_of(key)} see those of others")
    return found
