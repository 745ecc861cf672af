"""Where a target is not finite, before anything is fitted."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vi_params._check import require_key
from vi_params._table import Table
from vi_params._tree import fold_in_name
from vi_params.guides.starts import start_vector
from vi_params.objectives.objective import Objective
from vi_params.params import constrain, init_params
from vi_params.target import Target, flat


@dataclasses.dataclass(frozen=True)
class Check:
    """What was found at one point of a target.

    Attributes:
        ok: whether everything was finite and every transform could be undone.
        log_density: the log density there, in nats.
        table: one row for each latent and each term of the log density.
        problems: what is wrong, in words; empty where ok.
    """

    ok: bool
    log_density: float
    table: Table
    problems: tuple[str, ...]

    def __str__(self) -> str:
        head = "All finite." if self.ok else "Not usable: " + "; ".join(self.problems) + "."
        return f"{head} Log density {self.log_density:.6g}.\n{self.table}"


def check(target: Target, key: jax.Array, data: Any = None) -> Check:
    """The target at one random start: density, gradient and transforms, site by site.

    Args:
        target: what is to be approximated.
        key: a typed random key; it chooses the start, uniform on (-2, 2) in unconstrained space.
        data: the data; the target's own where None.

    Returns:
        A `Check` that prints well.

    Raises:
        TypeError: `key` is not a typed key.
        ValueError: a latent is discrete, so that there is no unconstrained space to start in.

    Example:
        >>> target = vi.target(lambda v, z, d: jnp.log(z["z"]), {"z": vi.Latent(())})
        >>> report = vi.check(target, jax.random.key(1))
        >>> report.ok
        False
    """
    require_key(key, "check")
    data = target.data if data is None else data
    flat_target = flat(target)

    @jax.jit
    def at_start(key: jax.Array, data: Any) -> Any:
        params = init_params(target.declared, fold_in_name(key, "params"))
        values = constrain(target.declared, params)
        u = start_vector(target, None)(fold_in_name(key, "latents"))
        latents = flat_target.constrain(u, values, data)
        back = flat_target.unconstrain(latents, values, data)
        gradient = jax.grad(flat_target.log_density)(u, values, data)
        found = _look(target, values, latents, data)
        return found, jnp.max(jnp.abs(back - u), initial=0.0), jnp.all(jnp.isfinite(gradient))

    found, round_trip, finite_gradient = at_start(key, data)
    problems = []
    if not round_trip < 1e-2:
        problems.append(f"unconstrain does not undo constrain (off by {float(round_trip):.3g})")
    if not finite_gradient:
        problems.append("the gradient in unconstrained space is not finite")
    return _report(target, found, problems)


def check_objective(objective: Objective, params: Any, key: jax.Array, data: Any) -> Check:
    """The target at a draw of the guide: what makes a start invalid."""
    target, guide = objective.target, objective.guide
    if target is None or guide is None:  # samples alone: there is no density to look at
        return Check(True, float("nan"), Table(("kind", "name", "value", "gradient"), ()), ())

    @jax.jit
    def at_draw(params: Any, key: jax.Array, data: Any) -> Any:
        values = constrain(target.declared, {n: params[n] for n in target.declared})
        latents = guide.sample(params, key, data).latents
        return _look(target, values, latents, data)

    return _report(target, at_draw(params, key, data), [])


def _look(target: Target, values: Any, latents: Any, data: Any) -> tuple[Any, Any, Any]:
    smooth = {name: z for name, z in latents.items() if not target.latents[name].is_discrete}
    gradient = jax.grad(lambda z: target.log_density(values, latents | z, data))(smooth)
    gradient = jax.tree.map(jnp.zeros_like, latents) | gradient
    return latents, gradient, target.terms(values, latents, data)


def _report(target: Target, found: tuple[Any, Any, Any], problems: list[str]) -> Check:
    latents, gradient, terms = found
    rows = []
    for name, latent in target.latents.items():
        value, slope = np.asarray(latents[name]), np.asarray(gradient[name])
        inside = latent.is_dynamic or bool(np.all(latent.support(value)))
        if not np.all(np.isfinite(value)):
            problems.append(f"latent {name!r} is not finite")
        elif not inside:
            problems.append(f"latent {name!r} is outside its support")
        if not np.all(np.isfinite(slope)):
            problems.append(f"the gradient with respect to latent {name!r} is not finite")
        rows.append(("latent", name, _range(value), _range(slope)))
    total = 0.0
    for name, term in terms.items():
        value = float(np.sum(np.asarray(term)))
        total += value
        if not np.isfinite(value):
            problems.append(f"the log density of {name!r} is {value}")
        rows.append(("term", name, f"{value:.4g}", ""))
    table = Table(("kind", "name", "value", "gradient"), tuple(rows))
    return Check(not problems, total, table, tuple(problems))


def _range(x: np.ndarray) -> str:
    """An array's range, and how many of its entries are not finite."""
    bad = int(np.sum(~np.isfinite(x)))
    if x.size == 0:
        return "empty"
    if bad:
        return f"{bad} of {x.size} not finite"
    low, high = float(np.min(x)), float(np.max(x))
    return f"{low:.4g}" if low == high else f"{low:.4g} .. {high:.4g}"
