"""An exchange by its name, through ccxt. The extra `feed` carries that library."""

from __future__ import annotations

import difflib
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from worker.errors import Unavailable, UsageError

PAGE = 500
"""Bars asked for at once; every exchange gives at least some of them."""

_INTERVAL = re.compile(r"[1-9][0-9]*[smhd]")


def open_exchange(name: str, options: Mapping[str, Any]) -> Any:
    """A `ccxt.pro` exchange; `options` go to its constructor. Raises `UsageError`, or `Unavailable` without ccxt."""
    try:
        import ccxt.pro  # noqa: PLC0415  seconds, and an extra
    except ModuleNotFoundError:
        raise Unavailable("quartet feed needs ccxt: install it with pip install 'quartet-worker[feed]'") from None
    if name not in ccxt.pro.exchanges:
        raise UsageError(f"unknown exchange {name}{_near(name, ccxt.pro.exchanges)}")
    exchange = getattr(ccxt.pro, name)({"enableRateLimit": True, **options})
    _note_when_lines_speak(exchange)
    return exchange


class SilentLineError(OSError):
    """Nothing came over a connection for so long that it was given up for a new one."""


def _note_when_lines_speak(exchange: Any) -> None:
    """Each connection gets `heard_s`: when any message last came over it, by `time.monotonic`."""
    handle = exchange.handle_message

    def noted(client: Any, message: Any) -> Any:
        client.heard_s = time.monotonic()
        return handle(client, message)

    exchange.handle_message = noted


def drop_silent_lines(exchange: Any, silence_s: float) -> int:
    """Give up the connections over which nothing came for `silence_s`; how many. Their watchers get `SilentLineError`.

    ccxt keeps a connection whose reading failed, and each later watch waits on it; one that drains many messages
    at once can stop reading for good (ccxt 4.5.60 over aiohttp 3.14.5 after some 4,000, until its ping is missed).
    """
    now_s = time.monotonic()
    lines = [line for line in exchange.clients.values() if line.connection is not None]
    for line in lines:
        line.heard_s = getattr(line, "heard_s", now_s)  # one that never spoke is given until the next look
    silent = [line for line in lines if now_s - line.heard_s >= silence_s]
    for line in silent:
        line.on_error(SilentLineError(f"{line.url} said nothing for {silence_s:g} s"))
    return len(silent)


async def check_request(exchange: Any, symbols: Sequence[str], interval: str) -> None:
    """Load the markets and check what is asked for. Raises `UsageError` or `Unavailable` with one clear line."""
    import ccxt  # noqa: PLC0415

    known = [i for i in exchange.timeframes or {} if _INTERVAL.fullmatch(i)]
    if interval not in known:
        raise UsageError(f"{exchange.id} has no bars of {interval}; it has {', '.join(known) or 'none that are used'}")
    if not exchange.has.get("fetchOHLCV"):
        raise UsageError(f"{exchange.id} gives no history of bars, which the warm-up and every gap need")
    try:
        await exchange.load_markets()
    except ccxt.BaseError as error:
        raise Unavailable(f"{exchange.id} is not reachable: {type(error).__name__}: {str(error)[:200]}") from None
    for symbol in symbols:
        if symbol not in exchange.markets:
            raise UsageError(f"{exchange.id} has no symbol {symbol}{_near(symbol, exchange.markets)}")


async def close_exchange(exchange: Any) -> None:
    """Close every connection; ccxt's own `close` keeps those of REST in some versions."""
    await exchange.close()
    if getattr(exchange, "session", None) is not None:
        await exchange.clean_rest_data()


def _near(name: str, known: Iterable[str]) -> str:
    """What was probably meant, as the end of a sentence."""
    plain = {re.sub(r"[^a-z0-9]", "", k.lower()): k for k in known}
    found = difflib.get_close_matches(re.sub(r"[^a-z0-9]", "", name.lower()), list(plain), n=3)
    return f"; did you mean {', '.join(plain[k] for k in found)}?" if found else ""
