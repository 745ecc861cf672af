"""Joint draws of latents and data from a NumPyro model."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from numpyro import distributions as dist
from numpyro import handlers

from vi_params._tree import abstract_key
from vi_params.interop.numpyro.call import Call
from vi_params.interop.numpyro.discover import substituted, trace


def simulator(model: Callable, call: Call, names: list[str]) -> Callable[..., Any] | None:
    """`(values, key, data) -> (latents, data)`: the model run forward, its observations drawn.

    Where an observation goes in the data is found by identity: each observed site must be given
    one of the data arrays as it stands, `obs=y`.

    Args:
        model: a NumPyro program.
        call: how it is called.
        names: its latents.

    Returns:
        The simulator, or None where an observed site's value is computed from the arguments, where
        nothing is observed, or where `numpyro.factor` makes the density more than a simulation.
    """
    where: dict[str, int] = {}

    def look(key: jax.Array, data: Any) -> None:
        args, kwargs = call.arguments(data)
        sites = trace(substituted(model, key, {}), args, kwargs)
        leaves = [id(leaf) for leaf in jax.tree.leaves(data)]
        for name, site in sites.items():
            if site["type"] == "sample" and site["is_observed"]:
                found = leaves.index(id(site["value"])) if id(site["value"]) in leaves else -1
                where[name] = -1 if isinstance(site["fn"], dist.Unit) else found

    jax.eval_shape(look, abstract_key(), call.data)
    if not where or min(where.values()) < 0 or len(set(where.values())) < len(where):
        return None

    def simulate(values: Mapping[str, Any], key: jax.Array, data: Any) -> Any:
        args, kwargs = call.arguments(data)
        fixed = handlers.substitute(model, data=dict(values))
        sites = trace(handlers.uncondition(handlers.seed(fixed, key)), args, kwargs)
        leaves, treedef = jax.tree.flatten(data)
        for name, i in where.items():
            leaves[i] = jnp.asarray(sites[name]["value"], leaves[i].dtype)
        return {name: sites[name]["value"] for name in names}, treedef.unflatten(leaves)

    return simulate
