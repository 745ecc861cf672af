"""Weights row by row beside latents that the rows share: the bound, its gradients, its targets."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from numpyro import distributions as dist
from scipy import stats
from scipy.special import logsumexp

import vi_params as vi

Y = np.array([0.4, -1.1], np.float32)
NOISE = 0.7
E = vi.estimators


def model(y, batch=None):
    """g ~ N(shift, 1), z_i ~ N(g, 1), y_i ~ N(z_i, 0.7): everything is known."""
    g = numpyro.sample("g", dist.Normal(numpyro.param("shift", 0.2), 1.0))
    with numpyro.plate("rows", len(y), subsample_size=batch):
        z = numpyro.sample("z", dist.Normal(g, 1.0))
        numpyro.sample("y", dist.Normal(z, NOISE), obs=numpyro.subsample(y, 0))


def program(values):
    """q(g) q(z_i | g): it holds the posterior."""
    g = numpyro.sample("g", dist.Normal(values["loc"], jnp.exp(values["log_scale"])))
    with numpyro.plate("rows", 2):
        z = dist.Normal(values["rows"] + values["slope"] * g, jnp.exp(values["log_width"]))
        numpyro.sample("z", z)


POINTS = {
    "loc": jnp.array([0.1, -0.5, 0.8]),
    "log_scale": jnp.array([-0.2, 0.2, -0.8]),
    "rows": jnp.array([[0.1, -0.3], [0.5, 0.0], [0.2, -0.8]]),
    "slope": jnp.array([0.2, 0.6, 0.0]),
    "log_width": jnp.array([-0.1, -0.5, 0.1]),
    "shift": jnp.array([0.2, -0.3, 0.6]),
}


def structured(**options):
    declared = {name: x[0] for name, x in POINTS.items() if name != "shift"}
    guide = vi.numpyro_guide(program, declared=declared)
    return vi.iwae(vi.from_numpyro(model, jnp.asarray(Y)), guide, plate="rows", **options)


def exact_bound(p):
    """L_2 by Gauss-Hermite quadrature over g and over both draws of each row, in NumPy."""
    e, weight = np.polynomial.hermite_e.hermegauss(30)
    weight = weight / weight.sum()
    g = p["loc"] + np.exp(p["log_scale"]) * e
    outer = stats.norm.logpdf(g, p["shift"], 1.0)
    outer = outer - stats.norm.logpdf(g, p["loc"], np.exp(p["log_scale"]))
    for row, y in zip(p["rows"], Y, strict=True):
        width = np.exp(p["log_width"])
        mean = row + p["slope"] * g[:, None]
        z = mean + width * e
        log_w = stats.norm.logpdf(z, g[:, None], 1.0) + stats.norm.logpdf(y, z, NOISE)
        log_w = log_w - stats.norm.logpdf(z, mean, width)
        pair = np.stack(np.broadcast_arrays(log_w[:, :, None], log_w[:, None, :]))
        outer = outer + (logsumexp(pair, axis=0) - np.log(2)) @ weight @ weight
    return outer @ weight


def exact_slopes(p):
    """The gradient of `exact_bound` by central differences."""
    found = {}
    for name, x in p.items():
        slope = np.zeros_like(x)
        for i in np.ndindex(x.shape):
            h = np.zeros_like(x)
            h[i] = 1e-4
            up, down = (exact_bound(p | {name: x + sign * h}) for sign in (1, -1))
            slope[i] = (up - down) / 2e-4
        found[name] = slope
    return found


@pytest.mark.parametrize("estimator", ["pathwise", "doubly_reparameterised", "vimco"])
def test_gradients_are_unbiased(estimator):
    """At three sets of parameters the mean gradient from 100,000 evaluations, in model and guide,
    is that of the exact bound L_2, within four standard errors."""
    objective = structured(num_importance=2, estimator=getattr(E, estimator)())
    slope = jax.grad(lambda p, key: -objective.loss(p, key)[0])
    keys = jax.random.split(jax.random.key(1), 100_000)
    over_keys = jax.vmap(slope, in_axes=(None, 0))
    found = jax.jit(lambda p: jax.lax.map(lambda one: over_keys(one, keys), p))(POINTS)
    for i in range(3):
        exact = exact_slopes({name: np.asarray(x[i], np.float64) for name, x in POINTS.items()})
        for name, truth in exact.items():
            draws = np.asarray(found[name][i], np.float64)
            error = draws.std(axis=0) / np.sqrt(len(keys))
            assert np.all(np.abs(draws.mean(axis=0) - truth) < 4 * error + 2e-5), name


COVARIANCE = np.ones((2, 2)) + (1 + NOISE**2) * np.eye(2)
EVIDENCE = stats.multivariate_normal(np.full(2, 0.2), COVARIANCE).logpdf(Y)


def test_at_the_posterior_there_is_no_variance():
    """With q the posterior every evaluation is the log evidence, and every doubly reparameterised
    gradient in the guide is zero, to rounding; the pathwise one is not."""
    precision, width = 1 + 2 / (1 + NOISE**2), 1 + 1 / NOISE**2
    posterior = {
        "loc": (0.2 + Y.sum() / (1 + NOISE**2)) / precision,
        "log_scale": -0.5 * np.log(precision),
        "rows": Y / NOISE**2 / width,
        "slope": 1 / width,
        "log_width": -0.5 * np.log(width),
        "shift": 0.2,
    }
    params, sizes = jax.tree.map(jnp.float32, posterior), {}
    for estimator in (E.doubly_reparameterised(), E.pathwise()):
        objective = structured(num_importance=3, estimator=estimator)
        both = jax.vmap(jax.value_and_grad(lambda p, k, o=objective: o.loss(p, k)[0]), (None, 0))
        losses, slopes = jax.jit(both)(params, jax.random.split(jax.random.key(0), 50))
        np.testing.assert_allclose(-losses, EVIDENCE, rtol=1e-5)
        del slopes["shift"]  # of log p(g), at the g that is drawn
        sizes[estimator.name] = max(float(jnp.abs(leaf).max()) for leaf in slopes.values())
    assert sizes["doubly_reparameterised"] < 1e-5
    assert sizes["pathwise"] > 0.1


def plain(batch):
    """The same model as a plain density and its terms by row."""
    return vi.target(
        lambda v, z, d: dist.Normal(v["shift"], 1.0).log_prob(z["g"]),
        {"g": vi.Latent(), "z": vi.Latent((2,), plates=("rows",))},
        per_row=lambda v, z, d: (
            dist.Normal(z["g"], 1.0).log_prob(z["z"]) + dist.Normal(z["z"], NOISE).log_prob(d["y"])
        ),
        declared={"shift": 0.2},
        data={"y": vi.minibatch(Y, batch)},
    )


def family(target):
    """Independent normals away from the posterior."""
    init = {"g": jnp.array(0.3), "z": jnp.array([0.6, -0.2])}
    return vi.guides.mean_field(target, init=init, init_scale=0.8)


def program_target(batch=None):
    return vi.from_numpyro(model, jnp.asarray(Y), batch=batch)


def bounds(target, num_importance, num):
    """The mean bound of a mean-field family, and four standard errors of it."""
    objective = vi.iwae(target, family(target), num_importance=num_importance, plate="rows")
    params = vi.init_params(objective.declared, jax.random.key(0))
    keys = jax.random.split(jax.random.key(num_importance), num)
    found = jax.jit(jax.vmap(lambda key: -objective.loss(params, key)[0]))(keys)
    found = np.asarray(found, np.float64)
    return found.mean(), 4 * found.std() / np.sqrt(num)


def without_rows():
    """The ELBO of q(g) = N(0.3, 0.8) with the rows integrated out, in closed form."""
    mean, variance = np.append(Y, 0.2), np.append(np.full(2, 1 + NOISE**2), 1.0)
    fit = stats.norm.logpdf(0.3, mean, np.sqrt(variance)) - 0.5 * 0.8**2 / variance
    return fit.sum() + stats.norm(0.3, 0.8).entropy()


@pytest.mark.slow
def test_the_bound_rises_to_that_of_the_shared_latents_alone():
    """L_1 < L_4 < L_256 for a mean-field family; the last is nearly the ELBO of g with all rows
    integrated out, in closed form, and that below the log evidence. Batches of rows, of a program
    or of a plain density, have the same mean."""
    target, limit = program_target(), without_rows()
    one, few, many = bounds(target, 1, 8000), bounds(target, 4, 8000), bounds(target, 256, 1000)
    assert sum(one) < few[0] - few[1]
    assert sum(few) < limit
    assert abs(many[0] - limit) < many[1] + 3e-3
    assert limit < EVIDENCE
    for other in (program_target(1), plain(1)):
        batches = bounds(other, 4, 8000)
        assert abs(batches[0] - few[0]) < np.hypot(batches[1], few[1])


def both(objective, params):
    """Loss and gradient at one key."""
    return jax.jit(jax.value_and_grad(lambda p: objective.loss(p, jax.random.key(3))[0]))(params)


@pytest.mark.parametrize("estimator", ["pathwise", "doubly_reparameterised"])
def test_one_draw_is_the_elbo_at_the_same_draws(estimator):
    """L_1 is the ELBO to rounding; a plain density with terms by row has the bound of the same
    model as a program, in batches of draws as well."""
    target, other = program_target(), plain(2)
    options = {"plate": "rows", "estimator": getattr(E, estimator)()}
    apart = vi.iwae(target, family(target), num_importance=1, num_particles=3, **options)
    stuck = {"pathwise": E.pathwise(), "doubly_reparameterised": E.sticking_the_landing()}
    elbo = vi.elbo(target, family(target), estimator=stuck[estimator], num_particles=3)
    batched = vi.iwae(
        other, family(other), num_importance=1, num_particles=3, batch_size=2, **options
    )
    params = vi.init_params(elbo.declared, jax.random.key(0))
    expected = both(elbo, params)
    for one in (apart, batched):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
            both(one, params),
            expected,
        )


def crossed(y):
    """Traits of users and of items, and what every user says of every item."""
    users, items = numpyro.plate("users", 3, dim=-2), numpyro.plate("items", 2, dim=-1)
    with users:
        a = numpyro.sample("a", dist.Normal(0.0, 1.0))
    with items:
        b = numpyro.sample("b", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
    with users, items:
        numpyro.sample("y", dist.Normal(a + b.sum(-1), 0.5), obs=y)


def test_crossed_plates():
    """Of two crossed plates either may be the rows, the other's latents are then shared: L_1 is the
    ELBO in both ways, and L_20 of users above it."""
    target = vi.from_numpyro(crossed, jnp.arange(6.0).reshape(3, 2) / 3)
    guide = vi.guides.mean_field(target, init_scale=0.7)
    elbo = vi.elbo(target, guide, num_particles=100)
    params = vi.init_params(elbo.declared, jax.random.key(0))

    def loss(objective):
        return jax.jit(lambda p: objective.loss(p, jax.random.key(1))[0])(params)

    def apart(plate, num):
        return vi.iwae(target, guide, num_importance=num, num_particles=100, plate=plate)

    expected = loss(elbo)
    for plate in ("users", "items"):
        np.testing.assert_allclose(loss(apart(plate, 1)), expected, rtol=1e-5)
    assert loss(apart("users", 20)) < expected - 1.0


def tied(y):
    """Every row sees all latents of rows."""
    with numpyro.plate("rows", 2):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
    total = z.sum()
    with numpyro.plate("rows", 2):
        numpyro.sample("y", dist.Normal(total, 1.0), obs=y)


def seen_outside(y):
    """A term outside the plate sees them."""
    with numpyro.plate("rows", 2):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(z, 1.0), obs=y)
    numpyro.factor("balance", -(z.sum() ** 2))


def backwards(v):
    with numpyro.plate("rows", 2):
        z = numpyro.sample("z", dist.Normal(v["loc"], 1.0))
    numpyro.sample("g", dist.Normal(z.sum(), 1.0))


def joint(v):
    numpyro.sample("z", dist.Normal(jnp.full(2, v["loc"]), 1.0).to_event(1))
    numpyro.sample("g", dist.Normal(0.0, 1.0))


def counts(y):
    k = numpyro.sample("k", dist.Bernoulli(0.3))
    with numpyro.plate("rows", 2):
        z = numpyro.sample("z", dist.Normal(1.0 * k, 1.0))
        numpyro.sample("y", dist.Normal(z, 1.0), obs=y)


def shared_only(y):
    g = numpyro.sample("g", dist.Normal())
    with numpyro.plate("rows", 2):
        numpyro.sample("y", dist.Normal(g, 1.0), obs=y)


def misplaced():
    """The prior of the rows left in the part that is no row's."""
    target = vi.target(
        lambda v, z, d: -jnp.sum(z["z"] ** 2),
        {"z": vi.Latent((2,), plates=("rows",))},
        per_row=lambda v, z, d: -((z["z"] - d) ** 2),
        data=vi.minibatch(Y, 2),
    )
    return vi.iwae(target, vi.guides.mean_field(target), plate="rows")


