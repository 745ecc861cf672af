"""An encoder on the batch: a posterior for every patient from one network, and rows that refine it.

20,000 patients have six readings each of a level z_i, some of them far off:

    z_i ~ Normal(mean, sd),   y_ij ~ StudentT(2, z_i, 0.5),   q(z_i) = Normal(encoder(y_i)).

The encoder's weights are one declared parameter of a guide with a subsampled plate; they may come
from plain JAX, Flax NNX or Equinox, whichever is installed: any pytree of arrays beside a function
that applies it. The same network serves patients who were not there when it was trained.

A network treats all patients alike. The second fit freezes it, `vi.freeze`, and gives every
patient a shift of the location and a factor of the scale, `vi.Param(..., plates=("patients",))`:
the encoder is where the rows start. Near the optimum it is the gradient's noise that is left, and
`vi.estimators.sticking_the_landing()` takes it away. For one latent a patient the exact posterior
is a sum over a grid: it judges both, and rows that start from nothing.

    python examples/amortised.py
"""

import itertools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.distributions import constraints

import vi_params as vi

PATIENTS, READINGS, HIDDEN, BATCH, STEPS = 20_000, 6, 8, 500, 1_500
MEAN, SD = 1.0, 2.0


def model(y):
    """The joint density; mean and sd are estimated, the plate takes the rows of a batch."""
    mean = numpyro.param("mean", 0.0)
    sd = numpyro.param("sd", 1.0, constraint=constraints.positive)
    with numpyro.plate("patients", PATIENTS, subsample_size=BATCH):
        z = numpyro.sample("z", dist.Normal(mean, sd))
        readings = dist.StudentT(2.0, z[:, None], 0.5).to_event(1)
        numpyro.sample("y", readings, obs=numpyro.subsample(y, 1))


def simulate(key):
    """Readings of some patients, sorted: their order says nothing."""
    keys = jax.random.split(key)
    z = MEAN + SD * jax.random.normal(keys[0], (PATIENTS, 1))
    return jnp.sort(z + 0.5 * jax.random.t(keys[1], 2.0, (PATIENTS, READINGS)), axis=1)


class Network(NamedTuple):
    """A network as two functions.

    Attributes:
        init: `key -> weights`, any pytree of arrays.
        apply: `(weights, inputs of shape (rows, n)) -> outputs of shape (rows, m)`.
    """

    init: Any
    apply: Any


def plain(*sizes):
    """A list of weights and biases."""

    def init(key):
        keys = jax.random.split(key, len(sizes) - 1)
        shapes = zip(keys, sizes[:-1], sizes[1:], strict=True)
        return [(jax.random.normal(k, (n, m)) / jnp.sqrt(n), jnp.zeros(m)) for k, n, m in shapes]

    def apply(layers, x):
        *hidden, (weight, bias) = layers
        for w, b in hidden:
            x = jax.nn.tanh(x @ w + b)
        return x @ weight + bias

    return Network(init, apply)


def flax_nnx(*sizes):
    """A Flax module, split into its structure, which is static, and its state."""
    from flax import nnx

    def module(key):
        rngs = nnx.Rngs(key)
        linear = [nnx.Linear(n, m, rngs=rngs) for n, m in itertools.pairwise(sizes)]
        return nnx.Sequential(*[layer for each in linear for layer in (each, jnp.tanh)][:-1])

    structure = nnx.split(nnx.eval_shape(lambda: module(jax.random.key(0))))[0]
    return Network(
        lambda key: nnx.split(module(key))[1],
        lambda state, x: nnx.merge(structure, state)(x),
    )


def equinox(*sizes):
    """An Equinox module, partitioned into its arrays and the rest."""
    import equinox as eqx

    def module(key):
        inputs, *hidden, outputs = sizes
        options = {"width_size": hidden[0], "depth": len(hidden), "activation": jnp.tanh}
        return eqx.nn.MLP(inputs, outputs, key=key, **options)

    rest = eqx.partition(module(jax.random.key(0)), eqx.is_array)[1]
    return Network(
        lambda key: eqx.filter(module(key), eqx.is_array),
        lambda arrays, x: jax.vmap(eqx.combine(arrays, rest))(x),
    )


NETWORKS = {"plain JAX": plain, "Flax NNX": flax_nnx, "Equinox": equinox}


