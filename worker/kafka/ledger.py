"""The state of one partition as a log of commits, for a changelog that has no transactions.

A commit is one value: where the input stood before and after it, every field of state that changed, and the
outputs that it decided. It is written before any of its outputs is sent, so it is the decision: a crash before
it leaves nothing that anybody saw, and after it the stored outputs are sent, once more if need be.

The log cleans itself as a log-structured file system does (Rosenblum and Ousterhout, 1992): where it holds more
than twice what lives, the oldest commits go, and fields that still live in them are carried into the new one. What
lives is therefore always the newest part of the log, without a gap: `tail` of its head says where it begins.

Nobody refuses the records of an owner that was replaced, so none of them may do harm. An epoch belongs to the owner
whose record comes first in it, a newer epoch goes before an older one, keys are the owner's own, and a commit is
deleted only once the commit that let it go is known to stand: then no successor can need it.

Pure: bytes in, bytes out. `tests/kafka/test_ledger.py` crashes it after every record.
"""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from streams.codec import StateCorruptError, seal, unseal

SEGMENT_BYTES = 700_000
"""A record holds no more; a broker takes 1 MiB unless told otherwise."""
SLACK_BYTES = 256_000
"""What may be dead beside what lives before the oldest commits are cleaned."""
MOST_CLEANED_BYTES = 1_000_000
"""What one commit carries along at most, so that none takes long."""
MOST_TOMBSTONES = 64

Field = tuple[str, bytes]
"""A field of the state: its part and its name in that part."""
Record = tuple[bytes, bytes | None]
"""Key and value of a record of the changelog; None deletes the key."""


@dataclass(frozen=True, slots=True)
class Change:
    """What one batch changes: the position after it, parts that go, fields that are set, its outputs packed."""

    position: bytes
    drops: Sequence[str] = ()
    fields: Mapping[Field, bytes] = field(default_factory=dict)
    outputs: bytes = b""


@dataclass(frozen=True, slots=True)
class _Commit:
    """One commit as it was written. `before` and `position` chain it to its neighbours."""

    seq: int
    epoch: int
    tail: int
    before: bytes
    position: bytes
    drops: Sequence[str]
    fields: Sequence[tuple[str, bytes, bytes]]
    outputs: bytes

    def pack(self) -> bytes:
        return seal([self.tail, self.before, self.position, self.drops, self.fields, self.outputs])


@dataclass(frozen=True, slots=True)
class _Kept:
    """What is remembered of a commit that is in the log: its keys, its size, the fields that it set."""

    seq: int
    keys: tuple[bytes, ...]
    size: int
    fields: tuple[Field, ...]


