"""Where families start: uniformly, at given values, or by numpyro's strategies."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from numpyro import distributions as dist
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints
from numpyro.infer import (
    init_to_feasible,
    init_to_mean,
    init_to_median,
    init_to_sample,
    init_to_uniform,
    init_to_value,
)

import vi_params as vi


def model():
    numpyro.sample("mu", dist.Normal(3.0, 1.0))
    numpyro.sample("tau", dist.Gamma(3.0, 1.0))
    numpyro.sample("cut", dist.ImproperUniform(constraints.ordered_vector, (), (2,)))
    numpyro.sample("p", dist.Dirichlet(jnp.array([1.0, 2.0, 5.0])))


PLAIN = {
    "mu": vi.Latent(()),
    "tau": vi.Latent((), constraints.positive),
    "cut": vi.Latent((2,), constraints.ordered_vector),
    "p": vi.Latent((3,), constraints.simplex),
}

TARGETS = {
    "numpyro": lambda: vi.from_numpyro(model),
    "plain": lambda: vi.target(lambda v, z, d: -(z["mu"] ** 2), PLAIN),
}

STRATEGIES = {
    "None": None,
    "median": init_to_median(num_samples=3),
    "mean": init_to_mean(),
    "mean, bare": init_to_mean,
    "sample": init_to_sample(),
    "uniform": init_to_uniform(radius=1.0),
    "feasible": init_to_feasible(),
    "value": init_to_value(values={"mu": 1.5}),
    "mapping": {"mu": 1.5, "tau": 0.5, "cut": jnp.array([1.0, 2.0]), "p": jnp.ones(3) / 3},
    "partial mapping": {"mu": 1, "cut": np.array([1.0, 2.0])},
}
FIXED = {"feasible", "mapping"}


def starts(target, init, num=2):
    """The latents at the starts from `num` keys, stacked."""
    guide = vi.guides.delta(target, init=init)

    @jax.jit
    @jax.vmap
    def start(key):
        params = vi.init_params(guide.declared, key)
        return guide.sample(params, key).latents

    return start(jax.random.split(jax.random.key(0), num))


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("name", STRATEGIES)
def test_starts_are_in_the_support_and_vary_by_key(kind, name):
    """Every strategy starts inside the supports, also where a prior cannot be sampled; all but
    those that fix every latent start elsewhere under another key."""
    target = TARGETS[kind]()
    latents = starts(target, STRATEGIES[name])
    for latent, declared in target.latents.items():
        assert np.all(np.isfinite(latents[latent]))
        assert np.all(declared.support(latents[latent]))
    same = {latent for latent in latents if np.array_equal(latents[latent][0], latents[latent][1])}
    assert (same == set(latents)) == (name in FIXED)


@pytest.mark.parametrize("kind", TARGETS)
def test_default_is_uniform_on_minus_two_to_two(kind):
    """Without init, the unconstrained coordinates are independent and uniform on (-2, 2)."""
    guide = vi.guides.mean_field(TARGETS[kind]())
    keys = jax.random.split(jax.random.key(0), 2000)
    locs = jax.jit(jax.vmap(lambda k: vi.init_params(guide.declared, k)["guide"]["loc"]))(keys)
    assert np.all(np.abs(locs) < 2.0)
    np.testing.assert_allclose(locs.mean(0), 0.0, atol=4 * 2 / np.sqrt(3 * 2000))
    np.testing.assert_allclose(locs.var(0), 4 / 3, rtol=0.1)
    assert np.max(np.abs(np.corrcoef(locs, rowvar=False) - np.eye(locs.shape[1]))) < 0.1


def test_strategies_follow_the_prior():
    """Mean starts at the prior's mean, uniform within its radius, value at its value."""
    target = vi.from_numpyro(model)
    mean = starts(target, init_to_mean())
    np.testing.assert_allclose(mean["mu"], 3.0)
    np.testing.assert_allclose(mean["tau"], 3.0, rtol=1e-6)
    np.testing.assert_allclose(mean["p"][0], np.array([1, 2, 5]) / 8, rtol=1e-5)
    assert np.all(np.abs(starts(target, init_to_uniform(radius=0.1))["mu"]) < 0.1)
    value = starts(target, init_to_value(values={"mu": 1.5}))
    np.testing.assert_array_equal(value["mu"], [1.5, 1.5])
    assert value["tau"][0] != value["tau"][1]


