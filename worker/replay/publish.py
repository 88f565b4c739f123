"""`quartet replay FILE`: bars of a recording, csv or parquet file onto a stream, with their own times."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from streams.formats import recognise
from streams.formats.times import whole
from streams.messages import Entry
from streams.recording import Item, Note, Recorded, Recording, decode, is_recording
from streams.validation import BadBarError, interval_ms
from worker.errors import UsageError
from worker.replay.lines import read_lines
from worker.replay.outline import RULES
from worker.training.bars import read_bars

AT_ONCE = 500
PATIENCE_S = 0.2


@dataclass(frozen=True, slots=True)
class Timed:
    """One entry to publish: when its bar closed, in ms, None where that cannot be read, and its fields."""

    closes_ms: int | None
    fields: dict[Any, Any]


@dataclass
class Pace:
    """How fast: `speed` times the bars' own clock, None as fast as the server takes them."""

    speed: float | None = None
    maxlen: int | None = None
    stop: threading.Event = field(default_factory=threading.Event)


def read_speed(text: str) -> float | None:
    """`max` or a number above 0. Raises `UsageError`."""
    if text == "max":
        return None
    try:
        speed = float(text)
    except ValueError:
        speed = 0.0
    if not 0 < speed < float("inf"):
        raise UsageError(f"--speed {text}: expected max, or a number above 0 such as 1 or 10")
    return speed


@dataclass
class _Told:
    """The bars that were counted so far, and their inputs."""

    keys: dict[str, None]
    entries: int = 0

    def take_note(self, note: Note) -> bool:
        """Whether a frame's note tells."""
        if note["rules"] != RULES:
            return False
        self.keys |= dict.fromkeys(note["inputs"])
        self.entries += note["bars"]
        return True

    def take(self, items: Iterable[Item]) -> None:
        """Look at those that may be bars: strangers may have appended anything to the other streams."""
        bars = [item for item in items if item.stream == "bars"]
        self.keys |= dict.fromkeys(item.key for item in bars)
        self.entries += sum(isinstance(item, Recorded) for item in bars)


def contents_of(path: Path) -> tuple[int, list[str]]:
    """How many entries `read_entries` gives, and the inputs of a recording, those found while it was made included."""
    if not is_recording(path):
        return len(read_bars(path).bars), []
    recording = Recording(path)
    told = _Told(dict.fromkeys(recording.header["inputs"]))
    for text, lines in read_lines(recording, told.take_note):
        told.take(decode(text[begin:end]) for stream, begin, end in lines if stream in (b"bars", b""))
    return told.entries, list(told.keys)


def read_entries(path: Path) -> Iterator[Timed]:
    """The entries to publish, in order: of a recording byte for byte, of other files by the time of the close."""
    if is_recording(path):
        for item in Recording(path):
            if item.stream == "bars" and isinstance(item, Recorded):
                yield Timed(_closes_ms(item), dict(item.fields))
        return
    bars = read_bars(path).bars
    steps = {interval: interval_ms(str(interval)) for interval in np.unique(bars.interval)}
    closes = bars.ts + np.array([steps[interval] for interval in bars.interval], np.int64)
    for row in np.lexsort((bars.symbol, bars.interval, closes)):
        numbers = zip(("open", "high", "low", "close", "volume"), bars.ohlcv[row].tolist(), strict=True)
        flat = {"symbol": str(bars.symbol[row]), "ts": str(bars.ts[row]), "interval": str(bars.interval[row])}
        yield Timed(int(closes[row]), {**flat, **{name: repr(x) for name, x in numbers}})


def _closes_ms(item: Recorded) -> int | None:
    """The latest close in an entry of any known format."""
    try:
        _, raws = recognise(Entry(item.key, item.id, item.fields))
        closes = (whole(raw["ts"], "ts") + interval_ms(str(raw.get("interval") or "1m")) for raw in raws)
        return max(closes, default=None)
    except (BadBarError, KeyError, TypeError, ValueError):
        return None


def publish(
    client: Any,
    key: str,
    entries: Iterable[Timed],
    pace: Pace,
    progress: Callable[[int], None],
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Append `entries` to the stream `key`, with IDs made by the server; how many. Ends early where told to stop."""
    done = 0
    for group in _groups(entries, pace, clock):
        pipe = client.pipeline(transaction=False)
        for entry in group:
            pipe.xadd(key, entry.fields, maxlen=pace.maxlen, approximate=True)
        pipe.execute()
        done += len(group)
        progress(len(group))
        if pace.stop.is_set():
            break
    return done


def _groups(entries: Iterable[Timed], pace: Pace, clock: Callable[[], float]) -> Iterator[list[Timed]]:
    """What is due together; waits where there is a pace to keep."""
    source = iter(entries)
    if pace.speed is None:
        while group := list(islice(source, AT_ONCE)):
            yield group
        return
    began, first = clock(), None
    for entry in source:
        if entry.closes_ms is not None:
            first = entry.closes_ms if first is None else first
            while (left := began + (entry.closes_ms - first) / 1000 / pace.speed - clock()) > 0:
                if pace.stop.wait(min(left, PATIENCE_S)):
                    return
        yield [entry]
