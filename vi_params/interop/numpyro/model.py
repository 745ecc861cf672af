"""A NumPyro model as a target."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from numpyro import handlers
from numpyro.infer.util import compute_log_probs

from vi_params._check import explain
from vi_params.batches.batch import split
from vi_params.interop.numpyro.call import bind, blaming_shapes
from vi_params.interop.numpyro.coordinates import coordinates
from vi_params.interop.numpyro.discover import LOCK, discover, trace
from vi_params.interop.numpyro.discrete import finite
from vi_params.interop.numpyro.enumeration import sum_out
from vi_params.interop.numpyro.plates import with_rows
from vi_params.interop.numpyro.recentre import recentred
from vi_params.interop.numpyro.simulate import simulator
from vi_params.interop.numpyro.sites import sites_of
from vi_params.sites import Site
from vi_params.target import Target, build


def from_numpyro(
    model: Callable,
    *args: Any,
    enumerate: bool = False,
    **kwargs: Any,
) -> Target:
    """The joint density of a NumPyro model at its observed data, as a target.

    The model is traced once, abstractly. Array arguments become `target.data`, a mapping from
    argument names to arrays that is passed through jit; all other arguments are static: Python (and
    NumPy integer) scalars used as sizes, strings, callables. `numpyro.param` sites become
    `target.declared`; deterministic sites come back with `vi.draws`. Supports follow the model at
    every evaluation where they depend on other latents or on the data. Discrete latents stay: a
    guide of one's own and an estimator that takes them (`vi.estimators.mixed()`) do the rest.

    With `enumerate=True`, discrete latents with finitely many values are summed out exactly: in
    plates, nested plates, along `numpyro.contrib.control_flow.scan` and numpyro's `markov`
    (Obermeyer et al., 2019). The target's latents are the continuous ones, its log density
    log sum_k p(x, z, k), and any guide and solver for continuous latents applies.
    `vi.infer_discrete` draws the discrete ones afterwards, with the deterministic sites that depend
    on them; `vi.draws` leaves those out. A masked discrete site adds nothing; `handlers.scale` acts
    before the sum, the scale of a subsampled plate after it. Inside the program a discrete latent
    has an extra axis on the left for its values: index with it (`mean[z]`) and broadcast, without
    reshaping or reducing it (seen and refused only where that takes the axis away, outside of
    loops); and put what depends on it into its plates. Needs the extra `enumerate` (funsor).

    Plates with `subsample_size` are minibatched: `vi.svi` and `vi.fit` draw their rows in every
    step, for model and guide alike, and NumPyro's scale N / B makes the estimate unbiased. Called
    with all data, as by `vi.draws` and `vi.diagnose`, the same model runs over all rows. A model of
    such a plate that is handed a batch of rows only, and does not use the plate's indices, is for
    `vi.fit(..., data=iterable)`. A subsampled plate inside a scan is made before it and entered in
    its body. Where parameters have rows of such a plate, every batch says which
    rows it holds, `vi.Batch({"y": rows}, {"plate": their numbers})`.

    Args:
        model: a NumPyro program; handlers such as `reparam`, `scale` and `mask` may wrap it.
        *args: its positional arguments.
        enumerate: whether finite discrete latents are summed out; they are refused otherwise.
        **kwargs: its keyword arguments. An observation passed as None makes its site a latent.

    Returns:
        A `Target`.

    Raises:
        ValueError: a discrete latent that cannot be summed out, mutable state, or a batch larger
            than its plate; the message names the site. At a call: the size of a subsampled plate
            has changed.
        ImportError: discrete latents are to be summed out and funsor is not installed.
        TypeError: the model does not take these arguments, or needs the value of an array while it
            is traced.

    Example:
        >>> import numpyro, numpyro.distributions as dist
        >>> def model(y):
        ...     mu = numpyro.sample("mu", dist.Normal(0, 1))
        ...     numpyro.sample("y", dist.Normal(mu, 1), obs=y)
        >>> target = vi.from_numpyro(model, jnp.array([0.5, 1.5]))
        >>> list(target.latents), list(target.data)
        (['mu'], ['y'])
    """
    if not isinstance(enumerate, bool):
        raise TypeError(
            explain(
                "enumerate is a switch for all discrete latents.",
                expected="True or False",
                received=repr(enumerate),
                where="vi.from_numpyro",
                hint="bind an argument of the model that has this name with functools.partial",
            )
        )
    call = bind(model, args, kwargs)
    found = discover(model, call, discrete=finite if enumerate else None)
    names = list(found.latents)

    def joint_at(data: Any) -> tuple[Callable, tuple, dict[str, Any]]:
        """The model at the rows of `data`, and its arguments."""
        program = with_rows(model, data, found.plates, found.declared, found.streamed)
        return program, *call.arguments(split(data)[0])

    summed = sum_out(joint_at, call.data, found) if found.discrete else None
    at = joint_at if summed is None else summed.at

    def run(fixed: Mapping[str, Any], data: Any) -> Any:
        program, args, kwargs = at(data)
        with blaming_shapes(call, split(data)[0]):
            return trace(handlers.substitute(program, data=dict(fixed)), args, kwargs)

    def joint_terms(values: Any, latents: Any, data: Any) -> dict[str, jax.Array]:
        program, args, kwargs = at(data)
        with LOCK, blaming_shapes(call, split(data)[0]):
            return compute_log_probs(program, args, kwargs, {**values, **latents})[0]

    terms = joint_terms if summed is None else summed.terms

    def log_density(values: Any, latents: Any, data: Any) -> jax.Array:
        return sum(terms(values, latents, data).values(), start=jnp.zeros(()))

    def sites(values: Any, latents: Any, data: Any) -> dict[str, Site]:
        return sites_of(run({**values, **latents}, data))

    def deterministic(values: Any, latents: Any, data: Any) -> dict[str, jax.Array]:
        sites = run({**values, **latents}, data)
        return {
            name: jnp.asarray(site["value"])
            for name, site in sites.items()
            if site["type"] == "deterministic" and not (summed and name in summed.dependents)
        }

    maps = coordinates(at, call, found)
    dynamic = any(latent.is_dynamic for latent in found.latents.values())
    target = build(
        log_density,
        found.latents,
        declared=found.declared,
        data=call.data,
        deterministic=deterministic,
        start=maps.start,
        plates=found.plates,
        subsample={n: size for n, size in found.subsample.items() if n not in found.streamed},
        streamed=found.streamed,
        terms=terms,
        sites=sites if summed is None else None,
        constrain=maps.constrain if dynamic else None,
        unconstrain=maps.unconstrain if dynamic else None,
        infer_discrete=None if summed is None else summed.infer,
    )
    if summed is not None or found.subsample:
        return target
    return target._replace(
        simulate=simulator(model, call, names),
        recentre=lambda target: recentred(target, at, call, found),
    )
