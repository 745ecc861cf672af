"""Subsampled plates of NumPyro programs: one draw of rows for model and guide, exact scale."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest
from numpyro import distributions as dist
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints
from numpyro.infer.util import log_density

import vi_params as vi
from vi_params.svi import noise_of_steps

KEY = jax.random.key(0)
N, B = 6, 2
X = jax.random.normal(jax.random.key(7), (N, 2))
Y = jnp.array([0.3, -1.2, 0.7, 2.0, -0.4, 1.1])


def model(x, y):
    """A local latent for every row, rows taken by the plate's indices and by numpyro.subsample."""
    w = numpyro.sample("w", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
    tau = numpyro.sample("tau", dist.LogNormal(0.0, 1.0))
    with numpyro.plate("rows", y.shape[0], subsample_size=B) as i:
        z = numpyro.sample("z", dist.LogNormal(tau, 0.5))
        numpyro.sample("y", dist.Normal(x[i] @ w + z, 1.0), obs=numpyro.subsample(y, 0))


def program(x, y):
    loc = numpyro.param("w_loc", jnp.ones(2))
    numpyro.sample("w", dist.Normal(loc, 0.7).to_event(1))
    numpyro.sample("tau", dist.LogNormal(numpyro.param("tau_loc", 0.2), 0.5))
    with numpyro.plate("rows", y.shape[0], subsample_size=B):
        loc = numpyro.param("loc", lambda key: jax.random.normal(key, (N,)), event_dim=0)
        scale = numpyro.param(
            "scale", jnp.linspace(0.5, 1.5, N), constraint=constraints.positive, event_dim=0
        )
        numpyro.sample("z", dist.LogNormal(loc, scale))


def by_distributions():
    """The same family by its distributions."""
    declared = {
        "w_loc": jnp.ones(2),
        "tau_loc": jnp.float32(0.2),
        "loc": vi.Param(lambda key: jax.random.normal(key, (N,)), plates=("rows",)),
        "scale": vi.Param(
            jnp.linspace(0.5, 1.5, N), constraint=constraints.positive, plates=("rows",)
        ),
    }
    return vi.guide(
        declared,
        lambda v: {
            "w": dist.Normal(v["w_loc"], 0.7).to_event(1),
            "tau": dist.LogNormal(v["tau_loc"], 0.5),
            "z": dist.LogNormal(v["loc"], v["scale"]),
        },
    )


@cache
def target():
    return vi.from_numpyro(model, X, Y)


@cache
def objective():
    return vi.elbo(target(), vi.numpyro_guide(program, X, Y))


@cache
def jitted_run():
    svi = vi.svi(objective(), optax.adam(0.05))
    return svi, jax.jit(lambda state, n: vi.run(svi, state, KEY, n), static_argnums=1)


def epochs(*plates):
    """The index of every combination of batches of a random partition of every plate's rows."""
    found = [{}]
    for plate, size, batch in plates:
        rows = jax.random.permutation(jax.random.key(5), size).reshape(-1, batch)
        found = [{**index, plate: some} for index in found for some in rows]
    return found


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5), a, b)


def test_what_is_found():
    """Latents and parameters have all rows, and say which axis is the plate's."""
    assert target().plates == {"rows": N}
    assert target().subsample == {"rows": B}
    assert target().latents["z"].shape == (N,)
    assert target().latents["z"].plates == ("rows",)
    assert objective().declared["loc"].plates == ("rows",)
    assert objective().declared["w_loc"].plates == ()


