"""Ctrl-C as a wish to stop at the next good moment."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Interrupt:
    """While entered, the first Ctrl-C sets `wanted`; a second one raises KeyboardInterrupt.

    A plain KeyboardInterrupt could strike between the moment a donated state is consumed and the
    moment its successor has a name, and lose both.
    """

    def __init__(self) -> None:
        """Not wanted yet; the handler is set on entering."""
        self.wanted = False
        self._before: Any = None

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.wanted:
            raise KeyboardInterrupt
        self.wanted = True
