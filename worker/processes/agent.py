"""`quartet run --stage agent:NAME`: feature vectors in, one agent's votes out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streams.codec import encode_reject, seal, unseal
from streams.contracts import V3, FeatureSet
from streams.keys import agent_stage
from streams.messages import Entry, Reason, Reject
from streams.store import Commit, Position, RewoundError, Snapshot
from worker.batches import Fields
from worker.builds import placed, started
from worker.decoding import SeriesBook, read_vectors
from worker.encoding import encoded_events, votes_outputs
from worker.processes.agents import LOADING_WAIT_S, HoldsAgents, on_bar
from worker.processes.base import WAIT_S, MarkingStore
from worker.rebuild import Rebuilt, rebuild
from worker.reload import Shelf, Steered
from worker.roster import Record
from worker.settings import Settings
from worker.stages import agents
from worker.stages.agents import AgentGroup, AgentReport
from worker.voting import Seat

THRESHOLDS = "thresholds"
PARTS = ("series", THRESHOLDS, *agents.PARTS)

MakeGroup = Callable[[Sequence[Seat], SeriesBook], AgentGroup]


class AgentProcess(HoldsAgents):
    """Drives one agent over a store. `make` gives a fresh group over seats and a source of vectors."""

    def __init__(
        self,
        settings: Settings,
        agent: str,
        store: MarkingStore,
        make: MakeGroup,
        shelf: Shelf,
        records: Mapping[str, Record],
        **given: Any,
    ) -> None:
        super().__init__(settings, store, **given)
        self.agent = agent
        self._make = make
        self._hold(shelf, (agent,), records)
        self.book = SeriesBook()
        self._group = make(self._seats(), self.book)
        self._thresholds: Mapping[str, float] = {}

    @property
    def group(self) -> AgentGroup:
        return self._group

    @property
    def outputs(self) -> Mapping[str, str]:
        return {f"votes:{self.agent}": self.keys.votes(self.agent)}

    # ------------------------------------------------------------------ a batch

    def _step(self) -> None:
        steered = self._steer()
        batch = self._take(lambda: self.store.read(self.position, [self.keys.features], self._most))
        if batch.entries or steered or self.steering.waiting:
            self._idle_since = None
        if batch.entries:
            self._process(batch.entries, steered)
        elif steered:
            self._settle(steered)
        elif self.steering.waiting:
            self._wait([self.keys.features], LOADING_WAIT_S)
        else:
            self._idle_since = self._idle_since or time.monotonic()
            self._wait([self.keys.features, self.keys.control], WAIT_S)

    def _start_anew(self, key: str) -> Mapping[str, Fields]:
        """Every window starts anew."""
        del key
        self.book.rewarm_all()
        return {"series": self.book.changes()}

    @property
    def _sets(self) -> tuple[FeatureSet, ...]:
        return tuple(dict.fromkeys((V3, *self.group.voting.feature_sets)))

    def _process(self, entries: Sequence[Entry], steered: Steered) -> None:
        poison = self._approach(entries)
        vectors = read_vectors(entries, self.book, self._sets, poison)
        vectors, ballots, verdicts = self.group.process(vectors, self.sensors.stopwatch)
        events = [on_bar(placed(event, self.position), vectors.accepted.bars) for event in steered.events]
        steered = replace(steered, events=events)
        rejects = [*steered.rejects, *(self._left_out(entry) for entry in entries if (entry.key, entry.id) in poison)]
        with self.sensors.stopwatch("pack"):
            state, drops = self._changes(vectors.accepted.rows)
            commit = Commit(
                self.position.advanced([*entries, *steered.entries], entries[-1].id),
                outputs=votes_outputs(self.keys, vectors, ballots),
                appends={
                    self.keys.rejected: [encode_reject(reject) for reject in rejects],
                    self.keys.events: encoded_events([*events, *verdicts]),
                },
                state=state,
                drops=drops,
            )
        self._commit(commit)
        self._cautious = max(0, self._cautious - len(entries))
        self.sensors.voted(vectors, ballots)
        self.sensors.rejected(rejects[len(steered.rejects) :])
        if steered:
            self._tell_steered(steered)
        self._tell_agents()
        self._tell_events(verdicts)

    def _left_out(self, entry: Entry) -> Reject:
        detail = "this vector ended the worker three times; its series starts anew and no model sees it"
        return Reject(entry, "poison", detail, agent_stage(self.agent))

    def _settled(self) -> tuple[Mapping[str, Fields], Sequence[str]]:
        return self._changes(np.zeros(0, np.int64))

    def _changes(self, rows: NDArray[np.int64]) -> tuple[dict[str, Fields], list[str]]:
        state, drops = self.group.changes(rows)
        state["series"] = self.book.changes()
        thresholds = self.group.thresholds
        if thresholds != self._thresholds:
            self._thresholds = thresholds
            state[THRESHOLDS] = [(agent.encode(), seal(value)) for agent, value in thresholds.items()]
            drops = [*drops, THRESHOLDS]
        return state, drops

    # ------------------------------------------------------------------ recovering

    def _recover(self, rewound: RewoundError | None) -> None:
        snapshot: Snapshot = self._reaching(lambda: self.store.load(PARTS))
        records, beside, seats = self._recall(snapshot)
        self._group.voting.close()
        self.book = SeriesBook()
        self._group = self._make(seats, self.book)
        self._thresholds = {}
        self.position = snapshot.position
        rebuilt = self._restore(snapshot, records)
        state, _ = self._settled()
        self._begin(
            [
                *self._serving_events(records, beside),
                started(self.settings, self._loadings, self.position, stage=agent_stage(self.agent)),
            ],
            self._recovery(rewound)
            if rebuilt is None
            else self._recovery(rewound, rebuilt.what, bars=rebuilt.bars, missing=rebuilt.missing),
            state={**rebuilt.state, **{part: fields for part, fields in state.items() if fields}}
            if rebuilt
            else {part: state[part] for part in ("agents", "quality", THRESHOLDS) if part in state},
            drops=PARTS if rebuilt else [THRESHOLDS, *self.group.unused(snapshot.state)],
        )
        self._tell_agents()

    def _restore(self, snapshot: Snapshot, records: Mapping[str, Record]) -> Rebuilt | None:
        if not self.options.rebuild:
            self.book.restore(snapshot.state["series"])
            self.group.restore(snapshot.state)
            return None
        self.options.rebuild = False
        self._keep_records(records)
        inputs = {key: at for key, at in self.position.inputs.items() if key == self.keys.features}

        def compute(entries: Sequence[Entry], left_out: frozenset[tuple[str, str]]) -> tuple[int, Mapping[str, Fields]]:
            vectors, _, _ = self.group.process(read_vectors(entries, self.book, self._sets, left_out))
            return len(entries), self._changes(vectors.accepted.rows)[0]

        at = Position(inputs, self.position.last_output_id)
        rebuilt = rebuild(compute, self.store, at, self.keys.rejected, self._reaching)
        rebuilt.tell(self.log)
        return rebuilt

    # ------------------------------------------------------------------ telling

    def _tell_agents(self) -> None:
        reports = self._changed_reports()
        if reports is not None:
            self.sensors.group(self.group)
            self.sensors.watched(self.group)
            self.status.told(reports, self.group.records)

    def _tell_levels(self) -> None:
        self.sensors.watched(self.group)

    def _reports(self) -> list[AgentReport]:
        """As the group says, and where vectors lack a set that a model reads, what mends it."""
        lacking = [s.name for s in self.group.voting.feature_sets if self.book.lacks(s.name)]
        if not lacking:
            return self.group.reports()
        detail = (
            f"{self.keys.features} has no {', '.join(lacking)}: start the feature stage anew, which takes the sets "
            "from the models, or name it in the setting feature_sets there"
        )
        return [
            replace(report, detail=report.detail or detail)
            if report.reason == Reason.INSUFFICIENT_HISTORY and _reads(report.seat, lacking)
            else report
            for report in self.group.reports()
        ]


def _reads(seat: Seat, sets: Sequence[str]) -> bool:
    return seat.model is not None and seat.model.feature_set in sets


def read_thresholds(fields: Mapping[bytes, bytes]) -> dict[str, float]:
    """By agent and canary what an agent's process keeps in its part `thresholds`."""
    return {name.decode(): float(unseal(name.decode(), data)) for name, data in fields.items()}
