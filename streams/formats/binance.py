"""Binance's klines: the websocket's message, bare or wrapped in `{stream, data}`, and the REST table.

`t` is the open, `T` the end less 1 ms; both may be in microseconds. Only `x` true is closed. Other
events and replies on the same connection are no bars.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streams.formats.document import Document
from streams.formats.times import interval_text, to_ms
from streams.validation import BadBarError, Raw

NAME = "binance"
SHAPE = 'a kline message {"e": "kline", "k": {...}}'
EVENTS = ("kline", "continuous_kline")
_KLINE = frozenset("tTohlcv")
_PRICES = {"open": "o", "high": "h", "low": "l", "close": "c", "volume": "v"}


def recognises(document: Document) -> bool:
    message = _unwrapped(document)
    reply = "id" in message and ("result" in message or "error" in message)
    return "e" in message or reply or message.keys() >= _KLINE


def read(document: Document) -> list[Raw]:
    """The kline, or nothing where the message is another event or a reply."""
    message = _unwrapped(document)
    kline = message.get("k") if "k" in message else message
    if message.get("e", "kline") not in EVENTS or not message.keys() & {"k", "t"}:
        return []
    if not isinstance(kline, Mapping):
        raise BadBarError("type", f"k is {kline!r:.40}, an object was expected")
    raw = {name: kline.get(letter) for name, letter in _PRICES.items()}
    closed = kline.get("x") is True or str(kline.get("x")).lower() == "true"
    around = {**document.beside, **message}
    return [
        raw
        | {
            "symbol": _symbol(kline, around),
            "interval": kline.get("i") or _interval(kline.get("t"), kline.get("T")),
            "ts": to_ms(kline.get("t"), "t"),
            "closed": closed,
        }
    ]


def _unwrapped(document: Document) -> Mapping[str, Any]:
    message = document.mapping
    inner = message.get("data")
    return inner if "stream" in message and isinstance(inner, Mapping) else message


def _symbol(kline: Mapping[str, Any], around: Mapping[str, Any]) -> Any:
    """The symbol; a continuous contract that is not perpetual carries its kind: `BTCUSD_NEXT_QUARTER`."""
    kind = around.get("ct", "PERPETUAL")
    pair = around.get("ps")
    if pair is not None and kind != "PERPETUAL":
        return f"{pair}_{kind}"
    return kline.get("s") or pair or around.get("s")


def _interval(open_time: Any, end: Any) -> str:
    return interval_text(to_ms(end, "T") + 1 - to_ms(open_time, "t"))


class Table:
    """The REST table of klines: rows of 12, `[t, o, h, l, c, v, T, ...]`, without symbol or flag."""

    NAME = "binance table"
    SHAPE = "rows of 12 [open ms, o, h, l, c, v, end ms, ...]"

    @staticmethod
    def recognises(document: Document) -> bool:
        return bool(document.rows) and all(len(row) == 12 for row in document.rows)

    @staticmethod
    def read(document: Document) -> list[Raw]:
        return [
            {
                **dict(zip(_PRICES, row[1:6], strict=True)),
                "symbol": document.beside.get("symbol"),
                "interval": document.beside.get("interval") or _interval(row[0], row[6]),
                "ts": to_ms(row[0], "t"),
            }
            for row in document.rows
        ]
