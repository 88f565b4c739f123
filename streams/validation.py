"""The bad-bar rules: what is accepted, and one reason for everything that is not.

Two steps, each a function of its inputs: `read_fields` (an entry's bytes to plain values) and
`check_bar` (plain values to a `Bar`). What a bar may be after the last one of its symbol and interval
is judged in `worker.intake`. A bar is rejected with a reason, never repaired.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter
from typing import Any

import orjson

from streams.messages import Bar

REASONS = (
    "not_finite",
    "type",
    "missing_field",
    "price_sign",
    "volume_sign",
    "magnitude",
    "ohlc",
    "revision",
    "out_of_order",
    "future",
    "unit",
    "grid",
    "interval",
    "oversize",
    "encoding",
    "symbol",
    "symbol_cap",
    "poison",
    "order",
)
"""Every reason of a reject, the closed label set of its metric. `order` is a refused control order."""

MAX_PAYLOAD_BYTES = 4096
MAX_FIELDS = 64
MAX_SYMBOL = 64
MAX_JSON_DEPTH = 4
MAX_PRICE = 1e12
MAX_VOLUME = 1e18
MAX_EXACT_INTEGER = 2**53
SMALLEST_NORMAL = 2.2250738585072014e-308
EARLIEST_TS_MS = 100_000_000_000
LATEST_TS_MS = 100_000_000_000_000
DAY_MS = 86_400_000
HOUR_MS = 3_600_000
INTERVAL_UNIT_MS = {"s": 1_000, "m": 60_000, "h": HOUR_MS, "d": DAY_MS}
DEFAULT_INTERVAL = "1m"

_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_INTEGER = re.compile(r"[+-]?[0-9]+")
_NOT_FINITE = re.compile(r"[+-]?(?:nan|inf|infinity)", re.IGNORECASE)
_SYMBOL = re.compile(r"[A-Za-z0-9._:/-]+")
_INTERVAL = re.compile(r"([1-9][0-9]{0,4})([smhd])")
_PLAIN_OHLCV = re.compile(r"(?:[0-9]{1,12}(?:\.[0-9]{1,20})?,){4}[0-9]{1,15}(?:\.[0-9]{1,20})?")
"""Within every limit but those of sign and shape: under 1e12 and 1e18, 0 or at least 1e-20, no long integer."""
CONTROL = bytes(range(32)) + b"\x7f"
_CONTROL = re.compile(b"[%b]" % re.escape(CONTROL))
_JSON_CONTROL = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_TRUE = frozenset(("true", "1"))
_FALSE = frozenset(("false", "0"))
_OHLCV = itemgetter("open", "high", "low", "close", "volume")

OHLCV = tuple[float, float, float, float, float]
Raw = Mapping[str, Any]
"""One bar as plain values: text, numbers, booleans or None by field name."""


class BadBarError(Exception):
    """A bar that is refused: `reason` from `REASONS`, `detail` for a person."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class UnclosedBarError(Exception):
    """A candle that is still forming: counted, never used, not an error of the feed."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a feed may send. Times in milliseconds; `intervals` None lets every interval pass."""

    intervals: frozenset[str] | None = None
    clock_skew_ms: int = 5_000
    max_gap_bars: int = 100
    max_symbols: int = 10_000
    max_bar_age_intervals: float | None = None
    frozen_bars: int = 30
    jump_ratio: float = 0.5


def read_fields(fields: Mapping[bytes, bytes]) -> Raw:
    """The plain values of an entry: its flat fields, or the JSON object in its `data`.

    Raises `BadBarError` with `oversize`, `encoding`, `type` or `missing_field`.
    """
    data = fields.get(b"data")
    if data is None:
        return read_flat(fields)
    check_size(fields)
    return read_json_object(data)


def check_size(fields: Mapping[bytes, bytes]) -> None:
    """Raise `oversize` where an entry has over 64 fields or over 4 kB."""
    _check_size(fields, b"".join(fields.keys()), b"".join(fields.values()))


def _check_size(fields: Mapping[bytes, bytes], names: bytes, values: bytes) -> None:
    if len(fields) > MAX_FIELDS:
        raise BadBarError("oversize", f"{len(fields)} fields, at most {MAX_FIELDS} are read")
    size = len(names) + len(values)
    if size > MAX_PAYLOAD_BYTES:
        raise BadBarError("oversize", f"{size} bytes, at most {MAX_PAYLOAD_BYTES} are read")


def read_flat(fields: Mapping[bytes, bytes]) -> Raw:
    """Flat fields as text. Raises `BadBarError` with `oversize` or `encoding`."""
    names, values = b"".join(fields.keys()), b"".join(fields.values())
    _check_size(fields, names, values)
    if _CONTROL.search(names) or _CONTROL.search(values):
        raise BadBarError("encoding", "a field holds NUL or a control character")
    try:
        return {k.decode(): v.decode() for k, v in fields.items()}
    except UnicodeDecodeError as error:
        raise BadBarError("encoding", f"a field is not UTF-8: {error.reason}") from None


