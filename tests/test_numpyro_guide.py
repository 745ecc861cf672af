"""NumPyro programs as guides: their density is NumPyro's own; parameters are found or given."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from numpyro import distributions as dist
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.infer import Trace_ELBO, autoguide, init_to_value
from numpyro.infer.util import log_density

import vi_params as vi

Y = jnp.array([0.3, -1.2, 0.7])


def model(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = numpyro.sample("tau", dist.HalfNormal(1.0))
    with numpyro.plate("rows", y.shape[0]):
        theta = numpyro.sample("theta", dist.Normal(mu, 1.0))
        numpyro.sample("y", dist.Normal(theta, tau), obs=y)


def program(y):
    loc = numpyro.param("mu_loc", jax.random.normal)
    mu = numpyro.sample("mu", dist.Normal(loc, 0.5))
    width = numpyro.param("width", 3.0, constraint=constraints.positive)
    numpyro.sample("tau", dist.LogNormal(0.0, width))
    with numpyro.plate("rows", y.shape[0]):
        weight = numpyro.param("weight", 0.5 * jnp.ones(3), event_dim=0)
        scale = numpyro.param("scale", jnp.ones(3), constraint=constraints.positive, event_dim=0)
        numpyro.sample("theta", dist.Normal(mu + weight * y, scale))


def declared_program(values, y):
    numpyro.sample("mu", dist.Normal(values["loc"], 0.5))
    numpyro.sample("tau", dist.LogNormal(0.0, 0.5))
    with numpyro.plate("rows", y.shape[0]):
        numpyro.sample("theta", dist.Normal(y, 1.0))


DECLARED = {"loc": jnp.array(0.3)}


@pytest.fixture(scope="module")
def target():
    return vi.from_numpyro(model, Y)


def test_density_is_numpyro_s():
    """log_prob, rescore and a draw's own density are numpyro's log_density of the program, also
    where one site's distribution takes another's value."""
    guide = vi.numpyro_guide(program, Y)
    params = vi.init_params(guide.declared, jax.random.key(0))
    draw = guide.sample(params, jax.random.key(1))
    values = vi.constrain(guide.declared, params)
    expected = log_density(program, (Y,), {}, {**values, **draw.latents})[0]
    np.testing.assert_allclose(draw.log_prob, expected, rtol=1e-5)
    np.testing.assert_allclose(guide.log_prob(params, draw.latents), expected, rtol=1e-5)
    np.testing.assert_allclose(guide.rescore(params, draw), expected, rtol=1e-5)


@pytest.mark.parametrize("kind", [autoguide.AutoMultivariateNormal, autoguide.AutoDiagonalNormal])
def test_auxiliary_sites_are_positions_not_latents(kind):
    """A draw of an autoguide over one vector holds the model's latents; its position the vector;
    its density is numpyro's, the Jacobian included."""
    program = kind(model)
    guide = vi.numpyro_guide(program, Y)

    @jax.jit
    def both(key):
        params = vi.init_params(guide.declared, key)
        draw = guide.sample(params, key)
        fixed = {**vi.constrain(guide.declared, params), **draw.position}
        return draw, log_density(handlers.seed(program, key), (Y,), {}, fixed)[0]

    draw, expected = both(jax.random.key(0))
    assert draw.latents.keys() == {"mu", "tau", "theta"}
    assert draw.position.keys() == {"_auto_latent"}
    np.testing.assert_allclose(draw.log_prob, expected, rtol=1e-5)


@pytest.mark.slow
def test_elbo_is_numpyro_s(target):
    """At the same parameters of AutoNormal, our mean loss over 4,000 draws is that of numpyro's
    Trace_ELBO within four standard errors of their difference."""
    program = autoguide.AutoNormal(model, init_loc_fn=init_to_value(values={"tau": 0.8}))
    objective = vi.elbo(target, vi.numpyro_guide(program, Y))
    params = vi.init_params(objective.declared, jax.random.key(0))
    values = vi.constrain(objective.declared, params)

    @jax.jit
    @jax.vmap
    def ours(key):
        return objective.loss(params, key)[0]

    @jax.jit
    @jax.vmap
    def theirs(key):
        return Trace_ELBO().loss(key, values, model, program, Y)

    a = np.asarray(ours(jax.random.split(jax.random.key(1), 4000)))
    b = np.asarray(theirs(jax.random.split(jax.random.key(2), 4000)))
    error = np.sqrt(a.var() / a.size + b.var() / b.size)
    assert abs(a.mean() - b.mean()) < 4 * error
    assert error < 0.1


