"""How programs are compiled: those that run for milliseconds, and those whose digits count."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any
from weakref import WeakKeyDictionary

import jax

from vi_params._arrays import on_host
from vi_params._over import runs_alone
from vi_params._tree import is_within_program

LIGHT: dict[str, Any] = {"xla_backend_optimization_level": 1}
"""XLA's options for them on a CPU: what it does beyond costs more than these programs run."""

if jax.__version_info__ < (0, 11):  # later versions have lost this option
    LIGHT["xla_cpu_use_fusion_emitters"] = False


def precise(f: Callable[..., Any]) -> Callable[..., Any]:
    """f with matrix products of full precision, unless a precision is configured.

    GPUs and TPUs by default round the factors of float32 products to 10 or 8 bits: gradients of a
    stochastic search can bear that, log weights and second derivatives cannot.
    """

    @functools.wraps(f)
    def inside(*args: Any) -> Any:
        # JAX makes the attributes of its configuration as it starts: no type checker sees them.
        configured = jax.config.jax_default_matmul_precision  # pyright: ignore
        with jax.default_matmul_precision(configured or "highest"):
            return f(*args)

    return inside


class Quick:
    """`jax.jit(precise(f))`, compiled in less time on a CPU; under another transformation, plain
    `jit`."""

    def __init__(self, f: Callable[..., Any], options: dict[str, Any] = LIGHT) -> None:
        """Nothing is compiled before the first call, or `ahead`.

        Args:
            f: a function of arrays.
            options: XLA's on a CPU; none for programs that run long enough to be optimised.
        """
        self.plain = jax.jit(precise(f))  # on a CPU products are exact anyway
        self.light = jax.jit(f, compiler_options=options) if options else self.plain
        self.begun: list[Future] = []
        self.alone: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()

    def __call__(self, *args: Any) -> Any:
        if is_within_program(*args):  # options belong to outermost programs
            return self.plain(*args)
        self._end_compiling()
        return self._own()(*args)

    def side_by_side(self, calls: list[tuple]) -> list[Any]:
        """What calls with arguments of the same shapes give: on a CPU by a thread each, unless the
        program `runs_alone`."""
        if len(calls) == 1 or jax.default_backend() != "cpu" or is_within_program(calls):
            return [self(*args) for args in calls]
        calls = jax.device_put(calls)
        self._end_compiling()
        traced = self._own().trace(*calls[0])
        if traced.jaxpr not in self.alone:
            self.alone[traced.jaxpr] = runs_alone(traced.jaxpr)
        if self.alone[traced.jaxpr]:
            return [self(*args) for args in calls]
        # What is compiled does not ask for the settings of its thread, as a call would; threads of
        # LAPACK's own would wait for each other.
        compiled = traced.lower().compile()
        with on_host(), ThreadPoolExecutor(len(calls)) as pool:
            return list(pool.map(lambda args: jax.block_until_ready(compiled(*args)), calls))

    def ahead(self, pool: Executor, *args: Any) -> Any:
        """Has the program compiled by a thread of `pool`, unless it is; gives its outputs' shapes.
        A call waits for what is being compiled, and compiles itself what has not begun.

        It is traced here: models may hold state while they are traced, as NumPyro's handlers do.

        Args:
            pool: whose threads compile.
            *args: of a later call, or their shapes and dtypes.
        """
        lowered = self._own().lower(*args)
        waiting = [compiling for compiling in self.begun if not compiling.done()]
        self.begun = [*waiting, pool.submit(lowered.compile)]
        return lowered.out_info

    def _end_compiling(self) -> None:
        """What is queued is compiled by the call, what runs is waited for."""
        for compiling in self.begun:
            if not compiling.cancel():
                compiling.exception()

    def _own(self) -> Any:
        return self.light if jax.default_backend() == "cpu" else self.plain


@contextlib.contextmanager
def compiler() -> Iterator[Executor]:
    """Threads for `Quick.ahead`, first come first served; at the end what has not begun is dropped,
    and what has begun goes on, at the latest until the interpreter ends."""
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