def test_mapping_of_values():
    """A mapping fixes the latents it names, ints included, and leaves the others uniform."""
    found = starts(vi.from_numpyro(model), STRATEGIES["partial mapping"])
    np.testing.assert_allclose(found["mu"], [1.0, 1.0])
    np.testing.assert_allclose(found["cut"], [[1.0, 2.0]] * 2, rtol=1e-6)
    assert found["tau"][0] != found["tau"][1]


def moving():
    a = numpyro.sample("a", dist.Uniform(0.0, 1.0))
    numpyro.sample("b", dist.Uniform(a, 2.0))


@pytest.mark.parametrize("init", [{"a": 0.9, "b": 1.5}, {"b": 1.5}, {"a": 0.5}, init_to_mean()])
def test_starts_under_a_moving_support(init):
    """Values given are kept, and the others are in the support they leave: b ~ Uniform(a, 2)."""
    found = starts(vi.from_numpyro(moving), init, num=20)
    for name, value in init.items() if isinstance(init, dict) else ():
        np.testing.assert_allclose(found[name], value, rtol=1e-4)
    assert np.all((found["a"] < found["b"]) & (found["b"] < 2.0))


def walk():
    def step(x, _):
        return numpyro.sample("x", dist.Normal(x, 1.0)), None

    scan(step, 0.0, None, length=3)


def test_strategies_reach_into_scan():
    """A latent inside a scan starts at the strategy's values, step by step."""
    target = vi.from_numpyro(walk)
    np.testing.assert_array_equal(starts(target, init_to_feasible())["x"], jnp.zeros((2, 3)))
    given = starts(target, init_to_value(values={"x": jnp.arange(3.0)}))["x"]
    np.testing.assert_array_equal(given[0], jnp.arange(3.0))


@pytest.mark.parametrize("family", [vi.guides.mean_field, vi.guides.full_rank])
def test_init_scale(family):
    """init_scale is the standard deviation of every unconstrained coordinate at the start."""
    guide = family(vi.from_numpyro(model), init={"mu": 7.0}, init_scale=0.25)

    @jax.jit
    def positions(key):
        params = vi.init_params(guide.declared, key)
        keys = jax.random.split(key, 4000)
        return jax.vmap(lambda key: guide.sample(params, key).position)(keys)

    position = positions(jax.random.key(0))
    np.testing.assert_allclose(position.std(0), 0.25, rtol=0.06)
    np.testing.assert_allclose(position[:, 0].mean(), 7.0, atol=0.02)


def boxed(y):
    a = numpyro.sample("a", dist.Uniform(jnp.zeros(3), 2 * jnp.ones(3)).to_event(1))
    numpyro.sample("y", dist.Normal(a, 1.0), obs=y)


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap])
def test_values_given_inside_a_transformation(transform):
    """A target, its guide and a start at given values can be built under jit and vmap."""

    def loc(y):
        guide = vi.guides.mean_field(vi.from_numpyro(boxed, y), init={"a": np.ones(3)})
        return vi.init_params(guide.declared, jax.random.key(0))["guide"]["loc"] + 0 * y

    ys = jnp.ones((2, 3))
    found = transform(loc)(ys if transform is jax.vmap else ys[0])
    np.testing.assert_allclose(found, 0.0, atol=1e-6)


mean_field = vi.guides.mean_field
ERRORS = {
    "misspelt latent": (
        lambda target: mean_field(target, init={"tua": 1.0}),
        KeyError,
        ["unknown: 'tua'", "did you mean 'tau'?", "Where: init"],
    ),
    "wrong shape": (
        lambda target: mean_field(target, init={"cut": jnp.zeros(3)}),
        ValueError,
        ["Expected: shape (2,)", "Received: shape (3,)", "init, latent 'cut'"],
    ),
    "outside the support": (
        lambda target: mean_field(target, init={"tau": -1.0}),
        ValueError,
        ["outside", "Positive", "Received: -1", "init, latent 'tau'"],
    ),
    "on the boundary": (
        lambda target: mean_field(target, init={"p": jnp.array([0.0, 0.0, 1.0])}),
        ValueError,
        ["interior of Simplex", "init, latent 'p'"],
    ),
    "no strategy": (
        lambda target: mean_field(target, init=0.0),
        TypeError,
        ["None, a mapping", "numpyro.infer.init_to_*", "0.0 (float)"],
    ),
    "scale zero": (
        lambda target: mean_field(target, init_scale=0.0),
        ValueError,
        ["init_scale > 0", "0.0"],
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_was_expected_and_received(case):
    """A wrong start is refused, with what was expected, what was received, and where."""
    build, kind, fragments = ERRORS[case]
    with pytest.raises(kind) as caught:
        build(vi.from_numpyro(model))
    for fragment in fragments:
        assert fragment in str(caught.value)
