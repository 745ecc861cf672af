"""Plates that are fed from outside, and the numbers of the rows that a batch of them holds.

The model of such a plate sees one batch and cannot tell which of the rows it is. Nothing has to,
unless parameters have the plate's rows: then every batch is a `vi.Batch` that says so.
"""

from collections.abc import Mapping
from typing import Any

from vi_params._check import explain
from vi_params.batches.batch import split
from vi_params.params.rows import plates_of
from vi_params.target.core import Target


def fed(target: Target, declared: Any) -> dict[str, tuple[int, int]]:
    """Plate -> (size, batch size), of the plates fed from outside whose rows parameters have."""
    if not target.streamed:
        return {}
    used = {plate for plates, _ in plates_of(declared).values() for plate in plates}
    return {n: (target.plates[n], b) for n, b in target.streamed.items() if n in used}


def require_fed(fed: Mapping[str, Any], data: Any, where: str) -> None:
    """Raises where data do not say which rows they hold although parameters have such rows."""
    missing = [plate for plate in fed if plate not in split(data)[1]]
    if missing:
        raise ValueError(
            explain(
                "Parameters have rows, but the data do not say which rows they hold.",
                expected=f"vi.Batch(rows, {{{missing[0]!r}: their numbers}})",
                received=type(data).__name__,
                where=f"{where}, plate {missing[0]!r}",
                hint="for all rows at once vi.Batch(everything, {...: jnp.arange(N)}); or compute "
                "what is local from the batch (an encoder, q(values, data))",
            )
        )
