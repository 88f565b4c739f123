"""One shelf of models for the workers of many partitions: a model is in memory once, however many serve it."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

from agents.artifacts import Loading, LoadOptions
from worker.reload import Shelf
from worker.roster import Artifact, Record


class SharedShelf(Shelf):
    """A `Shelf` for several threads. It keeps what any of them serves."""

    def __init__(self, models: Path, options: LoadOptions) -> None:
        super().__init__(models, options)
        self._lock = threading.RLock()
        self._records: dict[str, Mapping[str, Record]] = {}

    def newest(self, agent: str) -> Loading:
        with self._lock:
            return super().newest(agent)

    def named(self, agent: str, file: str) -> Loading:
        with self._lock:
            return super().named(agent, file)

    def exact(self, agent: str, artifact: Artifact) -> Loading:
        with self._lock:
            return super().exact(agent, artifact)

    def serving(self, agent: str, record: Record) -> Loading:
        with self._lock:
            return super().serving(agent, record)

    def keep(self, *records: Mapping[str, Record]) -> None:
        """Let go of every model that the records of no thread name."""
        with self._lock:
            alive = {thread.name for thread in threading.enumerate()}
            self._records = {name: held for name, held in self._records.items() if name in alive}
            self._records |= {threading.current_thread().name: dict(record) for record in records}
            super().keep(*self._records.values())

    def _hold(self, loading: Loading) -> Loading:
        """The model that is held already, where another thread has loaded the same bytes."""
        if loading.model is None:
            return loading
        return self._held.setdefault((loading.agent, Artifact.of(loading.model)), loading)
