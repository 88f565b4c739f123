"""Times as producers write them, to whole numbers. Errors are `BadBarError`, as for any bad field."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime
from typing import Any

from streams.validation import DAY_MS, LATEST_TS_MS, BadBarError, interval_ms

MS_NS = 1_000_000
_INTEGER = re.compile(r"[0-9]{1,20}")
_SECONDS = re.compile(r"[0-9]{1,15}(?:\.[0-9]{0,12})?")
_ISO = re.compile(r"(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(?:Z|[+-]00:?00)")


def seconds_to_ms(value: Any, name: str) -> int:
    """`1700000040.0`, as a number or as text, in seconds -> 1700000040000. Sub-millisecond digits are noise."""
    if isinstance(value, str) and _SECONDS.fullmatch(value):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadBarError("type", f"{name} is {value!r:.40}, seconds since the epoch were expected")
    if abs(value) >= LATEST_TS_MS:
        raise BadBarError("unit", f"{name} {value!r} is not in seconds since the epoch")
    return round(value * 1000)


def whole(value: Any, name: str) -> int:
    """An integer from a number or text; `1700000040000.0` is one too, 1.5 is not."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and _INTEGER.fullmatch(value):
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if value is None or value == "":
        raise BadBarError("missing_field", f"{name} is missing or empty")
    raise BadBarError("type", f"{name} is {value!r:.40}, a whole number was expected")


def to_ms(value: Any, name: str) -> int:
    """Milliseconds from milliseconds or microseconds, told apart by their size."""
    number = whole(value, name)
    return number // 1000 if number >= LATEST_TS_MS else number


def nanoseconds(value: Any, name: str) -> int:
    """Nanoseconds since the epoch from an integer, from its text, or from ISO 8601 in UTC, exactly."""
    match = _ISO.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return whole(value, name)
    try:
        moment = datetime.fromisoformat(f"{match[1]}T{match[2]}").replace(tzinfo=UTC)
    except ValueError:
        raise BadBarError("type", f"{name} is {value!r:.40}, which is no date") from None
    return int(moment.timestamp()) * 1_000_000_000 + int((match[3] or "").ljust(9, "0"))


def open_from_close_ns(close_ns: int, interval: str) -> int:
    """The open time in ms of a bar whose close is given in ns.

    A close that lies up to 2 ms before the interval's grid belongs onto it: Binance's end of a bar is
    1 ms before the close, and on its way through a float it moves by another few hundred ns.
    """
    step_ms = interval_ms(interval)
    grid_ns = min(step_ms, DAY_MS) * MS_NS
    short_ns = -close_ns % grid_ns
    if short_ns <= 2 * MS_NS:
        close_ns += short_ns
    return close_ns // MS_NS - step_ms


def interval_text(step_ms: int) -> str:
    """60000 -> `1m`: the interval in its largest whole unit. Raises `interval` where there is none."""
    for unit, unit_ms in (("d", DAY_MS), ("h", 3_600_000), ("m", 60_000), ("s", 1_000)):
        if step_ms >= unit_ms and step_ms % unit_ms == 0:
            return f"{step_ms // unit_ms}{unit}"
    raise BadBarError("interval", f"a bar of {step_ms} ms has no interval in whole seconds")
