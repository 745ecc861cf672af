"""What the sites of a trace say of a program: its parameters, latents and plates."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.core
import numpy as np
from numpyro.distributions import biject_to, constraints

from vi_params._check import explain
from vi_params.sites import is_point_mass

Trace = Mapping[str, Mapping[str, Any]]


def param_facts(sites: Trace) -> dict[str, dict[str, Any]]:
    """Constraint and plates of every param site."""
    facts = {}
    for name, site in sites.items():
        if site["type"] == "mutable":
            raise ValueError(
                explain(
                    "The program keeps mutable state.",
                    expected="sites of type sample, param, deterministic and plate",
                    received="a mutable site",
                    where=repr(name),
                    hint="use layers without running statistics",
                )
            )
        # Where a random module puts priors on all its weights, a site without arrays is left over.
        if site["type"] == "param" and jax.tree.leaves(site["value"]):
            constraint = site["kwargs"].get("constraint", constraints.real)
            if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(constraint)):
                raise ValueError(
                    explain(
                        "The bounds of a parameter's constraint are computed inside the program.",
                        expected="bounds that are Python numbers or arrays made outside",
                        received=f"traced bounds of {type(constraint).__name__.strip('_')}",
                        where=repr(name),
                    )
                )
            facts[name] = {"constraint": constraint, "plates": _plate_axes(site)}
    return facts


def _plate_axes(site: Mapping[str, Any]) -> tuple[str, ...]:
    """The plates that index the leading axes of a param site, outermost first."""
    event_dim = site["kwargs"].get("event_dim")
    if event_dim is None:
        return ()
    shape = np.shape(site["value"])
    batch = shape[: len(shape) - event_dim]
    by_axis = {len(batch) + frame.dim: frame for frame in site["cond_indep_stack"]}
    plates: list[str] = []
    while len(plates) in by_axis and batch[len(plates)] == by_axis[len(plates)].size:
        plates.append(by_axis[len(plates)].name)
    return tuple(plates)


def site_facts(sites: Trace, of_discrete: Callable[..., Any] | None) -> dict[str, Any]:
    """Shapes and supports of the latents, and the sizes of the plates."""
    latents, observed, auxiliary, deltas, plates, subsample = {}, [], [], [], {}, {}
    discrete, nesting = {}, 0
    for name, site in sites.items():
        if site["type"] == "plate":
            plates[name] = site["args"][0]
            if site.get("subsample_size") is not None:
                subsample[name] = site["subsample_size"]
        if site["type"] != "sample":
            continue
        fn = site["fn"]
        batch = max(len(fn.batch_shape), np.ndim(site["value"]) - fn.event_dim)
        nesting = max([nesting, batch, *(-frame.dim for frame in site["cond_indep_stack"])])
        if site["is_observed"]:
            observed.append(name)
            if any(frame.name in subsample for frame in site["cond_indep_stack"]):
                _require_whole(name, site)
            continue
        is_discrete = getattr(fn.support, "is_discrete", False)
        if is_discrete and of_discrete is not None:
            discrete[name] = of_discrete(name, site)
            continue
        if site["infer"].get("is_auxiliary", False):
            auxiliary.append(name)
        if is_point_mass(fn):
            deltas.append(name)
        shape = np.shape(site["value"])
        latents[name] = {
            "shape": shape,
            "dtype": site["value"].dtype,
            "support": fn.support,
            "discrete": is_discrete,
            "free_shape": None if is_discrete else _free_shape(fn.support, shape),
            "plates": _latent_plates(site),
        }
    return {
        "latents": latents,
        "subsample": subsample,
        "observed": tuple(observed),
        "auxiliary": tuple(auxiliary),
        "deltas": tuple(deltas),
        "plates": plates,
        "discrete": discrete,
        "nesting": nesting,
    }


def _free_shape(support: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a latent's unconstrained value."""
    return tuple(biject_to(support).inverse_shape(shape))


def _latent_plates(site: Mapping[str, Any]) -> tuple[str | None, ...]:
    """The plate that indexes each leading axis of a sample site."""
    batch = np.shape(site["value"])[: np.ndim(site["value"]) - site["fn"].event_dim]
    names: list[str | None] = [None] * len(batch)
    for frame in site["cond_indep_stack"]:
        axis = len(batch) + frame.dim
        if axis >= 0 and batch[axis] == frame.size:
            names[axis] = frame.name
    while names and names[-1] is None:
        names.pop()
    return tuple(names)


def _require_whole(name: str, site: Mapping[str, Any]) -> None:
    """Raises where observations do not fill the plates that they are in."""
    fn, shape = site["fn"], np.shape(site["value"])
    batch = shape[: len(shape) - fn.event_dim] if fn.event_dim else shape
    for frame in site["cond_indep_stack"]:
        axis = len(batch) + frame.dim
        if axis >= 0 and batch[axis] not in (1, frame.size):
            raise ValueError(
                explain(
                    "Observations do not fill their plate.",
                    expected=f"{frame.size} rows, or rows taken by numpyro.subsample or the "
                    "plate's indices",
                    received=f"shape {shape}",
                    where=f"site {name!r}, plate {frame.name!r}",
                )
            )
