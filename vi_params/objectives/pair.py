"""A target and a guide checked to fit, and their log weights at joint draws.

Every objective but the ELBO is made of the same parts: K draws z_k = z(params, noise_k), their
log densities log p(x, z_k) and log q(z_k), and a decision on where gradients may flow. The decision
is a function, a route:

- `total`: through the draw, the target and log q;
- `path`: through the draw alone, every parameter held fixed;
- `at_fixed_draws`: through the target and log q, the draw held fixed;
- `through_model`: through the target's parameters alone.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from vi_params._check import explain, require_count, require_instance
from vi_params._over import over
from vi_params._tree import abstract_key, pick
from vi_params.guide import Draw, Guide
from vi_params.matching import joint_data, joint_declared, matched, without_gradient
from vi_params.noise import Noise, iid
from vi_params.params import constrain
from vi_params.target import Target


class Scored(NamedTuple):
    """Draws of a guide, scored.

    Attributes:
        log_density: log p(x, z; theta), in nats.
        log_prob: log q(z; params), in nats.
    """

    log_density: jax.Array
    log_prob: jax.Array

    @property
    def log_weight(self) -> jax.Array:
        """Log p - log q."""
        return self.log_density - self.log_prob


class Pair(NamedTuple):
    """A target and a guide that fit each other.

    Attributes:
        target: what is approximated.
        guide: by what; its latents are the target's.
        declared: the parameters of both.
        data: the data of both.
        noise: `key -> noise`, leading axes `(num_particles, num_importance)`.
        num_importance: how many draws share a weight's normaliser.
        scheme: how the draws depend on each other.
        batch_size: how many draws are evaluated at once; all where None.
        plate: the plate whose rows have weights of their own; None for weights of whole draws.
    """

    target: Target
    guide: Guide
    declared: dict[str, Any]
    data: Any
    noise: Callable[[jax.Array], Any]
    num_importance: int
    scheme: Noise
    batch_size: int | None
    plate: str | None = None

    @property
    def local(self) -> list[str]:
        """The latents of the rows that have weights of their own."""
        latents = self.target.latents
        return [name for name, x in latents.items() if self.plate and self.plate in x.plates]


Route = Callable[[Pair, Any, Any, Any], Scored]
"""`(pair, params, one draw's noise, data) -> Scored`."""


def pair(
    target: Target,
    guide: Guide,
    where: str,
    *,
    num_particles: int = 1,
    num_importance: int = 1,
    noise: Noise | None = None,
    batch_size: int | None = None,
    fewest: int = 1,
) -> Pair:
    """The pair of a target and a guide, or an error that says what does not fit.

    Args:
        target: what to approximate.
        guide: by what.
        where: the objective's name, for messages.
        num_particles: how many independent estimates are averaged.
        num_importance: how many draws each is made of.
        noise: how the draws depend on each other; independent where None.
        batch_size: how many draws are evaluated at once.
        fewest: the smallest `num_importance`.

    Raises:
        ValueError: target and guide declare the same name, their latents do not match, the guide
            has no density, or a count is too small.
        TypeError: an argument is of the wrong kind.
    """
    require_instance(target, Target, "vi.target or vi.from_numpyro", f"{where}, target")
    require_instance(guide, Guide, "vi.guides.mean_field(target)", f"{where}, guide")
    require_count(num_particles, "num_particles", where)
    require_count(num_importance, "num_importance", where, least=fewest)
    if batch_size is not None:
        require_count(batch_size, "batch_size", where)
    scheme = noise or iid()
    require_instance(scheme, Noise, "vi.noise.antithetic()", f"{where}, noise")
    if guide.is_point:
        raise ValueError(
            explain(
                "A point estimate has no density to weigh draws by.",
                expected="a guide that spreads its mass",
                received="a guide whose latents are all point masses",
                where=where,
                hint="vi.elbo for the mode, or vi.guides.mean_field(target)",
            )
        )
    declared = joint_declared(target, guide)
    guide = matched(target, guide)

    def draw_noise(key: jax.Array) -> Any:
        flat = guide.noise(key, num_particles * num_importance, scheme)
        shape = num_particles, num_importance
        return jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), flat)

    jax.eval_shape(draw_noise, abstract_key())
    data = joint_data(target, guide)
    return Pair(target, guide, declared, data, draw_noise, num_importance, scheme, batch_size)


def model_values(pair: Pair, params: Any) -> dict[str, Any]:
    """The constrained values of the target's own parameters."""
    return constrain(pair.target.declared, pick(params, pair.target.declared))


