"""A function of many draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from vi_params._over import over

MATRICES = jnp.eye(3) + 0.1 * jnp.arange(6.0)[:, None, None]


def square(x):
    return {"square": x**2, "sum": x.sum()}


@pytest.mark.parametrize("at_once", [None, 1, 2, 4, 6, 9])
def test_every_block_size_gives_the_same(at_once):
    got = over(square, MATRICES, at_once)
    expected = jax.vmap(square)(MATRICES)
    jax.tree.map(np.testing.assert_allclose, got, expected)


def loops(f):
    return "scan" in str(jax.make_jaxpr(lambda xs: over(f, xs))(MATRICES))


def test_batched_factorisations_are_made_one_by_one_on_a_cpu():
    on_cpu = jax.default_backend() == "cpu"
    assert loops(jnp.linalg.cholesky) == on_cpu
    inside = jax.jit(lambda x: lax.cond(x.sum() > 0, jnp.linalg.cholesky, lambda x: x, x))
    assert loops(inside) == on_cpu
    np.testing.assert_allclose(
        over(jnp.linalg.cholesky, MATRICES), jnp.linalg.cholesky(MATRICES), rtol=1e-6
    )


def test_others_are_made_side_by_side():
    assert not loops(square)
    root = jnp.linalg.cholesky(MATRICES[0])
    # One factor for all: many right-hand sides in one call.
    assert not loops(lambda x: jax.scipy.linalg.solve_triangular(root, x[0], lower=True))


def test_it_has_derivatives():
    def loss(scale):
        return over(lambda x: jnp.linalg.cholesky(scale * x)[0, 0], MATRICES).sum()

    def closed_form(scale):
        return jnp.sqrt(scale * MATRICES[:, 0, 0]).sum()

    np.testing.assert_allclose(jax.grad(loss)(2.0), jax.grad(closed_form)(2.0), rtol=1e-5)
