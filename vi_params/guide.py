"""Guides: pure functions of (params, key) that draw latents and score them."""

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from numpyro import distributions as dist

from vi_params._check import explain, require_key, require_names
from vi_params._tree import fold_in_name, pick
from vi_params.batches.batch import row_scale, split
from vi_params.noise import Noise
from vi_params.params import constrain
from vi_params.params.declare import Declared, normalise
from vi_params.params.rows import rows_at
from vi_params.sites import Site, plate_axes


class Draw(NamedTuple):
    """One draw of a guide.

    Attributes:
        latents: the constrained latents by name.
        log_prob: log q of them, as a density over constrained latents; a scalar.
        position: what the draw was made at: the unconstrained vector of a family, the sampled
            values of a hand-written guide.
    """

    latents: Any
    log_prob: jax.Array
    position: Any


class Guide(NamedTuple):
    """A variational family q(z; params) as pure functions.

    `params` are unconstrained; they may hold other names beside the guide's own.

    Attributes:
        declared: name -> `Param`, the guide's learnable parameters.
        sample: `(params, key, data=None) -> Draw`: `transform` of one piece of noise.
        log_prob: `(params, latents, data=None) -> scalar`: log q at any latents.
        rescore: `(params, draw, data=None) -> scalar`: log q at a draw, under other or
            gradient-stopped parameters, with no inverse map.
        noise: `(key, num_particles, scheme=iid()) -> noise`, its leading axis the particles.
        transform: `(params, one particle's noise, data=None) -> Draw`.
        entropy: `(params, draw, data=None) -> scalar`, an unbiased estimate of -E[log q] in which
            what is known in closed form is exact; None where nothing is.
        distributions: `(params, data=None) -> mapping` from the names of the latents to numpyro
            distributions, for hand-written guides; None for families, which follow their target.
        sites: `(params, one particle's noise, data=None, given={}) -> mapping` of its `Site`s,
            drawn as by `transform` except for those `given`; no gradient flows through draws that
            are not reparameterised. None for families that tie their latents together.
        data: arrays that the guide takes beside the target's.
        is_point: whether all mass is in one point, so that there is no density to judge.
        is_reparameterised: whether draws have a gradient with respect to the parameters, as far as
            `distributions` does not say otherwise.
        plates: plate -> size, of the plates that the guide itself has.
        in_plates: `(latent -> plates of its leading axes, plate -> size, see) -> Guide`: the guide
            told where its latents lie, so that it counts the rows of a batch as the target does,
            and sees the data as `see(data)`; None for guides that know.
    """

    declared: Declared
    sample: Callable[..., Draw]
    log_prob: Callable[..., jax.Array]
    rescore: Callable[..., jax.Array]
    noise: Callable[..., Any]
    transform: Callable[..., Draw]
    entropy: Callable[..., jax.Array] | None = None
    distributions: Callable[..., Mapping[str, dist.Distribution]] | None = None
    sites: Callable[..., Mapping[str, Site]] | None = None
    data: Any = None
    is_point: bool = False
    is_reparameterised: bool = True
    plates: Mapping[str, int] = MappingProxyType({})
    in_plates: Callable[..., "Guide"] | None = None


def sampler(noise: Callable[..., Any], transform: Callable[..., Draw]) -> Callable[..., Draw]:
    """`guide.sample`: one piece of noise, transformed."""

    def sample(params: Any, key: jax.Array, data: Any = None) -> Draw:
        require_key(key, "guide.sample")
        one = jax.tree.map(lambda leaf: leaf[0], noise(key, 1))
        return transform(params, one, data)

    return sample


def key_noise(key: jax.Array, num_particles: int, scheme: Noise | None = None) -> jax.Array:
    """The noise of a program: one key a particle."""
    if scheme is not None and not scheme.is_iid:
        raise ValueError(
            explain(
                "The noise of a hand-written guide is its random keys.",
                expected="vi.noise.iid()",
                received=f"vi.noise.{scheme.name}()",
                where="guide.noise",
                hint="families in vi.guides draw normal noise and take any scheme",
            )
        )
    return jax.random.split(key, num_particles)


SINGLE = "latent"
"""The name inside a guide of the one latent of a guide that returns one distribution."""


