"""The two servers of a bridge, reachable or not: waited for, told of, and given up on only when told to stop."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from structlog.typing import FilteringBoundLogger

from streams.store import FencedError, StoreUnavailableError
from worker.errors import Unavailable
from worker.http import Condition, Readiness
from worker.metrics import BridgeMetrics

LONGEST_PAUSE_S = 2.0
LAST_TRIES_S = 1.0
"""How long a bridge that is told to stop goes on trying to reach a server."""
BROKER_AWAY_S = 2.0
"""An acknowledgement that takes longer is told of as an outage of the broker."""

REDIS, KAFKA, OWNER = "server", "broker", "owner"
_CONNECTED = {REDIS: "connected to Redis", KAFKA: "connected to Kafka", OWNER: "owner of the bridge's position"}
_AWAY = {
    REDIS: "Redis is unavailable; nothing is lost, trying again",
    KAFKA: "the Kafka broker is unavailable; nothing is lost, trying again",
}


class Stopped(Exception):
    """Told to stop while a server is away; what was not committed is carried again."""


@dataclass
class BridgeStatus:
    """What a bridge knows of itself, for `/healthz` and `/readyz`."""

    heartbeat: float = field(default_factory=time.monotonic)
    conditions: dict[str, Condition] = field(
        default_factory=lambda: dict.fromkeys((REDIS, KAFKA, OWNER), Condition(ok=False, detail="not yet"))
    )

    def readiness(self) -> Readiness:
        return Readiness(dict(self.conditions))


class Outages:
    """Calls again and again what a server does not answer. `beat` is called between the tries."""

    def __init__(
        self,
        status: BridgeStatus,
        metrics: BridgeMetrics,
        log: FilteringBoundLogger,
        stop: threading.Event,
        beat: Callable[[], None],
    ) -> None:
        self._status = status
        self._metrics = metrics
        self._log = log
        self._stop = stop
        self._beat = beat
        self._give_up_at: float | None = None

    def reaching(self, call: Callable[[], Any], *, committing: bool = False) -> Any:
        """What `call` gives once Redis answers. Raises `Stopped`."""
        try:
            return self._trying(REDIS, call, StoreUnavailableError, committing=committing)
        except FencedError:
            if committing:
                self._metrics.commits("fenced")
            raise

    def asking(self, call: Callable[[], Any]) -> Any:
        """What `call` gives once the broker answers. Raises `Stopped`."""
        return self._trying(KAFKA, call, Unavailable)

    def waiting(self, waited_s: float) -> None:
        """The broker has been owing an answer for so long. Raises `Stopped`."""
        self._beat()
        if waited_s > BROKER_AWAY_S:
            self._away(KAFKA, f"no acknowledgement for {BROKER_AWAY_S:g} s")
        if self._stop.is_set():
            self._last_tries()

    def reached(self, which: str) -> None:
        """A condition holds, from now on or still."""
        if not self._status.conditions[which].ok:
            self._log.info(_CONNECTED[which])
            self._status.conditions[which] = Condition(ok=True)

    def _trying(self, which: str, call: Callable[[], Any], away: type[Exception], *, committing: bool = False) -> Any:
        pause_s = 0.05
        while True:
            self._beat()
            try:
                value = call()
            except away as error:
                reason = getattr(error, "reason", "")
                if committing or reason == "out_of_memory":  # such a server refuses even the read before a commit
                    self._metrics.commits(reason)
                self._away(which, str(error))
                if self._stop.wait(pause_s):
                    self._last_tries()
                    time.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            else:
                self.reached(which)
                return value

    def _last_tries(self) -> None:
        now = time.monotonic()
        self._give_up_at = self._give_up_at or now + LAST_TRIES_S
        if now >= self._give_up_at:
            raise Stopped

    def _away(self, which: str, detail: str) -> None:
        if self._status.conditions[which].ok:
            self._log.error(_AWAY[which], detail=detail)
        self._status.conditions[which] = Condition(ok=False, detail=detail)
