"""What every process needs: own a stage, recover, turn after turn one commit, through outages, until told to stop."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from structlog.typing import FilteringBoundLogger

from streams.keys import Keys
from streams.messages import Entry, Event
from streams.redis import with_baseline
from streams.store import (
    Batch,
    Commit,
    FencedError,
    InputLostError,
    Position,
    RewoundError,
    Store,
    StoreUnavailableError,
    StreamFacts,
)
from worker.batches import Fields
from worker.encoding import encoded_events
from worker.http import Condition
from worker.lease import LeaseKeeper
from worker.notify import STANDING_BY, Notifier
from worker.sensors import Sensors
from worker.settings import Settings
from worker.status import Status

WAIT_S = 0.25
STANDBY_POLL_S = 0.2
LONGEST_BACKOFF_S = 2.0
BACKOFF_SHARE = 0.25
"""Of the deadline of agents: after an outage no stage comes back so late that it is called absent for it."""
LAST_TRIES_S = 1.0
"""How long a process that is told to stop goes on trying to reach the server."""
LAST_PAUSE_S = 0.1
LEVELS_EVERY_S = 2.0
ORDERS_EVERY_S = 0.1
"""While bars flow, orders are looked for no more often than this."""
MOST_ORDERS = 16
POISON_DEATHS = 3

WARNINGS = ("revision", "feed_unhealthy", "reload_refused", "order_refused", "rolled_back")
"""Events that are logged as warnings."""


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

    `accept_gap` is about what is gone at the start: once the input was read, a further gap stops the process.
    `reload`, when it is set, loads every agent's newest artifact, as the order does.
    """

    until_idle_s: float | None = None
    accept_gap: bool = False
    rebuild: bool = False
    stop: threading.Event = field(default_factory=threading.Event)
    reload: threading.Event = field(default_factory=threading.Event)
    now_ms: Callable[[], int] | None = None


