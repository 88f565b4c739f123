"""What an engine needs of a place that keeps streams: read, and one fenced commit a batch.

`streams.redis.RedisStore` is the real one; `streams.memory.MemoryStore` keeps everything in this
process, for replay and for users' own tests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from streams.codec import from_json, to_json
from streams.messages import Entry

FIRST_ID = "0-0"


class StoreUnavailableError(Exception):
    """The server cannot be reached or cannot write now; nothing is known to have been written.

    `reason`: `unavailable` (away, or not serving yet), `out_of_memory`, `read_only`, or `error` for any other
    refusal, such as that of a full disk.
    """

    def __init__(self, text: str, reason: str = "unavailable") -> None:
        super().__init__(text)
        self.reason = reason


class FencedError(Exception):
    """Another instance owns this stage: nothing was written and nothing may be."""


class RewoundError(Exception):
    """The server holds an earlier position than was committed: it lost its latest writes."""


class StoreMisuseError(Exception):
    """A key of ours holds something else, or an output stream is ahead: a person has to look."""


@dataclass(frozen=True, slots=True)
class InputPosition:
    """How far an input was read: the last ID, and how many entries were ever added up to it."""

    id: str
    consumed: int


class InputLostError(Exception):
    """Entries of an input are gone before they were read. `lost` is how many, exactly.

    `resume` is the position from which to carry on, if that is wanted.
    """

    def __init__(self, key: str, lost: int, what: str, resume: InputPosition) -> None:
        super().__init__(
            f"input {key}: {what}. Nothing was skipped: find out why, then start once with --accept-gap to count "
            f"{lost} entries as lost, go on, and warm every symbol up again"
        )
        self.key = key
        self.lost = lost
        self.resume = resume


@dataclass(frozen=True)
class Position:
    """How far a stage is: each input's position, and the last ID it gave out."""

    inputs: Mapping[str, InputPosition] = field(default_factory=dict)
    last_output_id: str = FIRST_ID

    def encode(self) -> bytes:
        """The bytes that a commit compares; the same position has the same bytes."""
        inputs = {key: [p.id, p.consumed] for key, p in sorted(self.inputs.items())}
        return to_json({"inputs": inputs, "last_output_id": self.last_output_id})

    @classmethod
    def decode(cls, data: bytes) -> Position:
        if not data:
            return cls()
        value = from_json(data)
        inputs = {key: InputPosition(*pair) for key, pair in value["inputs"].items()}
        return cls(inputs, value["last_output_id"])

    def advanced(self, entries: Sequence[Entry], last_output_id: str) -> Position:
        """The position after `entries`, which follow it in each input."""
        inputs = dict(self.inputs)
        for entry in entries:
            inputs[entry.key] = InputPosition(entry.id, inputs[entry.key].consumed + 1)
        return replace(self, inputs=inputs, last_output_id=last_output_id)


@dataclass(frozen=True, slots=True)
class Output:
    """Entries for one output stream, each with its ID and the bytes of its `data`; the IDs strictly increase."""

    key: str
    ids: Sequence[str]
    payloads: Sequence[bytes]


@dataclass(frozen=True)
class Commit:
    """Everything that one batch changes. `appends` are flat fields with IDs made by the server.

    `drops` are parts of the state that are deleted before `state` is written.
    """

    position: Position
    outputs: Sequence[Output] = ()
    appends: Mapping[str, Sequence[Sequence[bytes]]] = field(default_factory=dict)
    state: Mapping[str, Sequence[tuple[bytes, bytes]]] = field(default_factory=dict)
    drops: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class StreamFacts:
    """What the server says of a stream: entries in it, ever added to it, and its last and first ID."""

    length: int
    added: int
    last_id: str
    first_id: str = FIRST_ID


GONE = StreamFacts(0, 0, FIRST_ID)
"""The facts of a stream that was deleted."""


@dataclass(frozen=True)
class Committed:
    """How far a stage is: how many commits it made, and the position of the last one."""

    commits: int = 0
    position: Position = field(default_factory=Position)

    @classmethod
    def decode(cls, data: bytes) -> Committed:
        """Of what the commit script stores: the number of the commit, a blank, the position."""
        number, _, position = data.partition(b" ")
        return cls(int(number or 0), Position.decode(position))


@dataclass(frozen=True)
class Batch:
    """Entries read, in order, and the facts of each input at the same moment; `now_ms` by the server's clock.

    `committed` says how far the stages are that were asked for, at that moment too.
    """

    entries: Sequence[Entry]
    facts: Mapping[str, StreamFacts]
    now_ms: int | None = field(default=None, compare=False)
    committed: Mapping[str, Committed] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Snapshot:
    """What was committed: the position and every part of the state, read at one moment."""

    position: Position
    state: Mapping[str, Mapping[bytes, bytes]]


class Store(Protocol):
    """One stage's access to its streams. Not for use by several threads, `renew` excepted."""

    def acquire(self) -> bool:
        """Try to become the owner; False while another instance is alive."""
        ...

    def renew(self) -> bool:
        """Keep the lease; False where another instance holds it."""
        ...

    def release(self) -> None:
        """Give the lease up after a clean end, so that a standby takes over at once."""
        ...

    def load(self, parts: Sequence[str]) -> Snapshot:
        """Position and state at one moment."""
        ...

    def read(self, position: Position, keys: Sequence[str], count: int) -> Batch:
        """At most `count` entries after `position`, without waiting."""
        ...

    def wait(self, position: Position, keys: Sequence[str], timeout_s: float) -> bool:
        """Wait for an entry after `position`; whether there is one."""
        ...

    def commit(self, commit: Commit) -> bool:
        """Write everything or nothing, once. False where an earlier try with `commit` did and its reply was lost.

        Raises `FencedError`, `RewoundError`, `StoreUnavailableError` (the outcome may be unknown:
        call again with the same commit) or `StoreMisuseError`.
        """
        ...


class JoiningStore(Store, Protocol):
    """A store that can read several streams side by side, as who joins them needs it."""

    def read_each(self, position: Position, keys: Sequence[str], count: int, stages: Sequence[str] = ()) -> Batch:
        """At most `count` entries of each key after `position`, key by key, and how far `stages` are, at one moment."""
        ...


def check_input(key: str, position: InputPosition, facts: StreamFacts) -> None:
    """Raise `InputLostError` where the input was trimmed past the position, recreated, rewound or deleted.

    While fewer entries are gone than were consumed, the last consumed one is still there, so the
    first entry cannot lie behind it.
    """
    trimmed = facts.added - facts.length
    restart = InputPosition(FIRST_ID, trimmed)
    if facts.added < position.consumed:
        what = f"it was recreated: {position.consumed} entries were added up to the position, now only {facts.added}"
        raise InputLostError(key, trimmed, what, restart)
    if id_tuple(facts.last_id) < id_tuple(position.id):
        what = f"it was rewound: its last ID {facts.last_id} is before the position {position.id}"
        raise InputLostError(key, trimmed, what, restart)
    if trimmed < position.consumed and id_tuple(facts.first_id) > id_tuple(position.id):
        what = f"it was recreated: its first ID {facts.first_id} is after the position {position.id}"
        raise InputLostError(key, trimmed, what, restart)
    lost = trimmed - position.consumed
    if lost > 0:
        what = f"{lost} entries were trimmed before they were read"
        raise InputLostError(key, lost, what, InputPosition(position.id, trimmed))


def id_tuple(entry_id: str) -> tuple[int, int]:
    """An entry ID as a pair of integers, which compare as the server compares."""
    ms, _, seq = entry_id.partition("-")
    return int(ms), int(seq or 0)
