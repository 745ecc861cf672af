"""What `vi.approximate` hands back."""

import dataclasses
import math
from concurrent.futures import Executor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vi_params._arrays import on_host
from vi_params._cache import program
from vi_params._check import require_count, require_key
from vi_params._compile import Quick
from vi_params._over import over
from vi_params._table import Table
from vi_params._tree import fold_in_name, pick
from vi_params.approximation.judge import Judge, generator, joined
from vi_params.approximation.moments import Moments, moments_of, parts_of
from vi_params.diagnostics import Diagnosis
from vi_params.guide import Guide
from vi_params.importance import Weighted
from vi_params.params import constrain
from vi_params.target import Target, flat, split_vector

BLOCK = 500
"""For how many draws deterministic sites are computed at once."""

STARTS = 1000
"""From how many draws `nuts_start` estimates the mass matrix."""

NEARLY_ALL = 0.75
"""The share of effective draws above which a batch is resampled to its full size."""

FRESH = 2 / 3
"""How many draws are taken for each effective one, at most: more would often be the same."""

MOST_BATCHES = 25
"""How many batches one call of `draws` makes at most so that none is taken twice, and how many
further ones one of `moments`."""


class NutsStart(NamedTuple):
    """Where NUTS starts well, in unconstrained coordinates.

    Attributes:
        position: one start a chain in the coordinates of `vi.flat(target)`, shape (num_chains,
            dim): what samplers over a vector take.
        unconstrained: the same by name, leading axis the chains: numpyro's `init_params`.
        inverse_mass_matrix: the covariance of the draws in those coordinates, shape (dim, dim).
    """

    position: jax.Array
    unconstrained: dict[str, jax.Array]
    inverse_mass_matrix: jax.Array


