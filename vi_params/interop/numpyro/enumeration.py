"""A NumPyro model with its discrete latents summed out, and those latents inferred afterwards."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from numpyro import handlers

from vi_params._check import explain
from vi_params._tree import abstract_key
from vi_params.interop.numpyro.contraction import (
    Factor,
    Graph,
    contract,
    lag,
    maximum,
    root,
    sampling,
)
from vi_params.interop.numpyro.dependence import dependents, depends
from vi_params.interop.numpyro.discover import Found, trace
from vi_params.interop.numpyro.discrete import Discrete
from vi_params.interop.numpyro.tables import graph_of
from vi_params.params import constrain, init_params
from vi_params.target import EMPTY


class Summed(NamedTuple):
    """A model without its discrete latents.

    Attributes:
        at: `data -> (program, args, kwargs)`: the program with every discrete latent at one of its
            values. What does not depend on them, it does as ever.
        terms: `(values, latents, data) -> mapping` of the terms of the log density, the discrete
            latents summed out; a term is named after all sites that went into it.
        dependents: the deterministic sites that depend on discrete latents.
        infer: `(values, latents, key, data) -> mapping` of the discrete latents, and of the
            deterministic sites that depend on them: an exact draw given the continuous latents, or
            the jointly most probable values where `key` is None.
    """

    at: Callable[[Any], tuple[Callable, tuple, dict[str, Any]]]
    terms: Callable[[Any, Any, Any], dict[str, jax.Array]]
    dependents: frozenset[str]
    infer: Callable[[Any, Any, jax.Array | None, Any], dict[str, jax.Array]]


def sum_out(at: Callable[[Any], tuple], data: Any, found: Found) -> Summed:
    """The model without its discrete latents.

    Args:
        at: `data -> (program, args, kwargs)`: a NumPyro program and its arguments.
        data: the data at which it is traced.
        found: what it holds, its discrete latents among it.

    Raises:
        ImportError: funsor is not installed.
        ValueError: the sum cannot be done, or the support of a continuous latent depends on a
            discrete one.
    """
    discrete = found.discrete

    def fixed(site: Any) -> Any:
        free = site["type"] == "sample" and site["value"] is None
        if free and site["name"] in discrete:
            known = discrete[site["name"]]
            return jnp.full(site["fn"].shape(), known.values[0], known.dtype)
        return None

    def at_one(data: Any) -> tuple[Callable, tuple, dict[str, Any]]:
        program, args, kwargs = at(data)
        return handlers.substitute(program, substitute_fn=fixed), args, kwargs

    def plain(given: Mapping[str, Any], data: Any) -> Any:
        program, args, kwargs = at_one(data)
        return trace(handlers.substitute(program, data=dict(given)), args, kwargs)

    def graph(
        values: Any, latents: Any, data: Any, probes: Mapping[str, jax.Array] = EMPTY
    ) -> tuple[Graph, dict[str, jax.Array]]:
        program, *call = at(data)
        fixed_values = handlers.substitute(program, data=dict(values))
        return graph_of(fixed_values, call, latents, discrete, found.nesting, probes)

    def terms(values: Any, latents: Any, data: Any) -> dict[str, jax.Array]:
        tables, found = graph(values, latents, data)
        for part in contract(tables):
            name = ", ".join(dict.fromkeys(map(root, part.sites)))
            found[name] = found.get(name, 0.0) + part.table  # the first steps of a scan stand apart
        return found

    def infer(values: Any, latents: Any, key: jax.Array | None, data: Any) -> dict[str, jax.Array]:
        tables, _ = graph(values, latents, data)
        found = _indices(tables, maximum if key is None else sampling(key))
        sites = plain({**values, **latents}, data)
        drawn = {}
        for name, known in discrete.items():
            shape = jnp.shape(sites[name]["value"])
            steps = sorted((part for part in found if root(part) == name), key=lag, reverse=True)
            parts = [found[part] for part in steps]
            # One value only: there is no table.
            index = jnp.concatenate(list(map(jnp.ravel, parts))) if parts else jnp.zeros(shape, int)
            drawn[name] = jnp.asarray(known.values, known.dtype)[index.reshape(shape)]
        sites = plain({**values, **latents, **drawn}, data)
        return {**drawn, **{name: jnp.asarray(sites[name]["value"]) for name in dependents}}

    def moving(drawn: Any, values: Any, latents: Any, data: Any) -> dict[str, Any]:
        """What might depend on the discrete latents: deterministic sites and supports."""
        sites = plain({**values, **latents, **drawn}, data)
        deterministic = {n: s["value"] for n, s in sites.items() if s["type"] == "deterministic"}
        supports = {n: jax.tree.leaves(sites[n]["fn"].support) for n in found.latents}
        return {**deterministic, **supports}

    def start(key: jax.Array) -> Any:
        return constrain(found.declared, init_params(found.declared, key))

    values = jax.eval_shape(start, abstract_key())
    latents = {n: jax.ShapeDtypeStruct(z.shape, z.dtype) for n, z in found.latents.items()}
    drawn = {n: jax.ShapeDtypeStruct(z.shape, z.dtype) for n, z in discrete.items()}
    depend = depends(moving, drawn, values, latents, data)
    _require_fixed_supports([name for name in found.latents if depend[name]])
    jax.eval_shape(terms, values, latents, data)
    _require_along_axes(graph, discrete, values, latents, data)
    dependents = frozenset(name for name in depend if depend[name])
    return Summed(at_one, terms, dependents, infer)


def _indices(graph: Graph, sum_op: Callable[..., jax.Array]) -> dict[str, jax.Array]:
    """The index of each variable's value in each row: where the gradient of its own table is."""
    own = {f.sites[0]: f for f in graph.factors if f.sites[0] in graph.scopes}

    def total(probes: Mapping[str, jax.Array]) -> jax.Array:
        factors = [
            f._replace(table=f.table + probes[f.sites[0]]) if f.sites[0] in probes else f
            for f in graph.factors
        ]
        parts = contract(graph._replace(factors=factors), sum_op)
        return sum((part.table for part in parts), start=jnp.zeros(()))

    chosen = jax.grad(total)({name: jnp.zeros_like(f.table) for name, f in own.items()})
    return {name: _index(f._replace(table=chosen[name]), name, graph) for name, f in own.items()}


