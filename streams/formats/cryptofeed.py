"""cryptofeed's candles: `candles-<EXCHANGE>-<SYMBOL>`, flat text fields.

`start` and `stop` are seconds, and `stop` is the end less 1 ms on some exchanges, so the interval
comes from its field. `closed` is `False` on many exchanges that never say it: see `InputRule.closed`.
"""

from __future__ import annotations

from streams.formats.document import Document
from streams.formats.times import seconds_to_ms
from streams.validation import Raw

NAME = "cryptofeed"
SHAPE = "exchange, symbol, start, stop, interval, closed"
_SHAPE = frozenset(("exchange", "symbol", "start", "stop", "interval"))
_COPIED = ("symbol", "interval", "open", "high", "low", "close", "volume")


def recognises(document: Document) -> bool:
    return document.mapping.keys() >= _SHAPE


def read(document: Document) -> list[Raw]:
    value = document.mapping
    said = str(value.get("closed"))
    raw = {name: value.get(name) for name in _COPIED}
    return [raw | {"ts": seconds_to_ms(value["start"], "start"), "closed": said.lower() in ("true", "1")}]
