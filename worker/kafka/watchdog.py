"""Ends a process that stands still: one that neither recovers nor commits holds partitions that others could serve."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from structlog.typing import FilteringBoundLogger

from streams.store import FencedError
from worker.errors import FENCED, UNAVAILABLE

STALLED_S = 60.0
LOOK_EVERY_S = 1.0


class Watchdog:
    """Asks `stalled_s` every second from a thread of its own, and ends the process past `limit_s`.

    `limit_s` is `STALLED_S` unless given; `stalled_s` gives what stands still and for how long, in seconds, and
    raises `FencedError` where the process itself did, which ends it with exit code 75. The end is sudden: what hangs
    cannot be asked to stop, and whatever was committed is kept.
    """

    def __init__(
        self,
        stalled_s: Callable[[], tuple[str, float]],
        log: FilteringBoundLogger,
        *,
        limit_s: float | None = None,
        every_s: float = LOOK_EVERY_S,
        end: Callable[[int], None] = os._exit,
    ) -> None:
        self._stalled_s = stalled_s
        self._log = log
        self._limit_s = STALLED_S if limit_s is None else limit_s
        self._every_s = every_s
        self._end = end
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            try:
                what, stalled_s = self._stalled_s()
            except FencedError as error:
                self._log.critical(str(error), reason="fenced")
                self._end(FENCED)
                return
            if stalled_s > self._limit_s:
                self._log.critical(
                    f"{what} has stood still for {stalled_s:.0f} s, the limit is {self._limit_s:g} s: this worker "
                    "ends, so that another takes its partitions; start it again once the broker answers",
                    reason="stalled",
                )
                self._end(UNAVAILABLE)
                return
