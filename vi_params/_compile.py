"""Programs that run for milliseconds and would compile for seconds."""

from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

import jax
import jax.numpy as jnp

from vi_params._tree import is_traced

LIGHT: dict[str, Any] = {"xla_backend_optimization_level": 1}
"""XLA's options for them on a CPU: what it does beyond costs more than these programs run."""

if jax.__version_info__ < (0, 11):  # later versions have lost this option
    LIGHT["xla_cpu_use_fusion_emitters"] = False


class Quick:
    """`jax.jit(f)`, compiled in less time on a CPU; under another transformation, plain `jit`."""

    def __init__(self, f: Callable[..., Any], options: dict[str, Any] = LIGHT) -> None:
        """Nothing is compiled before the first call, or `ahead`.

        Args:
            f: a function of arrays.
            options: XLA's on a CPU; none for programs that run long enough to be optimised.
        """
        self.plain = jax.jit(f)
        self.light = jax.jit(f, compiler_options=options) if options else self.plain

    def __call__(self, *args: Any) -> Any:
        # Within another program even a constant is traced; options belong to outermost programs.
        outermost = not is_traced(*args, jnp.zeros(()))
        return (self._own() if outermost else self.plain)(*args)

    def ahead(self, pool: Executor, *args: Any) -> Any:
        """Has the program compiled by a thread of `pool`, unless it is; gives its outputs' shapes.

        It is traced here: models may hold state while they are traced, as NumPyro's handlers do.

        Args:
            pool: whose threads compile.
            *args: of a later call, or their shapes and dtypes.
        """
        lowered = self._own().lower(*args)
        pool.submit(lowered.compile)
        return lowered.out_info

    def _own(self) -> Any:
        return self.light if jax.default_backend() == "cpu" else self.plain
