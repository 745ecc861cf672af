"""What a NumPyro program holds: found by tracing it once, abstractly, with nothing computed.

NumPyro keeps its handlers on one stack for the whole process, so that two threads that trace at
once corrupt it: every trace here is made under one lock.
"""

import contextlib
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.infer import init_to_uniform

from vi_params._check import explain
from vi_params._tree import abstract_key
from vi_params.batches.batch import Batch
from vi_params.interop.numpyro.call import Call
from vi_params.interop.numpyro.dependence import reached
from vi_params.interop.numpyro.facts import Trace, param_facts, site_facts
from vi_params.interop.numpyro.plates import with_rows
from vi_params.params import Latent, Param

LOCK = threading.RLock()

Prepare = Callable[[Callable, jax.Array, Mapping[str, Any]], Callable]


class Found(NamedTuple):
    """The sites of a program.

    Attributes:
        latents: name -> `Latent`, of the sample sites that are not observed.
        observed: names of the sample sites that are.
        auxiliary: names of the latents that are auxiliary.
        deltas: names of the latents whose distribution is a point mass.
        declared: name -> `Param`, of the param sites.
        plates: plate -> size.
        discrete: name -> what is known of it, of the latents that are discrete and summed out.
        nesting: how many axes plates and batches take up at most.
        subsample: plate -> batch size, of the plates that the program subsamples itself.
        streamed: those among them whose data come batch by batch.
    """

    latents: dict[str, Latent]
    observed: tuple[str, ...]
    auxiliary: tuple[str, ...]
    deltas: tuple[str, ...]
    declared: dict[str, Param]
    plates: dict[str, int]
    discrete: dict[str, Any]
    nesting: int
    subsample: dict[str, int]
    streamed: dict[str, int]


def trace(
    program: Callable,
    args: tuple,
    kwargs: Mapping[str, Any],
    recorder: Callable[..., handlers.trace] = handlers.trace,
) -> Trace:
    """The trace of a program, made under the lock; errors of tracing say the way out."""
    with LOCK:
        try:
            return recorder(program).get_trace(*args, **kwargs)
        except (
            jax.errors.ConcretizationTypeError,
            jax.errors.NonConcreteBooleanIndexError,
            jax.errors.TracerArrayConversionError,
            jax.errors.TracerIntegerConversionError,
        ) as error:
            raise TypeError(
                explain(
                    "The program needs the value of an array argument while it is traced.",
                    expected="array arguments used through jax.numpy only",
                    received=str(error).split("\n", 1)[0],
                    where=getattr(program, "__name__", "program"),
                    hint="pass sizes and switches as Python ints, bools or strings, which stay "
                    "static; compute them from the data before the call",
                )
            ) from error


def substituted(program: Callable, key: jax.Array, values: Mapping[str, Any]) -> Callable:
    """The program with keys from `key`, sites in `values` fixed, and the other continuous latents
    drawn uniformly in unconstrained space (flat priors cannot be sampled)."""
    inner = handlers.substitute(handlers.seed(program, key), data=dict(values))
    return handlers.substitute(inner, substitute_fn=_uniform_where_free)


def discover(
    program: Callable,
    call: Call,
    *,
    prepare: Prepare = substituted,
    discrete: Callable[[str, Mapping[str, Any]], Any] | None = None,
) -> Found:
    """The latents, parameters and plates of a program, its subsampled plates over all their rows.

    A plate whose indices the program never uses, while its data have another size than the plate,
    takes its data batch by batch: its latents then have the rows of a batch.

    Args:
        program: a NumPyro program.
        call: how it is called.
        prepare: how it is made to run without a guide.
        discrete: what is to be known of a discrete latent that is summed out, from its name and
            site; None where discrete latents stay latents.

    Raises:
        ValueError: a site that cannot be handled: mutable state, a batch that is larger than its
            plate.
    """
    seen: dict[str, tuple[int, int]] = {}
    try:
        return _discover(program, call, prepare, {}, discrete, seen)
    except (ValueError, TypeError) as error:
        streamed = _streamed(program, call, prepare)
        if not streamed:
            if seen:
                plates = ", ".join(f"{name!r} ({size})" for name, (size, _) in seen.items())
                error.add_note(
                    "(This was raised while the program ran over all rows of its subsampled plates "
                    f"{plates}. Shapes inside of a plate must follow the rows that it is given: "
                    "take data by numpyro.subsample or the plate's indices, and write no batch "
                    "size but in subsample_size.)"
                )
            raise
    return _discover(program, call, prepare, streamed, discrete)