class Ledger:
    """The state of a partition and the log behind it. `epoch` rises with every owner."""

    def __init__(self, owner: str | None = None, *, segment_bytes: int = SEGMENT_BYTES) -> None:
        self.owner = owner or uuid.uuid4().hex[:12]
        self.epoch = 1
        self.seq = 0
        self.position = b""
        self.outputs = b""
        """Those of the head: whether they were sent is not known."""
        self._segment_bytes = segment_bytes
        self._fields: dict[Field, tuple[int, bytes]] = {}
        self._log: deque[_Kept] = deque()
        self._stands = False
        self._let_go: list[bytes] = []
        self._void: list[bytes] = []
        self._garbage: deque[bytes] = deque()
        self._live_bytes = 0
        self._log_bytes = 0

    # ------------------------------------------------------------------ reading

    @property
    def state(self) -> dict[str, dict[bytes, bytes]]:
        """Every part of the state and its fields."""
        parts: dict[str, dict[bytes, bytes]] = {}
        for (part, name), (_, value) in self._fields.items():
            parts.setdefault(part, {})[name] = value
        return parts

    def get(self, part: str, name: bytes) -> bytes | None:
        held = self._fields.get((part, name))
        return None if held is None else held[1]

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes of state that live, and bytes of state and outputs in the log."""
        return self._live_bytes, self._log_bytes

    # ------------------------------------------------------------------ writing

    def append(self, change: Change) -> list[Record]:
        """Take `change` and give the records that make it durable, to be written in this order.

        The change holds once the last record with a value is written; the deletions after it may be lost.
        """
        new_seq = self.seq + 1
        self._drop(change.drops)
        for name, value in change.fields.items():
            self._set(name, new_seq, value)
        carried = self._clean(new_seq, _size(change.fields) + len(change.outputs))
        written = {**carried, **change.fields}
        rows = [(part, name, value) for (part, name), value in written.items()]
        tail = self._log[0].seq if self._log else new_seq
        before, self.position, self.outputs, self.seq = self.position, change.position, change.outputs, new_seq
        commit = _Commit(new_seq, self.epoch, tail, before, change.position, list(change.drops), rows, change.outputs)
        records = self._segments(commit)
        self._keep(commit, tuple(key for key, _ in records), written)
        return [*records, *self._deletions()]

    def confirm(self) -> None:
        """Every record that was given out stands in the changelog, and no rival's before them."""
        self._stands = True
        self._garbage.extend(self._let_go)
        self._garbage.extendleft(self._void)  # before ours, which show that this epoch has another owner
        self._let_go, self._void = [], []

    def rival(self, keys: Iterable[bytes]) -> bytes | None:
        """Of `keys`, in the changelog's order, the first of an owner that makes this one's records void.

        Records of an older epoch are void themselves, and so are those of this epoch behind this owner's first: they
        are deleted.
        """
        first = self._stands
        for key in keys:
            epoch, owner = _writer(key)
            if owner == self.owner:
                first = True
            elif epoch > self.epoch or (epoch == self.epoch and not first):
                return key
            else:
                self._void.append(key)
        return None

    def _keep(self, commit: _Commit, keys: tuple[bytes, ...], fields: Mapping[Field, bytes]) -> None:
        size = _size(fields) + len(commit.outputs)
        self._log.append(_Kept(commit.seq, keys, size, tuple(fields)))
        self._log_bytes += size

    def _drop(self, parts: Sequence[str]) -> None:
        for name in [name for name in self._fields if name[0] in parts] if parts else ():
            self._forget(name)

    def _set(self, name: Field, seq: int, value: bytes) -> None:
        self._forget(name)
        self._fields[name] = (seq, value)
        self._live_bytes += _weight(name, value)

    def _forget(self, name: Field) -> None:
        held = self._fields.pop(name, None)
        if held is not None:
            self._live_bytes -= _weight(name, held[1])

    def _clean(self, seq: int, new_bytes: int) -> dict[Field, bytes]:
        """Let the oldest commits go while the log is mostly dead; what lives in them has to be written again."""
        carried: dict[Field, bytes] = {}
        moved = 0
        while self._log and self._log_bytes + new_bytes + moved > 2 * self._live_bytes + SLACK_BYTES:
            if moved > MOST_CLEANED_BYTES:
                break
            oldest = self._log.popleft()
            self._log_bytes -= oldest.size
            self._let_go.extend(oldest.keys)
            for name in oldest.fields:
                held = self._fields.get(name)
                if held is not None and held[0] == oldest.seq:
                    carried[name] = held[1]
                    self._fields[name] = (seq, held[1])
                    moved += _weight(name, held[1])
        return carried

    def _segments(self, commit: _Commit) -> list[Record]:
        body, most = commit.pack(), self._segment_bytes
        pieces = [body[at : at + most] for at in range(0, len(body), most)]
        name = f"{commit.epoch}.{self.owner}-{commit.seq}"
        return [
            (f"{name}-{i}".encode(), seal([commit.seq, commit.epoch, self.owner, i, len(pieces), piece]))
            for i, piece in enumerate(pieces)
        ]

    def _deletions(self) -> list[Record]:
        return [(self._garbage.popleft(), None) for _ in range(min(MOST_TOMBSTONES, len(self._garbage)))]

    # ------------------------------------------------------------------ restoring

    @classmethod
    def restore(
        cls, records: Mapping[bytes, bytes], owner: str | None = None, *, segment_bytes: int = SEGMENT_BYTES
    ) -> Ledger:
        """The ledger of the next owner, from what the changelog holds: the newest value of each key, in its order.

        Raises `StateCorruptError` where a commit is missing from what lives, or does not follow the one before.
        """
        ledger = cls(owner, segment_bytes=segment_bytes)
        found = _Found.read(records)
        ledger.epoch = found.epoch + 1
        live = found.live()
        for commit, keys in live:
            ledger._replay(commit, keys)
        kept = {key for _, keys in live for key in keys}
        ledger._void = [key for key in records if key in found.void]
        ledger._let_go.extend(key for key in records if key not in kept | found.void)
        return ledger

    def _replay(self, commit: _Commit, keys: tuple[bytes, ...]) -> None:
        if self.seq and commit.before != self.position:
            raise StateCorruptError(f"commit {commit.seq}", "it does not follow the one before it")
        self._drop(commit.drops)
        written = {(part, name): value for part, name, value in commit.fields}
        for name, value in written.items():
            self._set(name, commit.seq, value)
        self._keep(commit, keys, written)
        self.seq, self.position, self.outputs = commit.seq, commit.position, commit.outputs


