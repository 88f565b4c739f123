"""Holding agents: their models as the state names them, operators' orders, and what is told of them."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from agents.agent import Refusal
from agents.artifacts import Loading
from streams.codec import StateCorruptError, encode_reject
from streams.messages import CANARY, AgentState, Bar, Event, Reason
from streams.store import Commit, Snapshot
from worker.batches import Fields
from worker.builds import placed
from worker.encoding import encoded_events
from worker.processes.base import Process
from worker.reload import Shelf, Steered, Steering
from worker.roster import Artifact, Record, records_of
from worker.stages.agents import AgentGroup, AgentReport, trial_seat
from worker.voting import Seat

LOADING_WAIT_S = 0.02

_REBUILT = Refusal(Reason.OPERATOR, "the state was computed anew, and nothing is known of its votes: order it again")


class HoldsAgents(Process):
    """A process that serves `names`, some or all of the agents."""

    names: Sequence[str]
    steering: Steering
    _shelf: Shelf
    _loadings: list[Loading]
    _states: dict[str, tuple[str | None, ...]]
    _folder_at = 0.0

    def _hold(self, shelf: Shelf, names: Sequence[str], records: Mapping[str, Record]) -> None:
        """Load what serves; `records` say what did when this process came up."""
        self.names = names
        self._shelf = shelf
        self._states = {}
        self.steering = Steering(names, shelf, self.settings.agents)
        self._loadings = [shelf.serving(agent, records.get(agent, Record())) for agent in names]

    def _close(self) -> None:
        self.steering.close()

    @property
    @abstractmethod
    def group(self) -> AgentGroup:
        """The agents as they stand."""

    @abstractmethod
    def _settled(self) -> tuple[Mapping[str, Fields], Sequence[str]]:
        """State and drops to commit after changes that no batch follows."""

    @abstractmethod
    def _tell_agents(self) -> None:
        """Log and publish each agent's change of state, of its reason or of its model, once."""

    # ------------------------------------------------------------------ what serves

    def _recall(self, snapshot: Snapshot) -> tuple[dict[str, Record], dict[str, Loading], list[Seat]]:
        """What the state says that serves: the records, how each trial was loaded, and the seats."""
        try:
            stored = records_of(snapshot.state["agents"])
        except StateCorruptError:
            if not self.options.rebuild:
                raise
            stored = {}
        records = {agent: record for agent, record in stored.items() if agent in self.names}
        self._loadings = [self._shelf.serving(agent, records.get(agent, Record())) for agent in self.names]
        trials = {agent: record.trial.artifact for agent, record in records.items() if record.trial is not None}
        if self.options.rebuild:
            beside = {agent: Loading(agent, refusal=_REBUILT) for agent in trials}
        else:
            beside = {agent: self._shelf.exact(agent, artifact) for agent, artifact in trials.items()}
        self.steering.start(self._loadings)
        return records, beside, [*self._seats(), *self._trial_seats(records, beside)]

    def _seats(self) -> list[Seat]:
        return [Seat(x.agent, self.settings.weights[x.agent], x.model, x.refusal) for x in self._loadings]

    def _trial_seats(self, records: Mapping[str, Record], beside: Mapping[str, Loading]) -> list[Seat]:
        return [
            trial_seat(agent, loading.model, trial.kind, self.settings.canary_share)
            for agent, loading in beside.items()
            if loading.model is not None and (trial := records[agent].trial) is not None
        ]

    def _keep_records(self, records: Mapping[str, Record]) -> None:
        """After a rebuild: what no vector explains."""
        for agent, record in records.items():
            kept = replace(self.group.records[agent], pinned=record.pinned, before=record.before)
            self.group.records[agent] = kept

    def _serving_events(self, records: Mapping[str, Record], beside: Mapping[str, Loading]) -> list[Event]:
        """What each agent and each trial starts with."""
        events = [_agent_event(loading, records.get(loading.agent, Record())) for loading in self._loadings]
        return [*events, *(_trial_event(agent, records[agent], loading) for agent, loading in beside.items())]

    # ------------------------------------------------------------------ orders and reloads

    def _steer(self) -> Steered:
        """Change the agents by what operators ordered and the folder brought, as far as it is loaded."""
        if not self.steering.waiting:
            self.steering.receive(self._read_orders())
        if self.options.reload.is_set():
            self.options.reload.clear()
            self.steering.reload_all("SIGHUP")
        now = time.monotonic()
        if self.settings.watch_s and now - self._folder_at >= self.settings.watch_s:
            self._folder_at = now
            self.steering.look(self.group)
        return self.steering.take(self.group)

    def _settle(self, steered: Steered) -> None:
        """Commit changes that no bar follows."""
        position = self.position.advanced(steered.entries, self.position.last_output_id)
        state, drops = self._settled()
        appends = {
            self.keys.rejected: [encode_reject(reject) for reject in steered.rejects],
            self.keys.events: encoded_events([placed(event, self.position) for event in steered.events]),
        }
        self._commit(Commit(position, appends=appends, state=state, drops=drops))
        self._tell_steered(steered)

    def _tell_steered(self, steered: Steered) -> None:
        for reject in steered.rejects:
            self.sensors.metrics.rejected(reject.stage, reject.reason)
        self._shelf.keep(self.group.records)
        self._tell_agents()
        self._tell_events(steered.events)

    # ------------------------------------------------------------------ telling

    def _changed_reports(self) -> list[AgentReport] | None:
        """Every agent's report where any of them changed, each change logged once; None where none did."""
        reports = self._reports()
        states = {report.agent: _told(report) for report in reports}
        if states == self._states:
            return None
        for report in reports:
            if self._states.get(report.agent) != states[report.agent]:
                line = f"agent is {report.state}"
                self.log.info(line, agent=report.agent, reason=report.reason, version=report.seat.version)
        self._states = states
        return reports

    def _reports(self) -> list[AgentReport]:
        return self.group.reports()

    @staticmethod
    def _is_active(report: AgentReport) -> bool:
        return report.seat.role is AgentState.ACTIVE


