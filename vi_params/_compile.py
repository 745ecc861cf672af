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

    @functools.cache
    def light() -> Callable[..., Any]:
        return jax.jit(f, compiler_options=known_options())

    @functools.wraps(f)
    def call(*args: Any) -> Any:
        # Within another program even a constant is traced; options belong to outermost programs.
        outermost = not is_traced(*args, jnp.zeros(()))
        return (light() if outermost and jax.default_backend() == "cpu" else plain)(*args)

    return call


@functools.cache
def known_options() -> dict[str, Any]:
    """Those of `LIGHT` that this version of XLA has."""
    known = {}
    for name, value in LIGHT.items():
        try:
            jax.jit(lambda: 0, compiler_options={name: value})()
        except RuntimeError:  # no such compile option
            continue
        known[name] = value
    return known