def encode(network, weights, y):
    """Location and scale of every patient's level, from readings relative to the middle ones."""
    middle = (y[:, READINGS // 2 - 1] + y[:, READINGS // 2]) / 2
    shift, log_scale = network.apply(weights, jnp.arcsinh(y - middle[:, None])).T
    return middle + shift, 0.3 * jnp.exp(log_scale)


def program(values, network, y):
    """The guide. Where there is an encoder it starts the rows, where there are rows they refine."""
    with numpyro.plate("patients", PATIENTS, subsample_size=BATCH):
        loc, scale = 0.0, 1.0
        if network is not None:
            loc, scale = encode(network, values["encoder"], numpyro.subsample(y, 1))
        if "shift" in values:
            loc, scale = loc + values["shift"], scale * values["factor"]
        numpyro.sample("z", dist.Normal(loc, scale))


ROWS = {
    "shift": vi.Param(jnp.zeros(PATIENTS), plates=("patients",)),
    "factor": vi.Param(jnp.ones(PATIENTS), constraint=constraints.positive, plates=("patients",)),
}


def fit(target, guide, optimizer, params=None):
    """The parameters after a fit, their values, and the seconds it took."""
    objective = vi.elbo(target, guide, estimator=vi.estimators.sticking_the_landing())
    began = time.perf_counter()
    found = vi.fit(
        objective,
        optimizer(objective.declared),
        key=jax.random.key(1),
        num_steps=STEPS,
        params=params,
        stop=vi.stopping.never(),
        progress=False,
    )
    seconds = time.perf_counter() - began
    return found.params, vi.constrain(objective.declared, found.params), seconds


def adam(declared):
    """One rate for all: for networks, and for rows that start where a network has put them."""
    return optax.adam(optax.cosine_decay_schedule(0.02, STEPS), b1=0.7, b2=0.95)


def adam_from_nothing(declared):
    """Rows are seen 37 times: those that have a long way to go need a rate of their own."""
    rows = optax.adam(optax.cosine_decay_schedule(0.4, STEPS), b1=0.7, b2=0.95)
    labels = vi.labels(declared, {"shift|factor": "rows", ".*": "rest"})
    return optax.multi_transform({"rows": rows, "rest": adam(declared)}, labels)


@jax.jit
def exact(y, mean, sd):
    """Mean and standard deviation of every patient's level, on a grid."""
    z = jnp.linspace(-10.0, 12.0, 500)

    def one(y):
        log_p = dist.Normal(mean, sd).log_prob(z)
        log_p += dist.StudentT(2.0, z[:, None], 0.5).log_prob(y).sum(1)
        weight = jax.nn.softmax(log_p)
        first = weight @ z
        return first, jnp.sqrt(weight @ (z - first) ** 2)

    return jax.lax.map(one, y, batch_size=100)


class Error(NamedTuple):
    """How far the patients' normals are from the exact posteriors, root mean squares.

    Attributes:
        mean: of the means, in posterior standard deviations.
        scale: of the logarithms of the standard deviations.
    """

    mean: float
    scale: float


def error(loc, scale, y, values):
    """The error of the normals of some patients."""
    mean, sd = exact(y, values["mean"], values["sd"])
    off, ratio = (loc - mean) / sd, jnp.log(scale / sd)
    return Error(*(float(jnp.sqrt(jnp.mean(x**2))) for x in (off, ratio)))


class Result(NamedTuple):
    """What was found.

    Attributes:
        encoders: the kind of network -> its error.
        new: the plain encoder's error for patients that it has not seen.
        refined: the error of rows that start from it.
        alone: the error of rows that start from nothing, after as many steps.
        before: the plain encoder's parameters.
        after: the same after the fit in which they are frozen, with the rows.
    """

    encoders: dict[str, Error]
    new: Error
    refined: Error
    alone: Error
    before: dict[str, Any]
    after: dict[str, Any]


def tell(name, found, seconds=0.0):
    print(f"{name:28s} {found.mean:8.3f} {found.scale:8.3f} {seconds:8.1f}")


def main():
    """Fits and reports."""
    y, later = simulate(jax.random.key(0)), simulate(jax.random.key(5))
    target, some = vi.from_numpyro(model, y), slice(0, 1_000)

    print(f"{'errors of':28s} {'means':>8s} {'scales':>8s} {'seconds':>8s}")
    encoders, trained = {}, {}
    for name, make in NETWORKS.items():
        try:
            network = make(READINGS, HIDDEN, HIDDEN, 2)
        except ImportError:
            print(f"{name:28s} is not installed")
            continue
        declared = {"encoder": vi.Param(network.init)}
        guide = vi.numpyro_guide(program, network, y, declared=declared)
        params, values, seconds = fit(target, guide, adam)
        trained[name] = params, values
        encoders[name] = error(*encode(network, values["encoder"], y[some]), y[some], values)
        tell(f"the encoder, {name}", encoders[name], seconds)

    network, (before, values) = plain(READINGS, HIDDEN, HIDDEN, 2), trained["plain JAX"]
    new = error(*encode(network, values["encoder"], later[some]), later[some], values)
    tell("the same, for new patients", new)

    declared = {"encoder": vi.Param(network.init), **ROWS}
    guide = vi.numpyro_guide(program, network, y, declared=declared)
    start = {**before, **vi.init_params(ROWS, jax.random.key(2))}
    after, values, seconds = fit(
        target,
        guide,
        lambda declared: vi.freeze(adam(declared), declared, "encoder|mean|sd"),
        start,
    )
    loc, scale = encode(network, values["encoder"], y[some])
    loc, scale = loc + values["shift"][some], scale * values["factor"][some]
    refined = error(loc, scale, y[some], values)
    tell("rows that start from it", refined, seconds)

    guide = vi.numpyro_guide(program, None, y, declared=ROWS)
    _, values, seconds = fit(target, guide, adam_from_nothing)
    alone = error(values["shift"][some], values["factor"][some], y[some], values)
    tell("rows that start from nothing", alone, seconds)
    return Result(encoders, new, refined, alone, before, after)


if __name__ == "__main__":
    main()
