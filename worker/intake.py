"""The first stage: entries of the input become accepted bars, in order, with their series.

It owns what the order rules need: the last bar of each symbol and interval, and the share of
rejects among the last entries of the feed. All of it is part of the commit.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from streams.codec import StateCorruptError, seal, unseal
from streams.formats import FormatReader
from streams.messages import Bar, Entry, Event, Reject
from streams.validation import (
    OHLCV,
    BadBarError,
    Limits,
    Raw,
    UnclosedBarError,
    check_bar,
    interval_ms,
    missing_bars,
)

STAGE = "intake"
OUTCOMES = ("accepted", "rejected", "duplicate", "unclosed", "lost")
FLAGS = ("gap", "late", "jump", "frozen", "stale")
FEED_WINDOW = 500
FEED_MINIMUM = 200
FEED_REJECT_LIMIT = 0.05
IMPLAUSIBLE_AHEAD_MS = 3_600_000


@dataclass(slots=True)
class Series:
    """The last bar of one symbol and interval. `row` numbers the series, from 0."""

    row: int
    symbol: str
    interval: str
    last_ts: int
    last: OHLCV
    flat_bars: int = 0
    rewarm: bool = False

    def pack(self) -> bytes:
        return seal([self.row, self.symbol, self.interval, self.last_ts, self.last, self.flat_bars, self.rewarm])

    @classmethod
    def unpack(cls, name: str, data: bytes) -> Series:
        row, symbol, interval, last_ts, last, flat_bars, rewarm = unseal(name, data)
        if str(row) != name:
            raise StateCorruptError(name, f"it holds series {row}")
        return cls(row, symbol, interval, last_ts, tuple(last), flat_bars, rewarm)


@dataclass(frozen=True)
class Accepted:
    """The accepted bars of a batch, one row a bar in the order of the input, and what else came in."""

    ids: list[str]
    arrived_ms: list[int]
    bars: list[Bar]
    rows: NDArray[np.int64]
    ohlcv: NDArray[np.float64]
    restart: NDArray[np.bool_]
    stale: NDArray[np.bool_]
    withheld: NDArray[np.bool_]
    rejects: list[Reject] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    outcomes: Mapping[str, int] = field(default_factory=dict)
    flags: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.bars)


@dataclass(slots=True)
class OutputIds:
    """The IDs of output entries, strictly increasing; the last one is part of the position."""

    last: str = "0-0"

    def derive(self, entry_id: str, now_ms: int, *, own: bool) -> str:
        """The input's own ID where `own` and possible, else max(input ms, last ms) with the next sequence.

        An ID more than an hour ahead of the clock is not used: it would poison the output stream.
        """
        ms, seq = _parts(entry_id)
        last_ms, last_seq = _parts(self.last)
        if ms > now_ms + IMPLAUSIBLE_AHEAD_MS:
            ms, own = last_ms, False
        if own and (ms, seq) > (last_ms, last_seq):
            self.last = entry_id
        elif ms > last_ms:
            self.last = f"{ms}-0"
        else:
            self.last = f"{last_ms}-{last_seq + 1}"
        return self.last


@lru_cache(maxsize=16)
def _parts(entry_id: str) -> tuple[int, int]:
    ms, _, seq = entry_id.partition("-")
    return int(ms), int(seq or 0)


class FeedHealth:
    """Rejects among the last 500 entries: over 5 %, with at least 200 seen, the feed is unhealthy."""

    def __init__(self, recent: Sequence[int] = ()) -> None:
        self._recent = deque(recent, maxlen=FEED_WINDOW)
        self._rejects = sum(self._recent)
        self.healthy = self._is_healthy()

    def count(self, *, rejected: bool) -> bool:
        """Take one entry in; whether the feed became healthy or unhealthy by it."""
        if len(self._recent) == FEED_WINDOW:
            self._rejects -= self._recent[0]
        self._recent.append(int(rejected))
        self._rejects += rejected
        before, self.healthy = self.healthy, self._is_healthy()
        return self.healthy != before

    @property
    def reject_ratio(self) -> float:
        return self._rejects / len(self._recent) if self._recent else 0.0

    def _is_healthy(self) -> bool:
        return not self._rejects or len(self._recent) < FEED_MINIMUM or self.reject_ratio <= FEED_REJECT_LIMIT

    def pack(self) -> bytes:
        return seal(bytes(self._recent))


class _Batch:
    """The rows of one batch while they are collected."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.arrived_ms: list[int] = []
        self.bars: list[Bar] = []
        self.rows: list[int] = []
        self.restart: list[bool] = []
        self.stale: list[bool] = []
        self.withheld: list[bool] = []
        self.rejects: list[Reject] = []
        self.events: list[Event] = []
        self.outcomes: Counter[str] = Counter()
        self.flags: Counter[str] = Counter()

    def freeze(self) -> Accepted:
        return Accepted(
            ids=self.ids,
            arrived_ms=self.arrived_ms,
            bars=self.bars,
            rows=np.array(self.rows, dtype=np.int64),
            ohlcv=np.array([bar.ohlcv for bar in self.bars], dtype=np.float64).reshape(-1, 5),
            restart=np.array(self.restart, dtype=np.bool_),
            stale=np.array(self.stale, dtype=np.bool_),
            withheld=np.array(self.withheld, dtype=np.bool_),
            rejects=self.rejects,
            events=self.events,
            outcomes=self.outcomes,
            flags=self.flags,
        )


