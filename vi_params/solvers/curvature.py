"""Products with a Hessian: forward over reverse, or from differences of gradients.

Some densities have a gradient and no second derivative in JAX: those through ODE solvers and other
`jax.custom_vjp` functions, or through callbacks. There the product is a central difference of the
gradient, whose relative error is of the order eps^(2/3): 1e-10 in float64, 1e-5 in float32 (Nocedal
and Wright, 2006, Numerical optimization, section 8.1, and 7.1 for Newton-CG with it).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Slope = Callable[[jax.Array], jax.Array]
"""The gradient of a function of a vector."""

MISSING = (TypeError, ValueError, NotImplementedError)
"""What JAX raises, as the case may be, where a function has no forward derivative."""


def along(slope: Slope, x: jax.Array, v: jax.Array, unit: jax.Array | float = 1.0) -> jax.Array:
    """H v at x.

    Args:
        slope: the gradient of the function whose Hessian is H.
        x: shape (n,).
        v: shape (n,).
        unit: over what change of each coordinate the gradient changes by its own order, for
            differences: shape (n,) or one number.
    """

    def exact(v: jax.Array) -> jax.Array:
        return jax.jvp(slope, (x,), (v,))[1]

    try:
        # JAX raises for some functions only where they are mapped.
        jax.eval_shape(jax.vmap(exact), v[None])
    except MISSING:
        return _difference(slope, x, v, unit)
    return exact(v)


def _difference(slope: Slope, x: jax.Array, v: jax.Array, unit: jax.Array | float) -> jax.Array:
    length = jnp.linalg.norm(v / unit)
    step = jnp.finfo(x.dtype).eps ** (1 / 3) / jnp.where(length > 0, length, 1.0)
    return (slope(x + step * v) - slope(x - step * v)) / (2 * step)
