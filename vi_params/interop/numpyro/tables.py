"""A NumPyro program with its discrete latents enumerated, as log tables.

Run under numpyro's `enum` handler (the extra `enumerate` brings funsor, which it builds on), a
discrete latent takes all its values at once, along an axis of its own to the left of all plates;
whatever depends on it broadcasts. The log probability of a site is then a table over the discrete
latents it depends on.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpyro import handlers
from numpyro.contrib.control_flow.scan import scan_wrapper
from numpyro.primitives import Messenger

from vi_params._check import explain
from vi_params.interop.numpyro.contraction import Factor, Graph, root
from vi_params.interop.numpyro.discover import LOCK, trace
from vi_params.interop.numpyro.discrete import Discrete, import_funsor
from vi_params.target import EMPTY

TIME = "_time_"
"""What numpyro's scan puts before the name of a time axis."""


def graph_of(
    program: Callable,
    call: Sequence[Any],
    latents: Mapping[str, jax.Array],
    discrete: Mapping[str, Discrete],
    nesting: int,
    probes: Mapping[str, jax.Array] = EMPTY,
) -> tuple[Graph, dict[str, jax.Array]]:
    """The tables of a program at given continuous latents.

    Args:
        program: a NumPyro program, its parameters and the indices of its plates already fixed.
        call: its arguments, the positional ones and the keyword ones.
        latents: its continuous latents.
        discrete: its discrete latents.
        nesting: how many axes its plates and batches take up.
        probes: name -> a scalar that the values of a discrete latent are made to depend on, for
            whoever wants to see what depends on them.

    Returns:
        The tables of the sites that depend on discrete latents, and the log densities of the others
        by site, scaled by their plates.

    Raises:
        ValueError: a site outside a plate depends on a discrete latent inside it, or a scan that
            runs backwards holds a discrete latent.
    """
    funsor = import_funsor()
    first = -1 - nesting
    marked = _Sites(program, latents, discrete, probes)
    with LOCK, _explained(), funsor.plate_to_enum_plate():
        enumerated = funsor.enum(marked, first_available_dim=first)
        sites = trace(enumerated, *call, recorder=lambda program: _Recorder(program, first))
    powers: dict[str, float] = {}
    for site in sites.values():
        scales = site.get("plate_to_scale", {})
        powers.update({f.name: scales.get(f.name, 1.0) for f in site["cond_indep_stack"]})
    every = [_factor(site, discrete, powers) for site in sites.values()]
    times = tuple(dict.fromkeys(n for f in every for n in f.names if n.startswith(TIME)))
    rows = {*powers, *times}
    scopes = {
        factor.sites[0]: frozenset(factor.names) & rows
        for factor in every
        if root(factor.sites[0]) in discrete
    }
    factors, terms = [], {}
    for factor in every:
        variables = [name for name in factor.names if name in scopes]
        _require_their_plates(factor, variables, scopes)
        if variables:
            factors.append(factor)
        else:
            name = root(factor.sites[0])
            power = math.prod(powers[plate] for plate in factor.names if plate in powers)
            terms[name] = terms.get(name, 0.0) + power * jnp.sum(factor.table)
    return Graph(factors, scopes, powers, times), terms


class _Sites(Messenger):
    """Fixes the continuous latents of a program and has its discrete ones enumerated.

    A discrete latent is enumerated as 0, ..., K - 1, which the program sees as its values.
    numpyro's own substitution takes a continuous latent of a scan for the whole series of another
    where a discrete one gives its distribution more axes; here each step takes its own row.
    """

    def __init__(
        self,
        fn: Callable,
        latents: Mapping[str, jax.Array],
        discrete: Mapping[str, Discrete],
        probes: Mapping[str, jax.Array],
        step: Any = None,
        reverse: bool = False,
    ) -> None:
        self.latents, self.discrete, self.step, self.reverse = latents, discrete, step, reverse
        self.probes = probes
        super().__init__(fn)

    def process_message(self, msg: Any) -> None:
        if msg["type"] == "control_flow":
            if msg["fn"] is not scan_wrapper:
                raise ValueError(
                    explain(
                        "Only numpyro's scan can be used where discrete latents are summed out.",
                        expected="numpyro.contrib.control_flow.scan",
                        received=getattr(msg["fn"], "__name__", repr(msg["fn"])),
                        where="vi.from_numpyro(enumerate=True)",
                        hint="write the branches with jnp.where",
                    )
                )
            msg["args"] = self._with_steps(*msg["args"])
        elif msg["type"] == "sample" and not msg["is_observed"] and msg["value"] is None:
            name = msg["name"]
            if name in self.latents:
                value = self.latents[name]
                msg["value"] = value if self.step is None else value[self.step]
            elif name in self.discrete:
                if self.reverse:
                    raise ValueError(
                        explain(
                            "Discrete latents of a scan that runs backwards cannot be summed out.",
                            expected="scan(..., reverse=False)",
                            received="reverse=True",
                            where=repr(name),
                            hint="reverse the inputs with jnp.flip",
                        )
                    )
                msg["infer"] = {**msg["infer"], "enumerate": "parallel"}

    def postprocess_message(self, msg: Any) -> None:
        # The recorder is further out: it has taken the index down by now.
        if msg["type"] == "sample" and not msg["is_observed"]:
            msg["value"] = value = _value(msg, self.discrete)
            if msg["name"] in self.probes:
                msg["value"] = jnp.where(self.probes[msg["name"]], value, value)

    def _with_steps(
        self, fn: Callable, init: Any, xs: Any, length: int | None, reverse: bool
    ) -> tuple:
        """The arguments of a scan whose body knows which step it makes."""
        if length is None:
            length = np.shape(jax.tree.leaves(xs)[0])[0]

        def one(carry: Any, given: tuple[Any, Any]) -> Any:
            step, x = given
            return _Sites(fn, self.latents, self.discrete, EMPTY, step, reverse)(carry, x)

        return one, init, (jnp.arange(length), xs), length, reverse


