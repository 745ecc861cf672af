"""Sums over all values of discrete variables, exactly, in plates and along time.

A model with finite discrete variables k is a product of tables, here held as logarithms:
p(x, z) = sum_k prod_f exp(table_f[k_f]), where k_f are the variables that table f depends on.

Variables are summed out one at a time, always the one whose tables make the smallest product. What
is in a plate is summed out inside it, all rows at once, and only then multiplied over the rows:
work grows with the number of rows, never with K ** rows. A chain along time is summed out from its
end, beta_t = sum over the state after t, so that T steps of K states cost T K^2.

What "sum" means is an argument. With log-sum-exp the result is the log density. With a maximum its
gradient with respect to a table is the indicator of the best assignment (Viterbi); with a
log-sum-exp whose gradient is the indicator of a draw instead of the softmax, it is the indicator of
an exact draw of all variables jointly (backward sampling).

Source: Obermeyer et al. (2019), Tensor Variable Elimination for Plated Factor Graphs, algorithm 1.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vi_params._check import explain
from vi_params._tree import fold_in_words

LAG = "_PREV_"
"""What numpyro's scan puts before the name of a variable for each step back in time."""

Sum = Callable[[jax.Array, int, tuple], jax.Array]
"""`(table, axis, words) -> table` without that axis; `words` differ between all calls of a pass."""


class Factor(NamedTuple):
    """A table of log values.

    Attributes:
        table: one axis for each name.
        names: the variables, plates and time that index the axes.
        sites: the sites of the model that went into it.
    """

    table: jax.Array
    names: tuple[str, ...]
    sites: tuple[str, ...]


class Graph(NamedTuple):
    """The tables of a model.

    Attributes:
        factors: the tables.
        scopes: variable -> the plates (and the time) that its site is in.
        plates: plate -> the power its rows are raised to, N / B where it is subsampled.
        times: the names of time axes.
    """

    factors: list[Factor]
    scopes: Mapping[str, frozenset[str]]
    plates: Mapping[str, float]
    times: tuple[str, ...]


def root(name: str) -> str:
    """The name of a variable without its lags."""
    return name[lag(name) * len(LAG) :]


def lag(name: str) -> int:
    """How many steps back in time a name points."""
    return 1 + lag(name[len(LAG) :]) if name.startswith(LAG) else 0


def log_sum_exp(table: jax.Array, axis: int, words: tuple) -> jax.Array:
    """log sum exp; -inf, with gradient zero instead of NaN, where every entry is -inf."""
    empty = jnp.max(lax.stop_gradient(table), axis) == -jnp.inf
    safe = jnp.where(jnp.expand_dims(empty, axis), 0.0, table)
    return jnp.where(empty, -jnp.inf, jax.nn.logsumexp(safe, axis))


def maximum(table: jax.Array, axis: int, words: tuple) -> jax.Array:
    """The maximum; its gradient is the indicator of the first entry that attains it."""
    return _value_with_gradient_of(jnp.max(table, axis), table, jnp.argmax(table, axis), axis)


def sampling(key: jax.Array) -> Sum:
    """log sum exp, whose gradient is the indicator of an entry drawn in proportion to exp."""

    def sum_and_draw(table: jax.Array, axis: int, words: tuple) -> jax.Array:
        gumbel = jax.random.gumbel(fold_in_words(key, words), table.shape, table.dtype)
        drawn = jnp.argmax(table + gumbel, axis)
        return _value_with_gradient_of(log_sum_exp(table, axis, words), table, drawn, axis)

    return sum_and_draw


def contract(graph: Graph, sum_op: Sum = log_sum_exp) -> list[Factor]:
    """The tables summed over all variables and multiplied over all plates and times.

    Args:
        graph: the tables.
        sum_op: what takes the place of the sum, in log space.

    Returns:
        One scalar for each part of the model that is connected through its variables.

    Raises:
        ValueError: the sum cannot be done plate by plate.
    """
    count = itertools.count()

    def sum_out(table: jax.Array, axis: int, *words: Any) -> jax.Array:
        return sum_op(table, axis, (next(count), *words))

    plates = dict(graph.plates)
    factors = graph.factors
    for time in graph.times:
        inside = [factor for factor in factors if time in factor.names]
        if any(lag(name) and _moves(root(name), time, graph) for name in _names(inside)):
            outside = [factor for factor in factors if time not in factor.names]
            factors = outside + _without_time(inside, time, graph, sum_out)
        else:
            plates[time] = 1.0
    variables = _names(factors) & set(graph.scopes)
    return sum_product(factors, variables, plates, graph.scopes, sum_out)


