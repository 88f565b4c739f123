"""Bars of history as columns: read from csv or parquet, checked, put in order.

The columns are `symbol ts interval open high low close volume`; `interval` may be absent and is
then `1m`. Rows may come in any order (by symbol, by time, mixed): they are sorted, because sorting
loses nothing. An exact repetition is dropped and counted; two different rows of one symbol,
interval and `ts` are refused, because only the owner of the file knows which one is right.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

COLUMNS = ("symbol", "ts", "interval", "open", "high", "low", "close", "volume")
PRICES = ("open", "high", "low", "close", "volume")
DEFAULT_INTERVAL = "1m"
MAX_PRICE = 1e12
MAX_VOLUME = 1e18
MIN_TS_MS, MAX_TS_MS = 10**11, 10**14
"""Milliseconds of the years 1973 to 5138; seconds lie below, microseconds and nanoseconds above."""

_SYMBOL = re.compile(r"[A-Za-z0-9._:/-]{1,64}")
_INTERVAL = re.compile(r"([1-9][0-9]{0,5})([smhd])")
_UNIT_MS = {"s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}


class BarFileError(ValueError):
    """A file of bars that cannot be used: names the file, the line and the column."""


@lru_cache(maxsize=1024)
def interval_ms(interval: str) -> int:
    """`<n>` with s, m, h or d as milliseconds. Raises `ValueError` for anything else."""
    match = _INTERVAL.fullmatch(interval)
    if match is None:
        raise ValueError(f"interval {interval!r} is not a number with s, m, h or d, such as 1m")
    return int(match[1]) * _UNIT_MS[match[2]]


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
    """What a file held: its bars in order, and how many exact repetitions were dropped."""

    bars: Bars
    repeated: int


def read_bars(path: Path) -> BarFile:
    """Read `path` by its suffix: `.csv` or `.parquet`. Raises `BarFileError`."""
    readers: dict[str, Callable[[Path], _Table]] = {".csv": _read_csv, ".parquet": _read_parquet, ".pq": _read_parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise BarFileError(f"{path}: expected a .csv or .parquet file of bars, found {path.suffix or 'no suffix'!r}")
    if not path.is_file():
        raise BarFileError(f"{path}: no such file; give a csv or parquet file with the columns {' '.join(COLUMNS)}")
    table = reader(path)
    bars = _columns(path, table)
    _check(path, table, bars)
    return _in_order(path, table, bars)


@dataclass(frozen=True)
class _Table:
    """Columns as they came, and where a person finds row i of them: `line 17`, `row 16`."""

    columns: Mapping[str, Sequence[Any]]
    where: Callable[[int], str]


def _require_columns(path: Path, names: Iterable[str]) -> None:
    found = list(names)
    missing = [c for c in COLUMNS if c not in found and c != "interval"]
    if missing:
        raise BarFileError(
            f"{path}: line 1: no column {' '.join(missing)}; expected {' '.join(COLUMNS)} (interval may be absent), "
            f"found {' '.join(map(str, found)) or 'nothing'}"
        )


def _read_csv(path: Path) -> _Table:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = [name.strip().lower() for name in next(reader, [])]
            _require_columns(path, header)
            rows, lines = [], []
            for row in reader:
                if not row:
                    continue
                if len(row) != len(header):
                    raise BarFileError(
                        f"{path}: line {reader.line_num}: {len(row)} fields where the header has {len(header)}"
                    )
                rows.append(row)
                lines.append(reader.line_num)
    except (UnicodeDecodeError, csv.Error) as error:
        raise BarFileError(f"{path}: not a csv file in UTF-8: {error}") from error
    by_column = list(zip(*rows, strict=True)) or [()] * len(header)
    return _Table(dict(zip(header, by_column, strict=True)), lambda i: f"line {lines[i]}")


def _read_parquet(path: Path) -> _Table:
    try:
        import pyarrow as pa  # noqa: PLC0415 - an extra
        import pyarrow.parquet as pq  # noqa: PLC0415
    except ImportError as error:
        raise BarFileError(
            f"{path}: parquet files need the extra: pip install 'quartet-worker[parquet]', or use csv"
        ) from error
    try:
        file = pq.ParquetFile(path)
        names = {name.lower(): name for name in file.schema_arrow.names}
        _require_columns(path, names)
        table = file.read(columns=[names[c] for c in COLUMNS if c in names])
    except (pa.ArrowInvalid, OSError) as error:
        raise BarFileError(f"{path}: not a parquet file: {error}") from error
    if pa.types.is_timestamp(table.schema.field(names["ts"]).type):
        raise BarFileError(
            f"{path}: column ts: a timestamp; expected integers, the open time in ms since the epoch, UTC"
        )
    return _Table({c: table[names[c]].to_pylist() for c in COLUMNS if c in names}, lambda i: f"row {i + 1}")


def _columns(path: Path, table: _Table) -> Bars:
    rows = len(table.columns["ts"])
    if rows == 0:
        raise BarFileError(f"{path}: no bars; expected at least one row under the header")
    interval = table.columns.get("interval") or [DEFAULT_INTERVAL] * rows
    return Bars(
        np.array([str(s).strip() for s in table.columns["symbol"]]),
        _convert(path, table, "ts", _integer, np.int64),
        np.array([DEFAULT_INTERVAL if i is None else str(i).strip() or DEFAULT_INTERVAL for i in interval]),
        np.stack([_convert(path, table, c, float, np.float64) for c in PRICES], axis=1),
    )


def _integer(value: Any) -> int:
    number = int(value)
    if not isinstance(value, str) and number != value:
        raise ValueError(value)
    if not -(2**53) < number < 2**53:
        # Beyond what any unit but ns reaches; clipped so that the range check names it.
        return 2**53
    return number


def _convert(path: Path, table: _Table, column: str, convert: Callable[[Any], Any], dtype: type) -> NDArray[Any]:
    values = table.columns[column]
    try:
        return np.array([convert(v) for v in values], dtype=dtype)
    except (TypeError, ValueError, OverflowError):
        row = next(i for i, v in enumerate(values) if not _converts(convert, v))
        kind = "an integer of milliseconds" if column == "ts" else "a number"
        raise BarFileError(
            f"{path}: {table.where(row)}: column {column}: expected {kind}, found {values[row]!r}"
        ) from None


def _converts(convert: Callable[[Any], Any], value: Any) -> bool:
    try:
        convert(value)
    except (TypeError, ValueError, OverflowError):
        return False
    return True


def _check(path: Path, table: _Table, bars: Bars) -> None:
    """The rules that live bars must pass, as far as they concern a single closed bar."""
    _check_names(path, table, bars)
    o, h, low, c, v = bars.ohlcv.T
    step = np.array([interval_ms(i) for i in np.unique(bars.interval)])[
        np.unique(bars.interval, return_inverse=True)[1]
    ]
    prices = bars.ohlcv[:, :4]
    tiny = np.finfo(np.float64).tiny
    checks = [
        (~np.isfinite(bars.ohlcv).all(axis=1), "not_finite", "expected finite prices and volume"),
        ((prices <= 0).any(axis=1), "price_sign", "expected prices above 0"),
        (v < 0, "volume_sign", "expected a volume of 0 or more"),
        ((prices > MAX_PRICE).any(axis=1) | (v > MAX_VOLUME), "magnitude", "expected prices to 1e12, volume to 1e18"),
        (((np.abs(bars.ohlcv) < tiny) & (bars.ohlcv != 0)).any(axis=1), "magnitude", "a subnormal number"),
        ((h < low) | (np.maximum(o, c) > h) | (np.minimum(o, c) < low), "ohlc", "expected low <= open, close <= high"),
        ((bars.ts < MIN_TS_MS) | (bars.ts >= MAX_TS_MS), "unit", "expected ts in milliseconds since the epoch"),
        (bars.ts % step != 0, "grid", "expected ts, the open time, on the grid of its interval"),
    ]
    for bad, reason, rule in checks:
        if bad.any():
            row = int(np.argmax(bad))
            found = " ".join(f"{n}={x:.10g}" for n, x in zip(PRICES, bars.ohlcv[row], strict=True))
            raise BarFileError(
                f"{path}: {table.where(row)}: {reason}: {rule}, found ts={bars.ts[row]} {found}"
                f" ({int(bad.sum())} such rows)"
            )


def _check_names(path: Path, table: _Table, bars: Bars) -> None:
    for column, values, pattern, rule in (
        ("symbol", bars.symbol, _SYMBOL, "1 to 64 characters of [A-Za-z0-9._:/-]"),
        ("interval", bars.interval, _INTERVAL, "a number with s, m, h or d, such as 1m"),
    ):
        for name in np.unique(values):
            if pattern.fullmatch(str(name)) is None:
                row = int(np.argmax(values == name))
                raise BarFileError(f"{path}: {table.where(row)}: column {column}: expected {rule}, found {str(name)!r}")


def _in_order(path: Path, table: _Table, bars: Bars) -> BarFile:
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
            f"{path}: {table.where(int(order[first]))} and {table.where(int(order[first + 1]))}: "
            f"two different bars {bars.symbol[first]}|{bars.interval[first]}|{bars.ts[first]}; keep one of them"
        )
    keep = np.concatenate([[True], ~same])
    return BarFile(bars.take(keep), int(same.sum()))
