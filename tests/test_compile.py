"""Compiled programs: matrix products of full precision where digits count."""

import jax
import jax.numpy as jnp
import pytest

import vi_params as vi
from vi_params._compile import Quick, precise
from vi_params.diagnostics.diagnose import _diagnose

X = jnp.ones((3, 3))


def precisions(program, *args):
    """The precision of the matrix products of a program, as XLA is told it."""
    text = program.lower(*args).as_text()
    return {part.split("]")[0] for part in text.split("precision = [")[1:]}


def test_products_are_exact_unless_a_precision_is_configured():
    product = lambda x: x @ x  # noqa: E731
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
