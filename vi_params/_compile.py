"""Programs that run for milliseconds and would compile for seconds."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vi_params._tree import is_traced

LIGHT: dict[str, Any] = {"xla_backend_optimization_level": 1}
"""XLA's options for them on a CPU: what it does beyond costs more than these programs run."""

if jax.__version_info__ < (0, 11):  # later versions have lost this option
    LIGHT["xla_cpu_use_fusion_emitters"] = False


def quick(f: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.jit(f)`, compiled in less time on a CPU; under another transformation, plain `jit`."""
    plain = jax.jit(f)
    light = jax.jit(f, compiler_options=LIGHT)

    @functools.wraps(f)
    def call(*args: Any) -> Any:
        # Within another program even a constant is traced; options belong to outermost programs.
        outermost = not is_traced(*args, jnp.zeros(()))
        return (light if outermost and jax.default_backend() == "cpu" else plain)(*args)

    return call
