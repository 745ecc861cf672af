"""The discrete latents that a target sums out, inferred afterwards."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vi_params._cache import program
from vi_params._check import explain, require_count, require_instance, require_key, require_names
from vi_params._over import over
from vi_params._tree import abstract_key, pick
from vi_params.batches.batch import require_rows, split
from vi_params.params import constrain, init_params
from vi_params.target import Target, shape_at


def infer_discrete(
    target: Target,
    draws: Mapping[str, Any],
    key: jax.Array,
    data: Any = None,
    *,
    params: Any = None,
    temperature: int = 1,
    batch_size: int | None = None,
) -> dict[str, jax.Array]:
    """The discrete latents of a model, given draws of its continuous ones.

    At temperature 1, for each draw z of the continuous latents one draw of all discrete latents k
    jointly from p(k | z, x): with z from the posterior, (k, z) is from the joint posterior. At
    temperature 0 the jointly most probable k, argmax_k p(k | z, x) (Viterbi in a chain). Both are
    exact: the pass that sums the discrete latents out, differentiated with another rule.

    Args:
        target: made by `vi.from_numpyro(model, ..., enumerate=True)`.
        draws: name -> continuous latents, one draw or any leading axes, such as `vi.draws` gives;
            its deterministic sites are not read.
        key: a typed random key; not used at temperature 0.
        data: the data; the target's own where None.
        params: unconstrained parameters, `fit.params`; needed where the model has parameters.
        temperature: 1 draws, 0 maximises.
        batch_size: how many draws are treated at once; all where None.

    Returns:
        name -> array with the draws' leading axes: the discrete latents, then the deterministic
        sites that depend on them.

    Raises:
        ValueError: the target sums nothing out, a temperature other than 0 and 1, leading axes that
            differ between latents, or no `params` for a model that has them.
        KeyError: latents are missing or unknown.
        TypeError: `key` is not a typed key.

    Example:
        >>> import numpyro, numpyro.distributions as dist
        >>> def model(y):
        ...     mean = numpyro.sample("mean", dist.Normal(0, 5).expand([2]).to_event(1))
        ...     with numpyro.plate("rows", len(y)):
        ...         z = numpyro.sample("z", dist.Bernoulli(0.5))
        ...         numpyro.sample("y", dist.Normal(mean[z], 1), obs=y)
        >>> target = vi.from_numpyro(model, jnp.array([-3.0, 2.0, 3.5]), enumerate=True)
        >>> draws = {"mean": jnp.array([[-3.0, 3.0], [3.0, -3.0]])}
        >>> vi.infer_discrete(target, draws, jax.random.key(0), temperature=0)["z"]
        Array([[0, 1, 1],
               [1, 0, 0]], dtype=int32)
    """
    require_instance(target, Target, "vi.from_numpyro(..., enumerate=True)", "target")
    require_key(key, "infer_discrete")
    if target.infer_discrete is None:
        raise ValueError(
            explain(
                "The target sums no discrete latents out.",
                expected="vi.from_numpyro(model, ..., enumerate=True) of a model that has some",
                received=f"a target with the latents {list(target.latents)}",
                where="infer_discrete",
            )
        )
    if isinstance(temperature, bool) or temperature not in (0, 1):
        raise ValueError(
            explain(
                "The temperature must be 0 or 1.",
                expected="1 for a draw, 0 for the most probable values",
                received=repr(temperature),
                where="infer_discrete",
            )
        )
    if batch_size is not None:
        require_count(batch_size, "batch_size", "infer_discrete")
    if params is None and target.declared:
        raise ValueError(
            explain(
                "The model has parameters of its own.",
                expected=f"params with {list(target.declared)}",
                received="no params",
                where="infer_discrete",
                hint="params=fit.params",
            )
        )
    data = target.data if data is None else data
    require_rows(data, target.plates, "infer_discrete, data")
    latents, shape = _latents(target, draws, data)
    compiled = program(_infer, target, int(temperature), batch_size)
    flat = compiled(params, latents, key, data)
    return {name: jnp.reshape(x, (*shape, *x.shape[1:])) for name, x in flat.items()}


def _infer(target: Target, temperature: int, batch_size: int | None) -> Callable:
    infer = target.infer_discrete
    assert infer is not None

    @jax.jit
    def compiled(params: Any, latents: Any, key: jax.Array, data: Any) -> dict[str, jax.Array]:
        values = constrain(target.declared, pick(params or {}, target.declared))

        def one(given: Any) -> dict[str, jax.Array]:
            number, z = given
            return infer(values, z, jax.random.fold_in(key, number) if temperature else None, data)

        return over(one, (jnp.arange(_num(latents)), latents), batch_size)

    return compiled


def _latents(target: Target, draws: Any, data: Any) -> tuple[dict[str, jax.Array], tuple[int, ...]]:
    """The continuous latents with one leading axis, and the leading axes they came with."""
    if not isinstance(draws, Mapping):
        raise TypeError(
            explain(
                "Draws must come as a mapping.",
                expected=f"a mapping with the names {list(target.latents)}",
                received=type(draws).__name__,
                where="infer_discrete",
            )
        )
    computed = _deterministic_names(target, data)
    named = [name for name in draws if name not in computed or name in target.latents]
    require_names(named, list(target.latents), what="latents", where="infer_discrete")
    found, leading = {}, {}
    for name, latent in target.latents.items():
        value, shape = jnp.asarray(draws[name]), shape_at(latent, split(data)[1])
        before = value.ndim - len(shape)
        if before < 0 or value.shape[before:] != shape:
            raise ValueError(
                explain(
                    "A latent has the wrong shape.",
                    expected=f"shape {shape}, after any leading axes of draws",
                    received=f"shape {value.shape}",
                    where=f"infer_discrete, latent {name!r}",
                )
            )
        leading[name] = value.shape[:before]
        found[name] = value.reshape(math.prod(leading[name]), *shape)
    if len(set(leading.values())) > 1:
        raise ValueError(
            explain(
                "The latents have different leading axes.",
                expected="the same number of draws of each",
                received=", ".join(f"{name!r}: {shape}" for name, shape in leading.items()),
                where="infer_discrete",
            )
        )
    return found, next(iter(leading.values()), ())


def _deterministic_names(target: Target, data: Any) -> set[str]:
    """The names that `vi.draws` adds to the latents."""

    def at_start(key: jax.Array) -> Any:
        values = constrain(target.declared, init_params(target.declared, key))
        index = split(data)[1]
        latents = {n: jnp.zeros(shape_at(z, index), z.dtype) for n, z in target.latents.items()}
        return target.deterministic(values, latents, data)

    return set(jax.eval_shape(at_start, abstract_key()))


def _num(latents: Mapping[str, jax.Array]) -> int:
    """How many draws there are; one of a model without continuous latents."""
    return next((len(z) for z in latents.values()), 1)
