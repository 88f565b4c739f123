"""Which input keys there are, looked up again while running and told of, for whoever reads bars."""

from __future__ import annotations

import time

from structlog.typing import FilteringBoundLogger

from streams.inputs import REFRESH_S, Find, Inputs

SHOWN_KEYS = 5


class Lookout:
    """Keeps `inputs` up to date by `find`, and says what it meets."""

    def __init__(self, inputs: Inputs, find: Find, log: FilteringBoundLogger) -> None:
        self._inputs = inputs
        self._find = find
        self._log = log
        self._looked_at: float | None = None

    def look(self) -> None:
        """Every few seconds, the keys that match a pattern; new ones get a position in the next commit."""
        now = time.monotonic()
        if not self._inputs.patterns or (self._looked_at is not None and now - self._looked_at < REFRESH_S):
            return
        first, self._looked_at = self._looked_at is None, now
        change = self._inputs.refresh(self._find)
        for key in change.new:
            self._log.info("reading", key=key)
        if change.skipped:
            some = ", ".join(f"{key} ({kind})" for key, kind in list(change.skipped.items())[:SHOWN_KEYS])
            self._log.warning(
                "not read: keys that match a pattern but are no streams", n=len(change.skipped), keys=some
            )
        if first and not self._inputs.keys:
            self._log.warning("no stream matches yet; waiting for one", pattern=", ".join(self._inputs.patterns))