def _agent_event(loading: Loading, record: Record) -> Event:
    """What an agent starts with, and what served before where that was another artifact."""
    if loading.model is None:
        refusal = loading.refusal
        reason, detail = (str(refusal.reason), refusal.detail) if refusal else ("", "")
        return Event("agent_refused", agent=loading.agent, reason=reason, detail=detail, evidence=_refused(loading))
    before, now = record.artifact, Artifact.of(loading.model)
    changed = before is not None and not before.is_same(now)
    what = now.change(before) if changed else ""
    detail = "; ".join(part for part in (what, loading.model.detail, loading.note) if part)
    replaces = {"replaces": before.evidence()} if changed and before is not None else {}
    kind = "reload" if changed else "agent_loaded"
    return Event(kind, agent=loading.agent, detail=detail, evidence=now.evidence() | replaces | _newer(loading))


def _told(report: AgentReport) -> tuple[str | None, ...]:
    """What is told of an agent, anew where any of it changes."""
    return str(report.state), report.reason, report.detail, report.seat.version, report.seat.sha256


def _refused(loading: Loading) -> dict[str, Any]:
    """Which file was refused, as far as it was found and read."""
    candidate = loading.candidate
    found = {} if candidate is None else {"file": str(candidate.file), "version": candidate.version}
    return found | {key: loading.facts[key] for key in ("sha256",) if key in loading.facts}


def _newer(loading: Loading) -> dict[str, Any]:
    """The newer file that was refused while the one of the state serves on, if there is one."""
    if loading.passed_over is None:
        return {}
    candidate, refusal = loading.passed_over
    told = {"file": str(candidate.file), "version": candidate.version, "reason": str(refusal.reason)}
    return {"newer_refused": told}


def on_bar(event: Event, bars: Sequence[Bar]) -> Event:
    """The event with the first bar of the batch in whose commit it goes out."""
    if not bars:
        return event
    bar = bars[0]
    return replace(event, ts=bar.ts, bar_id=bar.bar_id, symbol=bar.symbol, interval=bar.interval)


def _trial_event(agent: str, record: Record, loading: Loading) -> Event:
    """What becomes of a canary or shadow at a start."""
    evidence = record.trial.artifact.evidence() if record.trial else {}
    if loading.model is not None:
        return Event("agent_loaded", agent=agent + CANARY, detail=loading.model.detail, evidence=evidence)
    refusal = loading.refusal
    reason, detail = (str(refusal.reason), refusal.detail) if refusal else ("", "")
    return Event("rolled_back", agent=agent + CANARY, reason=reason, detail=detail, evidence=evidence)
