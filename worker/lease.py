"""Keeps the lease alive from a thread of its own, so that a long batch does not lose it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import structlog
from structlog.typing import FilteringBoundLogger

from streams.store import StoreUnavailableError

STALLED_S = 60.0
"""A loop that has not turned for this long is given up: a standby may take over."""


class LeaseKeeper:
    """Calls `renew` every `every_s` seconds while the loop turns.

    `lost` is set once another holds the lease or `renew` fails in a way that nobody foresaw; `why` says which.
    """

    def __init__(
        self,
        renew: Callable[[], bool],
        heartbeat: Callable[[], float],
        every_s: float,
        log: FilteringBoundLogger | None = None,
    ) -> None:
        self.lost = threading.Event()
        self.why = ""
        self._log = log or structlog.get_logger()
        self._renew = renew
        self._heartbeat = heartbeat
        self._every_s = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            if time.monotonic() - self._heartbeat() > STALLED_S:
                continue
            try:
                held = self._renew()
            except StoreUnavailableError:
                continue  # the loop meets the same outage and says so; the epoch guards the commits
            except Exception as error:  # noqa: BLE001  it is told, and the loop ends
                self._log.exception("the lease cannot be renewed; this worker stops")
                self._give_up(
                    f"the lease cannot be renewed ({type(error).__name__}: {error}); a restart takes it again"
                )
                return
            if not held:
                self._give_up("another instance holds the lease; this one stops without writing")
                return

    def _give_up(self, why: str) -> None:
        self.why = why
        self.lost.set()
