"""The discrete latents of a NumPyro program: which of them can be summed out, and their values."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vi_params._check import explain


class Discrete(NamedTuple):
    """A finite discrete latent.

    Attributes:
        values: its values, shape (K,).
        shape: the shape of one draw.
        dtype: the dtype of a draw.
    """

    values: np.ndarray
    shape: tuple[int, ...]
    dtype: Any


def finite(name: str, site: Mapping[str, Any]) -> Discrete:
    """A discrete latent's values, from its site in an ordinary trace.

    Raises:
        ValueError: the values are not finitely many known numbers, or the site has a batch axis
            that is no plate.
    """
    fn, shape = site["fn"], np.shape(site["value"])
    received = f"{_family(fn)} at site {name!r}"
    if not fn.has_enumerate_support:
        raise ValueError(
            explain(
                "A discrete latent cannot be summed out: it has no finite support.",
                expected="Bernoulli, Categorical, DiscreteUniform, Binomial, BetaBinomial",
                received=received,
                where=repr(name),
                hint="truncate it: a Categorical over 0, ..., K - 1 with the same probabilities",
            )
        )
    if fn.event_dim:
        raise ValueError(
            explain(
                "A discrete latent that is summed out must be a scalar in each row of its plates.",
                expected="event shape ()",
                received=f"{received}, event shape {fn.event_shape}",
                where=repr(name),
                hint="write numpyro.plate instead of to_event",
            )
        )
    undeclared = _undeclared(site, shape)
    if undeclared:
        raise ValueError(
            explain(
                "A discrete latent has a batch axis that is no plate.",
                expected=f"numpyro.plate around the site for axes {undeclared}",
                received=f"{received}, shape {shape}",
                where=repr(name),
                hint="declare the rows independent with numpyro.plate, then they are summed out "
                "one by one",
            )
        )
    try:
        with jax.ensure_compile_time_eval():
            values = np.ravel(np.asarray(fn.enumerate_support(expand=False)))
    except Exception as error:
        raise ValueError(
            explain(
                "The values of a discrete latent are not known when the program is traced.",
                expected="the same bounds in all rows, Python ints where they are numbers",
                received=f"{received}: {str(error).splitlines()[0]}",
                where=repr(name),
                hint="use a Categorical over all values any row may take",
            )
        ) from error
    return Discrete(values, shape, jnp.asarray(site["value"]).dtype)


def import_funsor() -> Any:
    """numpyro's enumeration, or an error that names the extra to install."""
    try:
        from numpyro.contrib import funsor
    except ImportError as error:
        raise ImportError(
            explain(
                "Summing out discrete latents needs funsor.",
                expected="the extra `enumerate`",
                received=str(error).splitlines()[0],
                where="vi.from_numpyro(enumerate=True)",
                hint="pip install 'vi_params[enumerate]'",
            )
        ) from error
    return funsor


def _undeclared(site: Mapping[str, Any], shape: tuple[int, ...]) -> list[int]:
    """The axes of a site's batch that are neither plates nor the time of a scan."""
    plates = {frame.dim for frame in site["cond_indep_stack"]}
    dims = [dim for dim in range(-len(shape), 0) if shape[dim] > 1 and dim not in plates]
    return dims[1:] if "_scan_current_index" in site["infer"] else dims


def _family(fn: Any) -> str:
    while (base := getattr(fn, "base_dist", None)) is not None:
        fn = base
    return type(fn).__name__
