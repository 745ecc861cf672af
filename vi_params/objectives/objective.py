"""What an objective is: a loss as a pure function of parameters, randomness and data."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vi_params._check import explain, require_key, require_names
from vi_params._tree import fold_in_name, leaves_by_path, strong
from vi_params.batches import Batch, shuffled
from vi_params.batches.batch import require_index, split
from vi_params.guide import Guide
from vi_params.params.declare import Declared
from vi_params.params.rows import rows_at
from vi_params.target import Target
from vi_params.target.fed import fed, require_fed
from vi_params.target.minibatch import unmarked


class Aux(NamedTuple):
    """What an evaluation of the loss tells besides.

    Attributes:
        elbo: the estimate of the evidence lower bound, in nats; a scalar.
    """

    elbo: jax.Array


class Measure(NamedTuple):
    """What a loss is the estimate of, for whoever reads it.

    Attributes:
        name: the field's name for it.
        sign: -1 where the loss is minus that quantity, 1 where it is the quantity itself.
        unit: its unit, or what it is counted in.
        tolerance: how large a difference does not matter, in that unit.
    """

    name: str
    sign: int
    unit: str = "nats"
    tolerance: float = 0.01

    def of(self, loss: Any) -> Any:
        """The quantity at a loss."""
        return self.sign * loss


ELBO = Measure("ELBO", -1)


class Sampled(NamedTuple):
    """The randomness of an evaluation that looks at a batch of rows.

    Attributes:
        noise: the guide's.
        index: plate -> rows.
    """

    noise: Any
    index: dict[str, jax.Array]


class Objective(NamedTuple):
    """A loss to minimise.

    Where the target has subsampled plates, an evaluation draws their rows along with its noise,
    one draw for target, guide and all particles. Handed a `vi.Batch` it looks at its rows instead.

    Attributes:
        declared: the parameters of target and guide together.
        loss: `(params, key, data=default, step=None) -> (loss, aux)`, pure; `evaluate` at
            `noise(key)`.
        data: the default data, handed through jit as an argument by the drivers.
        noise: `key -> noise`, all the randomness of one evaluation; `Sampled` where it draws rows.
        evaluate: `(params, noise, data, step=None) -> (loss, aux)`; the number of the step matters
            to a loss that follows a schedule, and None stands for the end of it.
        target: what is approximated; None where samples alone are compared.
        guide: by what; None where there is none.
        measure: what the loss estimates.
    """

    declared: Declared
    loss: Callable[..., tuple[jax.Array, Any]]
    data: Any
    noise: Callable[[jax.Array], Any]
    evaluate: Callable[..., tuple[jax.Array, Any]]
    target: Target | None
    guide: Guide | None
    measure: Measure = ELBO

    @property
    def plates(self) -> Mapping[str, int]:
        """Plate -> how many rows it has."""
        return {} if self.target is None else self.target.plates

    @property
    def sizes(self) -> Mapping[str, tuple[int, int]]:
        """What `Target.sizes` says of the subsampled plates."""
        return {} if self.target is None else self.target.sizes

    @property
    def fed(self) -> Mapping[str, tuple[int, int]]:
        """The same of the plates fed from outside whose rows parameters have."""
        return {} if self.target is None else fed(self.target, self.declared)


def objective(
    declared: Declared,
    data: Any,
    noise: Callable[[jax.Array], Any],
    evaluate: Callable[..., tuple[jax.Array, Any]],
    target: Target | None,
    guide: Guide | None,
    measure: Measure = ELBO,
    *,
    scheduled: bool = False,
) -> Objective:
    """An `Objective` whose parameters and data are checked whenever it is traced.

    Where it is `scheduled`, `evaluate` takes the number of the step as a fourth argument.
    """
    structure = jax.tree.structure(split(data)[0])
    sizes, plates = ({}, {}) if target is None else (target.sizes, target.plates)
    from_outside = {} if target is None else fed(target, declared)

    def draw(key: jax.Array) -> Any:
        if not sizes:
            return noise(key)
        index = shuffled().draw(fold_in_name(key, "batch"), jnp.int32(0), sizes)
        return Sampled(noise(fold_in_name(key, "noise")), index)

    def checked(params: Any, noise: Any, data: Any, step: Any = None) -> tuple[jax.Array, Any]:
        require_names(list(params), list(declared), what="params", where="objective")
        if sizes:
            data = data if isinstance(data, Batch) else Batch(data, noise.index)
            noise = noise.noise
        if structure.num_leaves:
            require_structure(structure, split(data)[0])
        require_fed(from_outside, data, "objective")
        at = (step,) if scheduled else ()
        if isinstance(data, Batch):
            require_index(data.index, plates, "objective")
            params = rows_at(declared, params, data)
            data = dataclasses.replace(data, taken=True)
            value, aux = evaluate(params, noise, data, *at)
            return jnp.where(_is_inside(data.index, plates), value, jnp.nan), aux
        return evaluate(params, noise, data, *at)

    def loss(
        params: Any, key: jax.Array, data_: Any = None, step: Any = None
    ) -> tuple[jax.Array, Any]:
        require_key(key, "objective.loss")
        return checked(params, draw(key), data if data_ is None else data_, step)

    return Objective(declared, loss, data, draw, checked, target, guide, measure)


def _is_inside(index: Mapping[str, jax.Array], sizes: Mapping[str, int]) -> jax.Array:
    """Whether all rows exist: under jit their values are not known when `require_index` looks."""
    inside = [jnp.all((rows >= 0) & (rows < sizes[plate])) for plate, rows in index.items()]
    return jnp.all(jnp.stack([jnp.bool_(True), *inside]))


def resolve(owner: Objective | Target, data: Any) -> Any:
    """The data to use: those given, as strongly typed arrays, or the owner's."""
    if data is None:
        return owner.data
    if isinstance(data, Batch):
        require_index(data.index, owner.plates, "data")
        index = {plate: jnp.asarray(rows) for plate, rows in data.index.items()}
        return Batch(resolve(owner, data.data), index)
    data = unmarked(data, owner.plates, owner.sizes)
    require_structure(jax.tree.structure(split(owner.data)[0]), data)
    return jax.tree.map(strong, data)


def require_structure(structure: Any, data: Any) -> None:
    """Raises unless the data have the structure that the objective was built with."""
    if jax.tree.structure(data) == structure:
        return
    expected = structure.unflatten(range(structure.num_leaves))
    if isinstance(expected, Mapping) and isinstance(data, Mapping):
        require_names(
            list(leaves_by_path(data)), list(leaves_by_path(expected)), what="data", where="data"
        )
    hint = "pass data of the structure of objective.data, or build a new objective"
    if isinstance(expected, Mapping) and not isinstance(data, Mapping):
        names = ", ".join(f"{name!r}: ..." for name in expected)
        hint = f"name what a loader yields: {{{names}}}, as in objective.data"
    if not structure.num_leaves:
        hint = "it was built without data: build it with some, so that its log density sees them"
    raise ValueError(
        explain(
            "The structure of the data has changed.",
            expected=str(structure),
            received=str(jax.tree.structure(data)),
            where="data",
            hint=hint,
        )
    )
