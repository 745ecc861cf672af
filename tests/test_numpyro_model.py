"""NumPyro programs as targets: their density is NumPyro's own, whatever the program does."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from numpyro import distributions as dist
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints
from numpyro.infer.reparam import LocScaleReparam, TransformReparam
from numpyro.infer.util import log_density, potential_energy

import vi_params as vi

Y = jnp.array([0.3, -1.2, 0.7])


def of_many_supports(y):
    tau = numpyro.sample("tau", dist.HalfCauchy(1.0))
    p = numpyro.sample("p", dist.Dirichlet(jnp.ones(3)))
    chol = numpyro.sample("chol", dist.LKJCholesky(3, 2.0))
    cut = numpyro.sample("cut", dist.ImproperUniform(constraints.ordered_vector, (), (3,)))
    b = numpyro.sample("b", dist.Beta(2.0, 3.0))
    numpyro.sample("y", dist.MultivariateNormal(cut * p, scale_tril=tau * b * chol), obs=y)


def with_factor(y):
    z = numpyro.sample("z", dist.Normal(0.0, 1.0))
    numpyro.factor("penalty", -(z**4))
    numpyro.sample("y", dist.Normal(z, 1.0), obs=y)


def with_mask(y):
    z = numpyro.sample("z", dist.Normal(0.0, 1.0))
    with handlers.mask(mask=jnp.array([True, False, True])):
        numpyro.sample("y", dist.Normal(z, 1.0), obs=y)


def with_scale(y):
    z = numpyro.sample("z", dist.Normal(0.0, 1.0))
    with handlers.scale(scale=3.5):
        numpyro.sample("y", dist.Normal(z, 1.0), obs=y)


def groups(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = numpyro.sample("tau", dist.HalfNormal(1.0))
    with numpyro.plate("J", y.shape[0]):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def shifted_groups(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    affine = dist.transforms.AffineTransform(mu, 2.0)
    with numpyro.plate("J", y.shape[0]):
        prior = dist.TransformedDistribution(dist.Normal(0.0, 1.0), affine)
        numpyro.sample("y", dist.Normal(numpyro.sample("theta", prior), 1.0), obs=y)


def random_walk(y):
    tau = numpyro.sample("tau", dist.HalfNormal(1.0))

    def step(x, y):
        x = numpyro.sample("x", dist.Normal(x, tau))
        numpyro.deterministic("twice", 2 * x)
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y)
        return x, None

    scan(step, 0.0, y)


def rising_walk(y):
    """Each state is above the one before: a dynamic support inside a scan."""

    def step(x, y):
        x = numpyro.sample("x", dist.TruncatedNormal(x, 1.0, low=x))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y)
        return x, None

    scan(step, -1.0, y)


def with_missing(y):
    z = numpyro.sample("z", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(z, 1.0), obs=y, obs_mask=jnp.array([True, False, True]))


def with_params(y):
    loc = numpyro.param("loc", 0.5)
    scale = numpyro.param(
        "scale",
        lambda key: jnp.exp(jax.random.normal(key, (3,))),
        constraint=constraints.positive,
    )
    z = numpyro.sample("z", dist.Normal(loc, scale).to_event(1))
    numpyro.sample("y", dist.Normal(z, 1.0), obs=y)


def of_dynamic_support(y):
    a = numpyro.sample("a", dist.Uniform(0.0, 1.0))
    b = numpyro.sample("b", dist.Uniform(a, 2.0))
    numpyro.sample("y", dist.Normal(b, 1.0), obs=y)


MODELS = {
    "supports": of_many_supports,
    "factor": with_factor,
    "mask": with_mask,
    "scale": with_scale,
    "plate": groups,
    "LocScaleReparam": handlers.reparam(groups, config={"theta": LocScaleReparam(0)}),
    "LocScaleReparam, learnt": handlers.reparam(groups, config={"theta": LocScaleReparam()}),
    "TransformReparam": handlers.reparam(shifted_groups, config={"theta": TransformReparam()}),
    "scan": random_walk,
    "scan, dynamic support": rising_walk,
    "obs_mask": with_missing,
    "params": with_params,
    "dynamic support": of_dynamic_support,
}


@pytest.mark.parametrize("name", MODELS)
def test_density_is_numpyro_s(name):
    """log_density is numpyro's log_density; the flat one is minus its potential energy."""
    model = MODELS[name]
    target = vi.from_numpyro(model, Y)
    flat = vi.flat(target)

    @jax.jit
    def both(key):
        values = vi.constrain(target.declared, vi.init_params(target.declared, key))
        u = 0.5 * jax.random.normal(key, (flat.dim,))
        latents = flat.constrain(u, values)
        free = target.unconstrain(values, latents, target.data)
        fixed = handlers.substitute(model, data=values)
        return {
            "joint": (
                target.log_density(values, latents, target.data),
                log_density(model, (Y,), {}, {**values, **latents})[0],
            ),
            "flat": (flat.log_density(u, values), -potential_energy(fixed, (Y,), {}, free)),
            "inverse": (flat.unconstrain(latents, values), u),
        }

    for pair in both(jax.random.key(3)).values():
        np.testing.assert_allclose(*pair, rtol=2e-5, atol=2e-5)
        assert np.all(np.isfinite(pair[0]))


