"""What the page reads of a namespace, each read bounded: it may look at `MOST_SCANNED` entries and no more.

The streams hold all symbols in the order of entry, so one symbol's bars are found by looking back over
the others': 50,000 entries are 500 bars of 100 symbols, or 10 of 5,000. One scan runs at a time and
pauses as long as it works, so that the worker, whose process this is, has at least half of it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import redis

from streams.codec import from_json
from streams.keys import CHAIN, Keys
from worker.intake import Series
from worker.page.rows import columns, event_note, reject_note

MOST_BARS = 500
MOST_SCANNED = 50_000
MOST_NOTES = 100
MOST_NOTES_SCANNED = 5_000
MOST_READ = 1_000
"""Entries of each stream in one read of what is new."""
_PAGE = 500
_SYMBOLS_KEPT_S = 5.0

Pair = tuple[str, str]
"""A symbol and its interval."""
Id = str
Fields = Mapping[bytes, bytes]


@dataclass(frozen=True, slots=True)
class News:
    """Entries that came in since the last look, and whether there may be more."""

    features: list[tuple[Id, Fields]]
    signals: list[tuple[Id, Fields]]
    events: list[tuple[Id, Fields]]
    rejected: list[tuple[Id, Fields]]
    more: bool


class StreamReader:
    """Reads one namespace, whose accepted bars `stage` keeps; for use by several threads.

    Raises `redis.RedisError` where the server is away.
    """

    def __init__(self, client: redis.Redis, keys: Keys, stage: str = CHAIN) -> None:
        self._series = keys.state("series", stage)
        self._client: Any = client
        self._keys = keys
        self._tailed = (keys.features, keys.signals, keys.events, keys.rejected)
        self._scan = threading.Lock()
        self._symbols: tuple[float, list[Pair]] = (float("-inf"), [])
        self._told: tuple[Id, list[dict[str, Any]]] = ("", [])

    def last_signal(self) -> dict[str, Any] | None:
        """The newest signal of all symbols."""
        found = self._client.xrevrange(self._keys.signals, count=1)
        return from_json(found[0][1][b"data"]) if found else None

    def symbols(self) -> list[Pair]:
        """Every symbol and interval that was ever accepted, sorted; at most five seconds old."""
        read_at, known = self._symbols
        if time.monotonic() - read_at > _SYMBOLS_KEPT_S:
            stored = self._client.hgetall(self._series)
            series = [Series.unpack(name.decode(), data) for name, data in stored.items() if name.isdigit()]
            known = sorted((one.symbol, one.interval) for one in series)
            self._symbols = time.monotonic(), known
        return known

    def series(self, pair: Pair, bars: int) -> dict[str, Any]:
        """The last `bars` bars of one symbol as columns, its notes, and how far was looked back for them."""
        with self._scan:
            features, looked, whole = self._newest(self._keys.features, pair, bars)
            signals, _, _ = self._newest(self._keys.signals, pair, bars)
            notes = self._notes(pair)
        return {
            "symbol": pair[0],
            "interval": pair[1],
            "rows": columns(features, signals),
            "notes": notes,
            "looked_through": looked,
            "complete": whole or len(features) == bars,
        }

    def told(self) -> list[dict[str, Any]]:
        """The newest events that name an agent, newest first."""
        last = self._client.xrevrange(self._keys.events, count=1)
        newest = last[0][0].decode() if last else ""
        if newest != self._told[0]:
            found = []
            for entry_id, fields in self._back(self._keys.events, MOST_NOTES_SCANNED):
                if b'"agent":""' not in fields[b"data"]:
                    found.append(event_note(entry_id, fields[b"data"]))
            self._told = newest, found[:MOST_NOTES]
        return self._told[1]

    def ends(self) -> dict[str, Id]:
        """The last ID of each stream that is followed."""
        pipe = self._client.pipeline(transaction=True)
        for key in self._tailed:
            pipe.xrevrange(key, count=1)
        found = pipe.execute()
        return {key: one[0][0].decode() if one else "0-0" for key, one in zip(self._tailed, found, strict=True)}

    def news(self, positions: dict[str, Id]) -> News:
        """What follows `positions`, which move along."""
        found = self._client.xread(positions, count=MOST_READ)
        entries: dict[str, list[tuple[Id, Fields]]] = {key: [] for key in self._tailed}
        for key, page in found.items() if isinstance(found, dict) else found:
            name = key.decode()
            entries[name] = [(entry_id.decode(), fields) for entry_id, fields in page]
            positions[name] = entries[name][-1][0]
        features, signals, events, rejected = entries.values()
        return News(features, signals, events, rejected, any(len(page) >= MOST_READ for page in entries.values()))

    # ------------------------------------------------------------------ looking back

    def _newest(self, key: str, pair: Pair, count: int) -> tuple[list[dict[str, Any]], int, bool]:
        """The last `count` messages of a symbol, oldest first; entries looked at; whether that was all there is."""
        found: list[dict[str, Any]] = []
        looked = 0
        for _, fields in self._back(key, MOST_SCANNED):
            looked += 1
            data = fields[b"data"]
            if symbol_of(data) == pair[0]:
                message = from_json(data)
                if message["interval"] == pair[1]:
                    found.append(message)
                    if len(found) == count:
                        break
        return found[::-1], looked, looked < MOST_SCANNED and len(found) < count

    def _notes(self, pair: Pair) -> list[dict[str, Any]]:
        """The newest events and rejects that concern a symbol, or no symbol that is known; newest first."""
        events = (event_note(i, fields[b"data"]) for i, fields in self._back(self._keys.events, MOST_NOTES_SCANNED))
        rejects = (reject_note(i, fields) for i, fields in self._back(self._keys.rejected, MOST_NOTES_SCANNED))
        found = [*_first(events, pair), *_first(rejects, pair)]
        return sorted(found, key=lambda note: note["ms"], reverse=True)

    def _back(self, key: str, limit: int) -> Iterator[tuple[Id, Fields]]:
        """At most `limit` entries, the newest first, read in pages with a pause after each."""
        end, left = "+", limit
        while left > 0:
            started = time.monotonic()
            page = self._client.xrevrange(key, end, "-", count=min(_PAGE, left))
            for entry_id, fields in page:
                yield entry_id.decode(), fields
            if len(page) < _PAGE:
                return
            left -= len(page)
            end = f"({page[-1][0].decode()}"
            time.sleep(time.monotonic() - started)


def trouble(error: redis.RedisError) -> str:
    """Why nothing can be read, in words: a server that answers is not away."""
    if isinstance(error, redis.exceptions.NoPermissionError):
        return f"the server does not let the page read: {error}; give its user the rights of deploy/redis/users.acl"
    if isinstance(error, redis.exceptions.ResponseError):
        return f"the server answers the page with an error: {error}"
    return f"the server is away: {error}"


def symbol_of(data: bytes) -> str:
    """The symbol of an output message, without decoding the rest where it comes first, as the worker writes it."""
    head = b'{"symbol":"'
    if data.startswith(head):
        return data[len(head) : data.index(b'"', len(head))].decode()
    return str(from_json(data)["symbol"])


def concerns(note: Mapping[str, Any], pair: Pair) -> bool:
    """Whether a note is about this symbol, about none that is known, or about an agent, which votes on all."""
    return bool(note["agent"]) or (note["symbol"] in ("", pair[0]) and note["interval"] in ("", pair[1]))


def _first(notes: Iterator[dict[str, Any]], pair: Pair) -> list[dict[str, Any]]:
    return list(islice((note for note in notes if concerns(note, pair)), MOST_NOTES))
