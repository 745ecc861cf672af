"""The maps between declarations, unconstrained parameters and constrained values.

For a declared parameter with constraint set C and bijector T: R^n -> C, the trained array is
u = T^-1(x) and the value is x = T(u). All maps are pure; they can be jitted, vmapped and
differentiated.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import constraints

from vi_params._check import explain, require_key
from vi_params._tree import (
    abstract_key,
    flatten_like,
    fold_in_name,
    is_traced,
    leaves_by_path,
    path_name,
    strong,
)
from vi_params.params.declare import Declared, Latent, Param, bijector, constraint_name, normalise


def init_params(declared: Declared, key: jax.Array) -> dict[str, Any]:
    """The unconstrained parameters at their declared start.

    Every declaration has its own key, folded in from its path, so that adding a parameter does not
    change where the others start.

    Args:
        declared: mapping from names to `Param` (or nested pytrees of them; bare arrays count).
        key: a typed random key.

    Returns:
        The pytree of unconstrained arrays, of strong floating dtypes.

    Raises:
        ValueError: a start lies outside its constraint, or its shape does not fit.
        TypeError: a start is not of floating dtype, or `key` is not a typed key.

    Example:
        >>> declared = {"scale": vi.Param(jnp.full(2, 0.5), constraint=constraints.positive)}
        >>> vi.init_params(declared, jax.random.key(0))["scale"]
        Array([-0.6931472, -0.6931472], dtype=float32)
    """
    require_key(key, "init_params")

    def start(path: tuple, param: Param | Latent) -> Any:
        name = path_name(path)
        if isinstance(param, Latent):
            raise TypeError(
                explain(
                    "A latent has no start of its own.",
                    expected="Param",
                    received="Latent",
                    where=name,
                    hint="guides in vi.guides choose starts for a target's latents",
                )
            )
        init: Any = param.init
        value = init(fold_in_name(key, name)) if _is_function(init) else init
        leaves = leaves_by_path(value)
        if not leaves:
            raise ValueError(
                explain(
                    "The start of a parameter holds no array.",
                    expected="an array or a pytree of arrays",
                    received=repr(value),
                    where=name,
                )
            )
        transform = bijector(param.constraint, name)
        for below, leaf in leaves.items():
            _check_start(param, leaf, f"{name}/{below}" if below else name)
        return jax.tree.map(lambda leaf: _inverse(transform, leaf), value)

    declared = normalise(declared)
    leaves_by_path(declared)  # two leaves with one path would share their key
    return jax.tree_util.tree_map_with_path(start, declared)


def _is_function(init: Any) -> bool:
    """Whether `init` makes the start from a key; the weights of a network may be callable too."""
    if isinstance(init, functools.partial):
        return True
    return callable(init) and jax.tree_util.all_leaves([init])


def abstract_params(declared: Declared) -> dict[str, Any]:
    """The shapes and dtypes of the unconstrained parameters, without computing them."""
    return jax.eval_shape(lambda key: init_params(declared, key), abstract_key())


def constrain(declared: Declared, params: Any) -> dict[str, Any]:
    """The constrained values of unconstrained parameters.

    Args:
        declared: what `init_params` took, or a target's latents.
        params: unconstrained arrays in the structure of `declared`.

    Returns:
        The constrained values, in the same structure.

    Raises:
        KeyError: a name is missing or unknown.

    Example:
        >>> declared = {"scale": vi.Param(1.0, constraint=constraints.positive)}
        >>> vi.constrain(declared, {"scale": jnp.zeros(())})
        {'scale': Array(1., dtype=float32)}
    """
    return _map_leaves(declared, params, lambda transform, u: transform(u), "params", "constrain")


def unconstrain(declared: Declared, values: Any) -> dict[str, Any]:
    """The unconstrained parameters of constrained values: the inverse of `constrain`.

    Args:
        declared: what `init_params` took, or a target's latents.
        values: constrained arrays in the structure of `declared`.

    Returns:
        Unconstrained arrays of strong dtypes, in the same structure.

    Raises:
        KeyError: a name is missing or unknown.

    Example:
        >>> declared = {"scale": vi.Param(1.0, constraint=constraints.positive)}
        >>> vi.unconstrain(declared, {"scale": 1.0})
        {'scale': Array(0., dtype=float32)}
    """
    return _map_leaves(
        declared,
        values,
        _inverse,
        "values",
        "unconstrain",
    )


def constrain_with_log_det(declared: Declared, params: Any) -> tuple[dict[str, Any], jax.Array]:
    """The constrained values, and the log |det| of the Jacobian of `constrain` there.

    For values in sets of lower dimension (simplex, Cholesky factors of correlations) the
    determinant is that of numpyro's transform: with respect to the free coordinates.

    Args:
        declared: what `init_params` took, or a target's latents.
        params: unconstrained arrays in the structure of `declared`.

    Returns:
        `(values, log_abs_det)`, the second a scalar, summed over all leaves.

    Example:
        >>> declared = {"scale": vi.Param(1.0, constraint=constraints.positive)}
        >>> vi.constrain_with_log_det(declared, {"scale": jnp.ones(())})[1]
        Array(1., dtype=float32)
    """
    log_dets = [jnp.zeros(())]

    def forward(transform: Any, u: jax.Array) -> jax.Array:
        x = transform(u)
        # the transform onto the complex numbers gives a complex zero
        log_dets.append(jnp.sum(jnp.real(transform.log_abs_det_jacobian(u, x))))
        return x

    values = _map_leaves(declared, params, forward, "params", "constrain_with_log_det")
    return values, jnp.sum(jnp.stack(log_dets))


def _inverse(transform: Any, x: Any) -> jax.Array:
    """T^-1(x) as a strong floating array; whole numbers given as ints count."""
    x = strong(x)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        x = x.astype(jnp.result_type(float))
    return strong(transform.inv(x))


def _map_leaves(declared: Declared, tree: Any, f: Any, what: str, where: str) -> Any:
    declared = normalise(declared)
    subtrees, paths, treedef = flatten_like(declared, tree, what=what, where=where)
    transforms = [
        bijector(declaration.constraint, path)
        for declaration, path in zip(jax.tree.leaves(declared), paths, strict=True)
    ]
    return treedef.unflatten(
        jax.tree.map(lambda leaf, t=t: f(t, leaf), subtree)
        for t, subtree in zip(transforms, subtrees, strict=True)
    )


def _check_start(param: Param, value: Any, name: str) -> None:
    """Raises unless `value` is a floating array inside the constraint, of a shape that fits it."""
    constraint = constraint_name(param.constraint)
    dtype = getattr(value, "dtype", np.dtype(type(value)))
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(
            explain(
                "A parameter must start at floating-point numbers.",
                expected="a floating dtype",
                received=f"{value!r} of dtype {dtype}",
                where=name,
                hint="write 1.0 for 1; keep integers and functions out of the weights (partition "
                "the network first)",
            )
        )
    shape = jnp.shape(value)
    transform = bijector(param.constraint, name)
    free, image, reason = _abstract_round_trip(transform, shape, dtype)
    if image is None and _abstract_round_trip(transform, shape, jnp.result_type(float))[1]:
        raise TypeError(
            explain(
                "NumPyro's bijector does not take the dtype of a start.",
                expected=f"dtype {jnp.result_type(float)} for {constraint}",
                received=f"dtype {dtype}",
                where=name,
                hint="start at an array of the default floating dtype",
            )
        ) from reason
    batch_ndim = len(shape) - param.constraint.event_dim
    if image is None or image.shape != shape or batch_ndim < len(param.plates):
        raise ValueError(
            explain(
                "The shape of a start does not fit its declaration.",
                expected=f"a shape that {constraint} has"
                + (f", led by the plates {param.plates}" if param.plates else ""),
                received=f"shape {shape}",
                where=name,
                hint="give the start its full shape, the constraint's event and plates included",
            )
        ) from reason
    if jnp.issubdtype(free.dtype, jnp.complexfloating):
        raise TypeError(
            explain(
                "A complex start needs the complex constraint.",
                expected=f"a real floating dtype for {constraint}",
                received=f"dtype {dtype}",
                where=name,
                hint="constraint=constraints.complex trains the real and the imaginary part",
            )
        )
    if is_traced(value) or is_traced(param.constraint):
        return
    with jax.ensure_compile_time_eval():
        numbers = np.asarray(value)
        if numbers.dtype.itemsize < 4:  # numpy's finfo and linalg know no bfloat16
            numbers = numbers.astype(np.float32)
        inside = np.all(np.isfinite(numbers)) and np.all(param.constraint(numbers))
        inside = inside and not _on_boundary(param.constraint, numbers)
        transform = bijector(param.constraint, name)  # anew: its bounds may have been traced above
        free = _inverse(transform, value)
        if is_traced(free):  # a function with a derivative of its own, under vmap
            free = jax.jit(lambda x: _inverse(transform, x))(value)
        inside = inside and np.all(np.isfinite(free))
    if not inside:
        raise ValueError(
            explain(
                "The start of a parameter lies outside its constraint.",
                expected=f"finite values in the interior of {constraint}",
                received=np.array2string(np.asarray(value), threshold=8),
                where=name,
            )
        )


def _abstract_round_trip(transform: Any, shape: tuple, dtype: Any) -> tuple[Any, Any, Any]:
    """The abstract values of T^-1(x) and T(T^-1(x)), or (None, None, the reason why not)."""
    try:
        canonical = jax.dtypes.canonicalize_dtype(dtype)  # JAX warns of others where x64 is off
        free = jax.eval_shape(transform.inv, jax.ShapeDtypeStruct(shape, canonical))
        return free, jax.eval_shape(transform, free), None
    except (ValueError, TypeError, IndexError, AssertionError, NotImplementedError) as error:
        return None, None, error


def _on_boundary(constraint: Any, x: np.ndarray) -> bool:
    """Whether `x` is on the boundary of a closed set whose bijector clips there.

    The inverse is finite there, but so far out that gradients vanish.
    """
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    if isinstance(constraint, type(constraints.simplex)):
        return x.shape[-1] > 1 and bool(np.any(x <= 0))
    if isinstance(constraint, type(constraints.l1_ball)):
        return bool(np.any(np.sum(np.abs(x), axis=-1) >= 1))
    return False