def test_deterministic_sites_are_returned():
    """target.deterministic holds the deterministic sites: of scans, and those reparam leaves."""
    scanned = vi.from_numpyro(random_walk, Y)
    latents = {"tau": jnp.ones(()), "x": jnp.arange(3.0)}
    found = scanned.deterministic({}, latents, scanned.data)
    np.testing.assert_array_equal(found["twice"], 2 * jnp.arange(3.0))

    noncentred = vi.from_numpyro(MODELS["LocScaleReparam"], Y)
    latents = {"mu": jnp.ones(()), "tau": 2 * jnp.ones(()), "theta_decentered": jnp.arange(3.0)}
    found = noncentred.deterministic({}, latents, noncentred.data)
    np.testing.assert_allclose(found["theta"], 1.0 + 2.0 * jnp.arange(3.0))


def test_plates_are_found():
    """target.plates maps each plate to its size."""
    assert vi.from_numpyro(groups, Y).plates == {"J": 3}


def test_param_sites_are_declared():
    """Param sites keep their constraint; constant starts are constant, lazy ones vary by key."""
    declared = vi.from_numpyro(with_params, Y).declared
    assert isinstance(declared["scale"].constraint, type(constraints.positive))
    one, two = (vi.constrain(declared, vi.init_params(declared, jax.random.key(k))) for k in (0, 1))
    assert one["loc"] == two["loc"] == 0.5
    assert not np.any(one["scale"] == two["scale"])


def test_observation_left_out_is_a_latent():
    """A site whose observation is None is a latent; with the observation it is data."""

    def model(n, y=None):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        with numpyro.plate("n", n):
            numpyro.sample("y", dist.Normal(z, 1.0), obs=y)

    assert set(vi.from_numpyro(model, 3).latents) == {"z", "y"}
    assert set(vi.from_numpyro(model, 3, y=Y).latents) == {"z"}
    assert vi.from_numpyro(model, 3, y=Y).data.keys() == {"y"}


def test_conditioned_model():
    """A conditioned site is data of the program: no latent, and it counts in the density."""

    def model():
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(z, 1.0).expand([3]))

    target = vi.from_numpyro(handlers.condition(model, {"y": Y}))
    assert set(target.latents) == {"z"}
    np.testing.assert_allclose(
        target.log_density({}, {"z": jnp.array(0.4)}, None),
        dist.Normal().log_prob(0.4) + dist.Normal(0.4).log_prob(Y).sum(),
        rtol=1e-6,
    )


