"""`quartet run --stage features`: bars in, feature vectors out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from streams.codec import encode_reject
from streams.messages import Entry
from streams.store import Commit, RewoundError, Snapshot
from worker.batches import Fields
from worker.builds import started
from worker.encoding import encoded_events, features_output
from worker.intake import Intake
from worker.processes.bars import ReadsBars
from worker.processes.base import MarkingStore
from worker.rebuild import Rebuilt, rebuild
from worker.settings import Settings
from worker.stages.features import PARTS, FeatureStage


class FeatureProcess(ReadsBars):
    """Drives a feature stage over a store. `make` gives a fresh one: with the sets of the models as they serve then."""

    stage: FeatureStage

    def __init__(self, settings: Settings, store: MarkingStore, make: Callable[[], FeatureStage], **given: Any) -> None:
        super().__init__(settings, store, **given)
        self._make = make

    @property
    def intake(self) -> Intake:
        return self.stage.intake

    @property
    def outputs(self) -> Mapping[str, str]:
        return {"features": self.keys.features, "rejected": self.keys.rejected, "events": self.keys.events}

    def _step(self) -> None:
        batch = self._read_bars()
        if not batch.entries:
            self._wait_for_bars()
            return
        self._idle_since = None
        self._process(batch.entries, self._now_ms(batch))

    def _process(self, entries: Sequence[Entry], now_ms: int) -> None:
        poison = self._approach(entries)
        vectors = self.stage.process(entries, now_ms, poison=poison, stopwatch=self.sensors.stopwatch)
        accepted = vectors.accepted
        with self.sensors.stopwatch("pack"):
            commit = Commit(
                self.position.advanced(entries, self.intake.ids.last),
                outputs=[features_output(self.keys, vectors)],
                appends={
                    self.keys.rejected: [encode_reject(reject) for reject in accepted.rejects],
                    self.keys.events: encoded_events(accepted.events),
                },
                state=self.stage.changes(accepted.rows),
            )
        self._commit(commit)
        self._cautious = max(0, self._cautious - len(entries))
        self.sensors.taken(accepted)
        self.status.arrived(accepted)
        self.status.feed(healthy=self.intake.health.healthy)
        self.sensors.standing(self.status)
        self._tell_events(accepted.events)

    def _recover(self, rewound: RewoundError | None) -> None:
        snapshot: Snapshot = self._reaching(lambda: self.store.load(PARTS))
        self.stage = self._reaching(self._make)
        self.position = snapshot.position
        rebuilt = self._restore(snapshot)
        self.intake.ids.last = snapshot.position.last_output_id
        computed = [feature_set.name for feature_set in self.stage.sets]
        self._begin(
            [started(self.settings, (), self.position, stage="features", feature_sets=computed)],
            self._recovery(rewound)
            if rebuilt is None
            else self._recovery(rewound, rebuilt.what, bars=rebuilt.bars, missing=rebuilt.missing),
            state=rebuilt.state if rebuilt else {},
            drops=PARTS if rebuilt else (),
        )
        self.status.feed(healthy=self.intake.health.healthy)
        self.log.info("feature sets", computed=", ".join(computed))

    def _restore(self, snapshot: Snapshot) -> Rebuilt | None:
        if not self.options.rebuild:
            self.stage.restore(snapshot.state)
            return None
        self.options.rebuild = False
        now_ms = self._now_ms()

        def compute(entries: Sequence[Entry], left_out: frozenset[tuple[str, str]]) -> tuple[int, Mapping[str, Fields]]:
            accepted = self.stage.process(entries, now_ms, poison=left_out).accepted
            return len(accepted), self.stage.changes(accepted.rows)

        rebuilt = rebuild(compute, self.store, self.position, self.keys.rejected, self._reaching)
        rebuilt.tell(self.log)
        return rebuilt
