"""Entries of the streams as the page's JSON: columns by bar, and notes. Nothing is computed anew."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from streams.codec import from_json
from streams.formats import recognise
from streams.messages import Entry
from streams.validation import EARLIEST_TS_MS, LATEST_TS_MS, BadBarError

BAR = ("open", "high", "low", "close", "volume")
SIGNAL = (
    *("action", "confidence", "agreement", "configured", "loaded"),
    *("eligible", "voting", "agreeing", "quorum", "status"),
)
VOTE = ("action", "confidence", "effective_weight", "state", "reason", "version")

Message = Mapping[str, Any]


def columns(features: Iterable[Message], signals: Iterable[Message]) -> dict[str, Any]:
    """One row a bar, by time; null where there is no signal (warm-up) or no vote. The later message of a bar wins.

    Keys: `ts`, `ready`, `BAR`, `SIGNAL`, and `votes`: agent to columns of `VOTE`.
    """
    vectors = {message["ts"]: message for message in features}
    decided = {message["ts"]: message for message in signals}
    ts = sorted(vectors.keys() | decided.keys())
    values = [vectors.get(t, {}).get("values", {}) for t in ts]
    chosen = [decided.get(t, {}) for t in ts]
    votes = [signal.get("votes", {}) for signal in chosen]
    agents = dict.fromkeys(agent for row in votes for agent in row)
    return {
        "ts": ts,
        "ready": [vectors.get(t, {}).get("ready") for t in ts],
        **{name: [row.get(name) for row in values] for name in BAR},
        **{name: [row.get(name) for row in chosen] for name in SIGNAL},
        "votes": {agent: {name: [row.get(agent, {}).get(name) for row in votes] for name in VOTE} for agent in agents},
    }


def event_note(entry_id: str, data: bytes) -> dict[str, Any]:
    """An event as the page lists it; `ms` is when it was written, `ts` the bar's time or null."""
    event = from_json(data)
    kept = ("kind", "bar_id", "agent", "symbol", "interval", "reason", "detail", "evidence")
    return {
        "id": f"e{entry_id}",
        "ms": _ms(entry_id),
        "ts": event["ts"] or None,
        **{name: event[name] for name in kept},
    }


def reject_note(entry_id: str, fields: Mapping[bytes, bytes]) -> dict[str, Any]:
    """A refused entry as the page lists it; symbol, interval and time are its own words, where they can be read."""
    symbol, interval, ts = _identity(fields)
    return {
        "id": f"r{entry_id}",
        "ms": _ms(entry_id),
        "ts": ts,
        "kind": "rejected",
        "agent": "",
        "symbol": symbol,
        "interval": interval,
        "reason": _text(fields, b"reason"),
        "detail": _text(fields, b"detail"),
        "source_key": _text(fields, b"source_key"),
        "source_id": _text(fields, b"source_id"),
    }


def _identity(fields: Mapping[bytes, bytes]) -> tuple[str, str, int | None]:
    original = {name[3:]: value for name, value in fields.items() if name.startswith(b"in:")}
    entry = Entry(_text(fields, b"source_key"), _text(fields, b"source_id"), original)
    try:
        _, raws = recognise(entry)
    except BadBarError:
        return "", "", None
    raw = raws[0] if raws else {}
    symbol, interval = raw.get("symbol"), raw.get("interval", "1m")
    return (
        symbol[:64] if isinstance(symbol, str) else "",
        interval[:8] if isinstance(interval, str) else "",
        _time(raw.get("ts")),
    )


def _time(value: Any) -> int | None:
    """A bar's time in ms, or None where it is none."""
    text = str(value)
    ts = int(text) if text.isascii() and text.isdigit() and len(text) < 16 else 0
    return ts if EARLIEST_TS_MS <= ts <= LATEST_TS_MS else None


def _text(fields: Mapping[bytes, bytes], name: bytes) -> str:
    return fields.get(name, b"").decode(errors="replace")


def _ms(entry_id: str) -> int:
    return int(entry_id.partition("-")[0])
