"""A NumPyro model as a target."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.infer.util import compute_log_probs

from vi_params._check import require_names
from vi_params.batches.batch import row_scale, split
from vi_params.interop.numpyro.call import bind
from vi_params.interop.numpyro.discover import LOCK, discover, trace
from vi_params.interop.numpyro.plates import with_rows
from vi_params.target import Target, build


def from_numpyro(model: Callable, *args: Any, **kwargs: Any) -> Target:
    """The joint density of a NumPyro model at its observed data, as a target.

    The model is traced once, abstractly. Array arguments become `target.data`, a mapping from
    argument names to arrays that is passed through jit; all other arguments are static: Python (and
    NumPy integer) scalars used as sizes, strings, callables. `numpyro.param` sites become
    `target.declared`; deterministic sites come back with `vi.draws`. Supports follow the model at
    every evaluation where they depend on other latents or on the data.

    Plates with `subsample_size` are minibatched: `vi.svi` and `vi.fit` draw their rows in every
    step, for model and guide alike, and NumPyro's scale N / B makes the estimate unbiased. Called
    with all data, as by `vi.draws` and `vi.diagnose`, the same model runs over all rows. A model of
    such a plate that is handed a batch of rows only, and does not use the plate's indices, is for
    `vi.fit(..., data=iterable)`.

    Args:
        model: a NumPyro program; handlers such as `reparam`, `scale` and `mask` may wrap it.
        *args: its positional arguments.
        **kwargs: its keyword arguments. An observation passed as None makes its site a latent.

    Returns:
        A `Target`.

    Raises:
        ValueError: a discrete latent, mutable state, or a batch larger than its plate; the message
            names the site. At a call: the size of a subsampled plate has changed.
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
    call = bind(model, args, kwargs)
    found = discover(model, call)
    names = list(found.latents)

    def at(data: Any) -> tuple[Callable, tuple, dict[str, Any]]:
        """The model at the rows of `data`, and its arguments."""
        program = with_rows(model, data, found.plates, found.declared, found.streamed)
        return program, *call.arguments(split(data)[0])

    def run(fixed: Mapping[str, Any], data: Any) -> Any:
        program, args, kwargs = at(data)
        return trace(handlers.substitute(program, data=dict(fixed)), args, kwargs)

    def terms(values: Any, latents: Any, data: Any) -> dict[str, jax.Array]:
        program, args, kwargs = at(data)
        with LOCK:
            return compute_log_probs(program, args, kwargs, {**values, **latents})[0]

    def log_density(values: Any, latents: Any, data: Any) -> jax.Array:
        return sum(terms(values, latents, data).values(), start=jnp.zeros(()))

    def deterministic(values: Any, latents: Any, data: Any) -> dict[str, jax.Array]:
        sites = run({**values, **latents}, data)
        return {
            name: jnp.asarray(site["value"])
            for name, site in sites.items()
            if site["type"] == "deterministic"
        }

    def constrain(values: Any, u: Any, data: Any) -> tuple[dict[str, jax.Array], jax.Array]:
        def forward(site: Any) -> Any:
            if site["type"] == "sample" and site["name"] in u:
                return biject_to(site["fn"].support)(u[site["name"]])
            return None

        program, args, kwargs = at(data)
        fixed = handlers.substitute(program, data=dict(values))
        sites = trace(handlers.substitute(fixed, substitute_fn=forward), args, kwargs)
        latents = {name: sites[name]["value"] for name in names}
        log_dets = [
            row_scale(found.latents[name].plates, jnp.shape(u[name]), found.plates)
            * jnp.sum(_transform(sites[name]).log_abs_det_jacobian(u[name], latents[name]))
            for name in names
        ]
        return latents, sum(log_dets, start=jnp.zeros(()))

    def unconstrain(values: Any, latents: Any, data: Any) -> dict[str, jax.Array]:
        require_names(list(latents), names, what="latents", where="unconstrain")
        sites = run({**values, **latents}, data)
        return {name: _transform(sites[name]).inv(latents[name]) for name in names}

    def start(strategy: Callable, key: jax.Array) -> dict[str, jax.Array]:
        program, args, kwargs = at(call.data)
        seeded = handlers.substitute(handlers.seed(program, key), substitute_fn=strategy)
        sites = trace(seeded, args, kwargs)
        return {
            name: _transform(sites[name]).inv(jnp.asarray(sites[name]["value"], float))
            for name in names
        }

    dynamic = any(latent.is_dynamic for latent in found.latents.values())
    return build(
        log_density,
        found.latents,
        declared=found.declared,
        data=call.data,
        deterministic=deterministic,
        start=start,
        plates=found.plates,
        subsample={n: size for n, size in found.subsample.items() if n not in found.streamed},
        terms=terms,
        constrain=constrain if dynamic else None,
        unconstrain=unconstrain if dynamic else None,
    )


def _transform(site: Mapping[str, Any]) -> Any:
    return biject_to(site["fn"].support)
