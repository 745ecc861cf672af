"""Every guide, the same laws: pure draws, one density, finite gradients, independent keys."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from numpyro import distributions as dist
from numpyro.distributions import constraints
from numpyro.infer import autoguide

import vi_params as vi

Y = jnp.array([0.3, -1.2, 0.7])


def model(y):
    """A location for each row, their common mean, and a scale."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = numpyro.sample("tau", dist.HalfNormal(1.0))
    with numpyro.plate("rows", y.shape[0]):
        theta = numpyro.sample("theta", dist.Normal(mu, 1.0))
        numpyro.sample("y", dist.Normal(theta, tau), obs=y)


def scale_model():
    numpyro.sample("tau", dist.HalfNormal(1.0))


DECLARED = {
    "loc": jnp.array(0.3),
    "rows": {
        "loc": jnp.arange(3.0),
        "scale": vi.Param(jnp.ones(3), constraint=constraints.positive),
    },
}


def by_hand(values):
    return {
        "mu": dist.Normal(values["loc"], 0.5),
        "tau": dist.LogNormal(0.0, 0.5),
        "theta": dist.Normal(values["rows"]["loc"], values["rows"]["scale"]),
    }


def explicit(values, y):
    numpyro.sample("mu", dist.Normal(values["loc"], 0.5))
    numpyro.sample("tau", dist.LogNormal(0.0, 0.5))
    with numpyro.plate("rows", y.shape[0]):
        rows = values["rows"]
        numpyro.sample("theta", dist.Normal(rows["loc"] + y, rows["scale"]))


def discovered(y):
    loc = numpyro.param("mu_loc", jax.random.normal)
    numpyro.sample("mu", dist.Normal(loc, 0.5))
    width = numpyro.param("width", 0.5, constraint=constraints.positive)
    numpyro.sample("tau", dist.LogNormal(0.0, width))
    with numpyro.plate("rows", y.shape[0]):
        loc = numpyro.param("theta_loc", jnp.arange(3.0), event_dim=0)
        scale = numpyro.param(
            "theta_scale", 0.5 * jnp.ones(3), constraint=constraints.positive, event_dim=0
        )
        numpyro.sample("theta", dist.Normal(loc, scale))


def auto(kind, **options):
    return lambda target: vi.numpyro_guide(kind(model, **options), Y)


GUIDES = {
    "mean_field": vi.guides.mean_field,
    "full_rank": vi.guides.full_rank,
    "low_rank": vi.guides.low_rank,
    "contaminated_normal": vi.guides.contaminated_normal,
    "delta": vi.guides.delta,
    "guide of a mapping": lambda target: vi.guide(
        DECLARED, lambda values, data: by_hand(values) | {"mu": dist.Normal(data["y"].mean(), 0.5)}
    ),
    "numpyro_guide, declared": lambda target: vi.numpyro_guide(explicit, Y, declared=DECLARED),
    "numpyro_guide, discovered": lambda target: vi.numpyro_guide(discovered, Y),
    "AutoNormal": auto(autoguide.AutoNormal),
    "AutoMultivariateNormal": auto(autoguide.AutoMultivariateNormal),
    "AutoDelta": auto(autoguide.AutoDelta),
    "AutoIAFNormal": auto(autoguide.AutoIAFNormal, num_flows=1, hidden_dims=[5]),
    "AutoBNAFNormal": auto(autoguide.AutoBNAFNormal, num_flows=1, hidden_factors=[2]),
}
POINTS = {"delta", "AutoDelta"}
SCORES_DRAWS_ONLY = {"AutoMultivariateNormal", "AutoIAFNormal", "AutoBNAFNormal"}
NO_INVERSE = {"AutoBNAFNormal"}


@cache
def target():
    return vi.from_numpyro(model, Y)


@cache
def answers(name):
    """All that the laws ask of a guide, in one compiled program."""
    guide = GUIDES[name](target())
    objective = vi.elbo(target(), guide)

    @jax.jit
    def ask(key):
        params = vi.init_params(objective.declared, key)
        draw = guide.sample(params, key, objective.data)
        noise = jax.tree.map(lambda leaf: leaf[0], guide.noise(key, 1))
        composed = guide.transform(params, noise, objective.data)
        again = guide.sample(params | {"other": jnp.zeros(3)}, key, objective.data)
        many = jax.vmap(lambda k: guide.sample(params, k, objective.data))
        found = {
            "draw": draw,
            "again": again,
            "composed": composed,
            "many": many(jax.random.split(key, 2000)),
            "grads": jax.grad(lambda p: objective.loss(p, key)[0])(params),
        }
        if name not in NO_INVERSE:
            found["rescored"] = guide.rescore(params, draw, objective.data)
        if name not in SCORES_DRAWS_ONLY | POINTS:
            moved = jax.tree.map(lambda leaf: leaf + 0.1, params)
            found["moved"] = (
                guide.rescore(moved, draw, objective.data),
                guide.log_prob(moved, draw.latents, objective.data),
            )
        if name not in SCORES_DRAWS_ONLY:
            found["scored"] = guide.log_prob(params, draw.latents, objective.data)
        return found

    return ask(jax.random.key(0)), ask(jax.random.key(1)), guide


