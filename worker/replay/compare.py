"""Recorded and recomputed messages, field by field: equal bytes are equal, all else is named."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from streams.codec import to_json
from worker.replay.outline import VOTES
from worker.replay.source import Source

SEARCHED = 2_048
"""How far ahead a recorded entry is looked for where the order is broken."""

ABSENT = "(absent)"
Place = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Difference:
    """One value that differs. `agent` and `feature` are empty where the field is of neither."""

    bar_id: str
    stream: str
    agent: str
    feature: str
    field: str
    recorded: Any
    recomputed: Any

    def line(self) -> str:
        """For a person."""
        agent = f", agent {self.agent}" if self.agent else ""
        what = f"feature {self.feature}" if self.feature else self.field
        return f"bar {self.bar_id}{agent}, {what}: recorded {self.recorded!r}, recomputed {self.recomputed!r}"

    def as_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass
class Comparison:
    """What was compared and what differs. `first` is the first by bar, then features, votes, signal.

    `unrecorded` counts what each stream lacks at its end; `bars` are those of the batches taken so far.
    """

    tolerance: float = 0.0
    compared: Counter[str] = field(default_factory=Counter)
    differing: Counter[str] = field(default_factory=Counter)
    differences: int = 0
    unrecorded: Counter[str] = field(default_factory=Counter)
    bars: int = 0
    _last: int = -1
    _tails: dict[str, tuple[Place, str]] = field(default_factory=dict)
    first: Difference | None = None
    firsts: dict[str, Difference] = field(default_factory=dict)

    def take(self, found: Sequence[tuple[Place, Difference]], bars: int = 0) -> None:
        """Count the differences of one batch of `bars`, each at its place: row, then stream."""
        self.bars += bars
        self.differences += len(found)
        for _, difference in sorted(found, key=lambda pair: pair[0]):
            self.first = self.first or difference
            self.firsts.setdefault(difference.stream, difference)

    def finish(self) -> None:
        """Judge the ends: a commit is atomic, so a recording ends before the same bar in every stream."""
        early = {stream: tail for stream, tail in self._tails.items() if tail[0][0] <= self._last}
        lacking = [(place, _one_sided(stream, bar_id, ABSENT, "an entry")) for stream, (place, bar_id) in early.items()]
        self.take(lacking)
        for stream in early:
            lost = self.unrecorded.pop(stream)
            self.differing[stream] += lost
            self.differences += lost - 1

    def compare(
        self,
        stream: str,
        rank: int,
        rows: Sequence[int],
        messages: Iterable[Mapping[str, Any]],
        source: Source,
        *,
        open_ended: bool,
    ) -> list[tuple[Place, Difference]]:
        """Hold recomputed messages against the entries of `stream` that come next.

        `open_ended`: what a feature set or agent adds whose model is not at hand is no difference.
        """
        payloads = map(to_json, messages)
        found: list[tuple[Place, Difference]] = []
        done = 0
        while True:
            equal, payload = source.take_equal(stream, payloads)
            if equal:
                done += equal
                self.compared[stream] += equal
                self._last = max(self._last, self.bars + rows[done - 1])
            if payload is None:
                assert done == len(rows)  # noqa: S101 - a message a row
                return found
            different = self._unequal(stream, (rows[done], rank), payload, source, open_ended=open_ended)
            found += [((rows[done], rank), one) for one in different]
            done += 1

    def _unequal(
        self, stream: str, place: Place, payload: bytes, source: Source, *, open_ended: bool
    ) -> list[Difference]:
        """What differs where the entry that comes next does not have these bytes; it may be of another bar."""
        at = self.bars + place[0]
        bar_id = _bar_id(payload)
        skipped, recorded = self._next(stream, bar_id, payload, source)
        different = [_one_sided(stream, _bar_id(data), "an entry", ABSENT) for data in skipped]
        if recorded is not None:
            self.compared[stream] += 1
            self._last = max(self._last, at)
            if recorded != payload:
                different += self._fields(stream, recorded, payload, open_ended=open_ended)
        elif source.peek(stream) is None:
            self.unrecorded[stream] += 1
            self._tails.setdefault(stream, ((at, place[1]), bar_id))
        else:
            different.append(_one_sided(stream, bar_id, ABSENT, "an entry"))
        self.differing[stream] += len(skipped) + (len(different) > len(skipped))
        return different

    def _next(self, stream: str, bar_id: str, payload: bytes, source: Source) -> tuple[list[bytes], bytes | None]:
        """The recorded bytes that belong to a bar, None where there are none, and what was recorded before them."""
        head = source.peek(stream)
        if head is None:
            return [], None
        data = head.fields.get(b"data", b"")
        ahead = 0 if data == payload or _bar_id(data) == bar_id else self._ahead(stream, bar_id, source)
        if ahead is None:
            return [], None
        *skipped, own = (entry.fields.get(b"data", b"") for entry in source.take(stream, ahead + 1))
        return skipped, own

    @staticmethod
    def _ahead(stream: str, bar_id: str, source: Source) -> int | None:
        wanted = b'"' + bar_id.encode() + b'"'
        for place in range(1, SEARCHED):
            entry = source.peek(stream, place)
            if entry is None:
                return None
            data = entry.fields.get(b"data", b"")
            if wanted in data and _bar_id(data) == bar_id:
                return place
        return None

    def _fields(self, stream: str, recorded: bytes, payload: bytes, *, open_ended: bool) -> Iterator[Difference]:
        then, now = _loads(recorded), orjson.loads(payload)
        for path, before, after in _differing((), then, now):
            if self._close(before, after) or (open_ended and after == ABSENT and path[0] in ("values", "contracts")):
                continue
            agent = _agent(stream)
            if path[:1] == ("votes",) and len(path) > 1:
                agent = path[1]
            feature = path[1] if path[:1] == ("values",) and len(path) > 1 else ""
            yield Difference(now["bar_id"], stream, agent, feature, ".".join(path), before, after)

    def _close(self, before: Any, after: Any) -> bool:
        numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (before, after))
        return numbers and math.isclose(before, after, rel_tol=self.tolerance, abs_tol=self.tolerance)


def _loads(data: bytes) -> Any:
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        return None


def _bar_id(data: bytes) -> str:
    value = _loads(data)
    return str(value.get("bar_id", "")) if isinstance(value, dict) else ""


def _agent(stream: str) -> str:
    return stream.removeprefix(VOTES) if stream.startswith(VOTES) else ""


def _one_sided(stream: str, bar_id: str, recorded: str, recomputed: str) -> Difference:
    return Difference(bar_id, stream, _agent(stream), "", "entry", recorded, recomputed)


def _differing(path: tuple[str, ...], before: Any, after: Any) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """The leaves that differ between two JSON values."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in {**before, **after}:
            yield from _differing((*path, name), before.get(name, ABSENT), after.get(name, ABSENT))
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for place, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from _differing((*path, str(place)), one, other)
    elif type(before) is not type(after) or before != after:
        yield path, before, after
