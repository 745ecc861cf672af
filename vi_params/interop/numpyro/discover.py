"""What a NumPyro program holds: found by tracing it once, abstractly, with nothing computed.

NumPyro keeps its handlers on one stack for the whole process, so that two threads that trace at
once corrupt it: every trace here is made under one lock.
"""

import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from numpyro import handlers
from numpyro.distributions import biject_to, constraints
from numpyro.infer import init_to_uniform

from vi_params._check import explain
from vi_params._tree import abstract_key
from vi_params.interop.numpyro.call import Call
from vi_params.interop.numpyro.dependence import reached
from vi_params.params import Latent, Param
from vi_params.sites import is_point_mass

LOCK = threading.RLock()

CONCRETE = "from_numpyro / numpyro_guide"


class Found(NamedTuple):
    """The sites of a program.

    Attributes:
        latents: name -> `Latent`, of the sample sites that are not observed.
        observed: names of the sample sites that are.
        auxiliary: names of the latents that are auxiliary.
        deltas: names of the latents whose distribution is a point mass.
        declared: name -> `Param`, of the param sites.
        plates: plate -> size.
        discrete: name -> what is known of it, of the latents that are discrete.
        nesting: how many axes plates and batches take up at most.
    """

    latents: dict[str, Latent]
    observed: tuple[str, ...]
    auxiliary: tuple[str, ...]
    deltas: tuple[str, ...]
    declared: dict[str, Param]
    plates: dict[str, int]
    discrete: dict[str, Any]
    nesting: int


Trace = Mapping[str, Mapping[str, Any]]


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
    prepare: Callable[[Callable, jax.Array, Mapping[str, Any]], Callable] = substituted,
    discrete: Callable[[str, Mapping[str, Any]], Any] | None = None,
) -> Found:
    """The latents, parameters and plates of a program.

    Args:
        program: a NumPyro program.
        call: how it is called.
        prepare: how it is made to run without a guide.
        discrete: what is to be known of a discrete latent that is summed out, from its name and
            site; None where discrete latents stay latents.

    Raises:
        ValueError: a site that cannot be handled: a subsampled plate, mutable state.
    """
    first: dict[str, Any] = {}

    def params_of(key: jax.Array, data: Any) -> dict[str, Any]:
        args, kwargs = call.arguments(data)
        sites = trace(prepare(program, key, {}), args, kwargs)
        first.update(_param_facts(sites))
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
        facts.update(_site_facts(sites, discrete))
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
        latents[name] = Latent(found["shape"], support, found["dtype"], found["free_shape"])
    return Found(**{**facts, "latents": latents, "declared": declared})


_UNIFORM: Any = init_to_uniform()


def _uniform_where_free(site: Mapping[str, Any]) -> Any:
    return _UNIFORM(site) if site.get("value") is None else None


def _lazy(params_of: Callable, call: Call, name: str) -> Callable[[jax.Array], Any]:
    return lambda key: params_of(key, call.data)[name]


def _param_facts(sites: Trace) -> dict[str, dict[str, Any]]:
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


def _site_facts(sites: Trace, of_discrete: Callable[..., Any] | None) -> dict[str, Any]:
    """Shapes and supports of the latents, and the sizes of the plates."""
    latents, observed, auxiliary, deltas, plates, discrete = {}, [], [], [], {}, {}
    nesting = 0
    for name, site in sites.items():
        if site["type"] == "plate":
            plates[name] = _plate_size(name, site)
        if site["type"] != "sample":
            continue
        fn = site["fn"]
        batch = max(len(fn.batch_shape), np.ndim(site["value"]) - fn.event_dim)
        nesting = max([nesting, batch, *(-f.dim for f in site["cond_indep_stack"])])
        if site["is_observed"]:
            observed.append(name)
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
            "free_shape": None
            if is_discrete
            else tuple(biject_to(fn.support).inverse_shape(shape)),
        }
    return {
        "latents": latents,
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


def _plate_size(name: str, site: Mapping[str, Any]) -> int:
    size, subsample_size = site["args"]
    if subsample_size not in (None, size):
        raise ValueError(
            explain(
                "The program subsamples a plate.",
                expected="plates over all their rows",
                received=f"subsample_size={subsample_size} of {size}",
                where=f"plate {name!r}",
                hint="drop subsample_size; minibatches of NumPyro programs are not there yet",
            )
        )
    return size


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