every_guide = pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in SCORES_DRAWS_ONLY else n for n in GUIDES],
)


@every_guide
def test_sample_is_a_pure_function_of_params_and_key(name):
    """The same key gives the same draw, whatever else params hold; another key another draw."""
    one, two, _ = answers(name)
    jax.tree.map(np.testing.assert_array_equal, one["draw"], one["again"])
    for latent in () if name == "AutoDelta" else target().latents:
        assert np.all(one["draw"].latents[latent] != two["draw"].latents[latent])


@every_guide
def test_sample_is_transform_after_noise(name):
    """guide.sample(params, key) == guide.transform(params, guide.noise(key, 1)[0])."""
    one, _, _ = answers(name)
    jax.tree.map(np.testing.assert_array_equal, one["draw"], one["composed"])


@every_guide
def test_sampled_scored_and_rescored_densities_agree(name):
    """draw.log_prob == guide.log_prob(draw.latents) == guide.rescore(draw)."""
    for found in answers(name)[:2]:
        assert np.isfinite(found["draw"].log_prob)
        for way in ("scored", "rescored"):
            if way in found:
                np.testing.assert_allclose(found[way], found["draw"].log_prob, atol=1e-4)


@pytest.mark.parametrize("name", [n for n in GUIDES if n not in SCORES_DRAWS_ONLY | POINTS])
def test_rescoring_under_other_parameters(name):
    """guide.rescore(other, draw) is guide.log_prob(other, draw.latents), and not draw.log_prob."""
    found, _, _ = answers(name)
    rescored, scored = found["moved"]
    np.testing.assert_allclose(rescored, scored, atol=1e-4)
    assert abs(rescored - found["draw"].log_prob) > 1e-3


@every_guide
def test_draws_have_the_target_s_names_shapes_and_supports(name):
    """Every draw lies in the target's supports, in the target's shapes, under its names."""
    latents = answers(name)[0]["many"].latents
    assert latents.keys() == target().latents.keys()
    for latent, declared in target().latents.items():
        assert latents[latent].shape == (2000, *declared.shape)
        assert np.all(declared.support(latents[latent]))


@every_guide
def test_gradients_are_finite(name):
    """The gradient of the negative ELBO is finite for every parameter, and not all of it zero."""
    grads = jax.tree.leaves(answers(name)[0]["grads"])
    assert all(np.all(np.isfinite(leaf)) for leaf in grads)
    assert any(np.any(leaf != 0) for leaf in grads)


@pytest.mark.parametrize("name", [n for n in GUIDES if n not in POINTS | SCORES_DRAWS_ONLY])
def test_independent_parts_have_keys_of_their_own(name):
    """Over 2,000 draws, coordinates that are independent under the guide correlate below 0.1."""
    latents = answers(name)[0]["many"].latents
    columns = np.column_stack([latents["mu"], np.log(latents["tau"]), latents["theta"]])
    correlations = np.corrcoef(columns, rowvar=False)
    assert np.max(np.abs(correlations - np.eye(columns.shape[1]))) < 0.1


@pytest.mark.parametrize("name", sorted(POINTS))
def test_point_guides_have_no_density(name):
    """A guide whose mass is in one point says so, and every draw of it is that point."""
    found, _, guide = answers(name)
    assert guide.is_point
    assert found["draw"].log_prob == 0.0
    assert np.ptp(found["many"].latents["tau"]) == 0.0


@pytest.mark.parametrize("name", [n for n in GUIDES if n not in POINTS | SCORES_DRAWS_ONLY])
def test_other_guides_are_no_points(name):
    """Guides with a density do not call themselves points."""
    assert not answers(name)[2].is_point


def log_normal(values):
    return dist.LogNormal(values["loc"], values["scale"])


ONE_SCALE = {"loc": jnp.array(0.2), "scale": vi.Param(0.7, constraint=constraints.positive)}

NORMALISED = {
    "mean_field": partial(vi.guides.mean_field, init_scale=0.7),
    "full_rank": partial(vi.guides.full_rank, init_scale=0.7),
    "low_rank": partial(vi.guides.low_rank, init_scale=0.7),
    "contaminated_normal": partial(vi.guides.contaminated_normal, init_scale=0.7),
    "guide of one distribution": lambda target: vi.guide(ONE_SCALE, log_normal),
    "guide of a mapping": lambda target: vi.guide(ONE_SCALE, lambda v: {"tau": log_normal(v)}),
    "numpyro_guide": lambda target: vi.numpyro_guide(
        lambda v: numpyro.sample("tau", log_normal(v)), declared=ONE_SCALE
    ),
    "AutoNormal": lambda target: vi.numpyro_guide(
        autoguide.AutoNormal(scale_model, init_scale=0.7)
    ),
}