@dataclasses.dataclass(frozen=True)
class Approximation:
    """An approximation of a posterior, and whether to trust it.

    Attributes:
        guide: the family, of `coordinates`.
        params: its parameters and the model's own, unconstrained.
        diagnosis: the `Diagnosis` of the guide.
        trustworthy: whether `draws` can be used as draws of the posterior, its moments included.
        resampled: whether `draws` resamples the guide's draws by their importance weights.
        verdict: the judgement in words.
        table: what was tried, one row an approximation, a star at the one that was taken. A
            conditional Gaussian may look better and not be taken: see `vi.approximate`.
        target: what was approximated.
        coordinates: the same over the unconstrained vector that the guide is a density of, a
            hierarchy in partially centred coordinates (`vi.recentred`): the target that belongs to
            `guide` and `params` in calls of `vi.diagnose`, `vi.draws` and others.
        data: the data it was approximated for.
        judge: `key -> (weighted draws, diagnosis)`, a batch of the guide's draws.
        batches: the weighted draws that it was judged by, without their positions; of a mixture the
            first batch was the best of several rounds.
        sorted_by: the latent, and the column of its values, that `draws` is stratified by as it
            resamples; None where it does not.
    """

    guide: Guide
    params: Any
    diagnosis: Diagnosis
    trustworthy: bool
    resampled: bool
    verdict: str
    table: Table
    target: Target
    coordinates: Target
    data: Any
    judge: Judge
    batches: tuple[Weighted, ...]
    sorted_by: tuple[str, int] | None = None

    def draws(self, key: jax.Array, num_draws: int) -> dict[str, jax.Array]:
        """Draws of the posterior: the guide's, importance-resampled where `resampled` says so.

        Resampling is stratified by the latent with the heaviest tail (`sorted_by`): its moments are
        nearer to the posterior's than those of independent draws.

        Args:
            key: a typed random key.
            num_draws: how many.

        Returns:
            name -> array with leading axis `num_draws`: the constrained latents, then the target's
            deterministic sites.

        Raises:
            ValueError: num_draws < 1.
            TypeError: `key` is not a typed key.
        """
        require_key(key, "Approximation.draws")
        require_count(num_draws, "num_draws", "Approximation.draws")
        latents, _ = self._choose(key, num_draws)
        return jax.device_put(self._with_deterministic(latents))

    def moments(self, key: jax.Array, num_effective: int = 4000) -> Moments:
        """Means and standard deviations of the posterior, at once: those of the weighted draws that
        it was judged by. Only where fewer than `num_effective` of them are effective, further ones
        are made.

        Where `resampled` says so they have their Pareto-smoothed importance weights, else none, as
        `draws` has it.

        Args:
            key: a typed random key, of further draws.
            num_effective: how many effective draws are enough, counted by batches; at most 25 more
                are made. `Moments.num_effective` says of how many all together are worth.

        Returns:
            The `Moments` of the constrained latents and the target's deterministic sites; NaN where
            the log density was infinite at a draw.

        Raises:
            ValueError: num_effective < 1.
            TypeError: `key` is not a typed key.
        """
        require_key(key, "Approximation.moments")
        require_count(num_effective, "num_effective", "Approximation.moments")
        with on_host():
            batches = self._enough(key, num_effective)
            complete, weighted = self._with_deterministic, self.resampled
            return moments_of(parts_of(batches, complete, are_weighted=weighted))

    def nuts_start(self, key: jax.Array, num_chains: int = 4) -> NutsStart:
        """Starting points and an inverse mass matrix for NUTS.

        With NumPyro, for all latents by name in the order of `start.unconstrained`:

            names = tuple(start.unconstrained)
            kernel = NUTS(model, dense_mass=[names],
                          inverse_mass_matrix={names: start.inverse_mass_matrix})
            MCMC(kernel, ..., num_chains=4).run(key, *args, init_params=start.unconstrained)

        Args:
            key: a typed random key.
            num_chains: how many starting points, distinct draws.

        Returns:
            A `NutsStart`.

        Raises:
            ValueError: num_chains < 1.
            TypeError: `key` is not a typed key.
        """
        require_key(key, "Approximation.nuts_start")
        require_count(num_chains, "num_chains", "Approximation.nuts_start")
        latents, position = self._choose(key, max(STARTS, num_chains))
        if self.coordinates is not self.target:
            own = pick(self.params, self.target.declared)
            position = program(_positions, self.target)(own, latents, self.data)
        centred = position - position.mean(0)
        covariance = centred.T @ centred / len(position)
        # Few distinct draws can lie in a plane: a little of the diagonal keeps the matrix regular.
        spread = jnp.diag(jnp.diagonal(covariance))
        covariance = 0.99 * covariance + 0.01 * spread
        distinct = np.unique(np.asarray(position), axis=0, return_index=True)[1]
        order = np.resize(np.sort(distinct), num_chains)
        start = position[order]
        named = jax.vmap(lambda u: split_vector(self.target, u))(start)
        return NutsStart(start, named, covariance)

    def _with_deterministic(self, latents: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Latents, and the target's deterministic sites."""
        compute, own = program(_deterministic, self.target), pick(self.params, self.target.declared)
        num_draws, parts = len(next(iter(latents.values()))), []
        for begin in range(0, num_draws, BLOCK):
            # Blocks of one size: every number of draws would compile a program of its own.
            rows = np.minimum(np.arange(begin, begin + BLOCK), num_draws - 1)
            block = {name: values[rows] for name, values in latents.items()}
            parts.append(jax.device_get(compute(own, block, self.data)))
            if not parts[0]:
                break
        return {**latents, **joined(parts, num_draws)}

    def _enough(self, key: jax.Array, num_effective: int) -> list[Weighted]:
        """The batches by which it was judged, and further ones until enough draws are effective."""
        batches, block = list(self.batches), self.judge.block
        key = fold_in_name(key, "moments")  # it was judged by keys that are folded alike
        for i in range(MOST_BATCHES):
            number = sum(len(one.log_ratios) for one in batches)
            effective = number
            if self.resampled:
                effective = sum(float(np.nan_to_num(one.smoothed.ess)) for one in batches)
            if effective >= num_effective:
                break
            wanted = (num_effective - effective) * number / max(effective, 1)
            size = min(self.judge.num_draws, block * math.ceil(wanted / block))
            batches.append(self.judge(jax.random.fold_in(key, i), size)[0])
        return batches

    def _choose(self, key: jax.Array, num_draws: int) -> tuple[dict[str, np.ndarray], jax.Array]:
        """Latents, on the host, and unconstrained vectors of `num_draws` draws."""
        size, block = self.judge.num_draws, self.judge.block
        # So many proposals that a draw is seldom taken twice; no more where nearly all count.
        share = float(self.diagnosis.ess) / int(self.diagnosis.num_draws) if self.resampled else 1.0
        fresh = 1.0 if share > NEARLY_ALL else FRESH * share
        batches = min(MOST_BATCHES, math.ceil(num_draws / max(1.0, fresh * size)))
        batches = max(batches, math.ceil(num_draws / size))
        size = min(size, block * math.ceil(num_draws / (fresh * batches * block)))
        each = math.ceil(num_draws / batches)
        parts = []
        with on_host():
            for i in range(batches):
                propose, choose = (jax.random.fold_in(key, 2 * i + j) for j in range(2))
                weighted, _ = self.judge(propose, size)
                if self.resampled:
                    index = resampled(
                        choose, weighted.smoothed.log_weights, each, self._sorting(weighted)
                    )
                else:  # a batch is in any order
                    index = generator(choose).permutation(size)
                # In numpy: every number of draws would compile a program of its own.
                found = weighted.latents, weighted.position
                parts.append(jax.tree.map(lambda leaf, i=index[:each]: leaf[i], found))
        latents, position = joined(parts, num_draws)
        return latents, jax.device_put(position)

    def _sorting(self, weighted: Weighted) -> np.ndarray | None:
        if self.sorted_by is None:
            return None
        name, column = self.sorted_by
        values = np.asarray(weighted.latents[name])
        return np.argsort(values.reshape(len(values), -1)[:, column], kind="stable")

    def __str__(self) -> str:
        return f"{self.verdict}\n{self.table}"

    __repr__ = __str__


def resampled(
    key: jax.Array,
    log_weights: jax.Array,
    number: int | None = None,
    order: np.ndarray | None = None,
) -> np.ndarray:
    """Systematic resampling as by `pick_draws`, in random order so that each part is a sample, too:
    in numpy, since a sort takes longer to compile than all of this to run.

    Args:
        key: a typed random key.
        log_weights: of the draws, shape (num_draws,).
        number: how many are chosen; as many as there are where None.
        order: in which they lie side by side, so that all parts of it have their share.
    """
    random = generator(key)
    weights = np.exp(np.asarray(log_weights, float))
    order = np.arange(len(weights)) if order is None else order
    edges, number = np.cumsum(weights[order]), number or len(weights)
    levels = (np.arange(number) + random.uniform()) / number * edges[-1]
    chosen = order[np.minimum(np.searchsorted(edges, levels), len(edges) - 1)]
    return random.permutation(chosen)


def _positions(target: Target) -> Quick:
    @Quick
    def compiled(params: Any, latents: Any, data: Any) -> jax.Array:
        values = constrain(target.declared, params)
        return over(lambda one: flat(target).unconstrain(one, values, data), latents)

    return compiled


def compile_draws(pool: Executor, target: Target, params: Any, latents: Any, data: Any) -> None:
    """Has compiled what `Approximation.draws` computes from latents of these shapes."""
    block = {n: jax.ShapeDtypeStruct((BLOCK, *x.shape[1:]), x.dtype) for n, x in latents.items()}
    program(_deterministic, target).ahead(pool, pick(params, target.declared), block, data)


def _deterministic(target: Target) -> Quick:
    @Quick
    def compiled(params: Any, latents: Any, data: Any) -> dict[str, jax.Array]:
        values = constrain(target.declared, params)
        return over(lambda one: target.deterministic(values, one, data), latents)

    return compiled
