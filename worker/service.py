"""The chained worker: bars in, votes and signals out, all stages and one commit a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from structlog.typing import FilteringBoundLogger

from streams.messages import AgentState, Entry
from streams.store import Position, RewoundError, Snapshot
from worker.batches import Fields
from worker.builds import placed, started
from worker.encoding import commit_of
from worker.intake import Intake
from worker.notify import Notifier
from worker.pipeline import PARTS, Pipeline
from worker.processes.agents import LOADING_WAIT_S, HoldsAgents, on_bar
from worker.processes.bars import ReadsBars
from worker.processes.base import MarkingStore, Options
from worker.rebuild import Rebuilt, rebuild
from worker.reload import Shelf, Steered
from worker.roster import Record
from worker.sensors import Sensors
from worker.settings import Settings
from worker.stages.agents import AgentGroup, AgentReport
from worker.status import Status
from worker.voting import Seat

__all__ = ["MarkingStore", "Options", "Worker"]


class Worker(HoldsAgents, ReadsBars):
    """Drives a pipeline over a store. `make_pipeline` gives a fresh one over seats.

    `shelf` has the models, `records` say what served when this process came up.
    """

    def __init__(
        self,
        settings: Settings,
        store: MarkingStore,
        make_pipeline: Callable[[Sequence[Seat]], Pipeline],
        shelf: Shelf,
        records: Mapping[str, Record],
        *,
        sensors: Sensors,
        status: Status,
        log: FilteringBoundLogger,
        options: Options,
        notifier: Notifier | None = None,
    ) -> None:
        super().__init__(settings, store, sensors=sensors, status=status, log=log, options=options, notifier=notifier)
        self._make_pipeline = make_pipeline
        self._hold(shelf, settings.agents, records)
        self.pipeline = make_pipeline(self._seats())

    @property
    def group(self) -> AgentGroup:
        return self.pipeline.agents

    @property
    def intake(self) -> Intake:
        return self.pipeline.intake

    @property
    def outputs(self) -> Mapping[str, str]:
        return {
            "features": self.keys.features,
            **{f"votes:{agent}": self.keys.votes(agent) for agent in self.settings.agents},
            "signals": self.keys.signals,
            "rejected": self.keys.rejected,
            "events": self.keys.events,
        }

    # ------------------------------------------------------------------ a batch

    def _step(self) -> None:
        steered = self._steer()
        batch = self._read_bars()
        if batch.entries or steered or self.steering.waiting:
            self._idle_since = None
        if batch.entries:
            self._process(batch.entries, steered, self._now_ms(batch))
        elif steered:
            self._settle(steered)
        elif self.steering.waiting:
            self._wait(self.inputs.keys, LOADING_WAIT_S)
        else:
            self._wait_for_bars(self.keys.control)

    def _process(self, entries: Sequence[Entry], steered: Steered, now_ms: int) -> None:
        poison = self._approach(entries)
        result = self.pipeline.process(entries, now_ms, poison=poison, stopwatch=self.sensors.stopwatch)
        position = self.position.advanced([*entries, *steered.entries], self.pipeline.intake.ids.last)
        events = [on_bar(placed(event, self.position), result.accepted.bars) for event in steered.events]
        steered = replace(steered, events=events)
        with self.sensors.stopwatch("pack"):
            commit = commit_of(self.keys, result, position, steered.events, steered.rejects)
        self._commit(commit)
        self._cautious = max(0, self._cautious - len(entries))
        self.sensors.batch(result, self._now_ms())
        self.status.batch(result, healthy=self.pipeline.intake.health.healthy)
        if steered:
            self._tell_steered(steered)
        self._tell_agents()
        self.sensors.standing(self.status)
        self._tell_events(result.events)

    def _settled(self) -> tuple[Mapping[str, Fields], Sequence[str]]:
        return self.pipeline.changes()

    # ------------------------------------------------------------------ recovering

    def _recover(self, rewound: RewoundError | None) -> None:
        snapshot: Snapshot = self._reaching(lambda: self.store.load(PARTS))
        records, beside, seats = self._recall(snapshot)
        self.pipeline.voting.close()
        self.pipeline = self._make_pipeline(seats)
        self.position = snapshot.position
        rebuilt = self._restore(snapshot, records)
        self.pipeline.intake.ids.last = snapshot.position.last_output_id
        # Where another artifact serves than before, its window of votes was emptied: both go in one commit.
        serving = {"agents": self.group.record_changes(), "quality": self.group.safeguard.changes()}
        self._begin(
            [*self._serving_events(records, beside), started(self.settings, self._loadings, self.position)],
            self._recovery(rewound)
            if rebuilt is None
            else self._recovery(rewound, rebuilt.what, bars=rebuilt.bars, missing=rebuilt.missing),
            state=rebuilt.state if rebuilt else serving,
            drops=PARTS if rebuilt else self.pipeline.unused(snapshot.state),
        )
        self.status.feed(healthy=self.pipeline.intake.health.healthy)
        self._tell_agents()

    def _restore(self, snapshot: Snapshot, records: Mapping[str, Record]) -> Rebuilt | None:
        """Restore the pipeline from the stored state, or where that was asked for from the retained input."""
        if not self.options.rebuild:
            self.pipeline.restore(snapshot.state)
            return None
        self.options.rebuild = False
        self._keep_records(records)
        inputs = {key: at for key, at in self.position.inputs.items() if key != self.keys.control}
        bars = Position(inputs, self.position.last_output_id)
        now_ms = self._now_ms()

        def compute(entries: Sequence[Entry], left_out: frozenset[tuple[str, str]]) -> tuple[int, Mapping[str, Fields]]:
            result = self.pipeline.process(entries, now_ms, poison=left_out)
            return len(result.accepted), result.state

        rebuilt = rebuild(compute, self.store, bars, self.keys.rejected, self._reaching)
        rebuilt.tell(self.log)
        return rebuilt.plus("agents", self.group.record_changes())

    # ------------------------------------------------------------------ telling

    def _tell_agents(self) -> None:
        reports = self._changed_reports()
        if reports is None:
            return
        self.sensors.agents(self.pipeline)
        self.status.agents(self.group)
        self._tell_ensemble([report for report in reports if self._is_active(report)])

    def _tell_levels(self) -> None:
        self.sensors.windows(self.pipeline)

    def _tell_ensemble(self, reports: Sequence[AgentReport]) -> None:
        """Whether there can be a signal, and where there cannot, which agents are missing and why."""
        states = [report.state for report in reports]
        loaded = sum(state is not AgentState.REFUSED for state in states)
        eligible = sum(state is AgentState.ACTIVE for state in states)
        warming = sum(state is AgentState.WARMING_UP for state in states)
        self.sensors.standing(self.status)
        counts = f"{len(states)} configured, {loaded} loaded, {eligible} eligible, quorum {self.settings.quorum}"
        if eligible + warming < self.settings.quorum:
            missing = [f"{r.agent} {r.state} {r.reason or ''}".strip() for r in reports if r.state != AgentState.ACTIVE]
            line = f"ensemble below quorum: {counts}: every signal will be HOLD below_quorum: {'; '.join(missing)}"
            self.log.warning(line)
            return
        line = f"ensemble warming up: {counts}" if warming else f"ensemble ready: {counts}"
        self.log.info(line)