def total(pair: Pair, params: Any, noise: Any, data: Any) -> Scored:
    """The scores of one draw, differentiable in everything."""
    draw = pair.guide.transform(params, noise, data)
    log_density = pair.target.log_density(model_values(pair, params), draw.latents, data)
    return Scored(log_density, draw.log_prob)


def path(pair: Pair, params: Any, noise: Any, data: Any) -> Scored:
    """The scores of one draw, differentiable through the draw alone."""
    draw = pair.guide.transform(params, noise, data)
    return _score(pair, jax.lax.stop_gradient(params), draw, data)


def at_fixed_draws(pair: Pair, params: Any, noise: Any, data: Any) -> Scored:
    """The scores of one draw, differentiable in the parameters with the draw held fixed."""
    draw = pair.guide.transform(params, noise, data)
    return _score(pair, params, jax.lax.stop_gradient(draw), data)


def through_model(pair: Pair, params: Any, noise: Any, data: Any) -> Scored:
    """The scores of one draw, differentiable in the model's own parameters alone."""
    draw = jax.lax.stop_gradient(pair.guide.transform(params, noise, data))
    log_density = pair.target.log_density(model_values(pair, params), draw.latents, data)
    return Scored(log_density, draw.log_prob)


def scored(pair: Pair, route: Route, params: Any, noise: Any, data: Any) -> Scored:
    """All draws scored along a route; leading axes `(num_particles, num_importance)`."""
    return over_draws(lambda one: route(pair, params, one, data), noise, pair.batch_size)


def over_draws(f: Callable[[Any], Any], noise: Any, batch_size: int | None) -> Any:
    """`f` at the noise of every draw; leading axes `(num_particles, num_importance)`.

    With a batch size, what the gradient needs is computed again rather than kept, so that the
    memory is that of one batch.
    """
    leading = jax.tree.leaves(noise)[0].shape[:2]
    num = leading[0] * leading[1]
    in_batches = batch_size is not None and batch_size < num
    flat = jax.tree.map(lambda leaf: leaf.reshape(num, *leaf.shape[2:]), noise)
    found = over(jax.checkpoint(f) if in_batches else f, flat, batch_size)
    return jax.tree.map(lambda leaf: leaf.reshape(*leading, *leaf.shape[1:]), found)


def require_reparameterised(pair: Pair, where: str, hint: str) -> None:
    """Raises unless gradients can flow through every draw of the guide."""
    stuck = without_gradient(pair.target, pair.guide)
    if stuck:
        raise ValueError(
            explain(
                "The guide draws a latent from a distribution that is not reparameterised.",
                expected="distributions with has_rsample",
                received=f"none at {list(stuck)}",
                where=where,
                hint=hint,
            )
        )


def require_apart(fitted: Pair, where: str) -> None:
    """Raises where model and guide, which descend on losses of their own, share a parameter."""
    shared = [name for name in fitted.target.declared if name in fitted.guide.declared]
    if shared:
        raise ValueError(
            explain(
                "A parameter of both model and guide cannot follow two losses.",
                expected="parameters of the model or of the guide",
                received=f"both have {shared}",
                where=where,
                hint="the model ascends the importance-weighted bound, the guide descends this "
                "objective; vi.elbo and vi.iwae are one loss for both",
            )
        )


def _score(pair: Pair, params: Any, draw: Draw, data: Any) -> Scored:
    log_density = pair.target.log_density(model_values(pair, params), draw.latents, data)
    return Scored(log_density, pair.guide.rescore(params, draw, data))
