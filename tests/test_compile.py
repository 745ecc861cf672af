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


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="accelerators run them one by one")
def test_calls_run_side_by_side(monkeypatch):
    """Each waits inside for the other one."""
    barrier = threading.Barrier(2, timeout=60.0)

    def inside(x):
        barrier.wait()
        return x

    def through(x):
        return jax.pure_callback(inside, jax.ShapeDtypeStruct(x.shape, x.dtype), x) + 1.0

    monkeypatch.setattr("vi_params._compile.runs_alone", lambda jaxpr: False)
    found = Quick(through).side_by_side([(X,), (2.0 * X,)])
    np.testing.assert_allclose(found, [X + 1.0, 2.0 * X + 1.0])


def told(x):
    jax.debug.callback(lambda x: None, x)
    return x


def called(x):
    return jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


MATRICES = jnp.stack([jnp.eye(3), 4.0 * jnp.eye(3)])


@pytest.fixture
def no_threads(monkeypatch):
    def pool(number):
        raise RuntimeError("threads")

    monkeypatch.setattr("vi_params._compile.ThreadPoolExecutor", pool)


@pytest.mark.usefixtures("no_threads")
@pytest.mark.parametrize("f", [jnp.linalg.cholesky, jax.jit(called), told])
def test_what_runs_alone_is_called_in_turn(f):
    """Batched factorisations, two of which can wait for each other, and functions of Python."""
    calls = [(MATRICES,), (9.0 * MATRICES,)]
    expected = [f(*args) for args in calls]
    np.testing.assert_allclose(Quick(f).side_by_side(calls), expected, rtol=1e-6)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="accelerators run all in turn")
@pytest.mark.usefixtures("no_threads")
@pytest.mark.parametrize(("f", "x"), [(jnp.tanh, MATRICES), (jnp.linalg.cholesky, MATRICES[0])])
def test_what_else_there_is_runs_by_threads(f, x):
    """The factorisation of one matrix is no batch."""
    with pytest.raises(RuntimeError, match="threads"):
        Quick(f).side_by_side([(x,), (4.0 * x,)])


def test_within_another_program_calls_are_traced_in_turn():
    inner = Quick(lambda x: jnp.tanh(x @ x))
    exact = np.tanh(np.asarray([X @ X, 4.0 * X @ X]))
    np.testing.assert_allclose(
        jax.jit(lambda x: jnp.stack(inner.side_by_side([(x,), (2.0 * x,)])))(X), exact, rtol=1e-6
    )
    closed = jax.jit(lambda y: y + jnp.stack(inner.side_by_side([(X,), (2.0 * X,)])))
    np.testing.assert_allclose(closed(0.0), exact, rtol=1e-6)


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