def _index(chosen: Factor, name: str, graph: Graph) -> jax.Array:
    others = [n for n in chosen.names if n in graph.scopes and n != name]
    table = jnp.sum(chosen.table, tuple(chosen.names.index(n) for n in others))
    return jnp.argmax(table, [n for n in chosen.names if n not in others].index(name))


def _require_along_axes(
    graph: Callable[..., tuple[Graph, dict[str, jax.Array]]],
    discrete: Mapping[str, Discrete],
    *inputs: Any,
) -> None:
    """Raises where a program reduces over the values of a discrete latent, mixing them.

    A table that depends on the values has an axis for them, or they were summed, averaged or picked
    on the way. Looked at where no loop hides what depends on what.
    """
    names: dict[str, tuple[str, ...]] = {}

    def tables(probes: Mapping[str, jax.Array], *inputs: Any) -> dict[str, jax.Array]:
        found, terms = graph(*inputs, probes)
        names.update({factor.sites[0]: factor.names for factor in found.factors})
        return {**terms, **{factor.sites[0]: factor.table for factor in found.factors}}

    several = [name for name, known in discrete.items() if len(known.values) > 1]
    found = dependents(tables, {name: jnp.bool_(True) for name in several}, *inputs)
    for latent, sites in (found or {}).items():
        for site in sites:
            if latent not in names.get(site, ()):
                raise ValueError(
                    explain(
                        "A site depends on a discrete latent, but not on each of its values apart.",
                        expected=f"one term for each value of {latent!r}",
                        received="one for all of them: the program reduces over its values",
                        where=f"site {site!r}, discrete latent {latent!r}",
                        hint="inside the program the latent has an axis on the left for its "
                        "values: index with it and broadcast, and name the axes of sums (axis=-1)",
                    )
                )


def _require_fixed_supports(names: list[str]) -> None:
    if names:
        raise ValueError(
            explain(
                "The support of a continuous latent depends on a discrete latent.",
                expected="supports that are the same for all values of the discrete latents",
                received=f"latents {names}",
                where="vi.from_numpyro(enumerate=True)",
                hint="draw the latent on a fixed support and transform it, low[z] + width[z] * u",
            )
        )