def sum_product(
    factors: Iterable[Factor],
    variables: Collection[str],
    plates: Mapping[str, float],
    scopes: Mapping[str, frozenset[str]],
    sum_out: Callable[..., jax.Array],
) -> list[Factor]:
    """The factors with `variables` summed out and `plates` multiplied out; other axes stay."""
    rows = frozenset(plates)
    waiting: dict[frozenset[str], list[Factor]] = defaultdict(list)
    for factor in factors:
        waiting[rows.intersection(factor.names)].append(factor)
    results = []
    while waiting:
        scope = max(waiting, key=len)
        local = [name for name in variables if scopes[name] & rows == scope]
        for group in connected(waiting.pop(scope), local):
            factor = _eliminate(group, [name for name in local if name in _names(group)], sum_out)
            rest = [name for name in factor.names if name in scopes]
            outer = frozenset().union(*(scopes[name] & rows for name in rest))
            open_ = [name for name in rest if name in variables]
            if outer == scope if open_ else outer:
                raise ValueError(_intractable(rest, scopes))
            factor = _over_plates(factor, scope - outer, plates)
            if open_:
                waiting[outer].append(factor)
            else:
                results.append(factor)
    return results


def connected(
    factors: Iterable[Factor], names: Collection[str], alike: Callable[[str], str] = str
) -> list[list[Factor]]:
    """The factors in groups that have none of `names` in common, names being equal if `alike`."""
    groups: list[tuple[set[str], list[Factor]]] = []
    for factor in factors:
        shared = {alike(name) for name in factor.names if name in names}
        touching = [group for group in groups if group[0] & shared]
        groups = [group for group in groups if not group[0] & shared]
        members = [member for _, group in touching for member in group]
        groups.append((shared.union(*(seen for seen, _ in touching)), [*members, factor]))
    return [group for _, group in groups]


def product(factors: Sequence[Factor]) -> Factor:
    """The product of factors: the sum of their log tables over the union of their axes."""
    names = tuple(dict.fromkeys(name for factor in factors for name in factor.names))
    sites = tuple(dict.fromkeys(site for factor in factors for site in factor.sites))
    return Factor(reduce(jnp.add, (_aligned(factor, names) for factor in factors)), names, sites)


def _without_time(
    inside: list[Factor], time: str, graph: Graph, sum_out: Callable[..., jax.Array]
) -> list[Factor]:
    """The factors of a chain, as factors of the state before its first step."""
    moving = {name for name in _names(inside) & set(graph.scopes) if _moves(name, time, graph)}
    lagged = {name for name in _names(inside) if lag(name) and _moves(root(name), time, graph)}
    states = {root(name) for name in lagged}
    kept = frozenset().union(*(graph.scopes[name] for name in states))
    plates = {name: graph.plates[name] for name in _names(inside) & graph.plates.keys() - kept}
    steps = sum_product(inside, moving - states, plates, graph.scopes, sum_out)
    factors = []
    for group in connected(steps, states | lagged, root):
        step = product(group)
        mine = sorted({root(name) for name in step.names if name in states | lagged})
        if len({graph.scopes[name] for name in mine}) > 1:
            raise ValueError(_intractable(mine, graph.scopes))
        factors.append(
            _backward(step, time, mine, sum_out) if mine else _over_plates(step, [time], {})
        )
    return factors


