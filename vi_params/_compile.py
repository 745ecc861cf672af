"""Programs that run for milliseconds and would compile for seconds."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vi_params._tree import is_traced

LEVEL = 1
"""LLVM's optimisation level for them; its passes above cost more than these programs run."""


def quick(f: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.jit(f)`, compiled in less time on a CPU; under another transformation, plain `jit`."""
    plain = jax.jit(f)
    light = jax.jit(f, compiler_options={"xla_backend_optimization_level": LEVEL})

    @functools.wraps(f)
    def call(*args: Any) -> Any:
        # Within another program even a constant is traced; options belong to outermost programs.
        outermost = not is_traced(*args, jnp.zeros(()))
        return (light if outermost and jax.default_backend() == "cpu" else plain)(*args)

    return call
