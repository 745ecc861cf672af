"""A target and a guide together: their parameters, their data, and whether their latents agree."""

from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp

from vi_params._check import explain, require_names
from vi_params._tree import abstract_key, fold_in_name, is_traced, leaves_by_path, merge
from vi_params.batches.batch import Batch, require_rows, split
from vi_params.guide import SINGLE, Draw, Guide
from vi_params.params import Latent, init_params
from vi_params.params.declare import bijector, constraint_name, is_unbounded
from vi_params.params.maps import abstract_params
from vi_params.params.rows import plates_of
from vi_params.sites import Site, is_point_mass
from vi_params.target import EMPTY, Target, require_draw
from vi_params.target.fed import fed, require_fed
from vi_params.target.minibatch import require_plates


def matched(target: Target, guide: Guide) -> Guide:
    """The guide, checked to draw the target's latents: names, shapes and supports.

    A guide of one unnamed latent takes the name of the target's only one.
    """
    guide = _in_plates(target, guide)
    params = abstract_params(joint_declared(target, guide))
    data = joint_data(target, guide)
    key = abstract_key()
    draw = jax.eval_shape(guide.sample, params, key, data)
    if not isinstance(draw.latents, Mapping):
        guide = _name_single(target, guide)
        draw = jax.eval_shape(guide.sample, params, key, data)
    require_names(
        list(draw.latents),
        list(target.latents),
        what="latents of the guide",
        where="target and guide",
    )
    for name, latent in target.latents.items():
        received = draw.latents[name].shape
        if received != latent.shape:
            raise ValueError(
                explain(
                    "The guide draws a latent of another shape than the target's.",
                    expected=f"shape {latent.shape}",
                    received=f"shape {received}",
                    where=f"latent {name!r}",
                )
            )
    _require_kinds(target, guide)
    _require_supports(target, guide, data)
    if target.subsample:
        index = {
            plate: jax.ShapeDtypeStruct((batch,), jnp.int32)
            for plate, batch in target.subsample.items()
        }
        try:
            at_batch = jax.eval_shape(guide.sample, params, key, Batch(data, index)).latents
        except (TypeError, ValueError) as error:
            raise _unlike_rows(target, joint_declared(target, guide), error) from error
        require_draw(at_batch, target.latents, "the guide at a batch", index)
    return guide


def _in_plates(target: Target, guide: Guide) -> Guide:
    """The guide told of the target's plates, and checked to have the same sizes."""
    changed = {n for n, size in guide.plates.items() if target.plates.get(n, size) != size}
    if changed:
        raise ValueError(
            explain(
                "Target and guide have a plate of two sizes.",
                expected=", ".join(f"{name!r}: {target.plates[name]}" for name in sorted(changed)),
                received=", ".join(f"{name!r}: {guide.plates[name]}" for name in sorted(changed)),
                where="target and guide",
            )
        )
    axes = plates_of(joint_declared(target, guide))
    require_plates(axes, target.plates, "declared")
    if target.subsample and target.see is None:  # a program, all of whose plates are known
        known = {**guide.plates, **target.plates}
        for path, (plates, _) in axes.items():
            where = f"plates of parameter {path!r}"
            require_names(plates, list(known), what="plates", where=where, complete=False)
    if guide.in_plates is None:
        return guide
    plates = {name: latent.plates for name, latent in target.latents.items()}
    if SINGLE not in plates and len(plates) == 1:
        plates[SINGLE] = next(iter(plates.values()))
    return guide.in_plates(plates, target.plates, target.see or partial(_see, target.streamed))


def _unlike_rows(target: Target, declared: Any, error: Exception) -> ValueError:
    """Why a guide that runs at all rows might not run at those of a batch."""
    sizes, plated = dict(target.sizes.values()), plates_of(declared)
    plates = ", ".join(
        f"plate {n!r} ({batch} of {size})" for n, (size, batch) in target.sizes.items()
    )
    suspects = [
        f"{path} of shape {leaf.shape}"
        for path, leaf in leaves_by_path(abstract_params(declared)).items()
        if path not in plated and leaf.shape[:1] and leaf.shape[0] in sizes
    ]
    return ValueError(
        explain(
            "The guide runs at all rows and not at a batch's.",
            expected=f"values, data and latents that follow the rows of {plates}",
            received=f"{type(error).__name__}: {error}",
            where=f"the guide at a batch{', parameters ' * bool(suspects)}{', '.join(suspects)}",
            hint='parameters of its rows are Param(..., plates=("rows",)), or numpyro.param(..., '
            "event_dim=) inside the plate; data go through numpyro.subsample or the plate's rows",
        )
    )


def _see(streamed: Mapping[str, int], data: Any) -> Any:
    data, index = split(data)
    if not set(index) <= set(streamed):
        raise ValueError(
            explain(
                "Only the NumPyro model knows which of its arrays have rows.",
                expected="q(values), or a guide that takes its rows itself",
                received="q(values, data) at a batch",
                where="q of vi.guide",
                hint="write the guide as a program with the same plate and numpyro.subsample: "
                "vi.numpyro_guide",
            )
        )
    return data


def joint_declared(target: Target, guide: Guide) -> dict[str, Any]:
    """The declared parameters of target and guide together."""
    return merge(
        target.declared, guide.declared, what="parameters of target and guide", where="declared"
    )


def joint_data(target: Target, guide: Guide) -> Any:
    """The target's data, with what the guide takes beside them.

    Where parameters have rows of a plate fed from outside, they stand for its first rows.
    """
    data = _joint(target, guide)
    sizes = fed(target, joint_declared(target, guide))
    index = {plate: jnp.arange(batch) for plate, (_, batch) in sizes.items()}
    return Batch(data, index) if index else data