def _backward(step: Factor, time: str, states: list[str], sum_out: Callable[..., Any]) -> Factor:
    """beta(before) = sum_now step_t(before, now) beta(now), from the last step to the first."""
    depth = {s: max(lag(name) for name in step.names if root(name) == s) for s in states}
    before = [LAG * back + s for s in states for back in range(depth[s], 0, -1)]
    shifted = [name[len(LAG) :] for name in before]  # what is before t + 1, as seen from t
    others = [name for name in step.names if name not in {time, *states, *before}]
    sizes = dict(zip(step.names, step.table.shape, strict=True))
    for state in states:
        known = [sizes[name] for name in sizes if root(name) == state]
        sizes.update({name: known[0] for name in [*before, state] if root(name) == state})
    inner = [*before, *states, *others]
    shape = tuple(sizes[name] for name in [*before, *others])

    def one(beta: jax.Array, given: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        table, t = given
        after = Factor(beta, (*shifted, *others), ())
        now = product([Factor(table, tuple(inner), ()), after])
        table, names = now.table, list(now.names)
        for state in states:
            table = sum_out(table, names.index(state), t)
            names.remove(state)
        aligned = _aligned(Factor(table, tuple(names), ()), (*before, *others))
        return jnp.broadcast_to(aligned, shape), None

    tables = _aligned(step, (time, *inner))
    start = jnp.zeros(shape, tables.dtype)
    beta, _ = lax.scan(one, start, (tables, jnp.arange(len(tables))), reverse=True)
    return Factor(beta, (*before, *others), step.sites)


def _eliminate(
    factors: list[Factor], variables: list[str], sum_out: Callable[..., jax.Array]
) -> Factor:
    """The product of factors with variables summed out, the cheapest first."""
    left = list(variables)

    def cost(variable: str) -> int:
        touching = [factor for factor in factors if variable in factor.names]
        sizes = {n: s for f in touching for n, s in zip(f.names, f.table.shape, strict=True)}
        return int(np.prod(list(sizes.values()), dtype=object))

    while left:
        variable = min(left, key=cost)
        left.remove(variable)
        joint = product([factor for factor in factors if variable in factor.names])
        factors = [factor for factor in factors if variable not in factor.names]
        axis = joint.names.index(variable)
        names = joint.names[:axis] + joint.names[axis + 1 :]
        factors = [*factors, Factor(sum_out(joint.table, axis), names, joint.sites)]
    return product(factors)


def _over_plates(factor: Factor, names: Collection[str], powers: Mapping[str, float]) -> Factor:
    """The factor multiplied over the rows of plates, each row raised to the plate's power."""
    axes = tuple(factor.names.index(name) for name in names)
    power = reduce(lambda x, name: x * powers.get(name, 1.0), names, 1.0)
    rest = tuple(name for name in factor.names if name not in names)
    return Factor(power * jnp.sum(factor.table, axes), rest, factor.sites)


def _moves(name: str, time: str, graph: Graph) -> bool:
    return time in graph.scopes.get(name, ())


def _names(factors: Iterable[Factor]) -> set[str]:
    return {name for factor in factors for name in factor.names}


def _aligned(factor: Factor, names: Sequence[str]) -> jax.Array:
    """The table with one axis for each of `names`, of length 1 where it has no such name."""
    order = [factor.names.index(name) for name in names if name in factor.names]
    axes = [i for i, name in enumerate(names) if name not in factor.names]
    return jnp.expand_dims(jnp.transpose(factor.table, order), axes)


def _value_with_gradient_of(
    value: jax.Array, table: jax.Array, index: jax.Array, axis: int
) -> jax.Array:
    """`value`, with the gradient of the entries of `table` at `index`."""
    finite = jnp.where(jnp.isfinite(table), table, 0.0)
    chosen = jnp.take_along_axis(finite, jnp.expand_dims(index, axis), axis).squeeze(axis)
    return lax.stop_gradient(value) + (chosen - lax.stop_gradient(chosen))


def _intractable(names: Iterable[str], scopes: Mapping[str, frozenset[str]]) -> str:
    return explain(
        "The discrete latents of different plates depend on each other.",
        expected="a sum that can be done row by row in each plate",
        received=", ".join(f"{name!r} in {sorted(scopes[name]) or 'no plate'}" for name in names),
        where="vi.from_numpyro(enumerate=True)",
        hint="draw them in the same plates, or without a plate if there are few",
    )
