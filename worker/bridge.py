"""`quartet bridge`: bars from the input keys on Redis to the topic `bars` on Kafka, none lost, none doubled.

Read a batch, write it to Kafka, wait for the acknowledgement, commit the position on Redis behind the same fence as
a stage. With the position goes the offset at which each partition ended: after a crash between the acknowledgement
and the commit, what stands behind those offsets was sent already, and is not sent again.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from structlog.typing import FilteringBoundLogger

from streams.codec import StateCorruptError, encode_reject, seal, unseal
from streams.formats import FormatReader
from streams.inputs import Inputs
from streams.messages import Entry, Reject
from streams.records import flat_object, pack
from streams.redis import RedisStore, with_baseline
from streams.store import (
    FIRST_ID,
    Batch,
    Commit,
    FencedError,
    InputLostError,
    Position,
    RewoundError,
)
from streams.topics import Topics, partition_of
from worker.carriage import STAGE, Load, Sent, load_of
from worker.errors import CheckFailed, Unavailable
from worker.http import Condition
from worker.lease import LeaseKeeper
from worker.lookout import Lookout
from worker.metrics import BridgeMetrics
from worker.outages import KAFKA, OWNER, BridgeStatus, Outages, Stopped
from worker.sink import KafkaSink, Record, SinkBrokenError

OFFSETS = b"offsets"
WAIT_S = 0.25
STANDBY_POLL_S = 0.2
READ_A_PARTITION = 256
MOST_ENTRIES = 4096
TOLD_EVERY_S = 30.0


_FORGOTTEN = "what this bridge stored of its progress cannot be trusted: {}."
_ANEW = "To begin anew, with topics in which nothing stands yet: --from-start carries all that Redis still holds"


@dataclass
class BridgeOptions:
    """How one run differs from another. `until_idle_s` None runs until `stop`.

    `accept_gap` is about what is gone at the start: once the input was read, a further gap stops the bridge.
    """

    until_idle_s: float | None = None
    accept_gap: bool = False
    from_start: bool = False
    stop: threading.Event = field(default_factory=threading.Event)


class Bridge:
    """Carries until stopped. `make_reader` gives a reader of formats as a worker's; `store` is of stage `bridge`."""

    def __init__(
        self,
        store: RedisStore,
        topics: Topics,
        sink: Callable[[Sequence[str], Callable[[float], None]], KafkaSink],
        inputs: Inputs,
        make_reader: Callable[[], FormatReader],
        *,
        metrics: BridgeMetrics,
        status: BridgeStatus,
        log: FilteringBoundLogger,
        options: BridgeOptions,
    ) -> None:
        self.store = store
        self.topics = topics
        self.inputs = inputs
        self.reader = make_reader()
        self._make_reader = make_reader
        self.metrics = metrics
        self.status = status
        self.log = log
        self.options = options
        self.position = Position()
        self.offsets: list[int] = []
        self._outages = Outages(status, metrics, log, options.stop, self._beat)
        self._reaching = self._outages.reaching
        self.sink = sink((topics.bars, topics.rejected), self._outages.waiting)
        self._lookout = Lookout(inputs, lambda pattern: self._reaching(lambda: store.find(pattern)), log)
        self._sent = Sent()
        self._lease: LeaseKeeper | None = None
        self._idle_since: float | None = None
        self._lags: Counter[str] = Counter()
        self._told_at = time.monotonic()
        self._untold = 0

    # ------------------------------------------------------------------ the loop

    def run(self, lease: LeaseKeeper) -> None:
        """Serve until stopped or idle. Raises `Unavailable` where no broker answers at the start, and what ends it."""
        try:
            self.sink.open()
            self._outages.reached(KAFKA)
            if not self._own():
                return
            self._lease = lease
            lease.start()
            self._start()
            while not self._done():
                self._turn()
            self._reaching(self.store.release)
        except Stopped:
            raise Unavailable("told to stop while a server was away; what is not committed is carried again") from None
        finally:
            self.sink.close()
            if self._lease is not None:
                lease.stop()

    def _turn(self) -> None:
        self._beat()
        try:
            batch = self._read()
            if batch.entries:
                self._idle_since = None
                self._carry(batch.entries)
            else:
                self._idle_since = self._idle_since or time.monotonic()
                self._wait()
        except (RewoundError, SinkBrokenError) as error:
            self.log.warning("starting over from the last commit", reason=type(error).__name__, detail=str(error))
            self._start(again=error)
        self._tell()

    def _beat(self) -> None:
        self.status.heartbeat = time.monotonic()
        if self._lease is not None and self._lease.lost.is_set():
            raise FencedError(self._lease.why)

    def _done(self) -> bool:
        if self.options.stop.is_set():
            self.log.info("stopping: the batch in hand is committed")
            return True
        since, limit = self._idle_since, self.options.until_idle_s
        return since is not None and limit is not None and time.monotonic() - since >= limit

    def _wait(self) -> None:
        keys = self.inputs.keys
        if keys:
            self._reaching(lambda: self.store.wait(self.position, keys, WAIT_S))
        else:
            self.options.stop.wait(WAIT_S)

    # ------------------------------------------------------------------ owning and recovering

    def _own(self) -> bool:
        """Wait until this instance owns the stage; False where it is stopped before."""
        told = False
        while not self._reaching(self.store.acquire):
            if not told:
                self.log.info("standing by: another bridge is alive and owns this namespace")
                self.status.conditions[OWNER] = Condition(ok=False, detail="standing by for another bridge")
            told = True
            self._beat()
            if self.options.stop.wait(STANDBY_POLL_S):
                return False
        self._outages.reached(OWNER)
        return True

    def _start(self, again: Exception | None = None) -> None:
        """Take up what was committed and what was sent after it, again where a server fails meanwhile."""
        while True:
            try:
                if isinstance(again, RewoundError) and not self._own():
                    raise Stopped
                if isinstance(again, SinkBrokenError):
                    self._outages.asking(self.sink.open)
                self._recover()
            except (RewoundError, SinkBrokenError) as error:
                again = error
            else:
                return

    def _recover(self) -> None:
        """Position, bars in hand and offsets as they were committed, and what the topic holds behind those offsets."""
        anew = self.options.from_start
        snapshot = self._reaching(lambda: self.store.load((STAGE,)))
        state = {} if anew else snapshot.state[STAGE]
        self.reader = self._make_reader()
        ends = self._outages.asking(lambda: self.sink.ends(self.topics.bars))
        try:
            self.reader.restore(state)
            self.offsets = unseal("offsets", state[OFFSETS]) if OFFSETS in state else ends
        except StateCorruptError as error:
            raise CheckFailed(f"{_FORGOTTEN.format(error)} {_ANEW}") from None
        self._check_topic(ends)
        tail = self._outages.asking(lambda: self.sink.tail(self.topics.bars, self.offsets, ends))
        self._sent = Sent(tail)
        position = Position() if anew else snapshot.position
        self._commit(position, drops=(STAGE,) if anew else ())
        self.options.from_start = False
        if position.inputs:
            self.metrics.recoveries()
        self.log.info(
            "carrying on" if position.inputs else "beginning",
            reason="clean" if self.store.was_clean else "crash",
            position={key: at.id for key, at in position.inputs.items()},
            partitions=len(ends),
            records_found_sent=sum(map(len, tail)),
        )

    def _check_topic(self, ends: Sequence[int]) -> None:
        """Raise `CheckFailed` where the topic is not the one that the offsets speak of."""
        what = ""
        if len(self.offsets) != len(ends):
            what = f"it has {len(ends)} partitions, {len(self.offsets)} were written to"
        else:
            behind = [p for p, end in enumerate(ends) if end < self.offsets[p]]
            for p in behind[:1]:
                what = f"partition {p} ends at {ends[p]}, it was written up to {self.offsets[p]}"
        if what:
            where = f"topic {self.topics.bars} at {self.sink.bootstrap}"
            raise CheckFailed(
                f"{where} is not the one that was written to: {what}. Name the cluster of before with --to. {_ANEW}"
            )

    # ------------------------------------------------------------------ a batch

    def _read(self) -> Batch:
        self._lookout.look()
        keys = self.inputs.keys
        if not keys:
            return Batch((), {})
        count = min(READ_A_PARTITION * len(self.offsets), MOST_ENTRIES)
        try:
            batch: Batch = self._reaching(lambda: self.store.read(self.position, keys, count))
        except InputLostError as error:
            self._accept_loss(error)
            return self._read()
        self.options.accept_gap = False
        self.position = with_baseline(self.position, batch.facts)
        self._lags = Counter()
        for key, facts in batch.facts.items():
            self._lags[self.inputs.label(key)] += max(0, facts.added - self.position.inputs[key].consumed)
        for stream, lag in self._lags.items():
            self.metrics.lag(stream, lag)
        return batch

    def _carry(self, entries: Sequence[Entry]) -> None:
        load = load_of(entries, self.reader, len(self.offsets))
        records = [*self._bars(load), *self._rejects(load.rejects)]
        if records:
            self._reaching(lambda: self.store.load(()))  # raises `FencedError`: Kafka knows no fence of ours
            for (topic, partition), offset in self.sink.send(records).items():
                if topic == self.topics.bars:
                    self.offsets[partition] = offset
            self._outages.reached(KAFKA)
        self._commit(self.position.advanced(entries, FIRST_ID))
        self._count(load, len(records))

    def _bars(self, load: Load) -> list[Record]:
        unsent = self._sent.without(load.bars)
        return [Record(self.topics.bars, p, value) for p, bars in unsent.items() for value in pack(bars)]

    def _rejects(self, rejects: Sequence[Reject]) -> list[Record]:
        partitions = self.sink.partitions[self.topics.rejected]
        by_key: dict[str, list[bytes]] = {}
        for reject in rejects:
            by_key.setdefault(reject.entry.key, []).append(flat_object(encode_reject(reject)))
        return [
            Record(self.topics.rejected, partition_of(key, partitions), value)
            for key, objects in by_key.items()
            for value in pack(objects)
        ]

    def _commit(self, position: Position, drops: Sequence[str] = ()) -> None:
        state = {STAGE: [(OFFSETS, seal(self.offsets)), *self.reader.changes()]}
        commit = Commit(position, state=state, drops=drops)
        written = self._reaching(lambda: self.store.commit(commit), committing=True)
        self.metrics.commits("ok" if written else "lost_reply")
        self.position = position

    def _accept_loss(self, error: InputLostError) -> None:
        if not self.options.accept_gap:
            raise error
        self.log.error("input lost", reason="lost", key=error.key, lost=error.lost)
        self.reader.forget()
        self._commit(Position({**self.position.inputs, error.key: error.resume}, FIRST_ID))
        self.metrics.bars("lost", error.lost)

    # ------------------------------------------------------------------ telling

    def _count(self, load: Load, records: int) -> None:
        self._untold += load.size
        self.metrics.bars("carried", load.size)
        self.metrics.bars("rejected", len(load.rejects))
        self.metrics.bars("unclosed", load.unclosed)
        self.metrics.records(records)
        for reject in load.rejects:
            self.metrics.rejected(reject.reason)
            self.log.warning("entry rejected", reason=reject.reason, key=reject.entry.key, id=reject.entry.id)

    def _tell(self) -> None:
        """What was carried, twice a minute at most, and at the end."""
        now = time.monotonic()
        idle = self._idle_since is not None or self.options.stop.is_set()
        if self._untold and (idle or now - self._told_at >= TOLD_EVERY_S):
            self.log.info("carried", bars=self._untold, lag=dict(self._lags))
            self._told_at, self._untold = now, 0
