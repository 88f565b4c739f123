"""The worker's loop: own the namespace, recover, then read, process and commit until told to stop."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from structlog.typing import FilteringBoundLogger

from agents.agent import Refusal
from agents.artifacts import Loading
from streams.codec import StateCorruptError, encode_reject
from streams.inputs import REFRESH_S, Inputs
from streams.keys import Keys
from streams.messages import CANARY, AgentState, Bar, Entry, Event, Reason
from streams.redis import with_baseline
from streams.store import (
    Batch,
    Commit,
    FencedError,
    InputLostError,
    Position,
    RewoundError,
    Snapshot,
    Store,
    StoreUnavailableError,
)
from worker.builds import placed, started
from worker.encoding import commit_of, encoded_events
from worker.http import Condition
from worker.lease import LeaseKeeper
from worker.notify import Notifier
from worker.pipeline import PARTS, Pipeline
from worker.rebuild import Rebuilt, rebuild
from worker.reload import Shelf, Steered, Steering
from worker.roster import Artifact, Record, records_of
from worker.sensors import Sensors
from worker.settings import Settings
from worker.stages.agents import AgentReport, trial_seat
from worker.status import Status
from worker.voting import Seat

WAIT_S = 0.25
STANDBY_POLL_S = 0.2
LONGEST_BACKOFF_S = 2.0
LAST_TRIES_S = 1.0
"""How long a worker that is told to stop goes on trying to reach the server."""
LAST_PAUSE_S = 0.1
LEVELS_EVERY_S = 2.0
POISON_DEATHS = 3
SHOWN_KEYS = 5
ORDERS_EVERY_S = 0.1
"""While bars flow, orders are looked for no more often than this."""
MOST_ORDERS = 16
LOADING_WAIT_S = 0.02


WARNINGS = ("revision", "feed_unhealthy", "reload_refused", "order_refused", "rolled_back")
"""Events that are logged as warnings."""

_REBUILT = Refusal(Reason.OPERATOR, "the state was computed anew, and nothing is known of its votes: order it again")


class MarkingStore(Store, Protocol):
    """A store that survives a worker which dies on an entry."""

    was_clean: bool

    def mark(self, entry: Entry) -> int:
        """Note that `entry` is processed alone; how often that was noted without a commit since."""
        ...

    def lengths(self, keys: Sequence[str]) -> dict[str, int]: ...

    def find(self, pattern: str) -> Mapping[str, str]: ...


@dataclass
class Options:
    """How one run differs from another. `until_idle_s` None runs until it is stopped.

    `reload`, when it is set, loads every agent's newest artifact, as the order does.
    """

    until_idle_s: float | None = None
    accept_gap: bool = False
    rebuild: bool = False
    stop: threading.Event = field(default_factory=threading.Event)
    reload: threading.Event = field(default_factory=threading.Event)
    now_ms: Callable[[], int] | None = None


class Worker:
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
        self.settings = settings
        self.keys = Keys(settings.namespace)
        self.inputs = Inputs(settings.input_keys, settings.namespace)
        self.store = store
        self.sensors = sensors
        self.status = status
        self.log = log
        self.options = options
        self.notifier = notifier or Notifier()
        self.position = Position()
        self.steering = Steering(settings.agents, shelf)
        self._make_pipeline = make_pipeline
        self._shelf = shelf
        self._loadings = [shelf.serving(agent, records.get(agent, Record())) for agent in settings.agents]
        self.pipeline = make_pipeline(self._seats())
        self._states: dict[str, tuple[str | None, ...]] = {}
        self._cautious = 0
        self._idle_since: float | None = None
        self._levels_at = 0.0
        self._looked_at: float | None = None
        self._orders_at = 0.0
        self._folder_at = 0.0

    # ------------------------------------------------------------------ the loop

    def run(self, lease: LeaseKeeper) -> None:
        """Serve until stopped or idle. Raises what ends a worker: fenced off, input lost, misuse."""
        if not self._own():
            return
        lease.start()
        try:
            self._start()
            self.notifier.ready(f"serving {self.settings.namespace}")
            while not self._done():
                self._beat()
                if lease.lost.is_set():
                    raise FencedError(lease.why)
                self._turn()
            self._reaching(self.store.release)
        finally:
            self.notifier.stopping()
            self.steering.close()
            lease.stop()

    def _turn(self) -> None:
        try:
            steered = self._steer()
            batch = self._read()
            if batch.entries or steered or self.steering.waiting:
                self._idle_since = None
            if batch.entries:
                self._process(batch.entries, steered, self._now_ms(batch))
            elif steered:
                self._settle(steered)
            else:
                self._idle()
        except RewoundError as error:
            self._start(error)

    def _beat(self) -> None:
        """The loop turns: for `/healthz` and for the service manager's watchdog."""
        self.status.beat()
        self.notifier.alive()

    def _done(self) -> bool:
        if self.options.stop.is_set():
            self.log.info("stopping: the batch in hand is committed")
            return True
        silent_s, limit_s = self._idle_since, self.options.until_idle_s
        return silent_s is not None and limit_s is not None and time.monotonic() - silent_s >= limit_s

    def _idle(self) -> None:
        """Wait for a bar or an order, not long where models are being loaded for one."""
        if self.steering.waiting:
            keys, wait_s = list(self.inputs.keys), LOADING_WAIT_S
        else:
            self._idle_since = self._idle_since or time.monotonic()
            keys, wait_s = [*self.inputs.keys, self.keys.control], WAIT_S
        if keys:
            self._reaching(lambda: self.store.wait(self.position, keys, wait_s))
        else:
            self.options.stop.wait(wait_s)

    # ------------------------------------------------------------------ owning and recovering

    def _own(self) -> bool:
        """Wait until this instance owns the stage; False where it is stopped before."""
        waiting = False
        while not self._reaching(self.store.acquire):
            if not waiting:
                self.log.info("standing by: another instance is alive and owns this namespace")
                self.status.owner = Condition(ok=False, detail="standing by for another instance")
                self.notifier.status(self.status.owner.detail)
            waiting = True
            self._beat()
            if self.options.stop.wait(STANDBY_POLL_S):
                return False
        self.status.owner = Condition(ok=True)
        return True

    def _start(self, rewound: RewoundError | None = None) -> None:
        """Recover, again where the server went back in time meanwhile."""
        while True:
            if rewound is not None:
                self.log.error("the server went back in time; resuming from what it holds", detail=str(rewound))
                if not self._own():
                    return
            try:
                self._recover(rewound)
            except RewoundError as error:
                rewound = error
            else:
                return

    def _recover(self, rewound: RewoundError | None) -> None:
        """Take up what was committed, in one atomic read, and say what this instance starts with."""
        snapshot: Snapshot = self._reaching(lambda: self.store.load(PARTS))
        records, beside = self._recall(snapshot)
        self.position = snapshot.position
        rebuilt = self._restore(snapshot, records)
        self.pipeline.intake.ids.last = snapshot.position.last_output_id
        self._cautious = 0 if self.store.was_clean else self.settings.batch_size
        # Where another artifact serves than before, its window of votes was emptied: both go in one commit.
        serving = {"agents": self.pipeline.agents.record_changes(), "quality": self.pipeline.safeguard.changes()}
        events = [self._agent_event(loading, records.get(loading.agent, Record())) for loading in self._loadings]
        events += [_trial_event(agent, records[agent], loading) for agent, loading in beside.items()]
        events.append(started(self.settings, self._loadings, self.position))
        if self.position.inputs:
            events.append(self._recovery_event(self.position, rewound, rebuilt))
            self.sensors.metrics.recoveries()
        self._commit(
            Commit(
                self.position,
                appends={self.keys.events: encoded_events(events)},
                state=rebuilt.state if rebuilt else serving,
                drops=PARTS if rebuilt else self.pipeline.unused(snapshot.state),
            )
        )
        self.status.feed(healthy=self.pipeline.intake.health.healthy)
        self._tell_agents()

    def _recall(self, snapshot: Snapshot) -> tuple[dict[str, Record], dict[str, Loading]]:
        """A fresh pipeline over what the state says that serves: the records, and how each trial was loaded."""
        try:
            stored = records_of(snapshot.state["agents"])
        except StateCorruptError:
            if not self.options.rebuild:
                raise
            stored = {}
        records = {agent: record for agent, record in stored.items() if agent in self.settings.agents}
        self._loadings = [self._shelf.serving(agent, records.get(agent, Record())) for agent in self.settings.agents]
        trials = {agent: record.trial.artifact for agent, record in records.items() if record.trial is not None}
        if self.options.rebuild:
            beside = {agent: Loading(agent, refusal=_REBUILT) for agent in trials}
        else:
            beside = {agent: self._shelf.exact(agent, artifact) for agent, artifact in trials.items()}
        self.pipeline.voting.close()
        self.pipeline = self._make_pipeline([*self._seats(), *self._trial_seats(records, beside)])
        self.steering.start(self._loadings)
        return records, beside

    def _seats(self) -> list[Seat]:
        return [Seat(x.agent, self.settings.weights[x.agent], x.model, x.refusal) for x in self._loadings]

    def _trial_seats(self, records: Mapping[str, Record], beside: Mapping[str, Loading]) -> list[Seat]:
        return [
            trial_seat(agent, loading.model, trial.kind, self.settings.canary_share)
            for agent, loading in beside.items()
            if loading.model is not None and (trial := records[agent].trial) is not None
        ]

    def _restore(self, snapshot: Snapshot, records: Mapping[str, Record]) -> Rebuilt | None:
        """Restore the pipeline from the stored state, or where that was asked for from the retained input."""
        if not self.options.rebuild:
            self.pipeline.restore(snapshot.state)
            return None
        self.options.rebuild = False
        for agent, record in records.items():
            kept = replace(self.pipeline.records[agent], pinned=record.pinned, before=record.before)
            self.pipeline.records[agent] = kept
        inputs = {key: at for key, at in self.position.inputs.items() if key != self.keys.control}
        bars = Position(inputs, self.position.last_output_id)
        rebuilt = rebuild(self.pipeline, self.store, bars, self._now_ms(), self.keys.rejected, self._reaching)
        self.log.info("state rebuilt from the input", bars=rebuilt.bars)
        for key, missing in rebuilt.missing.items():
            if missing:
                self.log.warning(
                    "the input was trimmed: indicators start at its first entry and differ from before",
                    key=key,
                    missing=missing,
                )
        return rebuilt

    def _agent_event(self, loading: Loading, record: Record) -> Event:
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

    def _recovery_event(self, position: Position, rewound: RewoundError | None, rebuilt: Rebuilt | None) -> Event:
        inputs: dict[str, Any] = {key: at.id for key, at in position.inputs.items()}
        if rebuilt is not None:
            reason, how = "rebuild", f"state computed anew from {rebuilt.bars} retained bars"
            inputs |= {"bars": rebuilt.bars, "missing": rebuilt.missing}
        elif rewound is not None:
            reason, how = "rewind", str(rewound)
        else:
            reason = "clean" if self.store.was_clean else "crash"
            how = "after a clean end" if self.store.was_clean else "after an end that was not clean"
        self.log.info("recovered", reason=reason, detail=how, position=inputs, series=len(self.pipeline.intake.series))
        return Event("recovery", reason=reason, detail=how, evidence=inputs)

    # ------------------------------------------------------------------ a batch

    def _read(self) -> Batch:
        """The next batch, at most one entry while a crash is being approached again."""
        count = 1 if self._cautious else self.settings.batch_size
        self._look_for_inputs()
        keys = self.inputs.keys
        if not keys:
            return Batch((), {})
        with self.sensors.stopwatch("read"):
            try:
                batch: Batch = self._reaching(lambda: self.store.read(self.position, keys, count))
            except InputLostError as error:
                self._accept_loss(error)
                return Batch((), {})
        self.position = with_baseline(self.position, batch.facts)
        self._levels(batch)
        return batch

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

    # ------------------------------------------------------------------ orders and reloads

    def _steer(self) -> Steered:
        """Change the pipeline by what operators ordered and the folder brought, as far as it is loaded."""
        now = time.monotonic()
        if not self.steering.waiting and (self._idle_since is not None or now - self._orders_at >= ORDERS_EVERY_S):
            self._orders_at = now
            self._read_orders()
        if self.options.reload.is_set():
            self.options.reload.clear()
            self.steering.reload_all("SIGHUP")
        if self.settings.watch_s and now - self._folder_at >= self.settings.watch_s:
            self._folder_at = now
            self.steering.look(self.pipeline.agents)
        return self.steering.take(self.pipeline.agents)

    def _read_orders(self) -> None:
        key = self.keys.control
        try:
            batch: Batch = self._reaching(lambda: self.store.read(self.position, [key], MOST_ORDERS))
        except InputLostError as error:
            self._lose_orders(error)
            return
        self.position = with_baseline(self.position, batch.facts)
        self.steering.receive(batch.entries)

    def _lose_orders(self, error: InputLostError) -> None:
        """Orders that are gone were not carried out; no bar depends on them, so say it and go on."""
        detail = f"{error.lost} orders are gone from {error.key} before they were read: order again what is missing"
        self.log.error("orders lost", reason="lost", key=error.key, lost=error.lost)
        event = Event("gap", reason="lost", detail=detail, evidence={"key": error.key, "lost": error.lost})
        position = Position({**self.position.inputs, error.key: error.resume}, self.position.last_output_id)
        self._commit(Commit(position, appends={self.keys.events: encoded_events([event])}))
        self.position = position

    def _settle(self, steered: Steered) -> None:
        """Commit changes that no bar follows."""
        position = self.position.advanced(steered.entries, self.pipeline.intake.ids.last)
        state, drops = self.pipeline.settle()
        appends = {
            self.keys.rejected: [encode_reject(reject) for reject in steered.rejects],
            self.keys.events: encoded_events([placed(event, self.position) for event in steered.events]),
        }
        self._commit(Commit(position, appends=appends, state=state, drops=drops))
        self.position = position
        self._tell_steered(steered)

    def _tell_steered(self, steered: Steered) -> None:
        for reject in steered.rejects:
            self.sensors.metrics.rejected(reject.stage, reject.reason)
        self._shelf.keep(self.pipeline.records)
        self._tell_agents()
        self._tell_events(steered.events)

    def _now_ms(self, batch: Batch | None = None) -> int:
        """The clock that was given, else the server's at the moment of a read, else this machine's."""
        if self.options.now_ms is not None:
            return self.options.now_ms()
        server_ms = batch.now_ms if batch is not None else None
        return time.time_ns() // 1_000_000 if server_ms is None else server_ms

    def _process(self, entries: Sequence[Entry], steered: Steered, now_ms: int) -> None:
        poison = self._approach(entries)
        result = self.pipeline.process(entries, now_ms, poison=poison, stopwatch=self.sensors.stopwatch)
        position = self.position.advanced([*entries, *steered.entries], self.pipeline.intake.ids.last)
        events = [_on_bar(placed(event, self.position), result.accepted.bars) for event in steered.events]
        steered = replace(steered, events=events)
        with self.sensors.stopwatch("pack"):
            commit = commit_of(self.keys, result, position, steered.events, steered.rejects)
        self._commit(commit)
        self.position = position
        self._cautious = max(0, self._cautious - len(entries))
        self.sensors.batch(result, self._now_ms())
        self.status.batch(result, healthy=self.pipeline.intake.health.healthy)
        if steered:
            self._tell_steered(steered)
        self._tell_agents()
        self.sensors.standing(self.status)
        self._tell_events(result.events)

    def _approach(self, entries: Sequence[Entry]) -> frozenset[tuple[str, str]]:
        """After a crash each entry goes alone behind a mark, so that one which kills is found and left out."""
        if not self._cautious:
            return frozenset()
        entry = entries[0]
        deaths = self._reaching(lambda: self.store.mark(entry)) - 1
        if deaths < POISON_DEATHS:
            return frozenset()
        self.log.error("entry left out: it ended the worker", reason="poison", key=entry.key, id=entry.id)
        return frozenset({(entry.key, entry.id)})

    def _commit(self, commit: Commit) -> None:
        """Commit once, however often it takes; nothing else happens meanwhile."""
        with self.sensors.stopwatch("commit"):
            written = self._reaching(lambda: self.store.commit(commit), committing=True)
        self.sensors.metrics.commits("ok" if written else "lost_reply")

    def _accept_loss(self, error: InputLostError) -> None:
        """Count what is gone and warm everything up again, if that was asked for; else stop."""
        if not self.options.accept_gap:
            raise error
        self.log.error("input lost", reason="lost", key=error.key, lost=error.lost)
        inputs = dict(self.position.inputs)
        inputs[error.key] = error.resume
        self.pipeline.intake.rewarm_all()
        evidence = {"key": error.key, "lost": error.lost, "after": error.resume.id}
        event = Event("gap", reason="lost", detail=str(error), evidence=evidence)
        position = Position(inputs, self.position.last_output_id)
        self._commit(
            Commit(
                position,
                appends={self.keys.events: encoded_events([event])},
                state={"series": self.pipeline.intake.changes()},
            )
        )
        self.position = position
        self.sensors.metrics.bars("lost", error.lost)

    # ------------------------------------------------------------------ outages

    def _reaching(self, call: Callable[[], Any], *, committing: bool = False) -> Any:
        """Call until the server answers; a worker that is told to stop gives up soon, though not at one lost reply."""
        pause_s, give_up_at = 0.05, None
        while True:
            self._beat()
            try:
                value = call()
            except StoreUnavailableError as error:
                self._note_outage(error, committing=committing)
                if self.options.stop.wait(pause_s):
                    now = time.monotonic()
                    give_up_at = give_up_at or now + LAST_TRIES_S
                    if now >= give_up_at:
                        raise
                    time.sleep(LAST_PAUSE_S)
                pause_s = min(2 * pause_s, LONGEST_BACKOFF_S)
            except FencedError:
                if committing:
                    self.sensors.metrics.commits("fenced")
                raise
            else:
                if not self.status.server.ok:
                    self.log.info("connected to the server")
                    self.status.server = Condition(ok=True)
                return value

    def _note_outage(self, error: StoreUnavailableError, *, committing: bool) -> None:
        if self.status.server.ok:
            self.log.error("the server is unavailable; nothing is lost, trying again", detail=str(error))
        self.status.server = Condition(ok=False, detail=str(error))
        if committing or error.reason == "out_of_memory":  # such a server refuses even the read before a commit
            self.sensors.metrics.commits(error.reason)

    # ------------------------------------------------------------------ telling

    def _tell_agents(self) -> None:
        """Log and publish each agent's change of state, of its reason or of its model, once."""
        reports = self.pipeline.reports()
        states = {report.agent: _told(report) for report in reports}
        if states == self._states:
            return
        for report in reports:
            if self._states.get(report.agent) != states[report.agent]:
                line = f"agent is {report.state}"
                self.log.info(line, agent=report.agent, reason=report.reason, version=report.seat.version)
        self._states = states
        self.sensors.agents(self.pipeline)
        self.status.agents(self.pipeline)
        self._tell_ensemble([report for report in reports if report.seat.role is AgentState.ACTIVE])

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

    def _tell_events(self, events: Sequence[Event]) -> None:
        self.sensors.events(events)
        for event in events:
            level = self.log.warning if event.kind in WARNINGS else self.log.info
            named = {"bar_id": event.bar_id, "symbol": event.symbol, "agent": event.agent, "reason": event.reason}
            level(event.kind, **named, detail=event.detail)

    def _levels(self, batch: Batch) -> None:
        """Lag and lengths, every couple of seconds: they are asked of the server."""
        now = time.monotonic()
        if now - self._levels_at < LEVELS_EVERY_S:
            return
        self._levels_at = now
        self.sensors.inputs(self.position, batch.facts, self.inputs.label)
        self.sensors.windows(self.pipeline)
        outputs: Mapping[str, str] = {
            "features": self.keys.features,
            **{f"votes:{agent}": self.keys.votes(agent) for agent in self.settings.agents},
            "signals": self.keys.signals,
            "rejected": self.keys.rejected,
            "events": self.keys.events,
        }
        lengths = self._reaching(lambda: self.store.lengths(list(outputs.values())))
        for name, key in outputs.items():
            self.sensors.metrics.length(name, lengths[key])


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


def _on_bar(event: Event, bars: Sequence[Bar]) -> Event:
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
