"""What an objective refuses, and in which words."""

import jax
import jax.numpy as jnp
import numpyro
import optax
import pytest
from numpyro import distributions as dist
from numpyro.distributions import constraints
from numpyro.infer.autoguide import AutoNormal

import vi_params as vi

KEY = jax.random.key(0)


def build(q, *, latents=None, declared=None, **options):
    """The ELBO of a guide by hand on a flat target."""
    target = vi.target(
        lambda v, z, d: jnp.zeros(()),
        latents or {"z": vi.Latent((2,)), "tau": vi.Latent((), constraints.positive)},
        declared=declared or {},
    )
    return vi.elbo(target, vi.guide({"loc": jnp.zeros(2)}, q), **options)


def good(values):
    return {"z": dist.Normal(values["loc"], 1.0), "tau": dist.LogNormal(0.0, 1.0)}


def with_data():
    target = vi.target(
        lambda v, z, d: -jnp.sum((z["z"] - d["y"]) ** 2),
        {"z": vi.Latent()},
        data={"y": jnp.ones(3)},
    )
    return vi.elbo(target, vi.guides.mean_field(target))


PARAMS = {"guide": {"loc": jnp.zeros(1), "scale": jnp.zeros(1)}}


def delta_method(values):
    """A TransformedDistribution onto the wrong side: minus a log-normal."""
    onto_negative = dist.transforms.AffineTransform(0.0, -1.0)
    return good(values) | {
        "tau": dist.TransformedDistribution(
            dist.Normal(), [dist.transforms.ExpTransform(), onto_negative]
        )
    }


def by_program(sample_tau):
    target = vi.from_numpyro(lambda: numpyro.sample("tau", dist.HalfNormal(1.0)))
    return vi.elbo(target, vi.numpyro_guide(lambda: numpyro.sample("tau", sample_tau)))


def incompatible_data():
    target = vi.target(lambda v, z, d: -(z["z"] ** 2), {"z": vi.Latent()}, data=jnp.ones(3))
    guide = vi.numpyro_guide(lambda x: numpyro.sample("z", dist.Normal(x.sum(), 1.0)), jnp.ones(2))
    vi.elbo(target, guide)


