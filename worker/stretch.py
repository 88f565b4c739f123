"""A stretch of one agent's votes with the bars they were about, from a running server or a recording."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import redis
from numpy.typing import NDArray

from streams.codec import from_json
from streams.keys import Keys
from streams.messages import HORIZON, bar_id
from streams.recording import Recorded, Recording
from worker.qsc import fingerprint

_PAGE = 1_000


@dataclass(frozen=True, slots=True)
class Close:
    """One accepted bar: when it opened (ms), where it closed, and its features `[F]` under their names."""

    ts: int
    close: float
    names: tuple[str, ...]
    values: NDArray[np.float64]


@dataclass
class Stretch:
    """Votes in the order of their stream, and every bar from the first of them on, by symbol and interval."""

    votes: list[Mapping[str, Any]]
    bars: dict[tuple[str, str], list[Close]] = field(default_factory=dict)
    _names: dict[tuple[str, ...], tuple[str, ...]] = field(default_factory=dict)

    def add(self, feature: Mapping[str, Any]) -> None:
        """Take one message of the features stream."""
        values = feature["values"]
        names = tuple(values)
        names = self._names.setdefault(names, names)
        bar = Close(feature["ts"], values["close"], names, np.array(list(values.values()), np.float64))
        self.bars.setdefault((feature["symbol"], feature["interval"]), []).append(bar)

    def fingerprints(self, features: Sequence[str] = ()) -> dict[str, int]:
        """What tells the inputs of bars apart, by `bar_id`: these features, or all where none is named."""
        return {
            bar_id(symbol, interval, bar.ts): fingerprint(_read(bar, features))
            for (symbol, interval), bars in self.bars.items()
            for bar in bars
        }


def _read(bar: Close, features: Sequence[str]) -> NDArray[np.float64]:
    """The values of these features, or all where the bar has not every one of them."""
    if not features or not set(features) <= set(bar.names):
        return bar.values
    return bar.values[[bar.names.index(name) for name in features]]


def from_server(
    client: redis.Redis, keys: Keys, agent: str, *, first: str = "-", end: str = "+", last: int | None = None
) -> Stretch:
    """The votes between two entry IDs, both included, or the `last` of these."""
    key = keys.votes(agent)
    newest: Any = [] if last is None else client.xrevrange(key, end, first, last)
    entries = list(_pages(client, key, first, end)) if last is None else newest[::-1]
    stretch = Stretch([from_json(fields[b"data"]) for _, fields in entries])
    if entries:
        missing = _Missing(stretch.votes)
        for _, fields in _pages(client, keys.features, entries[0][0].decode(), "+"):
            feature = from_json(fields[b"data"])
            stretch.add(feature)
            if missing.none_after(feature):
                break
    return stretch


def from_recording(path: Path, agent: str, *, first: str = "-", end: str = "+", last: int | None = None) -> Stretch:
    """The same from a recording, whatever its namespace. Raises `RecordingError`."""
    votes: deque[Mapping[str, Any]] = deque(maxlen=last)
    stretch = Stretch([])
    for item in Recording(path):
        if not isinstance(item, Recorded):
            continue
        if item.stream == "features":
            stretch.add(from_json(item.fields[b"data"]))
        elif item.stream == f"votes:{agent}" and _within(item.id, first, end):
            votes.append(from_json(item.fields[b"data"]))
    stretch.votes = list(votes)
    return stretch


class _Missing:
    """Which series still lack the bars that score their last vote."""

    def __init__(self, votes: Iterable[Mapping[str, Any]]) -> None:
        self._last = {(vote["symbol"], vote["interval"]): vote["ts"] for vote in votes}
        self._after = dict.fromkeys(self._last, 0)

    def none_after(self, feature: Mapping[str, Any]) -> bool:
        series = feature["symbol"], feature["interval"]
        if series in self._last and feature["ts"] > self._last[series]:
            self._after[series] += 1
            if self._after[series] >= HORIZON:
                del self._last[series]
        return not self._last


def _pages(client: redis.Redis, key: str, first: str, end: str) -> Iterator[tuple[bytes, Mapping[bytes, bytes]]]:
    while True:
        page: Any = client.xrange(key, first, end, _PAGE)
        yield from page
        if len(page) < _PAGE:
            return
        first = "(" + page[-1][0].decode()


def _within(entry_id: str, first: str, end: str) -> bool:
    after = first == "-" or _parts(entry_id, 0) >= _parts(first, 0)
    return after and (end == "+" or _parts(entry_id, 0) <= _parts(end, 2**64 - 1))


def _parts(entry_id: str, sequence: int) -> tuple[int, int]:
    """As the server reads an ID: without a sequence it begins, or ends, its millisecond."""
    ms, _, seq = entry_id.partition("-")
    return int(ms), int(seq) if seq else sequence
