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


def test_rows_from_outside_cannot_have_parameters():
    """A local latent whose rows come batch by batch is refused by name."""

    def fed(y):
        with numpyro.plate("rows", 10, subsample_size=2):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("y", dist.Normal(z, 1.0), obs=y)

    outside = vi.from_numpyro(fed, jnp.zeros(2))
    for family in (vi.guides.mean_field, vi.guides.full_rank, vi.guides.delta):
        with pytest.raises(ValueError, match=r"all 10 rows of plate 'rows'[\s\S]*latent 'z'"):
            family(outside)