def guide(declared: Declared, q: Callable[..., Any]) -> Guide:
    """A guide from the distributions of its latents.

    Args:
        declared: name -> `Param` (or nested pytrees of them; bare arrays count).
        q: `(values) -> q` or `(values, data) -> q`: from constrained values to a mapping from the
            names of latents to numpyro distributions, or to one distribution for the only latent
            of a target. Latents are independent given the values.

    At a batch of rows a value declared with `Param(..., plates=("rows",))` arrives reduced to these
    rows, and `data`, of a target marked by `vi.minibatch` or fed from outside, are the rows' own;
    without one it has all its rows: the same `q` serves both. Which arrays of a NumPyro model have
    rows only a program knows: `vi.numpyro_guide` is for an encoder on its batches.
    Latents that have the plate in the target count N / B times, as they do there.

    Returns:
        A `Guide`.

    Raises:
        TypeError: `q` takes neither one nor two arguments, or returns something else.

    Example:
        >>> import numpyro.distributions as dist
        >>> from numpyro.distributions import constraints
        >>> scale = vi.Param(1.0, constraint=constraints.positive)
        >>> declared = {"loc": jnp.zeros(()), "scale": scale}
        >>> guide = vi.guide(declared, lambda v: {"z": dist.Normal(v["loc"], v["scale"])})
        >>> params = vi.init_params(guide.declared, jax.random.key(0))
        >>> guide.log_prob(params, {"z": jnp.zeros(())})
        Array(-0.9189385, dtype=float32)
    """
    return _guide(normalise(declared), q, _takes_data(q), {}, {}, lambda data: split(data)[0])


def _guide(
    declared: Declared,
    q: Callable[..., Any],
    takes_data: bool,
    plates: Mapping[str, tuple[str | None, ...]],
    sizes: Mapping[str, int],
    see: Callable[[Any], Any],
) -> Guide:
    def distributions(params: Any, data: Any = None) -> dict[str, dist.Distribution]:
        values = constrain(declared, rows_at(declared, pick_own(params, declared), data))
        found = q(values, see(data)) if takes_data else q(values)
        if isinstance(found, dist.Distribution):
            return {SINGLE: found}
        if isinstance(found, Mapping) and all(
            isinstance(d, dist.Distribution) for d in found.values()
        ):
            return dict(found)
        raise TypeError(
            explain(
                "A guide must return distributions.",
                expected="a numpyro distribution, or a mapping from names to them",
                received=f"{type(found).__name__}: {found!r}"[:200],
                where="q of vi.guide",
            )
        )

    def score(q: Mapping[str, dist.Distribution], latents: Any) -> jax.Array:
        require_names(list(latents), list(q), what="latents", where="guide.log_prob")
        terms = []
        for name in q:
            scale = row_scale(plates.get(name, ()), jnp.shape(latents[name]), sizes)
            terms.append(scale * jnp.sum(q[name].log_prob(latents[name])))
        return jnp.sum(jnp.stack(terms))

    def transform(params: Any, noise: jax.Array, data: Any = None) -> Draw:
        q = distributions(params, data)
        latents = {name: _sample(q[name], fold_in_name(noise, name)) for name in q}
        unnamed = latents[SINGLE] if SINGLE in q else latents
        return Draw(unnamed, score(q, latents), unnamed)

    def sites(
        params: Any, noise: jax.Array, data: Any = None, given: Mapping[str, Any] | None = None
    ) -> dict[str, Site]:
        given, found = given or {}, {}
        for name, d in distributions(params, data).items():
            x = given[name] if name in given else _sample(d, fold_in_name(noise, name))
            log_q = jnp.asarray(d.log_prob(x))
            axes = plate_axes(plates.get(name, ()), log_q.ndim)
            scale = row_scale(plates.get(name, ()), jnp.shape(x), sizes)
            found[name] = Site(x, log_q, d, axes, scale)
        return found

    def log_prob(params: Any, latents: Any, data: Any = None) -> jax.Array:
        q = distributions(params, data)
        return score(q, {SINGLE: latents} if SINGLE in q else latents)

    return Guide(
        declared=declared,
        sample=sampler(key_noise, transform),
        log_prob=log_prob,
        rescore=lambda params, draw, data=None: log_prob(params, draw.latents, data),
        noise=key_noise,
        transform=transform,
        distributions=distributions,
        sites=sites,
        in_plates=lambda *where: _guide(declared, q, takes_data, *where),
    )


def _sample(distribution: dist.Distribution, key: jax.Array) -> jax.Array:
    """A draw; no gradient flows through one that is not reparameterised."""
    x = jnp.asarray(distribution.sample(key))
    return x if distribution.has_rsample else jax.lax.stop_gradient(x)


def pick_own(params: Mapping[str, Any], declared: Declared) -> dict[str, Any]:
    """A guide's or a target's own parameters out of the joint mapping."""
    missing = [name for name in declared if name not in params]
    if missing:
        require_names(list(params), list(declared), what="params", where="params")
    return pick(params, declared)


def _takes_data(q: Callable[..., Any]) -> bool:
    parameters = inspect.signature(q).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return True
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional if p.default is p.empty]
    if len(required) > 2 or not positional:
        raise TypeError(
            explain(
                "The function of a guide has the wrong arguments.",
                expected="q(values) or q(values, data)",
                received=f"q{inspect.signature(q)}",
                where="vi.guide",
            )
        )
    return len(required) == 2