def test_density_is_numpyro_s_at_these_rows():
    """log_density at a batch is NumPyro's with the plate's indices substituted; at all data it is
    that of the model without subsampling."""
    latents = {"w": jnp.ones(2), "tau": jnp.float32(0.7), "z": jnp.linspace(0.2, 2.0, N)}
    index = jnp.array([4, 1])
    some = {**latents, "z": latents["z"][index]}
    ours = target().log_density({}, some, vi.Batch(target().data, {"rows": index}))
    theirs = log_density(handlers.substitute(model, {"rows": index}), (X, Y), {}, some)[0]
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    whole = target().log_density({}, latents, target().data)
    exact = dist.Normal(0.0, 1.0).log_prob(latents["w"]).sum()
    exact += dist.LogNormal(0.0, 1.0).log_prob(latents["tau"])
    exact += dist.LogNormal(latents["tau"], 0.5).log_prob(latents["z"]).sum()
    exact += dist.Normal(X @ latents["w"] + latents["z"], 1.0).log_prob(Y).sum()
    np.testing.assert_allclose(whole, exact, rtol=1e-6)


@pytest.mark.parametrize("kind", ["program", "distributions"])
def test_an_epoch_s_mean_is_the_full_gradient(kind):
    """The mean of log p - log q over all batches of an epoch is that of all data, and so are the
    gradients: by the parameters, global and local, and by the latents, global and local."""
    guide = vi.numpyro_guide(program, X, Y) if kind == "program" else by_distributions()
    guide = vi.elbo(target(), guide).guide
    params = vi.init_params(guide.declared, KEY)
    latents = {"w": jnp.ones(2), "tau": jnp.float32(0.7), "z": jnp.linspace(0.2, 2.0, N)}

    def integrand(params, latents, data):
        return target().log_density({}, latents, data) - guide.log_prob(params, latents, data)

    def at_rows(params, latents, index):
        some = {**latents, "z": latents["z"][index["rows"]]}
        return integrand(params, some, vi.Batch(target().data, index))

    both = jax.jit(jax.value_and_grad(at_rows, argnums=(0, 1)))
    found = [both(params, latents, index) for index in epochs(("rows", N, B))]
    mean = jax.tree.map(lambda *x: jnp.mean(jnp.stack(x), 0), *found)
    whole = jax.jit(jax.value_and_grad(integrand, argnums=(0, 1)))
    assert_close(mean, whole(params, latents, target().data))


def test_an_epoch_s_mean_of_a_family_is_the_full_gradient():
    """With the noise of a family held fixed the mean over an epoch of the loss and its gradient,
    Jacobians included, is that of all data."""
    loss = vi.elbo(target(), vi.guides.full_rank(target()), num_particles=2)
    params = vi.init_params(loss.declared, KEY)
    noise = loss.noise(KEY)

    @jax.jit
    @jax.value_and_grad
    def at(params, index):
        return loss.evaluate(params, noise._replace(index=index), loss.data)[0]

    found = [at(params, index) for index in epochs(("rows", N, B))]
    mean = jax.tree.map(lambda *x: jnp.mean(jnp.stack(x), 0), *found)
    assert_close(mean, at(params, {"rows": jnp.arange(N)}))


def nested(y):
    scale = numpyro.param("noise", 1.5, constraint=constraints.positive)
    users = numpyro.plate("users", 4, subsample_size=2, dim=-2)
    items = numpyro.plate("items", 6, subsample_size=3, dim=-1)
    with users:
        bias = numpyro.param("bias", jnp.arange(4.0)[:, None], event_dim=0)
        a = numpyro.sample("a", dist.Normal(bias, 1.0))
    with items:
        b = numpyro.sample("b", dist.Normal(0.0, 1.0))
    with users, items:
        numpyro.sample("y", dist.Normal(a + b, scale), obs=numpyro.subsample(y, 0))


