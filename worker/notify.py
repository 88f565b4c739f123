"""Tells the service manager how the worker stands: `sd_notify(3)`, one datagram a message.

Without `NOTIFY_SOCKET` nothing is sent. `WATCHDOG=1` comes from the loop that commits and from no
thread, so that a loop which is stuck is restarted. Before the worker is ready the same call asks for
more time instead: a standby may wait for hours, and one that hangs is still found.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping

STANDING_BY = "standing by for another instance"
"""The status of an instance that waits for its turn."""

EVERY_S = 1.0
"""Least time between two signs of life; the unit's `WatchdogSec` is many times longer."""

STARTUP_EXTENSION_S = 60
"""What a sign of life before readiness adds to the time to start, from then on."""


class Notifier:
    """One worker's line to its service manager. Not for use by several threads."""

    def __init__(self, address: str | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._address = "\0" + address[1:] if address and address.startswith("@") else address
        self._clock = clock
        self._ready = False
        self._last = float("-inf")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Notifier:
        """The notifier of the socket that the service manager named, or one that sends nothing."""
        return cls(environment.get("NOTIFY_SOCKET"))

    def ready(self, status: str) -> None:
        """The worker owns its namespace, has recovered and serves."""
        self._ready = True
        self._send("READY=1", f"STATUS={status}")

    def status(self, text: str) -> None:
        """One line for `systemctl status`."""
        self._send(f"STATUS={text}")

    def alive(self) -> None:
        """The loop turns: feed the watchdog, or before readiness ask for more time to start."""
        if self._address is None or self._clock() - self._last < EVERY_S:
            return
        self._last = self._clock()
        # READY again is harmless, and makes good a first one that was lost.
        self._send("READY=1\nWATCHDOG=1" if self._ready else f"EXTEND_TIMEOUT_USEC={STARTUP_EXTENSION_S * 1_000_000}")

    def stopping(self) -> None:
        self._send("STOPPING=1", "STATUS=stopping: the batch in hand is committed")

    def _send(self, *lines: str) -> None:
        """Send at most once and wait for nothing: a manager that does not listen is no reason to stop."""
        if self._address is None:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            channel.setblocking(False)
            try:
                channel.sendto("\n".join(lines).encode(), self._address)
            except OSError:
                self._last = float("-inf")  # the next turn says again that it is alive
