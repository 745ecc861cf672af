"""Networks in NumPyro programs: weights as parameters, weights under priors, mutable state."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from numpyro import distributions as dist
from numpyro.contrib.module import (
    eqx_module,
    flax_module,
    nnx_module,
    random_eqx_module,
    random_flax_module,
    random_nnx_module,
)

import vi_params as vi

eqx = pytest.importorskip("equinox")
nn = pytest.importorskip("flax.linen")
nnx = pytest.importorskip("flax.nnx")

X = jnp.arange(6.0).reshape(3, 2) / 5
Y = jnp.array([0.3, -1.2, 0.7])

OUTSIDE = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
NETWORKS = {
    "flax": lambda: flax_module("net", nn.Dense(1), input_shape=(3, 2)),
    "nnx": lambda: nnx_module("net", nnx.Linear(2, 1, rngs=nnx.Rngs(0))),
    "nnx, made outside": lambda: nnx_module("net", OUTSIDE),
    "eqx": lambda: jax.vmap(eqx_module("net", eqx.nn.MLP(2, 1, 3, 1, key=jax.random.key(0)))),
}


def regression(network):
    def model(x, y):
        noise = numpyro.sample("noise", dist.HalfNormal(1.0))
        numpyro.sample("y", dist.Normal(network()(x)[:, 0], noise), obs=y)

    return model


@pytest.mark.parametrize("name", NETWORKS)
def test_network_weights_are_declared_and_learnt(name):
    """A network's weights are one declared parameter; every weight has a finite gradient, a step
    along it lowers the loss, and a network made outside the model stays as it was."""
    target = vi.from_numpyro(regression(NETWORKS[name]), X, Y)
    assert list(target.declared) == ["net$params"]
    objective = vi.elbo(target, vi.guides.mean_field(target))
    params = vi.init_params(objective.declared, jax.random.key(0))
    loss = jax.jit(lambda params: objective.loss(params, jax.random.key(1))[0])
    slope = jax.jit(jax.grad(lambda params: objective.loss(params, jax.random.key(1))[0]))(params)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(slope))
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(slope["net$params"]))
    lower = jax.tree.map(lambda p, g: p - 1e-4 * g, params, slope)
    assert loss(lower) < loss(params)
    np.testing.assert_array_equal(OUTSIDE(X), nnx.Linear(2, 1, rngs=nnx.Rngs(0))(X))


RANDOM_NETWORKS = {
    "flax": lambda: random_flax_module("net", nn.Dense(1), dist.Normal(), input_shape=(3, 2)),
    "nnx": lambda: random_nnx_module("net", nnx.Linear(2, 1, rngs=nnx.Rngs(0)), dist.Normal()),
    "eqx": lambda: jax.vmap(
        random_eqx_module("net", eqx.nn.Linear(2, 1, key=jax.random.key(0)), dist.Normal())
    ),
}


@pytest.mark.parametrize("name", RANDOM_NETWORKS)
def test_random_network_has_latent_weights(name):
    """Weights under a prior are latents, and whatever parameters are left over have no effect."""
    target = vi.from_numpyro(regression(RANDOM_NETWORKS[name]), X, Y)
    assert sorted(latent.shape for latent in target.latents.values() if latent.shape) in (
        [(1,), (2, 1)],
        [(1,), (1, 2)],
    )
    objective = vi.elbo(target, vi.guides.mean_field(target))
    params = vi.init_params(objective.declared, jax.random.key(0))
    slope = jax.jit(jax.grad(lambda params: objective.loss(params, jax.random.key(1))[0]))(params)
    assert np.all(slope.pop("guide")["loc"] != 0)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(slope))


def test_partly_random_network():
    """With a prior on the bias only, the bias is a latent and the kernel a parameter."""

    def network():
        prior = {"bias": dist.Normal()}
        return random_flax_module("net", nn.Dense(1), prior, input_shape=(3, 2))

    target = vi.from_numpyro(regression(network), X, Y)
    assert "net/bias" in target.latents
    params = vi.init_params(target.declared, jax.random.key(0))
    assert [leaf.shape for leaf in jax.tree.leaves(params)] == [(2, 1)]


class BatchNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=False)(x)


def stateful(y):
    net = flax_module("net", BatchNorm(), input_shape=(3, 2), mutable=["batch_stats"])
    numpyro.sample("y", dist.Normal(net(X)[:, 0], 1.0), obs=y)


def test_mutable_state_is_refused():
    """Running statistics would change from call to call: refused by the name of their site."""
    with pytest.raises(ValueError, match=r"mutable[\s\S]*running statistics") as caught:
        vi.from_numpyro(stateful, Y)
    assert "'net$state'" in str(caught.value)