def by_rows(model, guide=None, **options):
    target = vi.from_numpyro(model, jnp.asarray(Y))
    guide = vi.guides.mean_field(target) if guide is None else guide
    return vi.iwae(target, guide, plate="rows", **options)


def by_program(program):
    return vi.numpyro_guide(program, declared={"loc": 0.1})


COUNTING = {"k": dist.Bernoulli(0.4), "z": dist.Normal(jnp.zeros(2), 1.0)}
ERRORS = {
    "rows that see each other": (lambda: by_rows(tied), ["rows of 'y' of the target", "plate="]),
    "a term outside": (
        lambda: by_rows(seen_outside),
        ["'balance' of the target, outside the plate, sees ['z']"],
    ),
    "a guide that draws what is shared last": (
        lambda: by_rows(model, by_program(backwards)),
        ["'g' of the guide, outside the plate, sees ['z']"],
    ),
    "a guide that draws all rows at once": (
        lambda: by_rows(model, by_program(joint)),
        ["'z' of the guide is not in the plate"],
    ),
    "a family that ties rows": (
        lambda: by_rows(model, vi.guides.full_rank(vi.from_numpyro(model, jnp.asarray(Y)))),
        ["a guide that is one density over all rows", "vi.guides.mean_field"],
    ),
    "a prior of rows that is no row's": (misplaced, ["'log_density' of the target", "per_row"]),
    "no latent of rows": (lambda: by_rows(shared_only), ["No latent has rows", "'g' in []"]),
    "a shared latent that is scored": (
        lambda: by_rows(counts, vi.guide({}, lambda v: COUNTING), estimator=E.vimco()),
        ["outside of plate 'rows'", "['k']"],
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    """Rows that are not apart are refused when the objective is built, by name."""
    build, fragments = ERRORS[case]
    with pytest.raises(ValueError, match=r"[Rr]ows") as caught:
        build()
    for fragment in fragments:
        assert fragment in str(caught.value)