def read_json_object(data: bytes) -> Raw:
    """The JSON object in `data`. Raises `BadBarError` with `encoding`, `type` or `oversize`."""
    value = read_json(data)
    if not isinstance(value, dict):
        raise BadBarError("type", f"data is a JSON {type(value).__name__}, an object was expected")
    return value


def read_json(data: bytes) -> Any:
    """Any JSON value within the limits of size, depth and encoding."""
    if _JSON_CONTROL.search(data):
        raise BadBarError("encoding", "data holds NUL or a control character")
    try:
        data.decode()
    except UnicodeDecodeError as error:
        raise BadBarError("encoding", f"data is not UTF-8: {error.reason}") from None
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        reason = "oversize" if "depth" in str(error) else "type"
        raise BadBarError(reason, f"data is not JSON that can be read: {error}") from None
    if _depth(value, MAX_JSON_DEPTH + 1) > MAX_JSON_DEPTH:
        raise BadBarError("oversize", f"JSON deeper than {MAX_JSON_DEPTH}")
    if isinstance(value, dict) and len(value) > MAX_FIELDS:
        raise BadBarError("oversize", f"{len(value)} fields, at most {MAX_FIELDS} are read")
    return value


def _depth(value: Any, budget: int) -> int:
    if budget == 0 or not isinstance(value, dict | list):
        return 0
    children = value.values() if isinstance(value, dict) else value
    return 1 + max((_depth(child, budget - 1) for child in children), default=0)


@lru_cache(maxsize=1024)
def interval_ms(interval: str) -> int:
    """Milliseconds of `<n>` with s, m, h or d. Raises `BadBarError` with `interval`."""
    match = _INTERVAL.fullmatch(interval)
    if match is None:
        raise BadBarError("interval", f"{interval[:20]!r} is not a number with s, m, h or d, such as 1m")
    return int(match[1]) * INTERVAL_UNIT_MS[match[2]]


def check_bar(raw: Raw, now_ms: int, limits: Limits) -> Bar:
    """The bar in `raw`, checked on its own. `now_ms` judges only bars from the future.

    Raises `UnclosedBarError` for a forming candle and `BadBarError` for everything else.
    """
    symbol = _symbol(raw)
    interval = _interval(raw, limits)
    if not is_closed(raw):
        raise UnclosedBarError
    ts = _timestamp(raw, interval_ms(interval), now_ms, limits)
    return Bar(symbol, ts, interval, *(_plain_ohlcv(raw) or _ohlcv(raw)))


def _plain_ohlcv(raw: Raw) -> OHLCV | None:
    """Good values in plain decimals, as nearly all are, judged at once; None where each has to be looked at."""
    try:
        texts = _OHLCV(raw)
        if _PLAIN_OHLCV.fullmatch(",".join(texts)) is None:
            return None
    except (KeyError, TypeError):
        return None
    open_, high, low, close, volume = map(float, texts)
    if 0 < low <= open_ <= high and low <= close <= high:
        return open_, high, low, close, volume
    return None


def _ohlcv(raw: Raw) -> OHLCV:
    open_, high, low, close = (_price(raw, name) for name in ("open", "high", "low", "close"))
    volume = _volume(raw)
    if high < low or not low <= open_ <= high or not low <= close <= high:
        raise BadBarError("ohlc", f"open {open_!r} high {high!r} low {low!r} close {close!r} contradict each other")
    return open_, high, low, close, volume


def _present(raw: Raw, name: str) -> Any:
    value = raw.get(name)
    if value is None or value == "":
        raise BadBarError("missing_field", f"{name} is missing or empty")
    return value


def _symbol(raw: Raw) -> str:
    value = _present(raw, "symbol")
    if not isinstance(value, str):
        raise BadBarError("type", f"symbol is a {type(value).__name__}, text was expected")
    if len(value) > MAX_SYMBOL or not _is_symbol(value):
        raise BadBarError("symbol", f"{value[:80]!r} is not 1 to 64 characters of A-Z a-z 0-9 . _ : / -")
    return value


@lru_cache(maxsize=16_384)
def _is_symbol(text: str) -> bool:
    return _SYMBOL.fullmatch(text) is not None


def _interval(raw: Raw, limits: Limits) -> str:
    value = raw.get("interval", DEFAULT_INTERVAL)
    if value is None or value == "":
        raise BadBarError("missing_field", "interval is empty; leave it out for 1m")
    if not isinstance(value, str):
        raise BadBarError("type", f"interval is a {type(value).__name__}, text such as 1m was expected")
    interval_ms(value)
    if limits.intervals is not None and value not in limits.intervals:
        raise BadBarError("interval", f"{value} is not among the intervals set: {', '.join(sorted(limits.intervals))}")
    return value