def test_static_and_nested_arguments():
    """Arrays anywhere among the arguments are data; sizes, strings and callables stay static."""

    def model(x, width, name, prepare, batch, *, link=jnp.tanh, centred=True):
        w = numpyro.sample(name, dist.Normal(jnp.zeros(width), 1.0).to_event(1))
        mean = link(prepare(x) @ w) if centred else 0.0
        with numpyro.plate("J", batch["J"]):
            numpyro.sample("y", dist.Normal(mean, 1.0), obs=batch["y"])

    x, w = np.arange(6.0).reshape(3, 2), jnp.array([0.1, -0.2])
    target = vi.from_numpyro(
        model, x, np.int64(2), "w", lambda x: 2 * x, {"J": 3, "y": Y}, link=jnp.sin
    )
    assert jax.tree.structure(target.data) == jax.tree.structure(
        {"x": 0, "batch": {"J": None, "y": 0}}
    )
    expected = dist.Normal().log_prob(w).sum() + dist.Normal(jnp.sin(2 * x @ w)).log_prob(Y).sum()
    np.testing.assert_allclose(target.log_density({}, {"w": w}, target.data), expected, rtol=1e-5)


def test_integer_and_boolean_arrays_are_data():
    """Index and indicator arrays keep their dtype kind and can be replaced."""

    def model(index, y):
        z = numpyro.sample("z", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
        numpyro.sample("y", dist.Bernoulli(logits=z[index]), obs=y)

    target = vi.from_numpyro(model, np.array([0, 1, 1]), np.array([True, False, True]))
    assert target.data["index"].dtype.kind == "i"
    z = {"z": jnp.array([-1.0, 2.0])}
    swapped = {**target.data, "index": 1 - target.data["index"]}
    assert target.log_density({}, z, target.data) != target.log_density({}, z, swapped)


def test_data_of_another_shape():
    """A target takes new data of the same and of another shape, and never the old ones."""
    target = vi.from_numpyro(with_factor, Y)
    z = {"z": jnp.array(0.3)}
    for y in (Y + 1.0, jnp.arange(5.0)):
        np.testing.assert_allclose(
            target.log_density({}, z, {"y": y}), log_density(with_factor, (y,), {}, z)[0], rtol=1e-6
        )


def test_vmap_over_data_sets():
    """vmapping log_density over data sets equals building a target for each, under vmap too."""
    ys = jnp.stack([Y, Y + 1.0])
    z = {"z": jnp.array(0.3)}
    target = vi.from_numpyro(with_factor, Y)
    expected = jnp.stack([log_density(with_factor, (y,), {}, z)[0] for y in ys])
    passed = jax.vmap(lambda y: target.log_density({}, z, {"y": y}))(ys)

    @jax.jit
    @jax.vmap
    def built_inside(y):
        target = vi.from_numpyro(with_factor, y)
        return target.log_density({}, z, target.data)

    np.testing.assert_allclose(passed, expected, rtol=1e-6)
    np.testing.assert_allclose(built_inside(ys), expected, rtol=1e-6)


def test_data_are_no_constants():
    """The jaxpr of the density holds no constant as large as the data."""
    target = vi.from_numpyro(with_factor, np.arange(1000.0))
    jaxpr = jax.make_jaxpr(vi.flat(target).log_density)(jnp.zeros(1), {}, target.data)
    assert max((np.size(constant) for constant in jaxpr.consts), default=0) < 1000


def test_threads_do_not_disturb_each_other():
    """Targets built and evaluated in two threads at once have the densities of one thread."""
    z, results = {"z": jnp.array(0.3)}, {}

    def work(model, turns=10):
        def one():
            target = vi.from_numpyro(model, Y)
            return float(target.log_density({}, z, target.data))

        results[model] = {one() for _ in range(turns)}

    models = with_factor, with_scale
    threads = [threading.Thread(target=work, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for model in models:
        np.testing.assert_allclose(
            list(results[model]), [log_density(model, (Y,), {}, z)[0]], rtol=1e-6
        )