@dataclass
class _Found:
    """The whole commits in a changelog, by sequence number and epoch, and the highest epoch of any record.

    `void` are the keys of owners that came second in their epoch.
    """

    epoch: int
    void: set[bytes]
    commits: dict[tuple[int, int], tuple[_Commit, tuple[bytes, ...]]]

    @classmethod
    def read(cls, records: Mapping[bytes, bytes]) -> _Found:
        pieces: dict[tuple[int, int, str], dict[int, tuple[int, bytes, bytes]]] = {}
        owners: dict[int, str] = {}
        void: set[bytes] = set()
        for key, value in records.items():
            seq, epoch, owner, i, n, piece = unseal(key.decode(errors="replace"), value)
            if owners.setdefault(epoch, owner) != owner:
                void.add(key)
            else:
                pieces.setdefault((epoch, seq, owner), {})[i] = (n, piece, key)
        commits: dict[tuple[int, int], tuple[_Commit, tuple[bytes, ...]]] = {}
        for (epoch, seq, _), parts in pieces.items():
            n = next(iter(parts.values()))[0]
            if len(parts) < n:
                continue  # its owner died before the last piece: it never held
            whole = b"".join(parts[i][1] for i in range(n))
            commit = _Commit(seq, epoch, *unseal(f"commit {seq}", whole))
            commits[seq, epoch] = commit, tuple(parts[i][2] for i in range(n))
        return cls(max(owners, default=0), void, commits)

    def live(self) -> list[tuple[_Commit, tuple[bytes, ...]]]:
        """From the tail of the newest owner's last commit to that commit, each by its newest writer."""
        if not self.commits:
            return []
        newest, last = max((epoch, seq) for seq, epoch in self.commits)
        tail = self.commits[last, newest][0].tail
        return list(self._newest_of(range(tail, last + 1)))

    def _newest_of(self, seqs: Iterable[int]) -> Iterator[tuple[_Commit, tuple[bytes, ...]]]:
        epochs: dict[int, int] = {}
        for seq, epoch in self.commits:
            epochs[seq] = max(epoch, epochs.get(seq, 0))
        for seq in seqs:
            if seq not in epochs:
                raise StateCorruptError(f"commit {seq}", "it is missing from the changelog")
            yield self.commits[seq, epochs[seq]]


def _writer(key: bytes) -> tuple[int, str]:
    """Epoch and owner in a key of `Ledger._segments`."""
    epoch, _, rest = key.decode().partition(".")
    return int(epoch), rest.rsplit("-", 2)[0]


def _weight(name: Field, value: bytes) -> int:
    return len(name[0]) + len(name[1]) + len(value)


def _size(fields: Mapping[Field, bytes]) -> int:
    return sum(_weight(name, value) for name, value in fields.items())
