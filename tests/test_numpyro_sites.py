"""What a NumPyro program may hold: supports fixed and moving, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest
from numpyro import distributions as dist
from numpyro.distributions import constraints

import vi_params as vi

X = jnp.arange(6.0).reshape(3, 2) / 5
Y = jnp.array([0.3, -1.2, 0.7])


def fixed_bounds(y):
    numpyro.sample("numbers", dist.Uniform(0.0, 2.0))
    numpyro.sample("arrays", dist.Uniform(jnp.zeros(3), 2 * jnp.ones(3)).to_event(1))
    numpyro.sample("truncated", dist.TruncatedNormal(0.0, 1.0, low=jnp.array(-1.0), high=1.0))
    top = jax.jit(lambda: jnp.where(jnp.arange(3) > 0, 1.0, 2.0))()
    numpyro.sample("jitted", dist.Uniform(0.0, top).to_event(1))
    numpyro.sample("sized", dist.Uniform(0.0, jnp.arange(1.0, y.shape[0] + 1)).to_event(1))


def moving_bounds(y):
    a = numpyro.sample("a", dist.Uniform(0.0, 1.0))
    numpyro.sample("on_latent", dist.Uniform(a, 2.0))
    numpyro.sample("on_data", dist.Uniform(0.0, 1.0 + y.max()))
    top = numpyro.param("top", 2.0, constraint=constraints.positive)
    numpyro.sample("on_param", dist.Uniform(0.0, top))


def test_fixed_supports_are_static():
    """Bounds that depend on no latent, datum or param are found, arrays made inside included."""
    latents = vi.from_numpyro(fixed_bounds, Y).latents
    assert not any(latent.is_dynamic for latent in latents.values())
    upper = {
        "numbers": 2.0,
        "arrays": [2.0, 2.0, 2.0],
        "truncated": 1.0,
        "jitted": [2.0, 1.0, 1.0],
        "sized": [1.0, 2.0, 3.0],
    }
    for name, bound in upper.items():
        support = latents[name].support
        support = getattr(support, "base_constraint", support)
        np.testing.assert_array_equal(support.upper_bound, np.asarray(bound), err_msg=name)


def test_moving_supports_are_dynamic():
    """Bounds that depend on a latent, on data or on a param are marked, and followed."""
    target = vi.from_numpyro(moving_bounds, Y)
    assert {name for name, latent in target.latents.items() if latent.is_dynamic} == {
        "on_latent",
        "on_data",
        "on_param",
    }
    u = {name: jnp.array(40.0) for name in target.latents}  # the upper ends of the supports
    ends, _ = target.constrain({"top": jnp.array(3.0)}, u, {"y": jnp.array([5.0])})
    np.testing.assert_allclose(ends["on_latent"], 2.0, rtol=1e-4)
    np.testing.assert_allclose(ends["on_data"], 6.0, rtol=1e-4)
    np.testing.assert_allclose(ends["on_param"], 3.0, rtol=1e-4)


def nested_uniform():
    a = numpyro.sample("a", dist.Uniform(0.0, 1.0))
    numpyro.sample("b", dist.Uniform(a, 2.0))


@pytest.mark.slow
@pytest.mark.parametrize("family", [vi.guides.mean_field, vi.guides.full_rank])
def test_dynamic_support_is_never_left(family):
    """With b ~ Uniform(a, 2): 2,000 steps without an infinite loss, an ELBO close to the evidence
    (log 1 = 0), and one density whether a draw is sampled, scored or rescored."""
    target = vi.from_numpyro(nested_uniform)
    guide = family(target)
    svi = vi.svi(vi.elbo(target, guide), optax.adam(2e-2))

    @jax.jit
    def fit(key):
        state, losses = vi.run(svi, svi.init(key), key, 2000)
        draws = jax.vmap(lambda k: guide.sample(state.params, k))(jax.random.split(key, 50))
        scored = jax.vmap(lambda draw: guide.log_prob(state.params, draw.latents))(draws)
        rescored = jax.vmap(lambda draw: guide.rescore(state.params, draw))(draws)
        return losses, draws, scored, rescored

    losses, draws, scored, rescored = fit(jax.random.key(0))
    assert np.all(np.isfinite(losses))
    assert abs(np.mean(losses[-500:])) < 0.05
    assert np.all((draws.latents["a"] < draws.latents["b"]) & (draws.latents["b"] < 2.0))
    np.testing.assert_allclose(draws.log_prob, scored, atol=2e-3)
    np.testing.assert_allclose(draws.log_prob, rescored, atol=1e-4)


def discrete(y):
    k = numpyro.sample("k", dist.Bernoulli(0.5))
    numpyro.sample("y", dist.Normal(k, 1.0), obs=y)


def too_large_a_batch(y):
    z = numpyro.sample("z", dist.Normal())
    with numpyro.plate("rows", y.shape[0], subsample_size=4):
        numpyro.sample("y", dist.Normal(z, 1.0), obs=numpyro.subsample(y, 0))


def branching(y):
    z = numpyro.sample("z", dist.Normal(1.0 if y.sum() > 0 else 0.0, 1.0))
    numpyro.sample("y", dist.Normal(z, 1.0), obs=y)


def selecting(y):
    z = numpyro.sample("z", dist.Normal())
    numpyro.sample("y", dist.Normal(z, 1.0), obs=y[y > 0])


def counting(y):
    for i in range(y[0]):
        numpyro.sample(f"z{i}", dist.Normal())


def leaving(y):
    numpyro.sample("z", dist.Normal(np.asarray(y).mean(), 1.0))


def moving_constraint(y):
    numpyro.param("scale", 1.0, constraint=constraints.greater_than(y.min()))


CONCRETE = ["needs the value of an array", "static", "Where: "]
REFUSED = {
    "batch larger than N": (
        too_large_a_batch,
        ValueError,
        ["plate 'rows'", "from 1 to 3", "Received: 4"],
    ),
    "branch on data": (branching, TypeError, [*CONCRETE, "branching"]),
    "boolean selection": (selecting, TypeError, [*CONCRETE, "selecting"]),
    "count from data": (counting, TypeError, [*CONCRETE, "counting"]),
    "NumPy on data": (leaving, TypeError, [*CONCRETE, "leaving"]),
    "constraint from data": (moving_constraint, ValueError, ["bounds", "'scale'"]),
}


def test_a_discrete_latent_has_no_flat_form():
    """A model with a discrete latent is a target; families, which need unconstrained coordinates,
    are refused by the name of the latent."""
    target = vi.from_numpyro(discrete, Y)
    assert target.latents["k"].is_discrete
    for build in (vi.flat, vi.guides.mean_field, vi.guides.delta):
        with pytest.raises(ValueError, match=r"discrete ones: \['k'\]"):
            build(target)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_programs(name):
    """What cannot be handled is refused when the target is built, by the name of its site."""
    model, kind, fragments = REFUSED[name]
    y = jnp.array([1, 2, 3]) if name == "count from data" else Y
    with pytest.raises(kind) as caught:
        vi.from_numpyro(model, y)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_wrong_arguments_are_refused():
    """Arguments the model does not take are refused, its signature shown."""
    with pytest.raises(TypeError, match=r"Expected: \(y\)[\s\S]*2 positional[\s\S]*discrete"):
        vi.from_numpyro(discrete, Y, Y)


def test_missing_data_are_refused():
    """Data without an array that the model takes are refused by its name."""
    target = vi.from_numpyro(nested_observed, Y)
    with pytest.raises(KeyError, match="missing: 'y'"):
        target.log_density({}, {"z": 0.0}, {"x": Y})
    with pytest.raises(TypeError, match="mapping by argument name"):
        target.log_density({}, {"z": 0.0}, Y)


def nested_observed(y):
    numpyro.sample("y", dist.Normal(numpyro.sample("z", dist.Normal()), 1.0), obs=y)
