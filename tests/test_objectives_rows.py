"""Importance weights row by row: closed forms, tightness, gradients, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from numpyro import distributions as dist

import vi_params as vi

Y = jnp.array([0.4, -1.1, 2.0, 0.3, -0.2])
ESTIMATORS = ["pathwise", "doubly_reparameterised", "vimco"]


def model(y):
    """Rows of (z_i, w_i): a pair of latents each, one of them a vector."""
    shift = numpyro.param("shift", jnp.array(0.3))
    with numpyro.plate("rows", len(y)):
        z = numpyro.sample("z", dist.Normal(shift, 1.0))
        w = numpyro.sample("w", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
        numpyro.sample("y", dist.Normal(z + 0.5 * w.sum(-1), 0.7), obs=y)


def by_program():
    def program(y):
        slope = numpyro.param("slope", jnp.array(0.4))
        with numpyro.plate("rows", len(y)):
            numpyro.sample("z", dist.Normal(slope * y, 0.8))
            numpyro.sample("w", dist.Normal(0.1 * y[:, None], jnp.full(2, 0.9)).to_event(1))

    return vi.numpyro_guide(program, Y)


def by_distributions():
    """The same guide, the vector's components independent instead of an event."""

    def q(v, data):
        y = data["y"]
        vector = dist.Normal(0.1 * y[:, None] * jnp.ones(2), 0.9)
        return {"z": dist.Normal(v["slope"] * y, 0.8), "w": vector}

    return vi.guide({"slope": 0.4}, q)


GUIDES = {"program": by_program, "distributions": by_distributions}


def one_row(y, guide, **options):
    """The IWAE bound of one row's data alone, by the weights of whole draws."""
    return vi.iwae(vi.from_numpyro(model, jnp.array([y])), guide, **options)


def start(objective):
    return jax.jit(lambda key: vi.init_params(objective.declared, key))(jax.random.key(0))


def mean_bound(objective, num, data=None):
    params = start(objective)
    keys = jax.random.split(jax.random.key(1), num)
    values = jax.jit(jax.vmap(lambda k, d: objective.loss(params, k, d)[1].value, (0, None)))
    found = np.asarray(values(keys, objective.data if data is None else data), np.float64)
    return found.mean(), found.var() / num


@pytest.mark.parametrize("guide", GUIDES)
def test_the_bound_is_the_sum_of_the_rows_bounds(guide):
    """L_5 with the plate's rows apart is the sum of the five one-row bounds L_5, each estimated
    from data of one row, within four standard errors."""
    target = vi.from_numpyro(model, Y)
    together = vi.iwae(target, GUIDES[guide](), num_importance=5, plate="rows")
    value, variance = mean_bound(together, 4000)
    single = one_row(Y[0], by_distributions(), num_importance=5)
    alone = [mean_bound(single, 4000, {"y": y[None]}) for y in Y]
    expected, spread = (sum(column) for column in zip(*alone, strict=True))
    assert abs(value - expected) < 4 * np.sqrt(variance + spread)


def test_rows_apart_are_tighter():
    """ELBO < whole-draw bound < row-by-row bound < log evidence, which is known."""
    target = vi.from_numpyro(model, Y)
    guide = by_program()
    rows = mean_bound(vi.iwae(target, guide, num_importance=5, plate="rows"), 4000)
    whole = mean_bound(vi.iwae(target, guide, num_importance=5), 4000)
    evidence = dist.Normal(0.3, np.sqrt(1 + 0.5 + 0.49)).log_prob(Y).sum()
    margin = 4 * np.sqrt(rows[1] + whole[1])
    assert whole[0] + margin < rows[0] < evidence + margin
    assert evidence - rows[0] < 0.8 * (evidence - whole[0])


@pytest.mark.slow
def test_gradients_agree():
    """The three estimators have one mean gradient, in guide and model, within four standard
    errors of the difference."""
    found = []
    for name in ESTIMATORS:
        objective = vi.iwae(
            vi.from_numpyro(model, Y),
            by_distributions(),
            num_importance=4,
            plate="rows",
            estimator=getattr(vi.estimators, name)(),
        )
        params = start(objective)
        slope = jax.grad(lambda p, key, o=objective: o.loss(p, key)[0])
        keys = jax.random.split(jax.random.key(len(found)), 10_000)
        draws = jax.jit(jax.vmap(slope, in_axes=(None, 0)))(params, keys)
        found.append({name: np.asarray(leaf, np.float64) for name, leaf in draws.items()})
    for other in found[1:]:
        for name in ("slope", "shift"):
            difference = found[0][name].mean() - other[name].mean()
            error = np.sqrt((found[0][name].var() + other[name].var()) / 10_000)
            assert abs(difference) < 4 * error


def test_one_draw_is_the_elbo():
    """With K = 1 the rows' bounds add up to the ELBO at the same draws; batches change nothing."""
    target = vi.from_numpyro(model, Y)
    apart = vi.iwae(target, by_program(), num_importance=1, num_particles=6, plate="rows")
    batched = vi.iwae(
        target, by_program(), num_importance=1, num_particles=6, plate="rows", batch_size=2
    )
    elbo = vi.elbo(target, by_program(), num_particles=6)
    params = start(elbo)
    found = [
        jax.jit(jax.value_and_grad(lambda p, o=o: o.loss(p, jax.random.key(3))[0]))(params)
        for o in (apart, batched, elbo)
    ]
    for one in found[:2]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), one, found[2])


def plain():
    return vi.target(lambda v, z, d: -0.5 * jnp.sum(z["z"] ** 2), {"z": vi.Latent((5,))})


ERRORS = {
    "a plain density": (
        lambda: vi.iwae(
            plain(), vi.guide({"loc": jnp.zeros(5)}, lambda v: dist.Normal(v["loc"])), plate="rows"
        ),
        ["a target that is one density", "per_row"],
    ),
    "a misspelt plate": (
        lambda: vi.iwae(vi.from_numpyro(model, Y), by_program(), plate="row"),
        ["unknown: 'row'", "did you mean 'rows'?"],
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    """What cannot be weighed row by row is refused when the objective is built."""
    build, fragments = ERRORS[case]
    with pytest.raises((ValueError, KeyError)) as caught:
        build()
    for fragment in fragments:
        assert fragment in str(caught.value)
