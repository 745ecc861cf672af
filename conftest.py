"""What doctests find in scope: the names that every example of the package uses."""

import jax
import jax.numpy as jnp
import optax
import pytest

import vi_params as vi


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace):
    doctest_namespace.update(jax=jax, jnp=jnp, optax=optax, vi=vi)