def _joint(target: Target, guide: Guide) -> Any:
    if guide.data is None:
        return target.data
    if target.data is None:
        return guide.data
    if not (isinstance(target.data, Mapping) and isinstance(guide.data, Mapping)):
        raise TypeError(
            explain(
                "Target and guide bring data that cannot be joined.",
                expected="mappings from argument names to arrays",
                received=f"{type(target.data).__name__} and {type(guide.data).__name__}",
                where="data",
                hint="give the target its data as a mapping by the names of the guide's arguments",
            )
        )
    return {**guide.data, **target.data}


def given_data(target: Target, guide: Guide, data: Any, where: str) -> Any:
    """The data to look at: those given, the rows of a batch checked, or those of both together."""
    data = _joint(target, guide) if data is None else data
    require_rows(data, {**guide.plates, **target.plates}, f"{where}, data")
    require_fed(fed(target, joint_declared(target, guide)), data, f"{where}, data")
    return data


def guide_sites(target: Target, guide: Guide) -> dict[str, Site]:
    """The sites of a guide, for what is static in them; empty where it is not known by sites."""
    found: dict[str, Site] = {}
    sites = guide.sites
    if sites is not None:

        def look(params: Any, key: jax.Array, data: Any) -> None:
            one = jax.tree.map(lambda leaf: leaf[0], guide.noise(key, 1))
            found.update(sites(params, one, data))

        params = abstract_params(joint_declared(target, guide))
        jax.eval_shape(look, params, abstract_key(), joint_data(target, guide))
    return found


def without_gradient(target: Target, guide: Guide) -> tuple[str, ...]:
    """The latents, or sites, of a guide whose draws do not carry the parameters' gradient."""
    if not guide.is_reparameterised:
        return tuple(target.latents)
    sites = guide_sites(target, guide)
    return tuple(name for name, site in sites.items() if not site.has_gradient)


def _name_single(target: Target, guide: Guide) -> Guide:
    if len(target.latents) != 1:
        raise ValueError(
            explain(
                "The guide draws one unnamed latent.",
                expected=f"distributions for {list(target.latents)}",
                received="one distribution",
                where="q of vi.guide",
                hint="return a mapping from names to distributions",
            )
        )
    (name,) = target.latents
    distributions, sites = guide.distributions, guide.sites

    def wrap(draw: Draw) -> Draw:
        return Draw({name: draw.latents}, draw.log_prob, draw.position)

    def rescore(params: Any, draw: Draw, data: Any = None) -> jax.Array:
        return guide.rescore(params, draw._replace(latents=draw.latents[name]), data)

    def named_sites(params: Any, noise: Any, data: Any = None, given: Any = EMPTY) -> Any:
        assert sites is not None
        inner = {SINGLE: given[name]} if name in given else EMPTY
        return {name: sites(params, noise, data, inner)[SINGLE]}

    return guide._replace(
        sample=lambda params, key, data=None: wrap(guide.sample(params, key, data)),
        transform=lambda params, noise, data=None: wrap(guide.transform(params, noise, data)),
        log_prob=lambda params, latents, data=None: guide.log_prob(params, latents[name], data),
        rescore=rescore,
        sites=sites and named_sites,
        distributions=distributions
        and (lambda params, data=None: {name: distributions(params, data)[SINGLE]}),
    )


def _require_supports(target: Target, guide: Guide, data: Any) -> None:
    """Raises where points that the guide can draw lie outside the target's support."""
    questions = {
        name: latent for name, latent in target.latents.items() if not _is_everything(latent)
    }
    distributions = guide.distributions
    if not questions or distributions is None:
        return
    seen: dict[str, str] = {}

    def inside(key: jax.Array) -> dict[str, jax.Array]:
        params = init_params(joint_declared(target, guide), key)
        found = distributions(params, data)
        answers = {}
        for name in (name for name in questions if name in found):
            latent, support = questions[name], cast(Any, found[name].support)
            seen[name] = constraint_name(support)
            if support.is_discrete:
                points = found[name].sample(fold_in_name(key, name), (64,))
            else:
                transform = bijector(support, name)
                shape = (16, *transform.inverse_shape(latent.shape))
                points = transform(2.0 * jax.random.normal(fold_in_name(key, name), shape))
            answers[name] = jnp.all(latent.support(points))
        return answers

    with jax.ensure_compile_time_eval():
        answers = jax.jit(inside)(jax.random.key(0))
    for name, answer in answers.items():
        if not is_traced(answer) and not answer:
            raise _outside(name, target, seen[name])


def _require_kinds(target: Target, guide: Guide) -> None:
    """Raises where one of target and guide takes a latent for discrete and the other does not."""
    for name, site in guide_sites(target, guide).items():
        support = site.distribution.support
        if name not in target.latents or is_point_mass(site.distribution):
            continue
        if support.is_discrete != target.latents[name].is_discrete:
            raise _outside(name, target, constraint_name(support))


def _outside(name: str, target: Target, received: str) -> ValueError:
    return ValueError(
        explain(
            "The guide draws a latent outside the target's support.",
            expected=constraint_name(target.latents[name].support),
            received=received,
            where=f"latent {name!r}",
            hint="use a distribution on that set, or transform one onto it "
            "(numpyro's TransformedDistribution with biject_to)",
        )
    )


def _is_everything(latent: Latent) -> bool:
    """Whether every real array of the latent's shape is in its support (or the model decides)."""
    return latent.is_dynamic or is_unbounded(latent.support)
