"""Programs that run for milliseconds and would compile for seconds."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vi_params._tree import is_traced

LIGHT = {"xla_backend_optimization_level": 1, "xla_cpu_use_fusion_emitters": False}
"""XLA's options for them on a CPU: what it does beyond costs more than these programs run."""


def quick(f: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.jit(f)`, compiled in less time on a CPU; under another transformation, plain `jit`."""
    plain = jax.jit(f)
    light = jax.jit(f, compiler_options=LIGHT)

    @functools.wraps(f)
    def call(*args: Any) -> Any:
        # Within another program even a constant is traced; options belong to outermost programs.
        if is_traced(*args, jnp.zeros(())) or jax.default_backend() != "cpu":
            return plain(*args)
        try:
            return light(*args)
        except RuntimeError as error:
            if "compile option" not in str(error):
                raise
            return plain(*args)  # another version of XLA, without one of the options

    return call
