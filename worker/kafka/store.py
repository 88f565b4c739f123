"""One partition as a store: the worker's thread on one side, the event loop on the other.

Entries come in by `put`, from the loop. A commit goes out through a `Link`: its ledger records, then its outputs,
then the offsets it has done with. An entry's ID is `<offset>-<place in the record, from 1>`.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from streams.codec import from_json, seal, to_json, unseal
from streams.messages import Entry
from streams.records import unpack
from streams.store import (
    FIRST_ID,
    Batch,
    Commit,
    FencedError,
    InputLostError,
    InputPosition,
    Position,
    Snapshot,
    StreamFacts,
    id_tuple,
)
from streams.topics import topic_of
from worker.kafka.ledger import Change, Ledger, Record
from worker.kafka.outgoing import Outgoing, folded, outgoing_of, unfolded

OWNER = "owner"
"""The part of the state that is the store's own.

How the last owner ended, the entry it approached alone, and the inputs of which a record was not read to its end.
"""
_CLEAN, _MARK, _WITHIN = (OWNER, b"clean"), (OWNER, b"mark"), (OWNER, b"within")
_LAST_PLACE = 2**31
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Bounds:
    """Of one input's partition: the offset of its first record, and the offset after its last."""

    first: int
    end: int


class Link(Protocol):
    """The loop's side of one partition. Called from the worker's thread; each call waits.

    Writing and reading raise `FencedError`, or `StoreUnavailableError` where the outcome is not known.
    """

    def log(self, records: Sequence[Record]) -> list[int]:
        """Write to the changelog; the offset of each record."""
        ...

    def logged(self, start: int) -> tuple[list[bytes], int]:
        """Of the changelog from offset `start` to its end: the keys of records that hold a value, and that end."""
        ...

    def send(self, outgoing: Sequence[Outgoing]) -> Mapping[str, int]:
        """Write outputs; for each topic how many records its partition was ever given."""
        ...

    def done(self, events: Sequence[Any]) -> None:
        """These input events need not come again."""
        ...

    def end(self, key: str) -> int:
        """The offset after the last record of an input that is known of."""
        ...


@dataclass(slots=True)
class _Taken:
    """One record that was delivered: `last` is the ID of its last entry, None of one that holds none."""

    offset: int
    last: tuple[int, int] | None
    event: Any


@dataclass(slots=True)
class _Pending:
    """A commit on its way: which of its writes are known to have been made."""

    commit: Commit
    outgoing: list[Outgoing]
    logged: bool = False