def test_nested_plates_scale_by_both():
    """For two plates the mean over all pairs of batches is the full density and gradient, by the
    model's own parameters too."""
    y = jax.random.normal(KEY, (4, 6))
    two = vi.from_numpyro(nested, y)
    assert two.latents["a"].plates == ("users",)
    assert two.latents["b"].plates == ("items",)
    assert two.declared["bias"].plates == ("users",)
    params = vi.init_params(two.declared, KEY)
    latents = {"a": jnp.arange(4.0)[:, None], "b": jnp.linspace(-1.0, 1.0, 6)}

    def density(params, latents, index):
        some = {"a": latents["a"][index["users"]], "b": latents["b"][index["items"]]}
        values = vi.constrain(two.declared, params)
        return two.log_density(values, some, vi.Batch(two.data, index))

    both = jax.jit(jax.value_and_grad(density, argnums=(0, 1)))
    found = [both(params, latents, i) for i in epochs(("users", 4, 2), ("items", 6, 3))]
    mean = jax.tree.map(lambda *x: jnp.mean(jnp.stack(x), 0), *found)

    def whole(params, latents):
        return two.log_density(vi.constrain(two.declared, params), latents, two.data)

    assert_close(mean, jax.value_and_grad(whole, argnums=(0, 1))(params, latents))


@pytest.mark.slow
def test_two_runs_are_one_and_an_epoch_sees_every_row():
    """run(2 n) is run(n) twice bit for bit, in the middle of an epoch too; the rows of an epoch are
    a partition."""
    svi, run = jitted_run()
    state = svi.init(KEY)
    whole, losses = run(state, 10)
    half, first = run(state, 5)
    rest, second = run(half, 5)
    jax.tree.map(np.testing.assert_array_equal, rest, whole)
    np.testing.assert_array_equal(jnp.concatenate([first, second]), losses)
    index = np.asarray(noise_of_steps(svi, KEY, jnp.int32(0), 6).index["rows"])
    for epoch in index.reshape(2, N):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(N))


def test_given_rows_are_the_rows_looked_at():
    """Under a Batch the step moves its rows and no others; rows given twice count twice; a row that
    does not exist makes a compiled step be skipped."""
    svi, _ = jitted_run()
    state, step = svi.init(KEY), jax.jit(svi.step)
    data = vi.Batch(objective().data, {"rows": jnp.array([3, 3, 1])})
    new, info = step(state, KEY, data)
    moved = np.flatnonzero(new.params["loc"] != state.params["loc"])
    np.testing.assert_array_equal(moved, [1, 3])
    assert not info.skipped
    loss, _ = objective().loss(state.params, KEY, data)
    np.testing.assert_allclose(info.loss, loss, rtol=1e-6)
    outside = vi.Batch(objective().data, {"rows": jnp.array([3, N, 1])})
    same, info = step(state, KEY, outside)
    assert info.skipped
    jax.tree.map(np.testing.assert_array_equal, same.params, state.params)


def conjugate(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 10.0))
    with numpyro.plate("rows", y.shape[0], subsample_size=5):
        numpyro.sample("y", dist.Normal(mu, 1.0), obs=numpyro.subsample(y, 0))


@pytest.mark.slow
def test_a_fit_finds_the_posterior_and_is_judged_on_all_data():
    """Minibatches lead to the conjugate posterior; draws and diagnosis use all rows by default."""
    y = 1.0 + jax.random.normal(KEY, (50,))
    normal = vi.from_numpyro(conjugate, y)
    guide = vi.guides.mean_field(normal)
    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, 3000))
    fit = vi.fit(
        vi.elbo(normal, guide), optimizer, key=KEY, num_steps=3000, restarts=2, progress=False
    )
    precision = 50 + 0.01
    draws = vi.draws(normal, guide, fit.params, KEY, 2000)["mu"]
    assert abs(jnp.mean(draws) - y.sum() / precision) < 0.03
    np.testing.assert_allclose(jnp.std(draws), precision**-0.5, rtol=0.15)
    judged = vi.diagnose(normal, guide, fit.params, KEY)
    exact = dist.MultivariateNormal(jnp.zeros(50), jnp.eye(50) + 100.0).log_prob(y)
    assert abs(judged.log_evidence - exact) < 0.1
    assert judged.trustworthy


