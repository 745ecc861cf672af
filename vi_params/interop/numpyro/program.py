"""A NumPyro program as a guide."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from numpyro import handlers
from numpyro.infer.autoguide import AutoGuide

from vi_params._check import explain
from vi_params._tree import is_traced
from vi_params.batches.batch import Batch, split
from vi_params.guide import Draw, Guide, key_noise, pick_own, sampler
from vi_params.interop.numpyro.call import Call, bind
from vi_params.interop.numpyro.discover import LOCK, Found, discover, trace
from vi_params.interop.numpyro.facts import Trace
from vi_params.interop.numpyro.plates import with_rows
from vi_params.interop.numpyro.sites import StopGradient, sites_of
from vi_params.params import constrain, init_params
from vi_params.params.declare import Declared, normalise
from vi_params.params.rows import rows_at
from vi_params.sites import Site, is_point_mass


def numpyro_guide(
    program: Callable, *args: Any, declared: Declared | None = None, **kwargs: Any
) -> Guide:
    """A NumPyro program as a guide: its sample sites are the latents.

    Args:
        program: a NumPyro program, or one of NumPyro's autoguides. With `declared` it receives the
            constrained values as first argument; without, its `numpyro.param` sites (constraints,
            lazy starts, event_dim and plates included) are found by tracing it once.
        *args: the program's (other) positional arguments; arrays become data. An autoguide takes
            what its model takes.
        declared: name -> `Param`, or None.
        **kwargs: the program's keyword arguments.

    At a batch, plates of the program have the batch's rows. Values declared with such a plate come
    reduced to these rows (to all rows without a batch), and so do `numpyro.param(..., event_dim=)`
    inside of it: the same program serves full data and minibatches.

    Returns:
        A `Guide`. Arguments that the target has under the same name take the target's data.

    Raises:
        ValueError: the program has param sites although `declared` is given, observes something, or
            has a site that cannot be handled.

    Example:
        >>> import numpyro, numpyro.distributions as dist
        >>> from numpyro.distributions import constraints
        >>> def program():
        ...     loc = numpyro.param("loc", 0.0)
        ...     scale = numpyro.param("scale", 1.0, constraint=constraints.positive)
        ...     numpyro.sample("z", dist.Normal(loc, scale))
        >>> guide = vi.numpyro_guide(program)
        >>> print(vi.describe(guide.declared))
        path   shape  dtype    constraint                 plates  size
        loc    ()     float32  Real()                                1
        scale  ()     float32  Positive(0)                           1
    """
    explicit = declared is not None
    call = bind(program, args, kwargs, skip=1 if explicit else 0)
    if isinstance(program, AutoGuide):
        _prepare(program, args, kwargs)
    found = _discover(program, call, declared)
    declared, hidden = found.declared, set(found.auxiliary)

    def run(
        params: Any, data: Any, key: jax.Array | None, fixed: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        data = call.data if data is None else data
        values = constrain(declared, rows_at(declared, pick_own(params, declared), data))
        given, own = dict(fixed or {}), {} if explicit else declared
        bound = partial(program, values) if explicit else program
        given = given if explicit else {**values, **given}
        if isinstance(data, Batch):
            data = dataclasses.replace(data, taken=True)
        bound = with_rows(bound, data, found.plates, own, found.streamed)
        seeded = bound if key is None else handlers.seed(bound, key)
        args, kwargs = call.arguments(split(data)[0])
        return _sample_sites(trace(handlers.substitute(seeded, data=given), args, kwargs))

    def transform(params: Any, noise: jax.Array, data: Any = None) -> Draw:
        sites = run(params, data, noise)
        latents = {name: site["value"] for name, site in sites.items() if name not in hidden}
        position = {n: site["value"] for n, site in sites.items() if not is_point_mass(site["fn"])}
        return Draw(latents, _log_prob(sites), position)

    def rescore(params: Any, draw: Draw, data: Any = None) -> jax.Array:
        return _log_prob(run(params, data, None, draw.position))

    def log_prob(params: Any, latents: Any, data: Any = None) -> jax.Array:
        if hidden:
            raise ValueError(
                explain(
                    "This guide cannot score arbitrary latents.",
                    expected="a program whose sample sites are the latents alone",
                    received=f"auxiliary sites {sorted(hidden)}",
                    where="guide.log_prob",
                    hint="score its own draws: guide.sample, guide.rescore",
                )
            )
        return _log_prob(run(params, data, None, latents))

    def sites(
        params: Any, noise: jax.Array, data: Any = None, given: Mapping[str, Any] | None = None
    ) -> dict[str, Site]:
        with LOCK, StopGradient():
            return sites_of(run(params, data, noise, given))

    def distributions(params: Any, data: Any = None) -> dict[str, Any]:
        sites = run(params, data, jax.random.key(0))
        return {
            name: site["fn"]
            for name, site in sites.items()
            if name not in hidden and not is_point_mass(site["fn"])
        }

    return Guide(
        declared=declared,
        sample=sampler(key_noise, transform),
        log_prob=log_prob,
        rescore=rescore,
        noise=key_noise,
        transform=transform,
        distributions=distributions,
        sites=sites,
        data=call.data or None,
        plates={**found.plates},
        is_point=bool(found.latents) and set(found.deltas) == set(found.latents),
    )


def _discover(program: Callable, call: Call, declared: Declared | None) -> Found:
    """The sites of the program; its parameters are those declared, or its own."""
    if declared is None:
        found = discover(program, call, prepare=_seeded)
    else:
        found = _discover_declared(program, call, normalise(declared))
    if found.observed:
        raise ValueError(
            explain(
                "A guide observes nothing.",
                expected="sample sites without obs=, and no numpyro.factor",
                received=f"observed sites {list(found.observed)}",
                where="vi.numpyro_guide",
            )
        )
    return found


def _discover_declared(program: Callable, call: Call, declared: Declared) -> Found:
    def with_values(program: Callable, key: jax.Array, values: Mapping[str, Any]) -> Callable:
        start = constrain(declared, init_params(declared, key))
        return _seeded(partial(program, start), key, values)

    found = discover(program, call, prepare=with_values)
    if found.declared:
        raise ValueError(
            explain(
                "The guide declares parameters in two ways.",
                expected="either declared= or numpyro.param sites",
                received=f"both; param sites {list(found.declared)}",
                where="vi.numpyro_guide",
            )
        )
    return found._replace(declared=declared)


def _seeded(program: Callable, key: jax.Array, values: Mapping[str, Any]) -> Callable:
    return handlers.substitute(handlers.seed(program, key), data=dict(values))


def _sample_sites(sites: Trace) -> dict[str, Any]:
    return {name: site for name, site in sites.items() if site["type"] == "sample"}


def _log_prob(sites: Mapping[str, Any]) -> jax.Array:
    total = jnp.zeros(())
    for site in sites.values():
        middle = site["intermediates"]
        value = site["value"]
        term = site["fn"].log_prob(value, middle) if middle else site["fn"].log_prob(value)
        scale = 1.0 if site["scale"] is None else site["scale"]
        total = total + jnp.sum(scale * term)
    return total


def _prepare(program: AutoGuide, args: tuple, kwargs: Mapping[str, Any]) -> None:
    """Lets an autoguide meet its model once, outside any trace: it remembers what it saw there."""
    if program.prototype_trace is None:
        if is_traced(args, kwargs):
            raise TypeError(
                explain(
                    "An autoguide must see concrete arguments once.",
                    expected="arrays with values",
                    received="traced arrays",
                    where="vi.numpyro_guide",
                    hint="build the guide outside jit and vmap",
                )
            )
        with LOCK:
            handlers.seed(program, jax.random.key(0))(*args, **kwargs)
