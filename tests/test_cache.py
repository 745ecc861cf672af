"""Programs kept: built once for things that behave the same, anew for all others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import vi_params as vi
from vi_params._cache import program

RATE = 0.1


def built_for():
    """A builder, and the list of the parts that it was called with."""
    calls = []

    def build(*parts):
        calls.append(parts)
        return object()

    return build, calls


def same(make, other=None):
    """Whether two things made separately count as one where likeness counts."""
    build, _ = built_for()
    first, second = make(), (other or make)()
    return program(build, alike=(first,)) is program(build, alike=(second,))


EQUAL = {
    "adam": lambda: optax.adam(1e-2),
    "a chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)),
    "a schedule": lambda: optax.adam(optax.cosine_decay_schedule(0.1, 100)),
    "hyperparameters": lambda: optax.inject_hyperparams(optax.adam)(0.1),
    "lbfgs": lambda: optax.lbfgs(),
    "schedule-free": lambda: optax.contrib.schedule_free_adamw(0.1),
    "averaged": lambda: vi.averaged(optax.adam(0.1), eta=4.0),
    "arrays": lambda: {"z": jnp.ones(2)},
    "numpy's numbers": lambda: (np.int64(3), np.float32(0.1)),
    "a partial": lambda: functools.partial(jnp.add, 1.0),
    "a stopping rule": lambda: vi.stopping.plateau(window=500),
    "a lambda over a global": lambda: lambda step: RATE * step,
}

DIFFERENT = {
    "rates": (lambda: optax.adam(1e-2), lambda: optax.adam(2e-2)),
    "rules": (lambda: optax.adam(1e-2), lambda: optax.adamw(1e-2)),
    "an int and a float": (lambda: (1,), lambda: (1.0,)),
    "a bool and an int": (lambda: (True,), lambda: (1,)),
    "zeros of different sign": (lambda: (0.0,), lambda: (-0.0,)),
    "defaults": (lambda: lambda x=1: x, lambda: lambda x=2: x),
    "arrays of other values": (lambda: (jnp.ones(2),), lambda: (jnp.zeros(2),)),
    "arrays of other shapes": (lambda: (jnp.ones(2),), lambda: (jnp.ones((2, 1)),)),
    "arrays of other dtypes": (lambda: (jnp.zeros(2, "f4"),), lambda: (jnp.zeros(2, "i4"),)),
    "arrays that may be written into": (lambda: (np.ones(2),), lambda: (np.ones(2),)),
    "strongly and weakly typed": (lambda: (jnp.float32(1.0),), lambda: (jnp.asarray(1.0),)),
    "partials": (
        lambda: functools.partial(jnp.add, 1.0),
        lambda: functools.partial(jnp.add, 2.0),
    ),
    "schedules": (
        lambda: optax.adam(optax.cosine_decay_schedule(0.1, 100)),
        lambda: optax.adam(optax.cosine_decay_schedule(0.1, 200)),
    ),
    "windows": (lambda: vi.stopping.plateau(window=500), lambda: vi.stopping.plateau(window=501)),
    "keys": (
        lambda: optax.add_noise(0.1, 0.5, jax.random.key(0)),
        lambda: optax.add_noise(0.1, 0.5, jax.random.key(1)),
    ),
}


@pytest.mark.parametrize("name", EQUAL)
def test_things_made_alike_count_as_one(name):
    """Functions of the same code closing over the same numbers share one program."""
    assert same(EQUAL[name])


@pytest.mark.parametrize("name", DIFFERENT)
def test_things_that_behave_differently_do_not(name):
    """Another number, type, default, array or function gives another program."""
    assert not same(*DIFFERENT[name])


def test_objects_are_told_apart_as_objects():
    """A part that is not said to be `alike` is found again as the same object only."""
    build, calls = built_for()
    rule = optax.adam(1e-2)
    assert program(build, rule, 3) is program(build, rule, 3)
    assert program(build, optax.adam(1e-2), 3) is not program(build, rule, 3)
    assert program(build, rule, 4) is not program(build, rule, 3)
    assert len(calls) == 3


def test_equal_code_under_another_global_is_another_program(monkeypatch):
    """A function that reads a global, made again after the global changed, is not the one before:
    the program would go on with the old value."""
    build, _ = built_for()

    def make():
        return lambda step: (lambda: RATE * step)()

    before = program(build, alike=(make(),))
    assert program(build, alike=(make(),)) is before
    monkeypatch.setattr(f"{__name__}.RATE", 0.2)
    assert program(build, alike=(make(),)) is not before


def test_a_variable_closed_over_may_change_for_good():
    """A function whose closed-over array is replaced, again and again, is never mistaken for what
    it was, although the memory of a dropped array may be given to the next."""
    scale = None
    build, calls = built_for()

    def schedule(step):
        return scale * step

    programs = set()
    for i in range(50):
        scale = jnp.full(3, float(i))
        programs.add(program(build, alike=(schedule,)))
        scale = None
    assert len(programs) == len(calls) == 50


def test_few_programs_are_kept():
    """The program not used for longest goes when there are too many."""
    build, calls = built_for()
    parts = [object() for _ in range(100)]
    for part in parts:
        program(build, part)
    program(build, parts[-1])
    assert len(calls) == 100
    program(build, parts[0])
    assert len(calls) == 101


def test_diagnose_compiles_once():
    """A second diagnosis of the same target and guide, with other parameters, traces nothing."""
    traces = []

    def log_density(values, latents, data):
        traces.append(1)
        return -0.5 * jnp.sum(latents["z"] ** 2)

    target = vi.target(log_density, {"z": vi.Latent((2,))})
    guide = vi.guides.mean_field(target)
    for seed in range(3):
        key = jax.random.key(seed)
        vi.diagnose(target, guide, vi.init_params(guide.declared, key), key, num_draws=50)
        if seed == 0:
            first = len(traces)
    assert len(traces) == first > 0
