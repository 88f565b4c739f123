"""The recorder: follows every stream of a namespace and appends what it reads to one file.

It reads like anybody else, consumes nothing and writes nothing to the server. One read gives a
consistent view of all streams, because a commit is atomic and so is the read; its entries are written
in the order of their IDs.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import redis

from streams.contracts import FEATURE_SETS
from streams.inputs import REFRESH_S, Inputs
from streams.keys import Keys
from streams.messages import AGENTS, CANARY
from streams.recording import MIB, Lost, Recorded, RecordingError, Writer, drop_cut, lock, part_path, read_tail
from streams.redis import find_keys
from streams.store import FIRST_ID, GONE, StreamFacts, id_tuple
from worker.builds import build
from worker.errors import CheckFailed, UsageError
from worker.replay.outline import note_of
from worker.settings import Settings

FLUSH_S = 0.7
"""A frame is ended at least this often: what a killed recorder may lose, with one read."""

PAUSE_S = 0.5
WAIT_MS = 200
COUNT = 500
BARS = "bars"


@dataclass
class Plan:
    """What to record and where. `rotate_bytes` ends a file and begins the next part; None never does."""

    out: Path
    keys: Keys
    inputs: Inputs
    from_now: bool = False
    rotate_bytes: int | None = 1024 * MIB
    until_idle_s: float | None = None
    stop: threading.Event = field(default_factory=threading.Event)


def last_start(client: Any, keys: Keys) -> Any:
    """What the last start of a worker said of itself, None where there was none yet; of stages all of them together."""
    found: dict[str, Any] = {}
    stages: set[str] = set()
    for evidence in _starts(client, keys):
        if "stage" not in evidence:
            return found or evidence
        if evidence["stage"] not in stages:
            stages.add(evidence["stage"])
            found = {**evidence, **found, "agents": {**evidence["agents"], **found.get("agents", {})}}
        if len(stages) == len(evidence["settings"]["agents"]) + 2:
            return found
    return found or None


def _starts(client: Any, keys: Keys) -> Iterator[Any]:
    """The evidence of every start, the newest first."""
    last = "+"
    while rows := client.xrevrange(keys.events, max=last, count=1000):
        for _, fields in rows:
            data = fields.get(b"data", b"")
            if b'"started"' in data and (event := orjson.loads(data))["kind"] == "started":
                yield event["evidence"]
        last = f"({rows[-1][0].decode()}"


def inputs_to_read(client: Any, settings: Settings, tell: Callable[[str], None]) -> tuple[str, ...]:
    """The keys or patterns that were named; where none were, those that the last worker read.

    Says where the named ones are not those of the worker.
    """
    start = last_start(client, Keys(settings.namespace)) or {}
    of_worker = tuple(start.get("settings", {}).get("bars") or settings.input_keys)
    if not settings.bars:
        return of_worker
    if set(of_worker) != set(settings.input_keys):
        tell(f"the last worker read {', '.join(of_worker)}; here it is {', '.join(settings.input_keys)}: see --bars")
    return settings.input_keys


@dataclass(frozen=True)
class Recording:
    """What a recorder did: entries by stream, entries lost to trimming, and the last file."""

    path: Path
    entries: Mapping[str, int]
    lost: int


class Recorder:
    """Follows the streams. `positions` are each key's last ID and the entries ever added up to it."""

    def __init__(self, client: Any, plan: Plan, tell: Callable[[str], None]) -> None:
        self.client = client
        self.plan = plan
        self.tell = tell
        self.positions: dict[str, tuple[str, int]] = {}
        self.entries: dict[str, int] = {}
        self.lost = 0
        self._header: dict[str, Any] = {}
        self._flushed = self._looked = 0.0
        self._connected = True
        self._writer = self._open()

    # ------------------------------------------------------------------ beginning

    def _open(self) -> Writer:
        """The file to append to: a new one, or the last part of a recording that is continued."""
        out = self.plan.out
        self.plan.inputs.refresh(self._find)
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            self._lock = lock(out)
            if out.stat().st_size:
                return self._continue()
            if (left := part_path(out, 2)).exists():
                raise UsageError(f"{left} is of another recording: move it elsewhere, or give another --out")
            self._begin()
            writer = Writer(out, note_of)
            writer.header(self._header)
        except OSError as error:
            raise UsageError(f"--out {out}: {error.strerror}; give a file that can be written") from error
        except RecordingError as error:
            raise UsageError(str(error)) from error
        return writer

    def _begin(self) -> None:
        facts = self._facts(self._streams())
        for key, fact in facts.items():
            first = (FIRST_ID, fact.added - fact.length)
            self.positions[key] = (fact.last_id, fact.added) if self.plan.from_now else first
        self._header = {
            "id": uuid.uuid4().hex,
            "part": 1,
            "created_ms": time.time_ns() // 1_000_000,
            "from": "now" if self.plan.from_now else "start",
            "namespace": self.plan.keys.namespace,
            "inputs": list(self.plan.inputs.keys),
            "build": build(),
            "contracts": {name: s.contract for name, s in FEATURE_SETS.items()},
            "started": last_start(self.client, self.plan.keys),
            "positions": dict(self.positions),
        }

    def _continue(self) -> Writer:
        tail = read_tail(self.plan.out)
        if tail.header["namespace"] != self.plan.keys.namespace:
            raise UsageError(
                f"{self.plan.out} records namespace {tail.header['namespace']}, not {self.plan.keys.namespace}; "
                "give another --out"
            )
        if tail.cut:
            self.tell(f"{tail.path}: an unfinished frame of {tail.cut} bytes is dropped; its entries are read again")
        drop_cut(tail)
        self._header = {k: v for k, v in tail.header.items() if k != "recording"}
        self.positions = dict(tail.positions)
        return Writer(tail.path, note_of)

    def _streams(self) -> dict[str, str]:
        """Key to the name that a recording gives its stream."""
        keys = self.plan.keys
        outputs = [keys.features, *(keys.votes(a + c) for a in AGENTS for c in ("", CANARY)), keys.signals]
        others = [*outputs, keys.events, keys.rejected, keys.control]
        named = {key: key.removeprefix(f"{keys.namespace}:") for key in others}
        return {**dict.fromkeys(self.plan.inputs.keys, BARS), **named}

    def _find(self, pattern: str) -> dict[str, str]:
        return find_keys(self.client, pattern)

    # ------------------------------------------------------------------ following

    def run(self) -> Recording:
        """Record until stopped, or until the streams were silent for `until_idle_s`."""
        try:
            try:
                self._follow()
            finally:
                self._writer.close()
        except OSError as error:
            raise CheckFailed(
                f"{self._writer.path}: {error.strerror}; what was recorded is kept: make room and go on with the same "
                "command"
            ) from error
        finally:
            self._lock.close()
        return Recording(self._writer.path, dict(self.entries), self.lost)

    def _follow(self) -> None:
        last_entry = time.monotonic()
        while not self.plan.stop.is_set():
            if self._reaching(self._turn):
                last_entry = time.monotonic()
            elif self.plan.until_idle_s is not None and time.monotonic() - last_entry >= self.plan.until_idle_s:
                break

    def _reaching(self, turn: Callable[[], int]) -> int:
        """One turn; an outage of the server is waited out, and what was read before it is on disk."""
        try:
            written = turn()
        except (redis.ConnectionError, redis.TimeoutError) as error:
            self._writer.flush()
            if self._connected:
                self.tell(f"the server is unavailable, trying again: {error}")
            self._connected = False
            self.plan.stop.wait(PAUSE_S)
            return 0
        if not self._connected:
            self.tell("connected to the server")
            self._connected = True
        return written

    def _turn(self) -> int:
        now = time.monotonic()
        if now - self._looked >= REFRESH_S:
            self._looked = now
            self.plan.inputs.refresh(self._find)
        written = sum(map(self._write, self._read()))
        if now - self._flushed >= FLUSH_S:
            self._flushed = now
            self._writer.flush()
            self._rotate()
        if not written:
            self.client.xread(self._after(), count=1, block=WAIT_MS)
        return written

    def _after(self) -> dict[str, str]:
        return {key: self.positions.get(key, (FIRST_ID, 0))[0] for key in self._streams()}

    def _read(self) -> list[Recorded]:
        """What follows the positions, of all streams at one moment; what was trimmed before it is noted."""
        after = self._after()
        pipe = self.client.pipeline(transaction=True)
        for key in after:
            pipe.xinfo_stream(key)
        pipe.xread(after, count=COUNT)
        *infos, found = pipe.execute(raise_on_error=False)
        if isinstance(found, Exception):
            raise found
        self._check({key: _fact(info) for key, info in zip(after, infos, strict=True)})
        return _in_order(found or (), self._streams())

    def _write(self, item: Recorded) -> int:
        self._writer.add(item)
        _, added = self.positions.get(item.key, (FIRST_ID, 0))
        self.positions[item.key] = item.id, added + 1
        self.entries[item.stream] = self.entries.get(item.stream, 0) + 1
        return 1

    def _rotate(self) -> None:
        limit = self.plan.rotate_bytes
        if limit is None or self._writer.size < limit:
            return
        part = self._header["part"] + 1
        self._header |= {
            "part": part,
            "started": last_start(self.client, self.plan.keys),
            "positions": dict(self.positions),
        }
        self._writer.close()
        self._writer = Writer.begin(part_path(self.plan.out, part), self._header, note_of)
        self.tell(f"{self._writer.path}: part {part}")

    # ------------------------------------------------------------------ what is gone

    def _facts(self, keys: Mapping[str, str]) -> dict[str, StreamFacts]:
        pipe = self.client.pipeline(transaction=True)
        for key in keys:
            pipe.xinfo_stream(key)
        return {key: _fact(info) for key, info in zip(keys, pipe.execute(raise_on_error=False), strict=True)}

    def _check(self, facts: Mapping[str, StreamFacts]) -> None:
        """Note what was trimmed before it was read; stop where a stream is not the one it was."""
        streams = self._streams()
        for key, fact in facts.items():
            entry_id, added = self.positions.get(key, (FIRST_ID, 0))
            if fact.added < added or id_tuple(fact.last_id) < id_tuple(entry_id):
                raise CheckFailed(
                    f"stream {key} went back or was made anew: it was read up to {entry_id}, now it ends at "
                    f"{fact.last_id}; what was recorded is kept, go on with another --out"
                )
            lost = fact.added - fact.length - added
            if lost > 0:
                self._writer.add(Lost(streams[key], key, entry_id, lost))
                self.positions[key] = entry_id, added + lost
                self.lost += lost
                self.tell(f"stream {key}: {lost} entries after {entry_id} were trimmed before they were recorded")


def _in_order(found: Any, streams: Mapping[str, str]) -> list[Recorded]:
    """The entries of one read by their IDs, as the worker takes its inputs.

    What lies behind the end of a stream that has more than `COUNT` waits for the next read: so a file that ends
    early ends before the same bar in every stream.
    """
    items = [
        Recorded(streams[name.decode()], name.decode(), entry_id.decode(), fields)
        for name, rows in found
        for entry_id, fields in rows
    ]
    ends = [id_tuple(rows[-1][0].decode()) for _, rows in found if len(rows) == COUNT]
    upto = min(ends, default=None)
    return sorted(
        (item for item in items if upto is None or id_tuple(item.id) <= upto), key=lambda item: id_tuple(item.id)
    )


def _fact(info: Any) -> StreamFacts:
    if isinstance(info, Exception):
        if "no such key" in str(info):
            return GONE
        raise info
    first = info["first-entry"]
    last_id = info["last-generated-id"].decode()
    return StreamFacts(info["length"], info["entries-added"], last_id, first[0].decode() if first else FIRST_ID)
