"""Compiled programs: products of full precision where digits count, and compiling in threads."""

import os
import threading
from concurrent.futures import Future

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vi_params as vi
from vi_params._compile import Quick, compiler, precise
from vi_params.diagnostics.diagnose import _diagnose

X = jnp.ones((3, 3))


def precisions(program, *args):
    """The precision of the matrix products of a program, as XLA is told it."""
    text = program.lower(*args).as_text()
    return {part.split("]")[0] for part in text.split("precision = [")[1:]}


def test_products_are_exact_unless_a_precision_is_configured():
    def product(x):
        return x @ x

    assert precisions(jax.jit(product), X) <= {"DEFAULT, DEFAULT"}
    for program in (jax.jit(precise(product)), Quick(product).plain):
        assert precisions(program, X) == {"HIGHEST, HIGHEST"}
        with jax.default_matmul_precision("bfloat16"):
            assert precisions(program, X) == {"DEFAULT, DEFAULT"}


@pytest.mark.parametrize("family", ["mean_field", "full_rank"])
def test_a_diagnosis_multiplies_exactly(family):
    """Log weights of rounded products would be noise of nats where log densities are thousands."""

    def log_density(values, latents, data):
        return -0.5 * jnp.sum((data @ latents["z"]) ** 2)

    target = vi.target(log_density, {"z": vi.Latent((3,))}, data=X)
    guide = getattr(vi.guides, family)(target)
    params = vi.init_params(guide.declared, jax.random.key(0))
    program = _diagnose(target, guide, 100, None)
    assert precisions(program, params, jax.random.key(1), X) == {"HIGHEST, HIGHEST"}


def test_a_call_waits_for_what_is_being_compiled(compilations):
    program, exact = Quick(lambda x: jnp.tanh(x @ x)), jnp.tanh(X @ X)
    with compilations() as seen, compiler() as pool:
        assert program.ahead(pool, X).shape == (3, 3)
        found = program(X)
    assert len(seen) == 1
    np.testing.assert_allclose(found, exact, rtol=1e-6)


def test_what_was_not_begun_is_dropped_and_compiled_when_it_is_called():
    program = Quick(lambda x: jnp.sinh(x))
    gate = threading.Event()
    try:
        with compiler() as pool:
            for _ in range(os.cpu_count()):
                pool.submit(gate.wait)
            program.ahead(pool, X)
            np.testing.assert_array_equal(program(X), jnp.sinh(X))
            program.ahead(pool, X)
        np.testing.assert_array_equal(program(X), jnp.sinh(X))
    finally:
        gate.set()


def test_what_failed_in_a_thread_is_compiled_again():
    class Broken:
        def submit(self, compile):
            future = Future()
            future.set_exception(RuntimeError("no compiler"))
            return future

    program = Quick(lambda x: jnp.cosh(x))
    program.ahead(Broken(), X)
    np.testing.assert_array_equal(program(X), jnp.cosh(X))
