"""Reading bars: the keys that are named or match a pattern, and what happens where entries are gone."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping

from streams.inputs import REFRESH_S, Inputs
from streams.store import Batch, InputLostError
from worker.batches import Fields
from worker.intake import Intake
from worker.processes.base import WAIT_S, Process

SHOWN_KEYS = 5


class ReadsBars(Process):
    """A process whose input is bars. `inputs` says which keys."""

    inputs: Inputs
    _looked_at: float | None = None

    @property
    @abstractmethod
    def intake(self) -> Intake:
        """Where the bars go."""

    def _label(self, key: str) -> str:
        return self.inputs.label(key)

    def _read_bars(self) -> Batch:
        """The next batch, at most one entry while a crash is being approached again."""
        self._look_for_inputs()
        keys = self.inputs.keys
        if not keys:
            return Batch((), {})
        return self._take(lambda: self.store.read(self.position, keys, self._most))

    def _look_for_inputs(self) -> None:
        """Every few seconds, the keys that match a pattern; new ones get a position in the next commit."""
        now = time.monotonic()
        if not self.inputs.patterns or (self._looked_at is not None and now - self._looked_at < REFRESH_S):
            return
        first, self._looked_at = self._looked_at is None, now
        change = self._reaching(lambda: self.inputs.refresh(self.store.find))
        for key in change.new:
            self.log.info("reading", key=key)
        if change.skipped:
            some = ", ".join(f"{key} ({kind})" for key, kind in list(change.skipped.items())[:SHOWN_KEYS])
            self.log.warning("not read: keys that match a pattern but are no streams", n=len(change.skipped), keys=some)
        if first and not self.inputs.keys:
            self.log.warning("no stream matches yet; waiting for one", pattern=", ".join(self.inputs.patterns))

    def _accept_loss(self, error: InputLostError) -> None:
        super()._accept_loss(error)
        self.sensors.metrics.bars("lost", error.lost)

    def _start_anew(self, key: str) -> Mapping[str, Fields]:
        """Every series warms up again, whatever key it came from."""
        del key
        self.intake.rewarm_all()
        return {"series": self.intake.changes()}

    def _wait_for_bars(self, *also: str) -> None:
        """Wait for a bar, or for an entry of one of `also`."""
        self._idle_since = self._idle_since or time.monotonic()
        self._wait([*self.inputs.keys, *also], WAIT_S)
