"""Bars of history as columns: read from csv, parquet or a recording, checked, put in order.

The columns are `symbol ts interval open high low close volume`; `interval` may be absent and is
then `1m`. A row must pass the rules that a live bar must pass on its own (`streams.validation`).

Rows may come in any order (by symbol, by time, mixed): they are sorted, because sorting loses
nothing. An exact repetition is dropped and counted, an unclosed bar (a column `closed`) likewise;
two different rows of one symbol, interval and `ts` are refused, because only the owner of the file
knows which one is right.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streams.messages import Bar
from streams.validation import LATEST_TS_MS, BadBarError, Limits, Raw, UnclosedBarError, check_bar
from worker.errors import UsageError

COLUMNS = ("symbol", "ts", "interval", "open", "high", "low", "close", "volume")
OPTIONAL = ("interval", "closed")
RECORDING = ".zst"


class BarFileError(UsageError):
    """A file of bars that cannot be used: names the file, the line and the column."""


@dataclass(frozen=True)
class Bars:
    """Columns over N closed bars. `ts` is the open time in ms; `ohlcv` is `[N, 5]`."""

    symbol: NDArray[np.str_]
    ts: NDArray[np.int64]
    interval: NDArray[np.str_]
    ohlcv: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.ts)

    def take(self, rows: NDArray[Any]) -> Bars:
        """The bars of a mask or of row numbers, in that order."""
        return Bars(self.symbol[rows], self.ts[rows], self.interval[rows], self.ohlcv[rows])

    def sorted(self) -> Bars:
        """By symbol, interval and time: one series after the other."""
        return self.take(np.lexsort((self.ts, self.interval, self.symbol)))


@dataclass(frozen=True)
class BarFile:
    """What a file held: its bars in order, how many repetitions and unclosed bars were left out."""

    bars: Bars
    repeated: int
    unclosed: int


Rows = Iterator[tuple[str, Raw]]
"""A place that a person finds (`line 17`, `row 16`) and one bar as plain values."""


def read_bars(path: Path) -> BarFile:
    """Read `path` by its suffix, `.csv` or `.parquet`; a recording whatever its suffix. Raises `BarFileError`."""
    from streams.recording import is_recording  # noqa: PLC0415 - with what reads it

    if path.suffix.lower() == RECORDING or is_recording(path):
        return _read_recording(path)
    readers: dict[str, Callable[[Path], Rows]] = {".csv": _read_csv, ".parquet": _read_parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise BarFileError(
            f"{path}: expected a .csv or .parquet file of bars, or a recording in .zst, "
            f"found {path.suffix or 'no suffix'!r}"
        )
    if not path.is_file():
        raise BarFileError(f"{path}: no such file; give a csv or parquet file with the columns {' '.join(COLUMNS)}")
    places, bars, unclosed = [], [], 0
    for place, raw in reader(path):
        try:
            bars.append(check_bar(raw, LATEST_TS_MS, _LIMITS))
            places.append(place)
        except UnclosedBarError:
            unclosed += 1
        except BadBarError as error:
            raise BarFileError(f"{path}: {place}: {error}") from None
    if not bars:
        raise BarFileError(f"{path}: no bars; expected at least one row under the header")
    return _in_order(path, places, _as_columns(bars), unclosed)


_LIMITS = Limits()


def _read_recording(path: Path) -> BarFile:
    """The bars that the worker accepted; a recording has its refused and repeated ones too, which are left out."""
    from streams.recording import RecordingError  # noqa: PLC0415 - with what reads it
    from worker.replay.accepted import accepted_bars  # noqa: PLC0415

    try:
        bars = list(accepted_bars(path))
    except RecordingError as error:
        raise BarFileError(str(error)) from error
    if not bars:
        raise BarFileError(f"{path}: the recording holds no accepted bar; record the stream that the worker reads")
    return _in_order(path, [f"bar {number}" for number in range(1, len(bars) + 1)], _as_columns(bars), 0)


def _require_columns(path: Path, names: Iterable[str]) -> None:
    found = list(names)
    missing = [c for c in COLUMNS if c not in found and c not in OPTIONAL]
    if missing:
        raise BarFileError(
            f"{path}: line 1: no column {' '.join(missing)}; expected {' '.join(COLUMNS)} (interval may be absent), "
            f"found {' '.join(map(str, found)) or 'nothing'}"
        )


def _read_csv(path: Path) -> Rows:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = [name.strip().lower() for name in next(reader, [])]
            _require_columns(path, header)
            for row in reader:
                if row and len(row) != len(header):
                    raise BarFileError(
                        f"{path}: line {reader.line_num}: {len(row)} fields where the header has {len(header)}"
                    )
                if row:
                    yield f"line {reader.line_num}", dict(zip(header, map(str.strip, row), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise BarFileError(f"{path}: not a csv file in UTF-8: {error}") from error


def _read_parquet(path: Path) -> Rows:
    try:
        import pyarrow as pa  # noqa: PLC0415 - an extra
        import pyarrow.parquet as pq  # noqa: PLC0415
    except ImportError as error:
        raise BarFileError(
            f"{path}: parquet files need the extra: pip install 'quartet-worker[parquet]', or use csv"
        ) from error
    try:
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
        names = [name for name in schema.names if name.lower() in {*COLUMNS, *OPTIONAL}]
        _require_columns(path, (name.lower() for name in schema.names))
        batches = file.read(columns=names).rename_columns([name.lower() for name in names]).to_batches()
    except (pa.ArrowInvalid, OSError) as error:
        raise BarFileError(f"{path}: not a parquet file: {error}") from error
    if any(pa.types.is_timestamp(schema.field(name).type) for name in names):
        raise BarFileError(
            f"{path}: column ts: a timestamp; expected integers, the open time in ms since the epoch, UTC"
        )
    rows = (row for batch in batches for row in batch.to_pylist())
    for number, row in enumerate(rows, start=1):
        yield f"row {number}", row


def _as_columns(bars: list[Bar]) -> Bars:
    return Bars(
        np.array([b.symbol for b in bars]),
        np.array([b.ts for b in bars], dtype=np.int64),
        np.array([b.interval for b in bars]),
        np.array([b.ohlcv for b in bars], dtype=np.float64),
    )


def _in_order(path: Path, places: list[str], bars: Bars, unclosed: int) -> BarFile:
    order = np.lexsort((np.arange(len(bars)), bars.ts, bars.interval, bars.symbol))
    bars = bars.take(order)
    same = (
        (bars.symbol[1:] == bars.symbol[:-1])
        & (bars.interval[1:] == bars.interval[:-1])
        & (bars.ts[1:] == bars.ts[:-1])
    )
    other = same & (bars.ohlcv[1:] != bars.ohlcv[:-1]).any(axis=1)
    if other.any():
        first = int(np.argmax(other))
        raise BarFileError(
            f"{path}: {places[order[first]]} and {places[order[first + 1]]}: "
            f"two different bars {bars.symbol[first]}|{bars.interval[first]}|{bars.ts[first]}; keep one of them"
        )
    keep = np.concatenate([[True], ~same])
    return BarFile(bars.take(keep), int(same.sum()), unclosed)