def test_misuse_names_the_plate():
    """Rows out of range, unknown plates, plates of another size: errors that name them."""
    svi, _ = jitted_run()
    state, data = svi.init(KEY), objective().data
    family = vi.init_params(vi.guides.mean_field(target()).declared, KEY)

    def step(index):
        return svi.step(state, KEY, vi.Batch(data, index))

    with pytest.raises(ValueError, match=r"from 0 to 5[\s\S]*\[6\][\s\S]*plate 'rows'"):
        step({"rows": jnp.array([0, 6])})
    with pytest.raises(KeyError, match=r"unknown: 'row'[\s\S]*did you mean 'rows'"):
        step({"row": jnp.array([0, 1])})
    with pytest.raises(TypeError, match=r"int array[\s\S]*plate 'rows'"):
        step({"rows": jnp.array([0.0, 1.0])})
    two = {"z": jnp.ones(2), "w": jnp.zeros(2), "tau": jnp.float32(0.0)}
    for call in (
        lambda at: target().log_density({}, two, at),
        lambda at: vi.draws(target(), objective().guide, state.params, KEY, 3, at),
        lambda at: vi.diagnose(target(), objective().guide, state.params, KEY, at),
        lambda at: target().constrain({}, two, at),
        lambda at: vi.guides.mean_field(target()).sample(family, KEY, at),
    ):
        with pytest.raises(ValueError, match=r"from 0 to 5[\s\S]*\[-1\][\s\S]*plate 'rows'"):
            call(vi.Batch(data, {"rows": jnp.array([0, -1])}))
        with pytest.raises(KeyError, match=r"unknown: 'row'[\s\S]*did you mean 'rows'"):
            call(vi.Batch(data, {"row": jnp.array([0, 1])}))
    with pytest.raises(ValueError, match=r"size has changed[\s\S]*6 rows[\s\S]*4 rows"):
        objective().loss(state.params, KEY, {"x": X[:4], "y": Y[:4]})
    with pytest.raises(ValueError, match=r"two sizes[\s\S]*'rows': 6[\s\S]*'rows': 4"):
        vi.elbo(target(), vi.numpyro_guide(_other_size))
    whole = {"z": jnp.zeros(N), "w": jnp.zeros(2), "tau": jnp.float32(0.0)}
    unreduced = vi.guide(whole, lambda v: {n: dist.LogNormal(x, 1.0) for n, x in v.items()})
    unreduced = unreduced._replace(distributions=None)
    with pytest.raises(ValueError, match=r"the batch's rows[\s\S]*latent 'z'[\s\S]*plates=\('rows"):
        vi.elbo(target(), unreduced)


