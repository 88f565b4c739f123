"""ccxt's candles: `[open ms, o, h, l, c, v]`, one row or a list of them.

A row names neither symbol nor interval nor whether it is closed: the first two stand in fields
beside it or in the setting `inputs`, and a bar is closed when the next one has begun.
"""

from __future__ import annotations

from streams.formats.document import Document
from streams.formats.times import whole
from streams.validation import Raw

NAME = "ccxt"
SHAPE = "rows of 6 [open ms, o, h, l, c, v]"
_PRICES = ("open", "high", "low", "close", "volume")


def recognises(document: Document) -> bool:
    return document.value == [] or (bool(document.rows) and all(len(row) == 6 for row in document.rows))


def read(document: Document) -> list[Raw]:
    beside = document.beside
    names = {"symbol": beside.get("symbol"), "interval": beside.get("timeframe") or beside.get("interval")}
    return [{**names, "ts": whole(row[0], "ts"), **dict(zip(_PRICES, row[1:], strict=True))} for row in document.rows]
