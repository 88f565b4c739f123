"""The feed's loop for each symbol: catch up by history, follow live, and start over after every failure.

A bar is published when the next one has begun, by the exchange's word and never by this machine's
clock: then its last update is its final one, if the connection held from that update to the next bar.
Otherwise nothing in hand is trusted; the exchange's history fills what was missed.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from structlog.typing import FilteringBoundLogger

from streams.store import StoreUnavailableError
from streams.validation import interval_ms
from worker.feed.exchange import PAGE, SilentLineError, drop_silent_lines
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
        self._newest = 0
        self._stuck: int | None = None
        self._dice = random.Random()  # noqa: S311  spreads reconnects, guards nothing

    async def run(self) -> None:
        """Never returns; what the exchange or the server refuses is tried again after a growing pause."""
        import ccxt  # noqa: PLC0415

        while True:
            try:
                await self.catch_up()
                await (self._follow() if self.exchange.has.get("watchOHLCV") else self._poll())
            except SilentLineError:
                continue  # no failure, however often: a quiet market must not make the pauses grow
            except (ccxt.BaseError, StoreUnavailableError, OSError) as error:  # BaseError: an OperationFailed too
                await self._back_off(error)

    async def catch_up(self) -> int:
        """Publish every closed bar after the last one on the stream, from history; how many.

        The last row of a page may still be forming, however old the clock says it is: the page that
        has the next one gives it.
        """
        last = await self.publisher.last_ts(self.symbol)
        now_ms = max(self.exchange.milliseconds(), self._newest)  # a clock that is behind must not hide bars
        since = now_ms // self.step_ms * self.step_ms - self.plan.history * self.step_ms
        since = since if last is None else last + self.step_ms
        wanted, done = max(0, (now_ms - since) // self.step_ms), 0
        while since + self.step_ms <= now_ms:
            rows = await self.exchange.fetch_ohlcv(self.symbol, self.publisher.interval, since, PAGE)
            closed = self._whole(_in_order(rows)[:-1])
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
        self._newest = 0
        silence_s = self.plan.silence_s or max(SHORTEST_SILENCE_S, 1.5 * self.step_ms / 1000)
        lines: list[Any] = []
        update = self._watch()
        try:
            while True:
                done, _ = await asyncio.wait({update}, timeout=silence_s)
                if not done:  # a quiet market or a dead line: history knows
                    await self._doubt(silence_s)
                    forming = None
                    continue
                rows, update = update.result(), self._watch()
                before, lines = lines, list(self.exchange.clients.values())
                if not _are_the_same(before, lines):
                    forming = None  # a line that breaks while nobody waits for it is renewed without a word
                self._recovered()
                for row in _in_order(rows):
                    forming = await self._advance(forming, row)
        finally:
            update.cancel()

    async def _doubt(self, silence_s: float) -> None:
        """Ask history; if it has bars, a line that said nothing at all, of any symbol, is given up for a new one."""
        if await self.catch_up() and drop_silent_lines(self.exchange, silence_s):
            self.log.warning("a line was silent while bars were made; opening a new one", symbol=self.symbol)

    async def _advance(self, forming: Row | None, row: Row) -> Row | None:
        """Take `row` in; what is in hand afterwards. Only its direct successor closes a bar."""
        if row[0] is None:
            return None
        if row[0] < self._newest:
            return forming
        self._newest = row[0]
        if forming is None or row[0] > forming[0] + self.step_ms:
            await self.catch_up()
        elif row[0] > forming[0]:
            await self._close(forming)
        return list(row) if _has_all(row) else None

    def _watch(self) -> asyncio.Task[Any]:
        return asyncio.ensure_future(self.exchange.watch_ohlcv(self.symbol, self.publisher.interval))

    async def _close(self, row: Row) -> None:
        """Publish a bar that has ended, and before it whatever is missing; not before that is there."""
        if not await self._joins(row):
            await self.catch_up()
        if await self.publisher.last_ts(self.symbol) is None or await self._joins(row):
            await self.publisher.publish(self.symbol, [row])

    async def _joins(self, row: Row) -> bool:
        last = await self.publisher.last_ts(self.symbol)
        return last is not None and row[0] <= last + self.step_ms

    async def _poll(self) -> None:
        """For an exchange without live bars: its history, a few times a bar."""
        while True:
            await asyncio.sleep(min(self.step_ms / 4000, 15.0))
            await self.catch_up()
            self._recovered()

    def _whole(self, rows: Sequence[Row]) -> list[Row]:
        """The rows before the first one with an absent value: what came after it could not be filled later."""
        whole = list(itertools.takewhile(_has_all, rows))
        stuck = rows[len(whole)][0] if len(whole) < len(rows) else None
        if stuck is not None and stuck != self._stuck:
            self.log.warning("history has a bar without values; waiting for them", symbol=self.symbol, ts=stuck)
        self._stuck = stuck
        return whole

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


def _in_order(rows: Sequence[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: row[0] or 0)


def _are_the_same(before: Sequence[Any], now: Sequence[Any]) -> bool:
    return len(before) == len(now) and all(a is b for a, b in zip(before, now, strict=True))


def _has_all(row: Row) -> bool:
    return all(x is not None for x in row[:6])


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