class _Recorder(handlers.trace):
    """Records the sample sites, and the names of the axes of their log probabilities."""

    def __init__(self, fn: Callable, first: int) -> None:
        self.first = first
        super().__init__(fn)

    def postprocess_message(self, msg: Any) -> None:
        if msg["type"] != "sample":
            return
        fn, value = msg["fn"], msg["value"]
        value_shape = jnp.shape(value)[: jnp.ndim(value) - fn.event_dim]
        shape = lax.broadcast_shapes(tuple(fn.batch_shape), value_shape)
        plates = {frame.dim: frame.name for frame in msg["cond_indep_stack"]}
        axes = {}
        for dim in range(-len(shape), 0):
            name = plates.get(dim) or (shape[dim] > 1 and _axis_name(dim))
            # What lies to the right of `first` and is no plate is a batch that nobody declared.
            if name and (dim in plates or dim <= self.first or name.startswith(TIME)):
                axes[dim] = name
        self.trace[msg["name"]] = {**msg, "axes": axes}


def _axis_name(dim: int) -> str | None:
    """The name of an axis where numpyro's enumeration has given it one."""
    from numpyro.contrib.funsor.enum_messenger import _DIM_STACK as stack

    here = stack.current_frame
    frames = (here, *here.parents, *here.iter_parents, stack.global_frame)
    return next((frame.dim_to_name[dim] for frame in frames if dim in frame.dim_to_name), None)


def _value(site: Mapping[str, Any], discrete: Mapping[str, Discrete]) -> Any:
    """A site's value, an enumerated index turned into what it stands for."""
    found = discrete.get(root(site["name"]))
    if found is None or np.array_equal(found.values, np.arange(len(found.values))):
        return site["value"]
    return jnp.asarray(found.values, found.dtype)[site["value"]]


def _factor(
    site: Mapping[str, Any], discrete: Mapping[str, Discrete], powers: Mapping[str, float]
) -> Factor:
    """The log probability of a site as a table over named axes, batches nobody named summed up."""
    fn, axes, name = site["fn"], site["axes"], site["name"]
    value = site["value"] if site["is_observed"] else _value(site, discrete)
    middle = site["intermediates"]
    table = fn.log_prob(value, middle) if middle else fn.log_prob(value)
    if site["scale"] is not None:
        plates = math.prod(powers[frame.name] for frame in site["cond_indep_stack"])
        table = site["scale"] / plates * table
    ndim = max([jnp.ndim(table), *(-dim for dim in axes)])
    table = jnp.reshape(table, (1,) * (ndim - jnp.ndim(table)) + jnp.shape(table))
    shape = list(table.shape)
    for frame in site["cond_indep_stack"]:
        shape[frame.dim] = frame.size
    table = jnp.broadcast_to(table, shape)
    table = jnp.sum(table, tuple(i for i in range(ndim) if i - ndim not in axes))
    names = tuple(axes[dim] for dim in sorted(axes))
    if not site["is_observed"] and root(name) in discrete and name in names:
        # A mask takes a site away by log probability zero, which no value of a distribution over
        # two or more has at all of them; made equally likely instead, it adds nothing to the sum.
        axis = names.index(name)
        absent = jnp.all(table == 0, axis, keepdims=True)
        table = jnp.where(absent, -math.log(table.shape[axis]), table)
    return Factor(table, names, (name,))


def _require_their_plates(
    factor: Factor, variables: list[str], scopes: Mapping[str, frozenset[str]]
) -> None:
    """Raises where a site depends on a discrete latent but is not in all of its plates."""
    for name in variables:
        outside = scopes[name] - set(factor.names)
        if outside:
            shown = sorted(
                f"scan of {n[len(TIME) :]!r}" if n.startswith(TIME) else f"plate {n!r}"
                for n in outside
            )
            raise ValueError(
                explain(
                    "A site depends on a discrete latent inside a plate or scan, from outside.",
                    expected=f"site {root(factor.sites[0])!r} inside {', '.join(shown)}",
                    received="outside of it",
                    where=f"site {root(factor.sites[0])!r}, discrete latent {root(name)!r}",
                    hint="move the site into the plate; sums over rows of discrete latents cannot "
                    "be taken apart row by row",
                )
            )


@contextmanager
def _explained() -> Iterator[None]:
    """Errors of a program that is run under enumeration say what its discrete latents look like."""
    try:
        yield
    except (TypeError, ValueError, IndexError) as error:
        error.add_note(
            "(This was raised while discrete latents were summed out. Inside the program such a "
            "latent then holds all its values at once, along a new axis to the left of all plates: "
            "index with it, mean[z], and broadcast; do not reshape it or reduce over its axes. "
            "Axes that are neither plates nor events need numpyro.plate or to_event.)"
        )
        raise
