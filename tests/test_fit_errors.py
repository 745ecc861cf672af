"""What fits, runs and diagnostics refuse: what was expected, what was received, and where."""

from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vi_params as vi
from vi_params.diagnostics import psis

KEY = jax.random.key(0)
DATA = {"x": jnp.ones(2), "y": jnp.zeros(2)}
TARGET = vi.target(
    lambda v, z, d: -0.5 * jnp.sum((z["z"] - d["x"] - d["y"]) ** 2),
    {"z": vi.Latent((2,))},
    data=DATA,
)
GUIDE = vi.guides.mean_field(TARGET)
OBJECTIVE = vi.elbo(TARGET, GUIDE)
PARAMS = vi.init_params(OBJECTIVE.declared, KEY)
SVI = vi.svi(OBJECTIVE, optax.adam(0.1))
STATE = SVI.init(KEY, PARAMS)


def fit(**options):
    return vi.fit(OBJECTIVE, **({"key": KEY, "progress": False} | options))


def params(**own):
    return {"guide": PARAMS["guide"] | own}


BAD = {
    "num_steps is 0": (lambda: fit(num_steps=0), ValueError, ">= 1", "0", "fit"),
    "num_steps is no int": (lambda: fit(num_steps=2.5), TypeError, "an int", "2.5 (float)", "fit"),
    "restarts is 0": (lambda: fit(restarts=0), ValueError, "restarts >= 1", "0", "fit"),
    "a raw key": (
        lambda: fit(key=jax.random.PRNGKey(0)),
        TypeError,
        "a typed key",
        "uint32 array of shape (2,)",
        "fit",
    ),
    "an int for a key": (lambda: fit(key=3), TypeError, "a typed key", "the int 3", "fit"),
    "several keys": (
        lambda: fit(key=jax.random.split(KEY)),
        TypeError,
        "shape ()",
        "shape (2,)",
        "fit",
    ),
    "no optax optimiser": (
        lambda: vi.fit(OBJECTIVE, 0.1, key=KEY),
        TypeError,
        "optax.GradientTransformation",
        "0.1 (float)",
        "optimizer",
    ),
    "data lack a key": (
        lambda: fit(data={"x": DATA["x"]}),
        KeyError,
        "'x', 'y'",
        "missing: 'y'",
        "data",
    ),
    "data have another key": (
        lambda: fit(data=DATA | {"w": 1.0}),
        KeyError,
        "'x', 'y'",
        "unknown: 'w'",
        "data",
    ),
    "data in another container": (
        lambda: fit(data=list(DATA.values())),
        ValueError,
        "{'x': *, 'y': *}",
        "[*, *]",
        "data",
    ),
    "data in another mapping": (
        lambda: fit(data=OrderedDict(DATA)),
        ValueError,
        "{'x': *, 'y': *}",
        "OrderedDict",
        "data",
    ),
    "params of a wrong shape": (
        lambda: fit(params=params(loc=jnp.zeros(3))),
        ValueError,
        "shape (2,)",
        "shape (3,)",
        "guide/loc",
    ),
    "params of an unknown name": (
        lambda: fit(params=params(locc=jnp.zeros(2))),
        KeyError,
        "'guide/loc'",
        "unknown: 'guide/locc'",
        "init",
    ),
    "params for several restarts": (
        lambda: fit(params=PARAMS, restarts=2),
        ValueError,
        "restarts=1",
        "restarts=2",
        "fit",
    ),
    "params that are not finite": (
        lambda: fit(params=params(loc=jnp.full(2, jnp.nan))),
        ValueError,
        "at the given params",
        "latent 'z' is not finite",
        "fit",
    ),
    "a run of no steps": (
        lambda: vi.run(SVI, STATE, KEY, 0),
        ValueError,
        "num_steps >= 1",
        "0",
        "run",
    ),
    "a run with a raw key": (
        lambda: vi.run(SVI, STATE, jax.random.PRNGKey(0), 3),
        TypeError,
        "a typed key",
        "raw uint32",
        "run",
    ),
    "a run on other data": (
        lambda: vi.run(SVI, STATE, KEY, 3, {"x": DATA["x"]}),
        KeyError,
        "'x', 'y'",
        "missing: 'y'",
        "data",
    ),
    "a step with an int key": (
        lambda: SVI.step(STATE, 1),
        TypeError,
        "a typed key",
        "the int 1",
        "svi.step",
    ),
    "no draws": (
        lambda: vi.draws(TARGET, GUIDE, PARAMS, KEY, 0),
        ValueError,
        "num_draws >= 1",
        "0",
        "draws",
    ),
    "batches of nothing": (
        lambda: vi.draws(TARGET, GUIDE, PARAMS, KEY, 10, batch_size=0),
        ValueError,
        "batch_size >= 1",
        "0",
        "draws",
    ),
    "too few draws to judge": (
        lambda: vi.diagnose(TARGET, GUIDE, PARAMS, KEY, num_draws=10),
        ValueError,
        "num_draws >= 25",
        "10",
        "diagnose",
    ),
    "three ratios": (
        lambda: psis(jnp.zeros(3)),
        ValueError,
        "num_draws >= 25",
        "shape (3,)",
        "psis",
    ),
    "a matrix of ratios": (
        lambda: psis(jnp.zeros((100, 2))),
        ValueError,
        "shape (num_draws,)",
        "shape (100, 2)",
        "psis",
    ),
    "a quantile of 2": (
        lambda: vi.summary({"z": np.zeros(5)}, quantiles=(0.5, 2.0)),
        ValueError,
        "between 0 and 1",
        "(0.5, 2.0)",
        "vi.summary",
    ),
    "draws without a leading axis": (
        lambda: vi.summary({"z": 3.0}),
        ValueError,
        "(num_draws, ...)",
        "shape ()",
        "'z'",
    ),
    "a check with an int key": (
        lambda: vi.check(TARGET, 0),
        TypeError,
        "a typed key",
        "the int 0",
        "check",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_words(name):
    """Each mistake raises its kind of error, which says what was expected, received, and where."""
    call, kind, expected, received, where = BAD[name]
    with pytest.raises(kind) as caught:
        call()
    lines = {
        label: text
        for label, _, text in (
            line.strip().partition(": ") for line in str(caught.value).splitlines()
        )
    }
    assert expected in lines["Expected"]
    assert received in lines["Received"]
    assert where in lines["Where"]
