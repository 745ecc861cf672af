"""Declarations: `Param` of a learnable array, `Latent` of a random one, and what both share.

A declaration is static. It stands outside the traced trees: a frozen dataclass that JAX takes for
a leaf, so that a mapping of declarations has the structure of the mapping of arrays it declares,
and one declaration may stand over a whole subtree (the weights of a network).
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from numpyro.distributions import biject_to, constraints
from numpyro.distributions.transforms import Transform

from vi_params._check import explain
from vi_params._tree import path_name


@dataclasses.dataclass(frozen=True, eq=False)
class Param:
    """The declaration of a learnable parameter: where it starts and where it may go.

    Attributes:
        init: the start, in the *constrained* space: an array, a pytree of arrays (the weights of a
            network, `constraint` then holds for each leaf), or a function `key -> array or pytree`,
            called with a key of this parameter's own.
        constraint: any `numpyro.distributions.constraints` object that has a bijector. The trained
            value is its unconstrained image.
        plates: names of the leading axes that index a plate; those rows can be subsampled.

    Raises:
        ValueError: the constraint has no bijector.
        TypeError: `init`, `constraint` or `plates` is of a wrong type.

    Example:
        >>> declared = {
        ...     "loc": vi.Param(jnp.zeros(3)),
        ...     "scale": vi.Param(lambda key: jnp.ones(3), constraint=constraints.positive),
        ... }
    """

    init: ArrayLike | Any | Callable[[jax.Array], Any]
    _: dataclasses.KW_ONLY
    # A factory: dataclasses take unhashable defaults, which numpyro's constraints are, for mutable.
    constraint: constraints.Constraint = dataclasses.field(default_factory=lambda: constraints.real)
    plates: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        bijector(self.constraint, "Param")
        if isinstance(self.plates, str) or not all(isinstance(name, str) for name in self.plates):
            raise TypeError(
                explain(
                    "plates must name the leading axes.",
                    expected='a tuple of str, such as plates=("users",)',
                    received=repr(self.plates),
                    where="Param",
                )
            )


@dataclasses.dataclass(frozen=True, eq=False)
class Latent:
    """The declaration of a latent variable of a target: its shape and its support.

    Attributes:
        shape: the shape of one draw, in the constrained space.
        support: a `numpyro.distributions.constraints` object. `constraints.dependent` marks a
            support that another latent or the data decide: `target.constrain` knows it.
        dtype: the dtype of a draw; the default float where None, or int on a discrete support.
        unconstrained_shape: the shape of the unconstrained image; the support gives it where None,
            and a discrete one has none.
        plates: the name of the plate that indexes each leading axis, None for an axis without one.

    Example:
        >>> tau = vi.Latent((), constraints.positive)
    """

    shape: tuple[int, ...] = ()
    support: constraints.Constraint = dataclasses.field(default_factory=lambda: constraints.real)
    dtype: Any = None
    unconstrained_shape: tuple[int, ...] | None = None
    plates: tuple[str | None, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.shape, int) or not all(isinstance(n, int) for n in self.shape):
            raise TypeError(
                explain(
                    "The shape of a latent must be a tuple of ints.",
                    expected="a shape such as () or (3,)",
                    received=repr(self.shape),
                    where="Latent",
                )
            )
        object.__setattr__(self, "shape", tuple(self.shape))
        if isinstance(self.plates, str) or len(self.plates) > len(self.shape):
            raise TypeError(
                explain(
                    "plates must name leading axes of the latent.",
                    expected=f'a tuple such as ("users",), of at most {len(self.shape)} names',
                    received=repr(self.plates),
                    where="Latent",
                )
            )
        kind = int if self.is_discrete else float
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype or jnp.result_type(kind)))
        if self.unconstrained_shape is None and not self.is_discrete:
            free = bijector(self.support, "Latent").inverse_shape(self.shape)
            object.__setattr__(self, "unconstrained_shape", tuple(free))

    @property
    def constraint(self) -> constraints.Constraint:
        """The support, under the name that a `Param` has for it."""
        return self.support

    @property
    def is_discrete(self) -> bool:
        """Whether the support is discrete, so that no unconstrained image exists."""
        try:
            return bool(getattr(self.support, "is_discrete", False))
        except NotImplementedError:  # constraints.dependent, about which nothing more is said
            return False

    @property
    def is_dynamic(self) -> bool:
        """Whether another latent or the data decide the support."""
        return is_dependent(self.support)


Declared = Mapping[str, Any]
"""A mapping from names to declarations, or to nested pytrees of them."""


def normalise(declared: Declared) -> Any:
    """`declared` with every bare array made a `Param`."""
    if not isinstance(declared, Mapping):
        raise TypeError(
            explain(
                "Declared parameters must be a mapping.",
                expected="a mapping from names to Param (or to nested pytrees of them)",
                received=type(declared).__name__,
                where="declared",
            )
        )

    def declare(path: tuple, leaf: Any) -> Param | Latent:
        if isinstance(leaf, (Param, Latent)):
            return leaf
        if isinstance(leaf, (jax.Array, np.ndarray, np.generic, int, float, complex)):
            return Param(leaf)
        raise TypeError(
            explain(
                "A declaration was expected.",
                expected="a Param, an array, or a pytree of them",
                received=f"{leaf!r} ({type(leaf).__name__})",
                where=path_name(path),
                hint="wrap a lazy start as Param(init), init: key -> array",
            )
        )

    return jax.tree_util.tree_map_with_path(declare, dict(declared))


def is_dependent(constraint: constraints.Constraint) -> bool:
    """Whether the constraint stands for a set that is not known beforehand."""
    return isinstance(constraint, type(constraints.dependent))


def is_unbounded(constraint: constraints.Constraint) -> bool:
    """Whether the set holds every real array."""
    while (base := getattr(constraint, "base_constraint", None)) is not None:
        constraint = base
    return isinstance(constraint, type(constraints.real))


def bijector(constraint: constraints.Constraint, where: str) -> Transform:
    """NumPyro's bijector from unconstrained arrays onto the constraint's set.

    Raises:
        TypeError: `constraint` is no constraint object.
        ValueError: there is no bijector onto its set.
    """
    if not isinstance(constraint, constraints.Constraint):
        raise TypeError(
            explain(
                "A constraint was expected.",
                expected="an object of numpyro.distributions.constraints",
                received=f"{constraint!r} ({type(constraint).__name__})",
                where=where,
            )
        )
    if is_dependent(constraint):
        raise ValueError(
            explain(
                "A dependent support has no bijector of its own.",
                expected="a constraint whose bounds are known beforehand",
                received=constraint_name(constraint),
                where=where,
                hint="target.constrain(values, u, data) follows the model's supports",
            )
        )
    try:
        return biject_to(constraint)
    except NotImplementedError as error:
        discrete = getattr(constraint, "is_discrete", False)
        raise ValueError(
            explain(
                "The constraint has no bijector.",
                expected="a continuous constraint that numpyro.distributions.biject_to knows",
                received=constraint_name(constraint),
                where=where,
                hint="discrete values cannot be trained by gradients"
                if discrete
                else "use an equivalent set, or register a bijector with biject_to.register",
            )
        ) from error


def constraint_name(constraint: constraints.Constraint) -> str:
    """A constraint as text, its bounds and parts included: the same text in every process.

    Different sets, and different bijectors onto one set, have different texts; numpyro's `==` does
    not tell `positive` from `softplus_positive`.
    """
    parts = (_part_name(part) for _, part in sorted(vars(constraint).items()))
    return f"{type(constraint).__name__.removeprefix('_')}({', '.join(parts)})"


def _part_name(part: Any) -> str:
    if isinstance(part, constraints.Constraint):
        return constraint_name(part)
    if isinstance(part, (tuple, list)):
        return f"({', '.join(map(_part_name, part))})"
    if isinstance(part, Tracer):
        return f"traced{part.shape}"
    if not isinstance(part, (jax.Array, np.ndarray, np.generic, int, float)):
        return part if isinstance(part, str) else type(part).__name__
    bound = np.asarray(part)
    if bound.ndim == 0:
        short = f"{bound.item():g}"
        return short if float(short) == bound.item() else str(bound)
    if bound.size > 8:
        digest = hashlib.blake2s(bound.astype(np.float64).tobytes(), digest_size=4).hexdigest()
        return f"array{bound.shape}#{digest}"
    return " ".join(np.array2string(bound, floatmode="unique").split())