def _discover(
    program: Callable,
    call: Call,
    prepare: Prepare,
    streamed: dict[str, int],
    discrete: Callable[..., Any] | None,
    seen: dict[str, tuple[int, int]] | None = None,
) -> Found:
    program = with_rows(program, None, {}, {}, streamed, seen)
    first: dict[str, Any] = {}

    def params_of(key: jax.Array, data: Any) -> dict[str, Any]:
        args, kwargs = call.arguments(data)
        sites = trace(prepare(program, key, {}), args, kwargs)
        first.update(param_facts(sites))
        return {name: sites[name]["value"] for name in first}

    key = abstract_key()
    params = _constants(params_of, key, call.data)
    declared = {}
    for name, facts in first.items():
        init = params[name] if name in params else _lazy(params_of, call, name)
        declared[name] = Param(init, **facts)

    facts: dict[str, Any] = {}

    def supports_of(key: jax.Array, data: Any, values: Any) -> dict[str, Any]:
        args, kwargs = call.arguments(data)
        sites = trace(prepare(program, key, values), args, kwargs)
        facts.update(site_facts(sites, discrete))
        return {name: jax.tree.leaves(found["support"]) for name, found in facts["latents"].items()}

    values = jax.eval_shape(params_of, key, call.data)
    bounds = _constants(supports_of, key, call.data, values)
    latents = {}
    for name, found in facts["latents"].items():
        treedef = jax.tree.structure(found["support"])
        if not treedef.num_leaves:
            support = found["support"]
        elif name in bounds:
            support = treedef.unflatten(bounds[name])
        else:
            support = constraints.dependent(
                is_discrete=found["discrete"], event_dim=found["support"].event_dim
            )
        latents[name] = Latent(
            found["shape"], support, found["dtype"], found["free_shape"], found["plates"]
        )
    return Found(**{**facts, "latents": latents, "declared": declared, "streamed": streamed})


_UNIFORM: Any = init_to_uniform()


def _uniform_where_free(site: Mapping[str, Any]) -> Any:
    return _UNIFORM(site) if site.get("value") is None else None


def _lazy(params_of: Callable, call: Call, name: str) -> Callable[[jax.Array], Any]:
    return lambda key: params_of(key, call.data)[name]


def _streamed(program: Callable, call: Call, prepare: Prepare) -> dict[str, int]:
    """Plate -> batch size, of the subsampled plates whose indices the program never uses."""
    seen: dict[str, tuple[int, int]] = {}
    with contextlib.suppress(ValueError, TypeError):
        trace_of(with_rows(program, None, {}, {}, {}, seen), call, prepare)
    if not seen:
        return {}
    sizes = {plate: size for plate, (size, _) in seen.items()}
    index = {plate: jnp.arange(batch) for plate, (_, batch) in seen.items()}

    def used(index: dict[str, jax.Array]) -> list[Any]:
        batch = Batch(None, index)
        sites = trace_of(with_rows(program, batch, sizes, {}, {}), call, prepare)
        found = [
            (site.get("value"), site.get("fn"))
            for site in sites.values()
            if site["type"] in ("sample", "deterministic")
        ]
        return [leaf for leaf in jax.tree.leaves(found) if isinstance(leaf, jax.Array)]

    try:
        closed = jax.make_jaxpr(used)(index)
    except (ValueError, TypeError):
        return {}
    inputs = dict(zip(sorted(index), closed.jaxpr.invars, strict=True))
    return {
        plate: batch
        for plate, (_, batch) in seen.items()
        if not any(reached(closed, [inputs[plate]]))
    }


def trace_of(program: Callable, call: Call, prepare: Prepare) -> Trace:
    """The sites of a program at arguments that stand for its own."""
    args, kwargs = call.arguments(call.data)
    return trace(prepare(program, jax.random.key(0), {}), args, kwargs)


def _constants(
    f: Callable[..., dict[str, Any]], key: Any, data: Any, values: Any = None
) -> dict[str, Any]:
    """The entries of `f(key, data)` that do not depend on the key, evaluated at the data; or, where
    `values` are given, those of `f(key, data, values)` that depend on nothing.

    What is a Python number or an array made outside is itself.
    """
    concrete: dict[str, Any] = {}
    inputs = (key, data) if values is None else (key, data, values)

    def traced(*inputs: Any) -> dict[str, Any]:
        found = f(*inputs)
        for name, entry in found.items():
            if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(entry)):
                concrete[name] = entry
        return {name: entry for name, entry in found.items() if name not in concrete}

    closed, shape = jax.make_jaxpr(traced, return_shape=True)(*inputs)
    if not jax.tree.leaves(shape):
        return concrete
    moving = closed.jaxpr.invars if values is not None else closed.jaxpr.invars[:1]
    flags = jax.tree.structure(shape).unflatten(reached(closed, moving))
    fixed = [name for name in shape if not any(jax.tree.leaves(flags[name]))]
    if fixed:

        def evaluate(data: Any) -> dict[str, Any]:
            blank = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), inputs[2:])
            found = f(jax.random.key(0), data, *blank)
            return {name: found[name] for name in fixed}

        concrete.update(jax.jit(evaluate)(data))
    return concrete