ERRORS = {
    "a name declared twice": (
        lambda: build(good, declared={"loc": jnp.zeros(2)}),
        ValueError,
        ["used twice", "parameters of target and guide", "Received: 'loc'", "name="],
    ),
    "a missing latent": (
        lambda: build(lambda v: {"z": good(v)["z"]}),
        KeyError,
        ["latents of the guide", "missing: 'tau'", "target and guide"],
    ),
    "an extra latent": (
        lambda: build(lambda v: good(v) | {"w": dist.Normal()}),
        KeyError,
        ["unknown: 'w'"],
    ),
    "a misspelt latent": (
        lambda: build(lambda v: {"z": good(v)["z"], "tua": good(v)["tau"]}),
        KeyError,
        ["unknown: 'tua'", "missing: 'tau'", "did you mean 'tau'?"],
    ),
    "one distribution for two latents": (
        lambda: build(lambda v: dist.Normal()),
        ValueError,
        ["one unnamed latent", "['z', 'tau']", "return a mapping"],
    ),
    "a wrong shape": (
        lambda: build(lambda v: good(v) | {"z": dist.Normal(jnp.zeros(3), 1.0)}),
        ValueError,
        ["Expected: shape (2,)", "Received: shape (3,)", "latent 'z'"],
    ),
    "a normal for a positive latent": (
        lambda: build(lambda v: good(v) | {"tau": dist.Normal()}),
        ValueError,
        ["Expected: Positive(0)", "Received: Real()", "latent 'tau'", "biject_to"],
    ),
    "a transformed distribution on the wrong side": (
        lambda: build(delta_method),
        ValueError,
        ["Expected: Positive(0)", "latent 'tau'"],
    ),
    "a positive vector for a simplex": (
        lambda: build(
            lambda v: {"p": dist.LogNormal(jnp.zeros(3), 1.0)},
            latents={"p": vi.Latent((3,), constraints.simplex)},
        ),
        ValueError,
        ["Expected: Simplex()", "latent 'p'"],
    ),
    "a program on the wrong support": (
        lambda: by_program(dist.Normal()),
        ValueError,
        ["Expected: Positive(0)", "Received: Real()", "latent 'tau'"],
    ),
    "a distribution that is not reparameterised": (
        lambda: build(lambda v: good(v) | {"z": dist.VonMises(v["loc"], 1.0)}),
        ValueError,
        ["Expected: distributions with has_rsample", "VonMises at 'z'", "estimators.mixed()"],
    ),
    "a discrete distribution": (
        lambda: build(lambda v: good(v) | {"tau": dist.Poisson(1.0)}),
        ValueError,
        ["outside the target's support", "IntegerNonnegative", "latent 'tau'"],
    ),
    "an entropy that is not known": (
        lambda: build(
            lambda v: good(v) | {"tau": dist.HalfNormal(1.0)},
            estimator=vi.estimators.closed_form_entropy(),
        ),
        ValueError,
        ["entropy", "Gaussian family", "HalfNormal at 'tau'", "closed_form_entropy", "pathwise()"],
    ),
    "no distribution": (
        lambda: build(lambda v: {"z": jnp.zeros(2)}),
        TypeError,
        ["must return distributions", "q of vi.guide"],
    ),
    "a function of three arguments": (
        lambda: build(lambda values, data, key: good(values)),
        TypeError,
        ["q(values) or q(values, data)", "q(values, data, key)"],
    ),
    "no particles": (
        lambda: build(good, num_particles=0),
        ValueError,
        ["num_particles >= 1", "Received: 0", "vi.elbo"],
    ),
    "a fraction of particles": (
        lambda: build(good, num_particles=1.5),
        TypeError,
        ["an int >= 1", "1.5 (float)"],
    ),
    "an empty batch": (lambda: build(good, batch_size=0), ValueError, ["batch_size >= 1"]),
    "paired noise for a guide by hand": (
        lambda: build(good, num_particles=2, noise=vi.noise.antithetic()),
        ValueError,
        ["random keys", "Expected: vi.noise.iid()", "Received: vi.noise.antithetic()"],
    ),
    "an odd number of pairs": (
        lambda: vi.elbo(
            target := vi.target(lambda v, z, d: -(z["z"] ** 2), {"z": vi.Latent()}),
            vi.guides.mean_field(target),
            num_particles=3,
            noise=vi.noise.antithetic(),
        ),
        ValueError,
        ["in pairs", "even num_particles", "Received: 3"],
    ),
    "data that cannot be joined": (
        incompatible_data,
        TypeError,
        ["cannot be joined", "Expected: mappings from argument names"],
    ),
    "renamed data": (
        lambda: with_data().loss(PARAMS, KEY, {"x": jnp.ones(3)}),
        KeyError,
        ["names of the data", "missing: 'y'", "unknown: 'x'"],
    ),
    "restructured data": (
        lambda: with_data().loss(PARAMS, KEY, (jnp.ones(3),)),
        ValueError,
        ["structure of the data has changed", "{'y': *}", "objective.data"],
    ),
    "data of a target without": (
        lambda: vi.solvers.deterministic(
            vi.target(lambda v, z, d: -(z["z"] ** 2), {"z": vi.Latent()}), KEY, jnp.ones(3)
        ),
        ValueError,
        ["structure of the data has changed", "built without data"],
    ),
    "restructured data in a step": (
        lambda: vi.svi(with_data(), optax.sgd(0.1)).init(KEY, data=[jnp.ones(3)]),
        ValueError,
        ["structure of the data has changed"],
    ),
    "unknown params": (
        lambda: with_data().loss(PARAMS | {"guidance": jnp.zeros(1)}, KEY),
        KeyError,
        ["names of the params", "unknown: 'guidance'", "did you mean 'guide'?"],
    ),
    "an int for a key": (
        lambda: with_data().loss(PARAMS, 7),
        TypeError,
        ["typed key", "the int 7", "key=jax.random.key(7)", "objective.loss"],
    ),
    "several keys": (
        lambda: with_data().loss(PARAMS, jax.random.split(KEY, 2)),
        TypeError,
        ["shape ()", "shape (2,)", "jax.vmap over the keys"],
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_was_expected_and_received(case):
    """What does not fit is refused when the objective is built or traced, with what was expected,
    what was received, where, and the way out."""
    refused, kind, fragments = ERRORS[case]
    with pytest.raises(kind) as caught:
        refused()
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_the_cases_err_by_one_thing_only():
    """The guide that the cases vary is accepted as it stands."""
    objective = build(good, num_particles=2)
    params = vi.init_params(objective.declared, KEY)
    assert jnp.isfinite(objective.loss(params, KEY)[0])
    with_data().loss(PARAMS, KEY, {"y": jnp.ones(5)})


def test_one_declaration_may_serve_both():
    """A name in target and guide is accepted where it is the same declaration."""
    shared = vi.Param(jnp.zeros(()))
    target = vi.target(
        lambda v, z, d: dist.Normal(v["loc"], 1.0).log_prob(z["z"]),
        {"z": vi.Latent()},
        declared={"loc": shared},
    )
    objective = vi.elbo(target, vi.guide({"loc": shared}, lambda v: dist.Normal(v["loc"], 1.0)))
    params = vi.init_params(objective.declared, KEY)
    assert params.keys() == {"loc"}
    assert objective.loss(params, KEY)[0] == pytest.approx(0.0, abs=1e-6)


def normal_target():
    return vi.target(lambda v, z, d: -0.5 * z["z"] ** 2, {"z": vi.Latent(())})


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda t, g: vi.elbo(g, t), "Expected: Target"),
        (lambda t, g: vi.elbo(t, t), "Expected: Guide"),
        (lambda t, g: vi.elbo(t, g, estimator="pathwise"), "Expected: Estimator"),
        (lambda t, g: vi.elbo(t, g, estimator=vi.estimators.pathwise), r"pathwise\(...\)"),
        (lambda t, g: vi.elbo(t, g, noise=vi.noise.sobol), r"sobol\(...\)"),
        (lambda t, g: vi.guides.mean_field(lambda y: None), "Expected: Target"),
        (lambda t, g: vi.elbo(t, AutoNormal(lambda: None)), "Expected: Guide"),
        (lambda t, g: vi.fit(t, key=jax.random.key(0)), "Expected: Objective"),
        (lambda t, g: vi.svi(vi.elbo(t, g), numpyro.optim.Adam(0.1)), "optax"),
    ],
)
def test_arguments_of_the_wrong_kind(build, expected):
    """What is expected, what came, and where, for each argument that a beginner may mix up."""
    target = normal_target()
    with pytest.raises(TypeError, match=expected) as error:
        build(target, vi.guides.mean_field(target))
    assert "Received: " in str(error.value)
