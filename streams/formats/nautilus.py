"""nautilus_trader's message bus: `topic` and `payload`, a stream for each topic or one for all.

The payload is JSON or msgpack, told apart by its first byte; what `encoding` says is not always so.
Only topics under `data.bars` are bars; everything else on the stream is somebody else's message.
`ts_event` is the bar's CLOSE.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgpack

from streams.formats.times import nanoseconds, open_from_close_ns
from streams.validation import BadBarError, Raw, check_size, read_json_object

NAME = "nautilus"
SHAPE = "topic data.bars.*, payload in JSON or msgpack"
TOPIC = b"data.bars."
_TOPICS = (b"data.", b"events.")
_UNITS = {"SECOND": "s", "MINUTE": "m", "HOUR": "h", "DAY": "d"}
_PRICES = ("open", "high", "low", "close", "volume")


def recognises(fields: Mapping[bytes, bytes]) -> bool:
    return b"topic" in fields and b"payload" in fields


def owns(fields: Mapping[bytes, bytes]) -> bool:
    """Whether the topic is nautilus_trader's own; other programs have fields named so as well."""
    return fields[b"topic"].startswith(_TOPICS)


def read(fields: Mapping[bytes, bytes]) -> list[Raw]:
    """The bar, or nothing where the topic is another; its size does not matter then."""
    if not fields[b"topic"].startswith(TOPIC):
        return []
    check_size(fields)
    value = _decode(fields[b"payload"])
    symbol, interval = parse_bar_type(value.get("bar_type"))
    close_ns = nanoseconds(value.get("ts_event"), "ts_event")
    raw = {name: value.get(name) for name in _PRICES}
    return [raw | {"symbol": symbol, "interval": interval, "ts": open_from_close_ns(close_ns, interval)}]


def _decode(payload: bytes) -> Raw:
    first = payload[:1]
    if first == b"{":
        return read_json_object(payload)
    if first and (0x80 <= first[0] <= 0x8F or first[0] in (0xDE, 0xDF)):
        return _unpack(payload)
    raise BadBarError("encoding", f"payload begins with {first!r}, which is neither a JSON object nor a msgpack map")


def _unpack(payload: bytes) -> Raw:
    try:
        value: Raw = msgpack.unpackb(payload)
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise BadBarError("encoding", f"payload is not msgpack that can be read: {error}") from None
    return value


def parse_bar_type(value: Any) -> tuple[str, str]:
    """`BTCUSDT-PERP.BINANCE-1-MINUTE-LAST-EXTERNAL` -> (`BTCUSDT-PERP.BINANCE`, `1m`).

    Bars of bid, ask or mid prices are series of their own: `EUR/USD.SIM-BID`.
    """
    if not isinstance(value, str):
        raise BadBarError("missing_field", f"bar_type is {value!r:.40}, text was expected")
    parts = value.partition("@")[0].rsplit("-", 4)
    if len(parts) != 5:
        raise BadBarError("type", f"bar_type is {value[:80]!r}, such as X.VENUE-1-MINUTE-LAST-EXTERNAL was expected")
    instrument, step, unit, price, _source = parts
    if unit not in _UNITS:
        raise BadBarError("interval", f"bars of {step[:10]} {unit[:20]} have no fixed interval in s, m, h or d")
    return instrument if price == "LAST" else f"{instrument}-{price}", step + _UNITS[unit]
