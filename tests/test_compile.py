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

enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64

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


def entering(inside):
    """A program that goes through `inside`, on the host, and then factorises matrices."""

    def through(x):
        x = jax.pure_callback(inside, jax.ShapeDtypeStruct(x.shape, x.dtype), x)
        return jnp.linalg.cholesky(x)

    return Quick(through)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="accelerators run them one by one")
def test_calls_run_side_by_side():
    """Each waits for the other one inside."""
    barrier = threading.Barrier(2, timeout=60.0)

    def inside(x):
        barrier.wait()
        return x

    found = entering(inside).side_by_side([(jnp.eye(3),), (4.0 * jnp.eye(3),)])
    np.testing.assert_allclose(found, [np.eye(3), 2.0 * np.eye(3)])


def test_batched_factorisations_do_not_run_side_by_side():
    """Two of them at once can wait for each other for ever."""
    lock, met = threading.Lock(), []

    def inside(x):
        met.append(lock.acquire(blocking=False))
        if met[-1]:
            threading.Event().wait(0.05)
            lock.release()
        return x

    matrices = jnp.stack([jnp.eye(3), 4.0 * jnp.eye(3)])
    found = entering(inside).side_by_side([(matrices,), (9.0 * matrices,)])
    np.testing.assert_allclose(found[1], 3.0 * np.array([np.eye(3), 2.0 * np.eye(3)]))
    assert met == [True, True]


def test_side_by_side_the_settings_are_those_of_the_caller(compilations):
    """JAX keeps some by thread; numbers of numpy are given it as they are."""
    program, one = Quick(lambda x, y: jnp.tanh(x) + y), np.ones(3)
    with enable_x64(not jax.config.jax_enable_x64):
        expected = [program(one, 0.5), program(2.0 * one, 1.5)]
        found = program.side_by_side([(one, 0.5), (2.0 * one, 1.5)])
        with compilations() as seen:
            program.side_by_side([(one, 0.5), (2.0 * one, 1.5)])
    assert seen == []
    for got, wanted in zip(found, expected, strict=True):
        assert got.dtype == wanted.dtype
        np.testing.assert_array_equal(got, wanted)


def test_what_failed_in_a_thread_is_compiled_again():
    class Broken:
        def submit(self, compile):
            future = Future()
            future.set_exception(RuntimeError("no compiler"))
            return future

    program = Quick(lambda x: jnp.cosh(x))
    program.ahead(Broken(), X)
    np.testing.assert_array_equal(program(X), jnp.cosh(X))
