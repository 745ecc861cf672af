"""A function of many draws."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import vi_params as vi
from vi_params._over import LAPACK, _equations, over, over_lanes
from vi_params.fitting.lanes import programs
from vi_params.fitting.stopping import never

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


def gaussian_process(number=7):
    """The length scale of a Gaussian process: its density factorises a matrix of that size."""
    distance = jnp.square(jnp.linspace(0.0, 1.0, number)[:, None] - jnp.linspace(0.0, 1.0, number))

    def log_density(values, latents, data):
        covariance = jnp.exp(-distance * jnp.exp(latents["z"])) + 0.1 * jnp.eye(number)
        root = jnp.linalg.cholesky(covariance)
        e = jax.scipy.linalg.solve_triangular(root, data, lower=True)
        return -0.5 * e @ e - jnp.log(jnp.diagonal(root)).sum() - 0.5 * latents["z"] ** 2

    return vi.target(log_density, {"z": vi.Latent(())}, data=jnp.sin(jnp.arange(1.0 * number)))


def factorised(program):
    """The shapes that a program hands to LAPACK, of those whose matrices are the density's."""
    shapes = [
        equation.invars[0].aval.shape
        for equation in _equations(program.jaxpr)
        if equation.primitive.name in LAPACK
    ]
    return {shape for shape in shapes if shape[-2:] == (7, 7)}


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="others have no such pool")
@pytest.mark.parametrize(
    "solver",
    ["deterministic", "laplace", "pathfinder", "batch_and_match", "natural_gradient", "svgd"],
)
def test_solvers_factorise_one_matrix_at_a_time(solver):
    """Not a batch of them over draws, particles, lanes or paths."""
    solve = getattr(vi.solvers, solver)
    program = jax.make_jaxpr(lambda key: jax.tree.leaves(solve(gaussian_process(), key)[1:3]))
    assert factorised(program(jax.random.key(0))) == {(7, 7)}


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="others have no such pool")
def test_restarts_factorise_one_matrix_at_a_time():
    target = gaussian_process()
    objective = vi.elbo(target, vi.guides.mean_field(target), num_particles=2)
    compiled = programs(objective, 3, optax.adam(0.1), never())
    keys, data = jax.random.split(jax.random.key(0), 3), target.data
    begin = jax.make_jaxpr(compiled.begin)(keys, None, data, {})
    lanes = jax.eval_shape(compiled.begin, keys, None, data, {})
    advance = jax.make_jaxpr(compiled.advance)(lanes, keys, 5, data)
    compare = jax.make_jaxpr(compiled.compare)(lanes, keys[0], data)
    assert factorised(begin) == factorised(advance) == factorised(compare) == {(7, 7)}


def test_lanes_are_made_one_after_the_other_on_a_cpu():
    def halvings(x):
        return lax.while_loop(lambda x: x > 1.0, lambda x: x / 2, x)

    xs = jnp.array([1.0, 6.0, 100.0])
    text = str(jax.make_jaxpr(lambda xs: over_lanes(halvings, xs))(xs))
    assert ("scan" in text) == (jax.default_backend() == "cpu")
    np.testing.assert_array_equal(over_lanes(halvings, xs), [1.0, 0.75, 0.78125])


def test_it_has_derivatives():
    def loss(scale):
        return over(lambda x: jnp.linalg.cholesky(scale * x)[0, 0], MATRICES).sum()

    def closed_form(scale):
        return jnp.sqrt(scale * MATRICES[:, 0, 0]).sum()

    np.testing.assert_allclose(jax.grad(loss)(2.0), jax.grad(closed_form)(2.0), rtol=1e-5)
