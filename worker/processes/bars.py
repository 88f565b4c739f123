"""Reading bars: the keys that are named or match a pattern, and what happens where entries are gone."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from streams.inputs import Inputs
from streams.store import Batch, InputLostError
from worker.batches import Fields
from worker.intake import Intake
from worker.lookout import Lookout
from worker.processes.base import WAIT_S, MarkingStore, Process
from worker.settings import Settings


class ReadsBars(Process):
    """A process whose input is bars. `inputs` says which keys."""

    def __init__(self, settings: Settings, store: MarkingStore, **given: Any) -> None:
        super().__init__(settings, store, **given)
        self.inputs = Inputs(settings.input_keys, settings.namespace)
        self._lookout = Lookout(self.inputs, lambda pattern: self._reaching(lambda: store.find(pattern)), self.log)

    @property
    @abstractmethod
    def intake(self) -> Intake:
        """Where the bars go."""

    def _label(self, key: str) -> str:
        return self.inputs.label(key)

    def _read_bars(self) -> Batch:
        """The next batch, at most one entry while a crash is being approached again."""
        self._lookout.look()
        keys = self.inputs.keys
        if not keys:
            return Batch((), {})
        return self._take(lambda: self.store.read(self.position, keys, self._most))

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