class Process(ABC):
    """One owner of one stage of a namespace. What is special to the stage is in the abstract methods.

    Everything that is asked of the server goes through `_reaching`; everything that is written is one commit.
    """

    agent = ""
    """The one agent that it is about; empty where it is about all."""

    def __init__(
        self,
        settings: Settings,
        store: MarkingStore,
        *,
        sensors: Sensors,
        status: Status,
        log: FilteringBoundLogger,
        options: Options,
        notifier: Notifier | None = None,
    ) -> None:
        self.settings = settings
        self.keys = Keys(settings.namespace)
        self.store = store
        self.sensors = sensors
        self.status = status
        self.log = log
        self.options = options
        self.notifier = notifier or Notifier()
        self.position = Position()
        self._cautious = 0
        self._idle_since: float | None = None
        self._levels_at = 0.0
        self._orders_at = 0.0

    @property
    def name(self) -> str:
        """What this process serves, for a person."""
        return self.settings.namespace

    @property
    @abstractmethod
    def outputs(self) -> Mapping[str, str]:
        """The streams that it writes, by their names in metrics."""

    @abstractmethod
    def _step(self) -> None:
        """Read, process and commit one batch, or wait where there is none."""

    @abstractmethod
    def _recover(self, rewound: RewoundError | None) -> None:
        """Take up what was committed, in one atomic read, and say what this instance starts with."""

    def _close(self) -> None:  # noqa: B027  nothing unless a stage has something
        """End what was begun, whatever happened."""

    def _reconnected(self) -> None:  # noqa: B027
        """The server answers again after an outage."""

    def _tell_levels(self) -> None:  # noqa: B027
        """Every couple of seconds: metrics over sliding windows."""

    def _label(self, key: str) -> str:
        """What metrics call an input."""
        return key.removeprefix(f"{self.keys.namespace}:")

    # ------------------------------------------------------------------ the loop

    def run(self, lease: LeaseKeeper) -> None:
        """Serve until stopped or idle. Raises what ends a process: fenced off, input lost, misuse."""
        if not self._own():
            return
        lease.start()
        try:
            self._start()
            self.notifier.ready(f"serving {self.name}")
            while not self._done():
                self._beat()
                if lease.lost.is_set():
                    raise FencedError(lease.why)
                self._turn()
            self._reaching(self.store.release)
        finally:
            self.notifier.stopping()
            self._close()
            lease.stop()

    def _turn(self) -> None:
        try:
            self._step()
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

    def _wait(self, keys: Sequence[str], wait_s: float) -> None:
        """Until an entry follows the position in one of `keys`, at most `wait_s`."""
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
                self.status.owner = Condition(ok=False, detail=STANDING_BY)
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

    def _begin(
        self,
        events: Sequence[Event],
        recovery: Event,
        *,
        state: Mapping[str, Fields],
        drops: Sequence[str],
    ) -> None:
        """Commit the start: `events`, and `recovery` where an earlier position was taken up."""
        self._cautious = 0 if self.store.was_clean else self.settings.batch_size
        told = list(events)
        if self.position.inputs:
            self.log.info("recovered", reason=recovery.reason, detail=recovery.detail, position=recovery.evidence)
            told.append(recovery)
            self.sensors.metrics.recoveries()
        self._commit(Commit(self.position, appends={self.keys.events: encoded_events(told)}, state=state, drops=drops))

    def _recovery(self, rewound: RewoundError | None, rebuilt: str = "", **evidence: Any) -> Event:
        """The event of a start from an earlier position; `rebuilt` says how the state was made anew, if it was."""
        inputs: dict[str, Any] = {key: at.id for key, at in self.position.inputs.items()} | evidence
        if rebuilt:
            reason, how = "rebuild", rebuilt
        elif rewound is not None:
            reason, how = "rewind", str(rewound)
        else:
            reason = "clean" if self.store.was_clean else "crash"
            how = "after a clean end" if self.store.was_clean else "after an end that was not clean"
        return Event("recovery", reason=reason, detail=how, evidence=inputs)

    # ------------------------------------------------------------------ a batch

    @property
    def _most(self) -> int:
        """Most entries of the next read: one while a crash is being approached again."""
        return 1 if self._cautious else self.settings.batch_size

    def _now_ms(self, batch: Batch | None = None) -> int:
        """The clock that was given, else the server's at the moment of a read, else this machine's."""
        if self.options.now_ms is not None:
            return self.options.now_ms()
        server_ms = batch.now_ms if batch is not None else None
        return time.time_ns() // 1_000_000 if server_ms is None else server_ms

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
        self.position = commit.position

    def _take(self, read: Callable[[], Batch]) -> Batch:
        """What `read` gives, behind entries that are gone where that is accepted: at the first read only."""
        with self.sensors.stopwatch("read"):
            while True:
                try:
                    batch: Batch = self._reaching(read)
                    break
                except InputLostError as error:
                    self._accept_loss(error)
        self.options.accept_gap = False
        self.position = with_baseline(self.position, batch.facts)
        self._levels(batch.facts)
        return batch

    def _accept_loss(self, error: InputLostError) -> None:
        """Go on behind entries that are gone, and start anew what they were for, if that was asked for; else stop."""
        if not self.options.accept_gap:
            raise error
        self.log.error("input lost", reason="lost", key=error.key, lost=error.lost)
        evidence = {"key": error.key, "lost": error.lost, "after": error.resume.id}
        event = Event("gap", agent=self.agent, reason="lost", detail=str(error), evidence=evidence)
        self._skip_lost(error, event, self._start_anew(error.key))

    @abstractmethod
    def _start_anew(self, key: str) -> Mapping[str, Fields]:
        """Forget what entries of `key` that are gone would have continued; the state to commit."""

    def _read_orders(self) -> Sequence[Entry]:
        """Operators' orders that came since; none before it is time to look again."""
        now, key = time.monotonic(), self.keys.control
        if self._idle_since is None and now - self._orders_at < ORDERS_EVERY_S:
            return ()
        self._orders_at = now
        try:
            batch: Batch = self._reaching(lambda: self.store.read(self.position, [key], MOST_ORDERS))
        except InputLostError as error:
            self._lose_orders(error)
            return ()
        self.position = with_baseline(self.position, batch.facts)
        return batch.entries

    def _lose_orders(self, error: InputLostError) -> None:
        """Orders that are gone were not carried out; no bar depends on them, so say it and go on."""
        detail = f"{error.lost} orders are gone from {error.key} before they were read: order again what is missing"
        self.log.error("orders lost", reason="lost", key=error.key, lost=error.lost)
        event = Event("gap", reason="lost", detail=detail, evidence={"key": error.key, "lost": error.lost})
        self._skip_lost(error, event, {})

    def _skip_lost(self, error: InputLostError, event: Event, state: Mapping[str, Fields]) -> None:
        """Go on behind entries that are gone, with an event that says so."""
        position = Position({**self.position.inputs, error.key: error.resume}, self.position.last_output_id)
        self._commit(Commit(position, appends={self.keys.events: encoded_events([event])}, state=state))

    # ------------------------------------------------------------------ outages

    def _reaching(self, call: Callable[[], Any], *, committing: bool = False) -> Any:
        """Call until the server answers; a worker that is told to stop gives up soon, though not at one lost reply."""
        pause_s, give_up_at = 0.05, None
        longest_s = min(LONGEST_BACKOFF_S, BACKOFF_SHARE * self.settings.deadline_s)
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
                pause_s = min(2 * pause_s, longest_s)
            except FencedError:
                if committing:
                    self.sensors.metrics.commits("fenced")
                raise
            else:
                if not self.status.server.ok:
                    self.log.info("connected to the server")
                    self.status.server = Condition(ok=True)
                    self._reconnected()
                return value

    def _note_outage(self, error: StoreUnavailableError, *, committing: bool) -> None:
        if self.status.server.ok:
            self.log.error("the server is unavailable; nothing is lost, trying again", detail=str(error))
        self.status.server = Condition(ok=False, detail=str(error))
        if committing or error.reason == "out_of_memory":  # such a server refuses even the read before a commit
            self.sensors.metrics.commits(error.reason)

    # ------------------------------------------------------------------ telling

    def _tell_events(self, events: Sequence[Event]) -> None:
        self.sensors.events(events)
        for event in events:
            level = self.log.warning if event.kind in WARNINGS else self.log.info
            named = {"bar_id": event.bar_id, "symbol": event.symbol, "agent": event.agent, "reason": event.reason}
            level(event.kind, **named, detail=event.detail)

    def _levels(self, facts: Mapping[str, StreamFacts]) -> None:
        """Lag and lengths, every couple of seconds: they are asked of the server."""
        now = time.monotonic()
        if now - self._levels_at < LEVELS_EVERY_S:
            return
        self._levels_at = now
        self.sensors.inputs(self.position, facts, self._label)
        self._tell_levels()
        lengths = self._reaching(lambda: self.store.lengths(list(self.outputs.values())))
        for name, key in self.outputs.items():
            self.sensors.metrics.length(name, lengths[key])