class PartitionStore:
    """A `MarkingStore` over one partition. `bounds` are those of each input, by key, as it was taken over."""

    def __init__(self, ledger: Ledger, link: Link, bounds: Mapping[str, Bounds], logged_end: int) -> None:
        self.was_clean = True
        self.ledger = ledger
        self._link = link
        self.bounds = dict(bounds)
        self._logged_end = logged_end
        self._position = Position.decode(ledger.position)
        self._pending: _Pending | None = None
        self._unlogged: list[Record] = []
        self._in_doubt = False
        self._claimed = False
        self._unsent: list[Outgoing] = []
        self._lengths: dict[str, int] = {}
        self._changed = threading.Condition()
        self._queues: dict[str, deque[Entry]] = {key: deque() for key in bounds}
        self._taken: dict[str, deque[_Taken]] = {key: deque() for key in bounds}
        self._delivered = dict.fromkeys(bounds, -1)
        self._checked: set[str] = set()
        self._idle_since: float | None = None
        self.writing_since: float | None = None
        """Since when a write waits for its answer (`time.monotonic()`); None while none does."""

    # ------------------------------------------------------------------ the loop's side

    def put(self, key: str, offset: int, value: bytes | None, arrived_ms: int, event: Any) -> None:
        """Take one record in. `event` is handed to `Link.done` once all of it is committed."""
        payloads = unpack(value)
        entries = [Entry(key, f"{offset}-{n}", {b"data": p}, arrived_ms) for n, p in enumerate(payloads, 1)]
        with self._changed:
            self._queues[key].extend(entries)
            self._taken[key].append(_Taken(offset, id_tuple(entries[-1].id) if entries else None, event))
            self._delivered[key] = offset
            self._idle_since = None
            self._changed.notify()
        if not entries:
            self._let_go()

    @property
    def waiting(self) -> int:
        """Entries that were delivered and not committed."""
        return sum(map(len, self._queues.values()))

    @property
    def idle_s(self) -> float:
        """How long the worker has been waiting in vain; 0 while it works."""
        since = self._idle_since
        return 0.0 if since is None else time.monotonic() - since

    # ------------------------------------------------------------------ owning

    def acquire(self) -> bool:
        """Claim the partition in its changelog, after sending again what the head may not have sent."""
        if not self._claimed:
            self._claimed = True
            held = self.ledger.get(*_CLEAN)
            self.was_clean = held is None or held == b"1"
            self._unsent = list(unfolded(self.ledger.outputs))
        self._send(self._unsent)
        self._unsent = []
        self._note({_CLEAN: b"0"})
        return True

    def renew(self) -> bool:
        """The group's session is the lease; a process that lost it is told so by its next write."""
        return True

    def release(self) -> None:
        """Say in the changelog that this owner ended after its last commit."""
        self._note({_CLEAN: b"1"})

    def mark(self, entry: Entry) -> int:
        """Note that `entry` is processed alone; how often owners noted it, one after another."""
        held = self.ledger.get(*_MARK)
        marked, count, by = unseal("mark", held) if held else ("", 0, "")
        if marked != f"{entry.key} {entry.id}":
            count, by = 0, ""
        count += by != self.ledger.owner
        self._note({_MARK: seal([f"{entry.key} {entry.id}", count, self.ledger.owner])})
        return int(count)

    def _note(self, fields: Mapping[tuple[str, bytes], bytes]) -> None:
        self._unlogged += self.ledger.append(Change(self.ledger.position, fields=fields))
        self._log()

    # ------------------------------------------------------------------ reading

    def load(self, parts: Sequence[str]) -> Snapshot:
        """Position and state of the last commit."""
        state = self.ledger.state
        return Snapshot(self._position, {part: dict(state.get(part, {})) for part in parts})

    def read(self, position: Position, keys: Sequence[str], count: int) -> Batch:
        """At most `count` entries after `position`, of those that were delivered.

        Raises `InputLostError` once where a topic was trimmed past the position or made anew.
        """
        for key in keys:
            if key not in self._checked:
                self._check(key, position)
                self._checked.add(key)
        entries: list[Entry] = []
        with self._changed:
            for key in keys:
                entries += self._after(key, position, count - len(entries))
            if entries:
                self._idle_since = None
            facts = {key: self._facts(key, position) for key in keys}
        return Batch(entries, facts)

    def _after(self, key: str, position: Position, count: int) -> list[Entry]:
        queue, at = self._queues[key], _at(position, key)
        while queue and id_tuple(queue[0].id) <= at:
            queue.popleft()
        return [queue[i] for i in range(min(count, len(queue)))]

    def _facts(self, key: str, position: Position) -> StreamFacts:
        """Lag is what waits here and the records behind it; a record may hold many entries, so it is a lower bound."""
        at = max(self._delivered[key], _at(position, key)[0] if key in position.inputs else -1)
        lag = len(self._queues[key]) + max(0, self._link.end(key) - at - 1)
        if key not in position.inputs:
            return StreamFacts(lag, lag, FIRST_ID)
        length = self._link.end(key) - self.bounds[key].first
        return StreamFacts(length, position.inputs[key].consumed + lag, FIRST_ID)

    def wait(self, position: Position, keys: Sequence[str], timeout_s: float) -> bool:
        """Wait for an entry after `position`; whether there is one."""
        with self._changed:
            if not any(self._after(key, position, 1) for key in keys):
                whole = set(keys) >= self._queues.keys()  # else orders are being carried out
                self._idle_since = (self._idle_since or time.monotonic()) if whole else None
                self._changed.wait(timeout_s)
            return any(self._after(key, position, 1) for key in keys)

    def lengths(self, keys: Sequence[str]) -> dict[str, int]:
        """Records that this partition of each output topic was ever given, as far as it was written to."""
        return {key: self._lengths.get(topic_of(key), 0) for key in keys}

    def find(self, pattern: str) -> Mapping[str, str]:
        """Patterns of keys are not for Kafka: none match."""
        del pattern
        return {}

    def _check(self, key: str, position: Position) -> None:
        if key not in position.inputs or not position.inputs[key].consumed:
            return
        bounds, (offset, _) = self.bounds[key], _at(position, key)
        consumed = position.inputs[key].consumed
        resume = InputPosition(f"{bounds.first - 1}-{_LAST_PLACE}" if bounds.first else FIRST_ID, consumed)
        if bounds.end <= offset:
            what = f"it was recreated or rewound: it ends at offset {bounds.end}, record {offset} was read already"
            raise InputLostError(key, bounds.end - bounds.first, what, resume)
        lost = bounds.first - offset - (key not in self._within())
        if lost > 0:
            what = (
                f"{lost} records were deleted before they were read to their end (it begins at offset {bounds.first}); "
                "each counts as one entry, however many bars it held"
            )
            raise InputLostError(key, lost, what, resume)

    def _within(self) -> list[str]:
        """The inputs whose last record was not read to its end, as of the last commit."""
        held = self.ledger.get(*_WITHIN)
        return from_json(held) if held else []

    def _is_within(self, key: str, position: Position) -> bool:
        """Whether `position`, of the next commit, leaves entries of the record at which it stands."""
        at = _at(position, key)
        with self._changed:
            last = next((one.last for one in self._taken[key] if one.last is not None and one.offset == at[0]), None)
        if last is None:
            return at == _at(self._position, key) and key in self._within()
        return at < last

    # ------------------------------------------------------------------ committing

    def commit(self, commit: Commit) -> bool:
        """The ledger's record, then the outputs, then the offsets; again from where it failed, with the same commit."""
        pending = self._pending
        if pending is None or pending.commit is not commit:
            outgoing = outgoing_of(commit)
            fields = {(part, name): value for part, fields in commit.state.items() for name, value in fields}
            within = [key for key in self._taken if self._is_within(key, commit.position)]
            if within != self._within():
                fields[_WITHIN] = to_json(within)
            change = Change(commit.position.encode(), commit.drops, fields, folded(outgoing))
            pending = self._pending = _Pending(commit, outgoing)
            self._unlogged += self.ledger.append(change)
        if not pending.logged:
            self._log()
            pending.logged = True
        self._send(pending.outgoing)
        self._position, self._pending = commit.position, None
        self._let_go()
        return True

    def _log(self) -> None:
        """Write to the changelog what is not known to be there, and only where no other worker has taken over.

        Records have to follow one another. Where they do not, and before anything is written again whose outcome
        is not known, the changelog says whose records are there.
        """
        if self._in_doubt:
            self._look()
        self._in_doubt = True
        if self._unlogged:
            offsets = self._write(lambda: self._link.log(self._unlogged))
            if offsets != list(range(self._logged_end, self._logged_end + len(offsets))):
                self._look()
            self._logged_end = max(self._logged_end, offsets[-1] + 1)
        self._unlogged, self._in_doubt = [], False
        self.ledger.confirm()

    def _look(self) -> None:
        """Read what came to the changelog since the last write that is known; what is ours need not be written again.

        Raises `FencedError` where another worker's record goes before ours.
        """
        keys, end = self._write(lambda: self._link.logged(self._logged_end))
        rival = self.ledger.rival(keys)
        if rival is not None:
            raise FencedError(
                f"another worker wrote to the changelog of this partition ({rival.decode()}, after offset "
                f"{self._logged_end - 1}); no output of this batch was sent"
            )
        there = set(keys)
        self._unlogged = [record for record in self._unlogged if record[0] not in there]
        self._logged_end = end

    def _write(self, call: Callable[[], _T]) -> _T:
        self.writing_since = self.writing_since or time.monotonic()
        value = call()
        self.writing_since = None
        return value

    def _send(self, outgoing: Sequence[Outgoing]) -> None:
        if outgoing:
            self._lengths |= self._write(lambda: self._link.send(outgoing))

    def _let_go(self) -> None:
        """Hand back the events of which every entry is committed."""
        done: list[Any] = []
        with self._changed:
            for key, taken in self._taken.items():
                at = _at(self._position, key)
                while taken and (taken[0].last is None or taken[0].last <= at):
                    done.append(taken.popleft().event)
                self._after(key, self._position, 0)
        if done:
            self._link.done(done)


def _at(position: Position, key: str) -> tuple[int, int]:
    known = position.inputs.get(key)
    return id_tuple(known.id) if known else id_tuple(FIRST_ID)


def offset_of(position: Position, key: str) -> int:
    """The offset of the last record that was read of an input, which may have entries left; 0 before the first."""
    return _at(position, key)[0]
