"""Laws that every objective obeys: pure, data as an argument, bounded memory, one compilation."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpyro import distributions as dist
from numpyro.distributions import constraints

import vi_params as vi
from vi_params.fitting.result import Final, assemble
from vi_params.svi import State

DATA = {"y": jnp.array([0.5, 1.5, -0.3])}


def make_target(with_model):
    """z ~ N(shift, 1), y_i ~ N(z, 1)."""

    def log_density(values, latents, data):
        z = latents["z"]
        prior = -0.5 * (z - values.get("shift", 0.0)) ** 2
        return prior - 0.5 * jnp.sum((data["y"] - z) ** 2)

    declared = {"shift": vi.Param(0.2)} if with_model else {}
    return vi.target(log_density, {"z": vi.Latent(())}, declared=declared, data=DATA)


def make_guide():
    """An amortised normal."""
    declared = {"loc": vi.Param(0.3), "scale": vi.Param(0.6, constraint=constraints.positive)}
    return vi.guide(
        declared, lambda v, data: dist.Normal(v["loc"] + 0.1 * jnp.sum(data["y"]), v["scale"])
    )


def simulate(values, key, data):
    first, second = jax.random.split(key)
    z = jax.random.normal(first)
    return {"z": z}, {"y": z + jax.random.normal(second, (3,))}


def rows(values, key):
    return {"y": values["loc"] + values["scale"] * jax.random.normal(key)}


BOUNDED = {
    "elbo": lambda t, g, **o: vi.elbo(t(True), g(), num_particles=6, **o),
    "iwae": lambda t, g, **o: vi.iwae(t(True), g(), num_importance=3, num_particles=2, **o),
    "renyi": lambda t, g, **o: vi.renyi(t(True), g(), alpha=0.5, num_importance=6, **o),
    "upper renyi": lambda t, g, **o: vi.renyi(t(False), g(), alpha=-2, num_importance=6, **o),
    "doubly": lambda t, g, **o: vi.iwae(
        t(True),
        g(),
        num_importance=6,
        estimator=vi.estimators.doubly_reparameterised(),
        **o,
    ),
    "vimco": lambda t, g, **o: vi.iwae(
        t(True), g(), num_importance=6, estimator=vi.estimators.vimco(), **o
    ),
    "cubo": lambda t, g, **o: vi.cubo(t(False), g(), num_importance=6, **o),
    "f": lambda t, g, **o: vi.f_divergence(
        t(False), g(), vi.divergences.jensen_shannon(), num_importance=6, **o
    ),
    "tail": lambda t, g, **o: vi.tail_adaptive(t(False), g(), num_importance=6, **o),
    "wake": lambda t, g, **o: vi.reweighted_wake_sleep(t(True), g(), num_importance=6, **o),
    "wake and sleep": lambda t, g, **o: vi.reweighted_wake_sleep(
        t(True), g(), num_importance=6, sleep=0.5, simulate=simulate, **o
    ),
    "fisher": lambda t, g, **o: vi.fisher_divergence(t(False), g(), num_particles=6, **o),
    "score-based": lambda t, g, **o: vi.score_based_divergence(
        t := t(False), vi.guides.mean_field(t), num_particles=6, **o
    ),
}
OBJECTIVES = BOUNDED | {
    "posterior": lambda t, g: vi.neural_posterior(t(True), g(), simulate=simulate),
    "mmd": lambda t, g: vi.mmd(make_guide().declared, rows, DATA, num_simulations=5),
    "energy": lambda t, g: vi.energy_distance(
        make_guide().declared, rows, DATA, num_simulations=5, num_observations=2
    ),
}
UPPER = {"upper renyi", "cubo", "f", "wake", "wake and sleep", "fisher", "score-based", "mmd"}
UPPER |= {"energy"}


@pytest.fixture(scope="module")
def built():
    """Every objective, its start, and its compiled loss and gradient as functions of all inputs."""

    def one(make):
        objective = make(make_target, make_guide)
        params = jax.jit(lambda key: vi.init_params(objective.declared, key))(jax.random.key(0))
        both = jax.jit(jax.value_and_grad(objective.loss, has_aux=True))
        return objective, params, both

    return {name: one(make) for name, make in OBJECTIVES.items()}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_pure_finite_and_fed_with_data(built, name, compilations):
    """The loss is a finite scalar of the default dtype, the same at the same key and another at
    another; other data change it without a compilation; every parameter has a finite gradient."""
    objective, params, both = built[name]
    (loss, _), slope = both(params, jax.random.key(1), objective.data)
    assert loss.shape == ()
    assert loss.dtype == jnp.result_type(float)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((loss, slope)))
    assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(slope))
    others = jax.tree.map(jnp.exp, objective.data)
    keys = jax.random.key(1), jax.random.key(2)
    with compilations() as seen:
        again = both(params, keys[0], objective.data)[0][0]
        other_key = both(params, keys[1], objective.data)[0][0]
        other_data = both(params, keys[0], others)[0][0]
    assert not seen
    assert loss == again
    assert loss != other_key
    assert loss != other_data or name == "posterior"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_measure(built, name):
    """Upper bounds and divergences are minimised as they are, lower bounds with a minus, and `aux`
    has the bound."""
    objective, params, both = built[name]
    assert objective.measure.sign == (1 if name in UPPER else -1)
    (loss, aux), _ = both(params, jax.random.key(1), objective.data)
    value = getattr(aux, "value", getattr(aux, "elbo", None))
    if value is not None and "wake" not in name:
        assert objective.measure.of(loss) == value


@pytest.mark.parametrize("name", ["iwae", "doubly", "wake", "fisher"])
def test_batches_of_draws_change_nothing(built, name):
    """The gradient from two draws at a time, at the default data, is that of all at once."""
    objective, params, both = built[name]
    batched = BOUNDED[name](make_target, make_guide, batch_size=2)
    got = jax.jit(jax.grad(lambda p, k: batched.loss(p, k)[0]))(params, jax.random.key(1))
    expected = both(params, jax.random.key(1), objective.data)[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), got, expected)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_misspelt_names(built, name):
    """Unknown parameters and unknown data are errors that name them."""
    objective, params, _ = built[name]
    with pytest.raises(KeyError, match="unknown: 'lok'"):
        objective.loss({**params, "lok": jnp.zeros(())}, jax.random.key(0))
    with pytest.raises(KeyError, match="unknown: 'x'"):
        objective.loss(params, jax.random.key(0), {"x": DATA["y"]})


def test_steps_side_by_side(built):
    """Three runs in one vmapped program start from valid states and stay finite."""
    objective, _, _ = built["cubo"]
    svi = vi.svi(objective, optax.adam(0.02))

    @jax.jit
    def go(keys):
        states = jax.vmap(svi.init)(keys)
        return jax.vmap(lambda s, k: vi.run(svi, s, k, 20))(states, keys)

    states, losses = go(jax.random.split(jax.random.key(0), 3))
    assert np.all(np.isfinite(losses))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(states.params))


@pytest.mark.parametrize("name", ["cubo", "mmd", "renyi"])
def test_a_fit_speaks_of_its_objective(built, name):
    """The summary names what was minimised, shows it with its own sign, says which way is worse,
    and never says ELBO."""
    measure = built[name][0].measure
    losses = np.array([[3.0, 1.25], [4.0, 2.5]])
    states = State({"a": np.zeros(2)}, (), np.array([2, 2]))
    final = Final(-losses[:, -1], np.full(2, 0.01), np.array([0.0, 0.01]), np.zeros(2))
    statuses = [vi.Status.CONVERGED, vi.Status.CONVERGED]
    fit = assemble(states, losses, statuses, np.zeros(2, int), final, measure)
    text = str(fit)
    assert fit.best == 0
    assert f"{measure.name} {1.25 * measure.sign}" in text
    assert f"1 of 2 restarts agree on the best {measure.name}" in text
    assert f"1.25 {measure.unit} {'higher' if name in UPPER else 'lower'}" in text
    assert measure.name in fit.restarts.columns
    assert "ELBO" not in text


def test_a_fit_without_target_or_guide():
    """Where no start is valid the error comes in words, although there is no density to look at."""
    objective = vi.mmd({"loc": 0.0}, lambda v, key: v["loc"] / 0.0, jnp.zeros(3))
    with pytest.raises(ValueError, match="No start has a finite loss"):
        vi.fit(objective, key=jax.random.key(0), num_steps=10, progress=False)


WRONG = {
    "an estimator of the ELBO": (
        lambda t, g: vi.iwae(t, g, estimator=vi.estimators.sticking_the_landing()),
        ["not one of importance-weighted objectives", "doubly_reparameterised() is its"],
    ),
    "VIMCO of the ELBO": (
        lambda t, g: vi.elbo(t, g, estimator=vi.estimators.vimco()),
        ["one of importance-weighted bounds", "vi.iwae"],
    ),
    "VIMCO of one draw": (
        lambda t, g: vi.iwae(t, g, num_importance=1, estimator=vi.estimators.vimco()),
        ["num_importance >= 2"],
    ),
    "an infinite order": (
        lambda t, g: vi.renyi(t, g, alpha=float("inf")),
        ["alpha must be finite"],
    ),
    "a lower order": (lambda t, g: vi.cubo(t, g, order=0.5), ["order >= 1", "alpha=0.5"]),
    "a positive beta": (lambda t, g: vi.tail_adaptive(t, g, beta=1.0), ["beta <= 0"]),
    "a point": (lambda t, g: vi.iwae(t, vi.guides.delta(t)), ["no density", "vi.elbo"]),
    "a rough divergence": (
        lambda t, g: vi.f_divergence(
            t,
            g,
            vi.divergences.total_variation(),
            estimator=vi.estimators.doubly_reparameterised(),
        ),
        ["second derivative", "pathwise()"],
    ),
    "a guide without reparameterisation": (
        lambda t, g: vi.iwae(
            t,
            vi.guide({"a": 2.0}, lambda v: dist.VonMises(0.0, v["a"])),
        ),
        ["not reparameterised", "['z']", "vimco()"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_refused(case):
    """What does not fit is refused when the objective is built, with the way out."""
    build, fragments = WRONG[case]
    target = make_target(False)
    with pytest.raises(ValueError, match=re.escape(fragments[0])) as caught:
        build(target, make_guide())
    for fragment in fragments[1:]:
        assert fragment in str(caught.value)
