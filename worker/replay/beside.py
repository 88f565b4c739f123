"""What a verification does in the shade of the models: compare a batch, and read the next, while one is computed.

Models hold the interpreter's lock only between their operations, and wait for it there as long as other
Python code runs: so nothing runs beside whatever leads up to them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

TURN_S = 1e-4
"""After how long Python code gives way to a model whose operation has ended; 5 ms unless set."""


class Beside:
    """One job at a time, in a thread of its own, begun late and ended early."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "beside")
        self._waiting: Callable[[], None] | None = None
        self._running: Future[None] | None = None
        self._usual_turn_s = sys.getswitchinterval()

    def leave(self, job: Callable[[], None]) -> None:
        """Leave a job for the next `begin` or `settle`. The one before it has to be settled."""
        self._waiting = job

    def begin(self) -> None:
        """Begin what was left, beside the caller."""
        if self._waiting is not None:
            self._running, self._waiting = self._thread.submit(self._waiting), None

    def settle(self) -> None:
        """Be done with what was left. Raises what the job raised."""
        self.begin()
        if self._running is not None:
            running, self._running = self._running, None
            running.result()

    def __enter__(self) -> Self:
        sys.setswitchinterval(TURN_S)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._thread.shutdown()
        sys.setswitchinterval(self._usual_turn_s)
