"""Joint draws of latents and data from a model, checked before they are trained on."""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Literal

from vi_params._check import explain
from vi_params._tree import abstract_key
from vi_params.objectives.objective import require_structure
from vi_params.objectives.pair import Pair
from vi_params.params import constrain
from vi_params.params.maps import abstract_params
from vi_params.target import require_draw

Simulate = Callable[[Any, jax.Array, Any], tuple[Any, Any]]
"""`(values, key, data) -> (latents, data)`: one draw of the latents and of the data given them."""


def require_simulate(fitted: Pair, simulate: Simulate | None, where: str) -> Simulate:
    """The simulator to use, with latents and data as the target's and guide's.

    Raises:
        ValueError: there is none; its draws do not have the structure of latents and data; nothing
            is observed; or the guide does not look at what is simulated.
    """
    target = fitted.target
    simulate = target.simulate if simulate is None else simulate
    if simulate is None:
        raise ValueError(
            explain(
                "There is nothing to simulate latents and data from.",
                expected="simulate=(values, key, data) -> (latents, data), or a NumPyro model "
                "whose observations are its arguments",
                received="a target without a simulator",
                where=where,
            )
        )
    if not callable(simulate):
        raise TypeError(
            explain(
                "A simulator must be a function.",
                expected="simulate(values, key, data) -> (latents, data)",
                received=f"{simulate!r} ({type(simulate).__name__})",
                where=where,
            )
        )
    params = abstract_params(fitted.declared)
    values = jax.eval_shape(lambda p: constrain(target.declared, p), _own(params, target.declared))
    drawn = jax.eval_shape(simulate, values, abstract_key(), fitted.data)
    if not (isinstance(drawn, tuple) and len(drawn) == 2):
        raise ValueError(
            explain(
                "A simulator gives two things.",
                expected="a tuple (latents, data)",
                received=f"{type(drawn).__name__}",
                where=where,
            )
        )
    latents, data = drawn
    require_draw(latents, target.latents, f"{where}, simulate")
    require_structure(jax.tree.structure(fitted.data), data)
    _require_shapes(fitted.data, data, where)
    _require_looks(fitted, params, latents, data, where)
    return simulate


def _own(params: Any, declared: Any) -> dict[str, Any]:
    return {name: params[name] for name in declared}


def _require_shapes(expected: Any, received: Any, where: str) -> None:
    shapes = [[leaf.shape for leaf in jax.tree.leaves(tree)] for tree in (expected, received)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            explain(
                "The simulated data have other shapes than the data.",
                expected=str(shapes[0]),
                received=str(shapes[1]),
                where=f"{where}, simulate",
            )
        )


def _require_looks(fitted: Pair, params: Any, latents: Any, data: Any, where: str) -> None:
    """Raises where log q is the same whatever the data: such a guide would learn the prior."""
    closed = jax.make_jaxpr(fitted.guide.log_prob)(params, latents, data)
    num = len(jax.tree.leaves(data))
    moving = set(closed.jaxpr.invars[len(closed.jaxpr.invars) - num :]) if num else set()
    for equation in closed.jaxpr.eqns:
        if any(v in moving for v in equation.invars if not isinstance(v, Literal)):
            moving.update(equation.outvars)
    out = closed.jaxpr.outvars[0]
    if isinstance(out, Literal) or out not in moving:
        raise ValueError(
            explain(
                "The guide does not look at the data.",
                expected="an amortised guide, whose distributions follow the data",
                received="a guide whose log q is the same at all data",
                where=where,
                hint="vi.guide(declared, lambda values, data: ...)",
            )
        )
