"""Streams in memory with a settable clock: the same store without a server, for replay and for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from streams.keys import CHAIN
from streams.messages import Entry
from streams.store import (
    FIRST_ID,
    GONE,
    Batch,
    Commit,
    Committed,
    Position,
    Snapshot,
    StoreMisuseError,
    StreamFacts,
    check_input,
    id_tuple,
)

Fields = Mapping[bytes, bytes]


@dataclass
class MemoryStreams:
    """Streams by key. `now_ms` is the clock that names entries; it moves only when it is set.

    `committed` says how far each stage over them is.
    """

    now_ms: int = 0
    streams: dict[str, list[tuple[str, Fields]]] = field(default_factory=dict)
    added: dict[str, int] = field(default_factory=dict)
    last_ids: dict[str, str] = field(default_factory=dict)
    committed: dict[str, Committed] = field(default_factory=dict)

    def add(self, key: str, fields: Fields, entry_id: str | None = None) -> str:
        """Append one entry; its ID, made from the clock unless given. Raises ValueError if it is not larger."""
        last = self.last_ids.get(key, FIRST_ID)
        if entry_id is None:
            ms, seq = id_tuple(last)
            entry_id = f"{self.now_ms}-0" if self.now_ms > ms else f"{ms}-{seq + 1}"
        if id_tuple(entry_id) <= id_tuple(last):
            raise ValueError(f"{key}: ID {entry_id} is not after the last one, {last}")
        self.streams.setdefault(key, []).append((entry_id, fields))
        self.added[key] = self.added.get(key, 0) + 1
        self.last_ids[key] = entry_id
        return entry_id

    def trim(self, key: str, keep: int) -> None:
        """Forget the oldest entries, as MAXLEN does."""
        self.streams[key] = self.streams[key][-keep:] if keep else []

    def delete(self, key: str) -> None:
        """Forget a stream, its last ID and its count."""
        for store in (self.streams, self.added, self.last_ids):
            store.pop(key, None)

    def facts(self, key: str) -> StreamFacts:
        """As a server tells them; `GONE` where the stream does not exist."""
        if key not in self.streams:
            return GONE
        stream = self.streams[key]
        return StreamFacts(len(stream), self.added[key], self.last_ids[key], stream[0][0] if stream else FIRST_ID)

    def after(self, key: str, entry_id: str) -> list[tuple[str, Fields]]:
        """The entries of a stream that follow an ID."""
        stream = self.streams.get(key, [])
        start = _first_after(stream, entry_id)
        return stream[start:]


def _first_after(stream: Sequence[tuple[str, Fields]], entry_id: str) -> int:
    low, high, wanted = 0, len(stream), id_tuple(entry_id)
    while low < high:
        middle = (low + high) // 2
        if id_tuple(stream[middle][0]) <= wanted:
            low = middle + 1
        else:
            high = middle
    return low


class MemoryStore:
    """A `streams.store.Store` over `MemoryStreams`: one owner, nothing to fence, nothing to lose."""

    def __init__(self, streams: MemoryStreams | None = None, stage: str = CHAIN) -> None:
        self.streams = streams or MemoryStreams()
        self.stage = stage
        self.was_clean = True
        self.position = Position()
        self.state: dict[str, dict[bytes, bytes]] = {}

    def acquire(self) -> bool:
        return True

    def renew(self) -> bool:
        return True

    def release(self) -> None:
        """Nobody waits."""

    def load(self, parts: Sequence[str]) -> Snapshot:
        return Snapshot(self.position, {part: dict(self.state.get(part, {})) for part in parts})

    def read(self, position: Position, keys: Sequence[str], count: int) -> Batch:
        batch = self.read_each(position, keys, count)
        entries = batch.entries if len(keys) == 1 else sorted(batch.entries, key=lambda entry: id_tuple(entry.id))
        return replace(batch, entries=entries[:count])

    def read_each(self, position: Position, keys: Sequence[str], count: int, stages: Sequence[str] = ()) -> Batch:
        entries: list[Entry] = []
        for key in keys:
            known = position.inputs.get(key)
            if known:
                check_input(key, known, self.streams.facts(key))
            rows = self.streams.after(key, known.id if known else FIRST_ID)[:count]
            entries += [Entry(key, entry_id, fields) for entry_id, fields in rows]
        facts = {key: self.streams.facts(key) for key in keys if key in self.streams.streams}
        committed = {stage: self.streams.committed.get(stage, Committed()) for stage in stages}
        return Batch(entries, facts, committed=committed)

    def wait(self, position: Position, keys: Sequence[str], timeout_s: float) -> bool:
        """Whether there is an entry after `position`; a memory stream never makes anybody wait."""
        del timeout_s
        return bool(self.read(position, keys, 1).entries)

    def mark(self, entry: Entry) -> int:
        """Nothing in memory outlives the one who dies on an entry."""
        del entry
        return 1

    def unmark(self) -> None:
        """As there is no mark."""

    def lengths(self, keys: Sequence[str]) -> dict[str, int]:
        return {key: len(self.streams.streams.get(key, ())) for key in keys}

    def commit(self, commit: Commit) -> bool:
        self._check_ids(commit)
        for part in commit.drops:
            self.state.pop(part, None)
        for output in commit.outputs:
            for entry_id, payload in zip(output.ids, output.payloads, strict=True):
                self.streams.add(output.key, {b"data": payload}, entry_id)
        for key, rows in commit.appends.items():
            for row in rows:
                self.streams.add(key, dict(zip(row[::2], row[1::2], strict=True)))
        for part, fields in commit.state.items():
            self.state.setdefault(part, {}).update(fields)
        self.position = commit.position
        before = self.streams.committed.get(self.stage, Committed())
        self.streams.committed[self.stage] = Committed(before.commits + 1, commit.position)
        return True

    def _check_ids(self, commit: Commit) -> None:
        """All checks before the first write, as on a server."""
        for output in commit.outputs:
            last = self.streams.facts(output.key).last_id
            if output.ids and id_tuple(output.ids[0]) <= id_tuple(last):
                raise StoreMisuseError(f"stream {output.key} ends at {last}, past the next output {output.ids[0]}")