def is_closed(raw: Raw) -> bool:
    """Whether a bar says that it is closed, or says nothing of it. Raises `BadBarError` with `type`."""
    value = raw.get("closed", True)
    if isinstance(value, bool):
        return value
    text = str(value).lower() if isinstance(value, str | int) else ""
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise BadBarError("type", f"closed is {value!r:.40}, true or false was expected")


def _timestamp(raw: Raw, step_ms: int, now_ms: int, limits: Limits) -> int:
    ts = _integer(_present(raw, "ts"))
    if not EARLIEST_TS_MS <= ts < LATEST_TS_MS:
        raise BadBarError("unit", f"ts {ts} is not in milliseconds since the epoch")
    if ts % min(step_ms, DAY_MS):
        raise BadBarError("grid", f"ts {ts} is not on the grid of {step_ms} ms; ts is the bar's open time")
    if ts > now_ms + step_ms + limits.clock_skew_ms:
        raise BadBarError("future", f"ts {ts} is {ts - now_ms} ms ahead of the clock")
    return ts


def _integer(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and len(value) <= 32 and _INTEGER.fullmatch(value):
        return int(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise BadBarError("not_finite", f"ts is {value!r}")
    if isinstance(value, str) and _NOT_FINITE.fullmatch(value):
        raise BadBarError("not_finite", f"ts is {value!r}")
    raise BadBarError("type", f"ts is {value!r:.40}, an integer of milliseconds was expected")


def _number(raw: Raw, name: str) -> float:
    value = _present(raw, name)
    kind = type(value)
    if kind is str:
        return _number_from_text(value, name)
    if kind is int:
        return _exact_integer(value, name)
    if kind is float:
        return _finite(value, name)
    raise BadBarError("type", f"{name} is a {kind.__name__}, a number was expected")


def _number_from_text(text: str, name: str) -> float:
    if _NUMBER.fullmatch(text) is None:
        reason = "not_finite" if _NOT_FINITE.fullmatch(text) else "type"
        raise BadBarError(reason, f"{name} is {text[:40]!r}, a number was expected")
    if len(text) > 15 and _INTEGER.fullmatch(text):
        return _exact_integer(int(text) if len(text) < 400 else MAX_EXACT_INTEGER + 1, name)
    return _finite(float(text), name)


def _exact_integer(value: int, name: str) -> float:
    if abs(value) > MAX_EXACT_INTEGER:
        raise BadBarError("magnitude", f"{name} is an integer over 2^53, which a float cannot hold exactly")
    return float(value)


def _finite(value: float, name: str) -> float:
    if not math.isfinite(value):
        raise BadBarError("not_finite", f"{name} is {value!r}")
    if 0 < abs(value) < SMALLEST_NORMAL:
        raise BadBarError("magnitude", f"{name} is {value!r}, smaller than a normal float")
    return value


def _price(raw: Raw, name: str) -> float:
    value = _number(raw, name)
    if value <= 0:
        raise BadBarError("price_sign", f"{name} is {value!r}, a price is over 0")
    if value > MAX_PRICE:
        raise BadBarError("magnitude", f"{name} is {value!r}, over {MAX_PRICE:g}")
    return value


def _volume(raw: Raw) -> float:
    value = _number(raw, "volume")
    if value < 0:
        raise BadBarError("volume_sign", f"volume is {value!r}, a volume is 0 or more")
    if value > MAX_VOLUME:
        raise BadBarError("magnitude", f"volume is {value!r}, over {MAX_VOLUME:g}")
    return value + 0.0  # -0.0 becomes 0.0, so that equal bars have equal bits


def missing_bars(last_ts: int, ts: int, step_ms: int) -> int:
    """How many bars are absent between two open times; hourly and daily ones not on weekends (UTC)."""
    missing = (ts - last_ts) // step_ms - 1
    if missing <= 0 or step_ms < HOUR_MS or step_ms > DAY_MS:
        return max(missing, 0)
    return missing - _weekend_bars(last_ts + step_ms, missing, step_ms)


def _weekend_bars(first_ts: int, count: int, step_ms: int) -> int:
    """Of `count` open times from `first_ts` on, those on a Saturday or Sunday."""
    per_week = 7 * DAY_MS // step_ms
    weeks, rest = divmod(count, per_week)
    tail = sum((first_ts + k * step_ms) // DAY_MS % 7 in (2, 3) for k in range(rest))
    whole = sum((first_ts + k * step_ms) // DAY_MS % 7 in (2, 3) for k in range(per_week)) if weeks else 0
    return weeks * whole + tail
