"""The native bars: flat fields, or one field `data` with the same as a JSON object."""

from __future__ import annotations

from streams.formats.document import Document
from streams.validation import Raw

NAME = "native"
SHAPE = "symbol, ts, open, high, low, close, volume"
_PRICES = ("open", "high", "low", "close", "volume")


def recognises(document: Document) -> bool:
    """By `ts` beside a symbol or prices; by a symbol beside prices too, so that the reject names the missing field.

    Where a `start` stands beside a `stop` or an `exchange`, nobody knows what `ts` means there: it may be the close.
    """
    value = document.mapping
    if "start" in value and ("stop" in value or "exchange" in value):
        return False
    symbol, prices = "symbol" in value, any(name in value for name in _PRICES)
    return (symbol or prices) if "ts" in value else "start" not in value and symbol and prices


def read(document: Document) -> list[Raw]:
    return [document.mapping]
