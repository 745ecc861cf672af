"""Families over latents in subsampled plates: rows of their own, exact scale, right posterior."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest
from numpyro import distributions as dist
from numpyro.infer import init_to_value
from test_minibatch import KEY, B, N, nested, target

import vi_params as vi


def test_parameters_have_rows():
    """Every local latent has a location and a scale for each row, declared with the plate."""
    guide = vi.guides.mean_field(target())
    assert guide.declared["guide"]["z"]["loc"].plates == ("rows",)
    assert guide.declared["guide"]["w"]["loc"].plates == ()
    params = vi.init_params(guide.declared, KEY)
    assert params["guide"]["z"]["loc"].shape == (N,)


def test_it_is_the_flat_family_at_all_data():
    """With the same moments its density is that of independent normals under the same Jacobian, by
    NumPyro's distributions; rescore and log_prob agree with the draw's own."""
    guide = vi.guides.mean_field(target(), init_scale=0.5)
    params = vi.init_params(guide.declared, KEY)
    own = vi.constrain(guide.declared, params)["guide"]

    @jax.jit
    def scores(params, index):
        data = target().data if index is None else vi.Batch(target().data, {"rows": index})
        draw = guide.sample(params, KEY, data)
        again = guide.rescore(params, draw, data), guide.log_prob(params, draw.latents, data)
        return draw, again

    for index in (None, jnp.array([4, 0])):
        draw, again = scores(params, index)
        np.testing.assert_allclose(again, draw.log_prob, rtol=1e-4)
        rows = jnp.arange(N) if index is None else index
        q = dist.Normal(own["w"]["loc"], own["w"]["scale"]).log_prob(draw.latents["w"]).sum()
        q += dist.LogNormal(own["tau"]["loc"], own["tau"]["scale"]).log_prob(draw.latents["tau"])
        local = dist.LogNormal(own["z"]["loc"][rows], own["z"]["scale"][rows])
        q += N / len(rows) * local.log_prob(draw.latents["z"]).sum()
        np.testing.assert_allclose(draw.log_prob, q, rtol=1e-4)


def test_rows_with_the_plate_behind_another_axis():
    """A plate that is not the leading axis is kept in front in the parameters, and comes back in
    its place; one of NumPyro's strategies starts it."""
    y = jax.random.normal(KEY, (4, 6))
    two = vi.from_numpyro(nested, y)
    values = {"a": jnp.arange(4.0)[:, None], "b": jnp.arange(6.0)}
    guide = vi.guides.mean_field(two, init=init_to_value(values=values))
    params = vi.init_params(guide.declared, KEY)
    jax.tree.map(np.testing.assert_allclose, {n: params["guide"][n]["loc"] for n in values}, values)
    index = {"users": jnp.array([2, 0]), "items": jnp.array([5, 1, 0])}
    draw = jax.jit(guide.sample)(params, KEY, vi.Batch(two.data, index))
    assert draw.latents["a"].shape == (2, 1)
    assert draw.latents["b"].shape == (3,)
    np.testing.assert_allclose(draw.latents["b"], values["b"][index["items"]], atol=0.5)


def groups(y):
    """The rows' posterior is known: z_i ~ N(y_i / 2, 1 / 2)."""
    with numpyro.plate("rows", y.shape[0], subsample_size=B):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(z, 1.0), obs=numpyro.subsample(y, 0))


@pytest.mark.parametrize("estimator", ["pathwise", "closed_form_entropy", "sticking_the_landing"])
def test_row_updates_lead_to_the_posterior(estimator):
    """With every estimator the rows go to their closed-form posterior."""
    y = jnp.linspace(-2.0, 2.0, N)
    local = vi.from_numpyro(groups, y)
    guide = vi.guides.mean_field(local, init={"z": jnp.zeros(N)}, init_scale=0.5)
    chosen = getattr(vi.estimators, estimator)()
    objective = vi.elbo(local, guide, estimator=chosen)
    svi = vi.svi(objective, optax.adam(optax.exponential_decay(0.05, 1000, 0.3)))
    state = svi.init(KEY, params=vi.init_params(objective.declared, KEY))
    state, _ = jax.jit(lambda state: vi.run(svi, state, KEY, 5000))(state)
    found = vi.constrain(guide.declared, state.params)["guide"]["z"]
    np.testing.assert_allclose(found["loc"], y / 2, atol=0.08)
    np.testing.assert_allclose(found["scale"], 0.5**0.5, rtol=0.1)