def test_discovered_parameters():
    """Param sites keep their constraints and starts (lazy ones by key), and the plates that their
    event_dim leaves to the left."""
    declared = vi.numpyro_guide(program, Y).declared
    assert {name: param.plates for name, param in declared.items()} == {
        "mu_loc": (),
        "width": (),
        "weight": ("rows",),
        "scale": ("rows",),
    }
    one, two = (vi.constrain(declared, vi.init_params(declared, jax.random.key(k))) for k in (0, 1))
    assert one["mu_loc"] != two["mu_loc"]
    np.testing.assert_allclose(one["width"], 3.0, rtol=1e-6)
    np.testing.assert_allclose(one["weight"], 0.5)


def test_guide_takes_the_target_s_data(target):
    """Under an objective, a guide's argument follows the target's data of the same name."""
    objective = vi.elbo(target, vi.numpyro_guide(declared_program, jnp.zeros(3), declared=DECLARED))
    params = vi.init_params(objective.declared, jax.random.key(0))

    @jax.jit
    def theta(y):
        return objective.guide.sample(params, jax.random.key(1), {"y": y}).latents["theta"]

    np.testing.assert_allclose(theta(Y + 7.0) - theta(jnp.zeros(3)), Y + 7.0, atol=1e-5)
    np.testing.assert_array_equal(objective.data["y"], Y)


def test_guide_brings_data_of_its_own(target):
    """Arguments that only the guide takes join the objective's data, and count."""

    def amortised(y, features):
        declared_program({"loc": features.sum()}, y)

    objective = vi.elbo(target, vi.numpyro_guide(amortised, Y, jnp.ones(2)))
    assert objective.data.keys() == {"y", "features"}
    key = jax.random.key(0)
    losses = {
        float(objective.loss({}, key, objective.data | {"features": f})[0]) for f in np.eye(2)
    }
    other = float(objective.loss({}, key, objective.data | {"features": jnp.zeros(2)})[0])
    assert len(losses) == 1
    assert other not in losses


def test_handlers_around_a_program():
    """scale and mask around a guide's sites count in its density as in numpyro."""

    def scaled():
        with handlers.scale(scale=2.0):
            numpyro.sample("a", dist.Normal(0.0, 1.0))
        with handlers.mask(mask=False):
            numpyro.sample("b", dist.Normal(0.0, 1.0))

    draw = vi.numpyro_guide(scaled).sample({}, jax.random.key(0))
    expected = 2.0 * dist.Normal().log_prob(draw.latents["a"])
    np.testing.assert_allclose(draw.log_prob, expected, rtol=1e-6)


def test_building_inside_vmap(target):
    """A guide built under vmap from traced data gives the draws of guides built one by one."""
    ys = jnp.stack([Y, Y - 1.0])

    def theta(y):
        guide = vi.numpyro_guide(declared_program, y, declared=DECLARED)
        params = vi.init_params(guide.declared, jax.random.key(0))
        return guide.sample(params, jax.random.key(1)).latents["theta"]

    np.testing.assert_allclose(
        jax.jit(jax.vmap(theta))(ys), jnp.stack([theta(y) for y in ys]), rtol=1e-6
    )


def observing(y):
    numpyro.sample("mu", dist.Normal(), obs=y)


def score_auxiliary():
    guide = vi.numpyro_guide(autoguide.AutoMultivariateNormal(model), Y)
    latents = {"mu": 0.0, "tau": 1.0, "theta": Y}
    guide.log_prob(vi.init_params(guide.declared, jax.random.key(0)), latents)


def auto_under_vmap():
    jax.vmap(lambda y: vi.numpyro_guide(autoguide.AutoNormal(model), y) and y)(Y[None])


ERRORS = {
    "declared twice": (
        lambda: vi.numpyro_guide(lambda values, y: program(y), Y, declared=DECLARED),
        ValueError,
        ["two ways", "either declared= or numpyro.param", "['mu_loc', 'width', 'weight', 'scale']"],
    ),
    "observed site": (
        lambda: vi.numpyro_guide(observing, Y),
        ValueError,
        ["observes nothing", "without obs=", "['mu']"],
    ),
    "auxiliary sites": (score_auxiliary, ValueError, ["cannot score", "_auto_latent", "rescore"]),
    "autoguide of traced data": (auto_under_vmap, TypeError, ["concrete", "outside jit and vmap"]),
    "wrong arguments": (
        lambda: vi.numpyro_guide(program, Y, width=2),
        TypeError,
        ["Expected: (y)", "keywords ['width']"],
    ),
    "missing parameters": (
        lambda: vi.numpyro_guide(program, Y).sample({"mu_lok": 0.0}, jax.random.key(0)),
        KeyError,
        ["missing: 'mu_loc'", "did you mean 'mu_loc'"],
    ),
    "raw key": (
        lambda: vi.numpyro_guide(program, Y).sample({}, jax.random.PRNGKey(0)),
        TypeError,
        ["typed key", "uint32"],
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_was_expected_and_received(case):
    """A wrong program is refused, with what was expected, what was received, and where."""
    build, kind, fragments = ERRORS[case]
    with pytest.raises(kind) as caught:
        build()
    for fragment in fragments:
        assert fragment in str(caught.value)