@pytest.mark.parametrize("name", NORMALISED)
def test_densities_are_normalised_over_constrained_space(name):
    """The integral of exp(log_prob) over a positive latent is 1, by quadrature on its log."""
    target = vi.from_numpyro(scale_model)
    objective = vi.elbo(target, NORMALISED[name](target))
    params = vi.init_params(objective.declared, jax.random.key(0))
    grid = jnp.linspace(-7.0, 7.0, 1001)

    @jax.vmap
    def density(log_tau):
        latents = {"tau": jnp.exp(log_tau)}
        return jnp.exp(objective.guide.log_prob(params, latents) + log_tau)

    np.testing.assert_allclose(jnp.trapezoid(density(grid), grid), 1.0, atol=1e-3)


def test_families_share_their_noise():
    """mean_field and full_rank at the same location and scales give the same draw from a key."""
    guides = [f(target(), init_scale=0.3) for f in (vi.guides.mean_field, vi.guides.full_rank)]
    draws = []
    for guide in guides:
        params = vi.init_params(guide.declared, jax.random.key(0))
        draws.append(guide.sample(params, jax.random.key(1)))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), *draws)


def test_a_contaminated_normal_is_a_mixture_of_normals():
    """Its density is numpyro's, its draws are stretched as often as said, its parameters are those
    of full-rank."""
    plain = vi.target(lambda v, z, d: -0.5 * jnp.sum(z["z"] ** 2), {"z": vi.Latent((2,))})
    weights, scales = jnp.array([0.7, 0.3]), jnp.array([1.0, 4.0])
    guide = vi.guides.contaminated_normal(plain, weights=(0.7, 0.3), scales=(1.0, 4.0))
    normal = vi.guides.full_rank(plain)
    values = {"loc": jnp.array([1.0, -2.0]), "scale_tril": jnp.array([[0.5, 0.0], [0.3, 2.0]])}
    params = vi.unconstrain(normal.declared, {"guide": values})
    with jax.default_matmul_precision("highest"):  # on a GPU it is not the default
        draws = jax.vmap(lambda key: guide.sample(params, key))(
            jax.random.split(jax.random.key(0), 40000)
        )
    parts = dist.MultivariateNormal(
        jnp.tile(values["loc"], (2, 1)), scale_tril=scales[:, None, None] * values["scale_tril"]
    )
    exact = dist.MixtureSameFamily(dist.Categorical(weights), parts)
    found = draws.latents["z"]
    np.testing.assert_allclose(draws.log_prob, exact.log_prob(found), rtol=1e-4)
    covariance = (0.7 + 0.3 * 16) * values["scale_tril"] @ values["scale_tril"].T
    np.testing.assert_allclose(jnp.cov(found.T), covariance, rtol=0.05, atol=0.2)
    np.testing.assert_allclose(found.mean(0), values["loc"], atol=0.1)


@pytest.mark.parametrize(
    "options",
    [
        {"weights": (0.5, 0.4)},
        {"weights": (0.5, 0.4), "scales": (1.0, 2.0)},
        {"weights": (1.5, -0.5), "scales": (1.0, 2.0)},
        {"scales": (1.0, 0.0, 2.0)},
        {"weights": (), "scales": ()},
    ],
)
def test_parts_of_a_contaminated_normal_are_checked(options):
    with pytest.raises(ValueError, match="as many positive scales as positive weights"):
        vi.guides.contaminated_normal(target(), **options)


def test_name_of_a_family():
    """name= renames a family's parameters, so that families compose."""
    guide = vi.guides.mean_field(target(), name="q")
    params = vi.init_params(guide.declared, jax.random.key(0))
    assert params.keys() == {"q"}
    assert np.isfinite(guide.sample(params, jax.random.key(1)).log_prob)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_any_key_implementation(impl):
    """Starts and draws come from keys of any implementation."""
    key = jax.random.key(0, impl=impl)
    for name in ("mean_field", "numpyro_guide, discovered"):
        guide = GUIDES[name](target())

        @jax.jit
        def density(key, guide=guide):
            params = vi.init_params(guide.declared, key)
            return guide.sample(params, key, target().data).log_prob

        assert np.isfinite(density(key))


def test_without_latents_a_fit_is_maximum_likelihood():
    """Only parameters in the model: the guide has nothing to learn, the mean is the data's."""

    def log_density(values, latents, data):
        return -0.5 * jnp.sum((data - values["m"]) ** 2)

    target = vi.target(log_density, {}, declared={"m": 0.0}, data=jnp.array([1.0, 2.0]))
    objective = vi.elbo(target, vi.guides.mean_field(target))
    fit = vi.fit(objective, key=jax.random.key(0), num_steps=1000, progress=False)
    np.testing.assert_allclose(fit.params["m"], 1.5, atol=1e-2)