def test_parameters_that_do_not_follow_the_rows_are_named():
    """A param site without event_dim, a misspelt plate: refused when the guide meets the target; a
    program that writes its batch size into a shape, when it is traced: the plate is named."""

    def without_event_dim():
        numpyro.sample("w", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
        numpyro.sample("tau", dist.LogNormal(0.0, 1.0))
        with numpyro.plate("rows", N, subsample_size=B):
            numpyro.sample("z", dist.LogNormal(numpyro.param("loc", jnp.zeros(N)), 1.0))

    with pytest.raises(ValueError, match=r"plate 'rows' \(2 of 6\)[\s\S]*loc of shape \(6,\)"):
        vi.elbo(target(), vi.numpyro_guide(without_event_dim))

    misspelt = vi.guide(
        {"z": vi.Param(jnp.zeros(N), plates=("row",))},
        lambda v: {
            "w": dist.Normal(jnp.zeros(2), 1.0).to_event(1),
            "tau": dist.LogNormal(0.0, 1.0),
            "z": dist.LogNormal(v["z"], 1.0),
        },
    )
    with pytest.raises(KeyError, match=r"unknown: 'row'[\s\S]*parameter 'z'[\s\S]*mean 'rows'"):
        vi.elbo(target(), misspelt)

    def rigid(y):
        with numpyro.plate("rows", N, subsample_size=B):
            numpyro.sample("z", dist.Normal(jnp.zeros(B), 1.0))
            numpyro.sample("y", dist.Normal(0.0, 1.0), obs=numpyro.subsample(y, 0))

    with pytest.raises(ValueError, match="broadcast") as raised:
        vi.from_numpyro(rigid, Y)
    assert "subsampled plates 'rows' (6)" in "".join(raised.value.__notes__)


def test_rows_that_the_program_fixes_are_kept():
    """A handler's indices stay: the density is NumPyro's, no rows are drawn, and a batch on top of
    them is refused."""
    index = jnp.array([4, 1])
    fixed = handlers.substitute(conjugate, {"rows": jnp.array([4, 1, 0, 2, 5])})
    kept = vi.from_numpyro(fixed, Y)
    assert kept.subsample == {}
    ours = kept.log_density({}, {"mu": 0.3}, kept.data)
    np.testing.assert_allclose(ours, log_density(fixed, (Y,), {}, {"mu": 0.3})[0], rtol=1e-6)
    with pytest.raises(ValueError, match=r"two ways[\s\S]*plate 'rows'"):
        kept.log_density({}, {"mu": 0.3}, vi.Batch(kept.data, {"rows": index}))
    outside = handlers.substitute(conjugate, {"rows": jnp.array([0, 1, 2, 3, N])})
    with pytest.raises(ValueError, match=r"from 0 to 5[\s\S]*plate 'rows'"):
        vi.from_numpyro(outside, Y)


def series(y):
    """A series for every row: the plate is made before the scan and entered in its body."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    rows = numpyro.plate("rows", N, subsample_size=B)
    with rows:
        some = numpyro.subsample(y, 0)
        first = numpyro.sample("first", dist.Normal(mu, 1.0))

    def body(z, y):
        with rows:
            z = numpyro.sample("z", dist.Normal(mu * z, 1.0))
            numpyro.sample("y", dist.Normal(z, 1.0), obs=y)
        return z, None

    scan(body, first, some)


def test_a_plate_inside_a_scan():
    """Latents of every step and row: density at a batch by hand, the epoch's mean that of all data;
    rows of parameters for all steps. A plate made in the body is refused by its name."""
    y = jax.random.normal(KEY, (3, N))
    chains = vi.from_numpyro(series, y)
    assert chains.latents["z"].plates == (None, "rows")
    z, first = 0.5 * y, jnp.linspace(-1.0, 1.0, N)

    @jax.jit
    def at(index):
        some = {"mu": 0.3, "first": first[index], "z": z[:, index]}
        return chains.log_density({}, some, vi.Batch(chains.data, {"rows": index}))

    def by_hand(index):
        before = jnp.concatenate([first[None], z[:-1]])[:, index]
        rows = dist.Normal(0.3, 1.0).log_prob(first[index]).sum()
        rows += dist.Normal(0.3 * before, 1.0).log_prob(z[:, index]).sum()
        rows += dist.Normal(z[:, index], 1.0).log_prob(y[:, index]).sum()
        return dist.Normal(0.0, 1.0).log_prob(0.3) + N / len(index) * rows

    found = [at(index["rows"]) for index in epochs(("rows", N, B))]
    for index, density in zip(epochs(("rows", N, B)), found, strict=True):
        np.testing.assert_allclose(density, by_hand(index["rows"]), rtol=1e-5)
    np.testing.assert_allclose(jnp.mean(jnp.stack(found)), by_hand(jnp.arange(N)), rtol=1e-5)
    guide = vi.guides.mean_field(chains)
    params = vi.init_params(guide.declared, KEY)["guide"]
    assert params["z"]["loc"].shape == (N, 3)

    def made_inside(y):
        def body(carry, y):
            with numpyro.plate("rows", N, subsample_size=B):
                numpyro.sample("y", dist.Normal(0.0, 1.0), obs=numpyro.subsample(y, 0))
            return carry, None

        scan(body, 0.0, y)

    with pytest.raises(ValueError, match=r"inside a scan[\s\S]*plate 'rows'[\s\S]*with rows"):
        vi.from_numpyro(made_inside, y)


def _other_size():
    with numpyro.plate("rows", 4, subsample_size=2):
        numpyro.sample("z", dist.LogNormal(0.0, 1.0))
