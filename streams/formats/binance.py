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
OTHER_EVENTS = frozenset(
    """
    trade aggTrade avgPrice bookTicker depthUpdate 24hrTicker 24hrMiniTicker 1hTicker 4hTicker 1dTicker referencePrice
    markPriceUpdate indexPriceUpdate indexPrice_kline markPrice_kline forceOrder compositeIndex contractInfo
    assetIndexUpdate openInterest tradingSession serverShutdown eventStreamTerminated listenKeyExpired
    executionReport listStatus outboundAccountPosition balanceUpdate externalLockUpdate
    ORDER_TRADE_UPDATE ACCOUNT_UPDATE ACCOUNT_CONFIG_UPDATE MARGIN_CALL TRADE_LITE STRATEGY_UPDATE GRID_UPDATE
    CONDITIONAL_ORDER_TRIGGER_REJECT ALGO_UPDATE
    """.split()
)
"""What else Binance sends on its websockets; an `e` that is not among them is no message of Binance's."""
_KLINE = frozenset("tTohlcv")
_PRICES = {"open": "o", "high": "h", "low": "l", "close": "c", "volume": "v"}


def recognises(document: Document) -> bool:
    message = _unwrapped(document)
    event = message.get("e")
    known = isinstance(event, str) and (event in EVENTS or event in OTHER_EVENTS)
    return known or ("e" not in message and (_is_reply(message) or message.keys() >= _KLINE))


def read(document: Document) -> list[Raw]:
    """The kline, or nothing where the message is another event or a reply."""
    message = _unwrapped(document)
    if message.get("e", "kline") not in EVENTS or _is_reply(message):
        return []
    kline = message.get("k", message if message.keys() >= _KLINE else None)
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


def _is_reply(message: Mapping[str, Any]) -> bool:
    """To a subscription or a question about it: null, a truth value or the names subscribed to; or an error."""
    if "id" not in message:
        return False
    result = message.get("result")
    names = isinstance(result, list) and all(isinstance(name, str) for name in result)
    answered = "result" in message and (result is None or isinstance(result, bool) or names)
    return answered or isinstance(message.get("error"), Mapping)


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
