"""Bars onto the stream, each once: what the stream's tail already holds is not written again."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from streams.redis import RedisStore
from streams.store import StoreUnavailableError, id_tuple

Row = Sequence[Any]
"""`[open ms, open, high, low, close, volume]`."""

_PRICES = ("open", "high", "low", "close", "volume")
_CHUNK = 1000


class Publisher:
    """Appends closed bars of one interval to `key`, in order of time for each symbol.

    One feed at a time writes a symbol to a key; a second one would only make duplicates, which the
    worker drops. `maxlen` None keeps everything.
    """

    def __init__(self, store: RedisStore, key: str, symbols: Sequence[str], interval: str, maxlen: int | None) -> None:
        self.store = store
        self.key = key
        self.symbols = tuple(symbols)
        self.interval = interval
        self.maxlen = maxlen
        self.last: dict[str, int] = {}
        self._sure = False
        self._turn = asyncio.Lock()

    async def last_ts(self, symbol: str) -> int | None:
        """The open time of the last bar of `symbol` on the stream. Raises `StoreUnavailableError`."""
        async with self._turn:
            await self._be_sure()
        return self.last.get(symbol)

    async def publish(self, symbol: str, rows: Sequence[Row]) -> int:
        """Write the rows that are later than the last one of `symbol`; how many there were.

        Raises `StoreUnavailableError`; whether they were written is found out at the next call.
        """
        async with self._turn:
            await self._be_sure()
            last = self.last.get(symbol, -1)
            new = [row for row in rows if row[0] > last]
            if not new:
                return 0
            self._sure = False
            entries = [self._fields(symbol, row) for row in new]
            await asyncio.to_thread(self.store.append, self.key, entries, maxlen=self.maxlen)
            self._sure = True
            self.last[symbol] = new[-1][0]
            return len(new)

    async def _be_sure(self) -> None:
        """After the start and after a write whose outcome is unknown: ask the stream."""
        if not self._sure:
            self.last = await asyncio.to_thread(read_tail, self.store, self.key, self.symbols, self.interval)
            self._sure = True

    def _fields(self, symbol: str, row: Row) -> dict[str, Any]:
        prices = {name: repr(float(x)) for name, x in zip(_PRICES, row[1:6], strict=True)}
        return {"symbol": symbol, "ts": int(row[0]), "interval": self.interval, **prices}


def read_tail(store: RedisStore, key: str, symbols: Sequence[str], interval: str) -> dict[str, int]:
    """The open time of the last bar of each symbol on the stream, read from its end."""
    wanted = {symbol.encode(): symbol for symbol in symbols}
    found: dict[str, int] = {}
    before = "+"
    while len(found) < len(wanted):
        rows = store.tail(key, before, _CHUNK)
        for _, fields in rows:
            symbol = wanted.get(fields.get(b"symbol", b""))
            ts = fields.get(b"ts", b"")
            if symbol and fields.get(b"interval", b"1m").decode() == interval and ts.isdigit():
                found[symbol] = max(found.get(symbol, 0), int(ts))
        if len(rows) < _CHUNK:
            break
        before = "({}-{}".format(*id_tuple(rows[-1][0]))
    return found


__all__ = ["Publisher", "StoreUnavailableError", "read_tail"]