class Intake:
    """Decodes, validates and orders. `several_keys` says that more than one input key is read."""

    def __init__(self, limits: Limits, *, reader: FormatReader | None = None, several_keys: bool = False) -> None:
        self.limits = limits
        self.several_keys = several_keys
        self.stale_bars: Container[str] | None = None
        """Bars that came too late as a recording has it; None judges by the clock."""
        self.health = FeedHealth()
        self.ids = OutputIds()
        self._reader = reader or FormatReader()
        self._series: dict[tuple[str, str], Series] = {}
        self._changed: set[tuple[str, str]] = set()

    @property
    def series(self) -> list[Series]:
        """Every series, by row."""
        return list(self._series.values())

    def accept(
        self, entries: Sequence[Entry], now_ms: int, poison: frozenset[tuple[str, str]] = frozenset()
    ) -> Accepted:
        """Sort `entries` into accepted bars and everything else; a (key, ID) in `poison` is rejected unread."""
        batch = _Batch()
        for entry in entries:
            if (entry.key, entry.id) in poison:
                self._reject(batch, entry, "poison", "this entry ended the worker three times; it is left out")
                continue
            try:
                raws = self._reader(entry)
            except BadBarError as error:
                self._reject(batch, entry, error.reason, error.detail)
                continue
            if not raws:
                batch.outcomes["unclosed"] += 1  # another message: it says nothing of the feed's health either
            for raw in raws:
                self._accept_one(batch, entry, raw, now_ms, own_id=len(raws) == 1 and not self.several_keys)
        return batch.freeze()

    def _accept_one(self, batch: _Batch, entry: Entry, raw: Raw, now_ms: int, *, own_id: bool) -> None:
        try:
            bar = check_bar(raw, now_ms, self.limits)
            series = self._series.get((bar.symbol, bar.interval))
            if series is not None and bar.ts <= series.last_ts:
                self._repeat(batch, entry, bar, series)
                return
            self._admit(batch, entry, bar, series, now_ms, own_id=own_id)
        except UnclosedBarError:
            self._count(batch, "unclosed")
        except BadBarError as error:
            self._reject(batch, entry, error.reason, error.detail)

    def _repeat(self, batch: _Batch, entry: Entry, bar: Bar, series: Series) -> None:
        if bar.ts < series.last_ts:
            self._reject(batch, entry, "out_of_order", f"ts {bar.ts} is older than the last bar's, {series.last_ts}")
        elif bar.ohlcv == series.last:
            self._count(batch, "duplicate")
        else:
            detail = f"{bar.bar_id} came again as {bar.ohlcv}; it was {series.last} and stays so"
            self._reject(batch, entry, "revision", detail)
            batch.events.append(Event("revision", bar.ts, bar.bar_id, "", bar.symbol, bar.interval, "revision", detail))

    def _admit(
        self, batch: _Batch, entry: Entry, bar: Bar, series: Series | None, now_ms: int, *, own_id: bool
    ) -> None:
        restart = False
        if series is None:
            series = self._open_series(bar)
        else:
            restart = self._judge_gap(batch, bar, series)
            self._judge_shape(batch, bar, series)
        series.last_ts, series.last, series.rewarm = bar.ts, bar.ohlcv, False
        self._changed.add((bar.symbol, bar.interval))
        self._count(batch, "accepted", bar)
        batch.ids.append(self.ids.derive(entry.id, now_ms, own=own_id))
        batch.arrived_ms.append(_parts(entry.id)[0] if entry.arrived_ms is None else entry.arrived_ms)
        batch.bars.append(bar)
        batch.rows.append(series.row)
        batch.restart.append(restart)
        batch.stale.append(self._judge_age(batch, bar, now_ms))
        batch.withheld.append(not self.health.healthy)

    def _open_series(self, bar: Bar) -> Series:
        if len(self._series) >= self.limits.max_symbols:
            raise BadBarError(
                "symbol_cap", f"{len(self._series)} series are open already; raise max_symbols to take {bar.symbol}"
            )
        series = Series(len(self._series), bar.symbol, bar.interval, bar.ts, bar.ohlcv)
        self._series[bar.symbol, bar.interval] = series
        return series

    def _judge_gap(self, batch: _Batch, bar: Bar, series: Series) -> bool:
        """Whether the series has to warm up again; says so in an event."""
        missing = missing_bars(series.last_ts, bar.ts, interval_ms(bar.interval))
        restart = series.rewarm or missing > self.limits.max_gap_bars
        if missing > 0:
            batch.flags["gap"] += 1
            then = "the series warms up again" if restart else "it goes on"
            detail = f"{missing} bars are missing before this one; {then}"
            evidence = {"missing": missing, "last_ts": series.last_ts, "rewarm": restart}
            batch.events.append(Event("gap", bar.ts, bar.bar_id, "", bar.symbol, bar.interval, "gap", detail, evidence))
        return restart

    def _judge_shape(self, batch: _Batch, bar: Bar, series: Series) -> None:
        last_close = series.last[3]
        if abs(bar.close / last_close - 1) > self.limits.jump_ratio:
            batch.flags["jump"] += 1
        flat = bar.high == bar.low == last_close
        series.flat_bars = series.flat_bars + 1 if flat else 0
        if series.flat_bars >= self.limits.frozen_bars:
            batch.flags["frozen"] += 1

    def _judge_age(self, batch: _Batch, bar: Bar, now_ms: int) -> bool:
        if self.stale_bars is not None:
            return bar.bar_id in self.stale_bars
        limit = self.limits.max_bar_age_intervals
        if limit is None:
            return False
        step = interval_ms(bar.interval)
        age_ms = now_ms - bar.ts - step
        stale = age_ms > limit * step
        if stale:
            batch.flags["stale"] += 1
        elif age_ms > step:
            batch.flags["late"] += 1
        return stale

    def _reject(self, batch: _Batch, entry: Entry, reason: str, detail: str) -> None:
        batch.rejects.append(Reject(entry, reason, detail, STAGE))
        self._count(batch, "rejected")

    def _count(self, batch: _Batch, outcome: str, bar: Bar | None = None) -> None:
        batch.outcomes[outcome] += 1
        if self.health.count(rejected=outcome == "rejected"):
            kind = "feed_healthy" if self.health.healthy else "feed_unhealthy"
            detail = f"{self.health.reject_ratio:.1%} of the last entries were rejected, the limit is 5 %"
            ts, name = (bar.ts, bar.bar_id) if bar else (0, "")
            evidence = {"reject_ratio": self.health.reject_ratio}
            batch.events.append(Event(kind, ts, name, reason="rejects", detail=detail, evidence=evidence))

    def rewarm_all(self) -> None:
        """After an accepted loss of input: every series warms up again from its next bar."""
        self._reader.forget()
        for key, series in self._series.items():
            series.rewarm = True
            self._changed.add(key)

    def changes(self) -> list[tuple[bytes, bytes]]:
        """The state fields to store for everything since the last call."""
        fields = [(b"%d" % s.row, s.pack()) for s in (self._series[key] for key in self._changed)]
        self._changed.clear()
        return [*fields, *self._reader.changes(), (b"feed", self.health.pack())]

    def restore(self, fields: Mapping[bytes, bytes]) -> None:
        """Take up the state that `changes` wrote. Raises `StateCorruptError`."""
        rows = [Series.unpack(name.decode(), data) for name, data in fields.items() if name.isdigit()]
        rows.sort(key=lambda series: series.row)
        for place, series in enumerate(rows):
            if series.row != place:
                raise StateCorruptError(str(place), f"missing, though series {series.row} is there")
        self._series = {(s.symbol, s.interval): s for s in rows}
        self._reader.restore(fields)
        if b"feed" in fields:
            self.health = FeedHealth(unseal("feed", fields[b"feed"]))