def fed(y):
    """Rows from outside: the plate's indices are not used."""
    with numpyro.plate("rows", N, subsample_size=y.shape[0]):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(z, 1.0), obs=y)


def test_rows_from_outside_have_parameters_where_they_say_which_they_are():
    """At the same noise a vi.Batch of rows from outside makes the step that the same rows of whole
    data make; a fit moves every row that came, and draws are made of the rows asked for."""
    y = np.linspace(-2.0, 2.0, N, dtype=np.float32)
    parts = [np.array([4, 1]), np.array([5, 0])]
    reached = []
    for model, data in ((fed, y[:2]), (groups, y)):
        local = vi.from_numpyro(model, jnp.asarray(data))
        guide = vi.guides.mean_field(local, init={"z": jnp.zeros(N)}, init_scale=0.5)
        objective = vi.elbo(local, guide)
        svi = vi.svi(objective, optax.sgd(0.02))
        state, update = svi.init(KEY), jax.jit(svi.update)
        for i, rows in enumerate(parts):
            noise = guide.noise(jax.random.fold_in(KEY, i), 1)
            if model is groups:
                noise = objective.noise(KEY)._replace(noise=noise)
            batch = vi.Batch({"y": y[rows] if model is fed else y}, {"rows": rows})
            state, info = update(state, noise, batch)
        reached.append((state.params, info.loss))
        if model is fed:
            batches = [vi.Batch({"y": y[rows]}, {"rows": rows}) for rows in parts]
            options = {"num_steps": 10, "progress": False, "stop": vi.stopping.never(every=10)}
            fit = vi.fit(objective, optax.sgd(0.02), key=KEY, data=batches, **options)
            moved = np.flatnonzero(fit.params["guide"]["z"]["loc"])
            np.testing.assert_array_equal(moved, [0, 1, 4, 5])
            assert vi.draws(local, guide, fit.params, KEY, 4, batches[0])["z"].shape == (4, 2)
            assert guide.sample(fit.params, KEY).latents["z"].shape == (N,)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *reached)


def test_rows_from_outside_that_do_not_say_which_they_are():
    """Refused by the name of the plate: batches without row numbers, with others than they have, or
    none at all; families that have no rows."""
    outside = vi.from_numpyro(fed, jnp.zeros(2))
    guide = vi.guides.mean_field(outside)
    objective = vi.elbo(outside, guide)
    params = vi.init_params(guide.declared, KEY)

    def fit(data):
        vi.fit(objective, optax.sgd(0.1), key=KEY, data=data, progress=False, num_steps=2)

    y = {"y": jnp.zeros(2)}
    unnamed = r"do not say which rows[\s\S]*plate 'rows'"
    with pytest.raises(ValueError, match=unnamed):
        fit([y])
    with pytest.raises(ValueError, match=unnamed):
        fit(None)
    with pytest.raises(ValueError, match=unnamed):
        vi.draws(outside, guide, params, KEY, 2)
    with pytest.raises(ValueError, match=unnamed):
        objective.loss(params, KEY, y)
    with pytest.raises(ValueError, match=r"do not match[\s\S]*2 row numbers[\s\S]*plate 'rows'"):
        fit([vi.Batch(y, {"rows": jnp.arange(3)})])
    for family in (vi.guides.full_rank, vi.guides.delta):
        with pytest.raises(ValueError, match=rf"all {N} rows of plate 'rows'[\s\S]*latent 'z'"):
            family(outside)
    with pytest.raises(ValueError, match=r"batch of this latent's rows[\s\S]*latent 'z'"):
        vi.guides.mean_field(outside, init=init_to_value(values={}))
