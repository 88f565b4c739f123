"""The feed's loop for each symbol: catch up by history, follow live, and start over after every failure.

A bar is published when the next one has begun: then its last update is its final one, if the
connection held from that update to the next bar. After a cut nothing in hand is trusted; the
exchange's history fills what was missed.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from structlog.typing import FilteringBoundLogger

from streams.store import StoreUnavailableError
from streams.validation import interval_ms
from worker.feed.exchange import PAGE
from worker.feed.publisher import Publisher, Row

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 60.0
SHORTEST_SILENCE_S = 20.0

Progress = Callable[[str, int, int], None]
"""Told of the history: symbol, bars published, bars wanted."""


@dataclass(frozen=True)
class Plan:
    """How much history a symbol without bars on the stream begins with, and how patient the feed is."""

    history: int = 300
    first_pause_s: float = FIRST_PAUSE_S
    longest_pause_s: float = LONGEST_PAUSE_S
    silence_s: float | None = None


class SymbolFeed:
    """One symbol of an exchange onto the stream, until cancelled."""

    def __init__(
        self,
        exchange: Any,
        publisher: Publisher,
        symbol: str,
        plan: Plan,
        log: FilteringBoundLogger,
        progress: Progress = lambda *_: None,
    ) -> None:
        self.exchange = exchange
        self.publisher = publisher
        self.symbol = symbol
        self.plan = plan
        self.log = log
        self.progress = progress
        self.step_ms = interval_ms(publisher.interval)
        self._failures = 0
        self._dice = random.Random()  # noqa: S311  spreads reconnects, guards nothing

    async def run(self) -> None:
        """Never returns; what the exchange or the server refuses is tried again after a growing pause."""
        import ccxt  # noqa: PLC0415

        while True:
            try:
                await self.catch_up()
                await (self._follow() if self.exchange.has.get("watchOHLCV") else self._poll())
            except (ccxt.NetworkError, ccxt.ExchangeError, StoreUnavailableError, OSError) as error:
                await self._back_off(error)

    async def catch_up(self) -> int:
        """Publish every closed bar after the last one on the stream, from history; how many."""
        last = await self.publisher.last_ts(self.symbol)
        now_ms = self.exchange.milliseconds()
        since = now_ms // self.step_ms * self.step_ms - self.plan.history * self.step_ms
        since = since if last is None else last + self.step_ms
        wanted, done = max(0, (now_ms - since) // self.step_ms), 0
        while since + self.step_ms <= now_ms:
            rows = await self.exchange.fetch_ohlcv(self.symbol, self.publisher.interval, since, PAGE)
            closed = _usable(rows[:-1] if _reaches(rows, now_ms, self.step_ms) else rows)
            done += await self.publisher.publish(self.symbol, closed)
            self.progress(self.symbol, done, wanted)
            if not closed or closed[-1][0] < since:
                break
            since = closed[-1][0] + self.step_ms
        if done:
            self.log.info("history published", symbol=self.symbol, bars=done)
        return done

    async def _follow(self) -> None:
        """Live updates: the last one of a bar is published when the next bar begins."""
        forming: Row | None = None
        silence_s = self.plan.silence_s or max(SHORTEST_SILENCE_S, 1.5 * self.step_ms / 1000)
        update = self._watch()
        try:
            while True:
                done, _ = await asyncio.wait({update}, timeout=silence_s)
                if not done:  # a quiet market or a dead line: history knows
                    await self.catch_up()
                    continue
                rows, update = update.result(), self._watch()
                self._recovered()
                for row in _usable(rows):
                    if forming is not None and row[0] > forming[0]:
                        await self._close(forming)
                    if forming is None or row[0] >= forming[0]:
                        forming = list(row)
        finally:
            update.cancel()

    def _watch(self) -> asyncio.Task[Any]:
        return asyncio.ensure_future(self.exchange.watch_ohlcv(self.symbol, self.publisher.interval))

    async def _close(self, row: Row) -> None:
        """Publish a bar that has ended, and before it whatever is missing."""
        last = await self.publisher.last_ts(self.symbol)
        if last is None or row[0] > last + self.step_ms:
            await self.catch_up()
        await self.publisher.publish(self.symbol, [row])

    async def _poll(self) -> None:
        """For an exchange without live bars: its history, a few times a bar."""
        while True:
            await asyncio.sleep(min(self.step_ms / 4000, 15.0))
            await self.catch_up()
            self._recovered()

    def _recovered(self) -> None:
        if self._failures:
            self.log.info("connected again", symbol=self.symbol)
        self._failures = 0

    async def _back_off(self, error: BaseException) -> None:
        """Wait longer each time, with half of it at random, so that symbols do not return as one."""
        ceiling_s = min(self.plan.longest_pause_s, self.plan.first_pause_s * 2**self._failures)
        if not self._failures:
            detail = f"{type(error).__name__}: {str(error)[:200]}"
            self.log.warning("cut off; trying again, then filling what was missed", symbol=self.symbol, detail=detail)
        self._failures = min(self._failures + 1, 16)
        await asyncio.sleep(ceiling_s * (0.5 + self._dice.random() / 2))


def _usable(rows: Sequence[Row]) -> list[Row]:
    """Rows without absent values, in order of time; the exchange's history gives the others later."""
    return sorted((row for row in rows if all(x is not None for x in row[:6])), key=lambda row: row[0])


def _reaches(rows: Sequence[Row], now_ms: int, step_ms: int) -> bool:
    """Whether the last row may still be forming: history gives the bar in progress as its last one."""
    return bool(rows) and rows[-1][0] + step_ms > now_ms - step_ms


async def run_feed(feeds: Sequence[SymbolFeed], stop: asyncio.Event) -> None:
    """All symbols side by side until `stop` is set; an error that nobody foresaw ends the feed."""
    tasks = [asyncio.ensure_future(_named(feed)) for feed in feeds]
    waiting = asyncio.ensure_future(stop.wait())
    try:
        done, _ = await asyncio.wait({waiting, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in (waiting, *tasks):
            task.cancel()
        await asyncio.gather(waiting, *tasks, return_exceptions=True)


def _named(feed: SymbolFeed) -> Coroutine[Any, Any, None]:
    return feed.run()
