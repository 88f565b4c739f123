"""`quartet feed` against a local exchange over its real protocol: cuts, duplicates, gaps, restarts."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
import redis
from aiohttp import web

from streams import embedded
from streams.keys import Keys
from streams.redis import RedisStore, connect
from streams.store import StoreUnavailableError
from tests.helpers import LIMIT_S, environment, wait_for
from tests.worker.exchange import STEP_MS, Exchange, ohlcv
from worker.cli.app import invoke
from worker.feed.exchange import SilentLineError, close_exchange, drop_silent_lines, open_exchange
from worker.feed.publisher import Publisher, read_tail
from worker.feed.session import Plan, SymbolFeed
from worker.logs import make_logger

PAIRS = ("BTC/USDT", "ETH/USDT")


@pytest.fixture
def exchange() -> Iterator[Exchange]:
    with Exchange() as running:
        yield running


@contextmanager
def feeding(tmp_path: Path, url: str, namespace: str, exchange: Exchange, *more: str) -> Iterator[subprocess.Popen]:
    """The program as a user starts it; ended by SIGTERM, which it has to survive quietly."""
    options = tmp_path / "options.json"
    options.write_text(json.dumps(exchange.options))
    arguments = ["feed", "--exchange", "binance", "--symbols", ",".join(PAIRS), "--interval", "1s", "--redis", url,
                 "--namespace", namespace, "--options", str(options), *more]  # fmt: skip
    with (tmp_path / "feed.log").open("ab") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "worker", *arguments], cwd=tmp_path, env=environment(), stdout=log, stderr=log
        )
    try:
        yield child
    finally:
        child.send_signal(signal.SIGTERM)
        code = child.wait(LIMIT_S)
        sys.stdout.write((tmp_path / "feed.log").read_text())  # what a test that waited in vain has to show
    assert code == 0, (tmp_path / "feed.log").read_text()
    assert "Traceback" not in (tmp_path / "feed.log").read_text()


class Stream:
    """What is on the stream of bars."""

    def __init__(self, url: str, key: str) -> None:
        self.client = redis.Redis.from_url(url, decode_responses=True)
        self.key = key

    def added(self) -> int:
        exists = self.client.exists(self.key)
        return int(self.client.xinfo_stream(self.key)["entries-added"]) if exists else 0

    def stamps(self, symbol: str) -> list[int]:
        return [int(f["ts"]) for _, f in self.client.xrange(self.key) if f["symbol"] == symbol]

    def grows(self, bars: int) -> None:
        """Wait for so many more bars of each symbol."""
        targets = {pair: len(self.stamps(pair)) + bars for pair in PAIRS}
        wait_for(lambda: all(len(self.stamps(pair)) >= n for pair, n in targets.items()), 2 * LIMIT_S)

    def check(self) -> None:
        """Every bar once, none missing, each with its final values."""
        for pair in PAIRS:
            stamps = self.stamps(pair)
            assert stamps == list(range(stamps[0], stamps[-1] + 1, STEP_MS))
        for _, fields in self.client.xrange(self.key):
            values = tuple(float(fields[name]) for name in ("open", "high", "low", "close", "volume"))
            assert values == ohlcv(fields["symbol"].replace("/", ""), int(fields["ts"]))
            assert fields["interval"] == "1s"


def pause() -> None:
    """Let at least two bars end while the feed is away."""
    start = time.monotonic()
    wait_for(lambda: time.monotonic() - start > 2.2 * STEP_MS / 1000)


@pytest.fixture
def stream(valkey: str, namespace: str) -> Stream:
    return Stream(valkey, f"{namespace}:bars")


def test_history_comes_first_then_live_bars_without_a_seam(tmp_path, valkey, namespace, exchange, stream):
    with feeding(tmp_path, valkey, namespace, exchange, "--history", "450"):
        stream.grows(453)
    stream.check()
    assert len(exchange.requests) >= 2 * 3, "450 bars came in pages of 200"


def test_cuts_and_refusals_leave_no_gap_and_no_bar_twice(tmp_path, valkey, namespace, exchange, stream):
    with feeding(tmp_path, valkey, namespace, exchange, "--history", "20"):
        stream.grows(22)
        for refusing in (False, True, False):
            before = exchange.connections
            exchange.refusing = refusing
            exchange.cut()
            pause()
            wait_for(lambda refusing=refusing: exchange.refused or not refusing)
            exchange.refusing = False
            wait_for(lambda before=before: exchange.connections > before, 2 * LIMIT_S)
            stream.grows(2)
    stream.check()


def test_an_error_that_is_not_of_the_network_is_outlived_too(publisher, stream, exchange):
    """Binance's -1000, an unknown error, is ccxt's `OperationFailed`: neither a network's error nor an exchange's."""

    async def scene() -> None:
        plan = Plan(history=5, first_pause_s=0.05, longest_pause_s=0.1)
        async with running_feed(publisher, exchange, plan):
            await asyncio.to_thread(wait_for, lambda: exchange.refused >= 3)
            exchange.refusing = False
            await asyncio.to_thread(wait_for, lambda: len(stream.stamps(PAIRS[0])) >= 7)

    exchange.refusing = True
    asyncio.run(asyncio.wait_for(scene(), 2 * LIMIT_S))
    check_one(stream)


def test_a_restart_fills_what_was_missed_and_repeats_nothing(tmp_path, valkey, namespace, exchange, stream):
    with feeding(tmp_path, valkey, namespace, exchange, "--history", "10"):
        stream.grows(12)
    away = len(stream.stamps(PAIRS[0]))
    pause()
    with feeding(tmp_path, valkey, namespace, exchange, "--history", "10"):
        stream.grows(5)
    assert len(stream.stamps(PAIRS[0])) >= away + 5
    stream.check()


def test_maxlen_keeps_the_stream_short(tmp_path, valkey, namespace, exchange, stream):
    with feeding(tmp_path, valkey, namespace, exchange, "--history", "900", "--maxlen", "300"):
        wait_for(lambda: stream.added() >= 2 * 898, 2 * LIMIT_S)
    assert 300 <= stream.client.xlen(stream.key) < 900


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--exchange", "binanse", "--symbols", "BTC/USDT"], "did you mean binance"),
        (["--exchange", "binance", "--symbols", "BTCUSDT"], "no symbol BTCUSDT; did you mean BTC/USDT"),
        (["--exchange", "binance", "--symbols", "BTC/USDT", "--interval", "7m"], "no bars of 7m"),
        (["--exchange", "binance", "--symbols", ","], "--symbols names none"),
    ],
)
def test_a_wrong_request_is_one_line_with_what_was_meant(tmp_path, valkey, exchange, capfd, arguments, text):
    assert feed_once(tmp_path, valkey, exchange.options, *arguments) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert text in err
    assert err.count("\n") == 1


def test_an_exchange_that_is_not_there_is_exit_code_3(tmp_path, valkey, capfd):
    options = {"urls": {"api": {"public": "http://127.0.0.1:9"}}, "options": {"fetchMarkets": {"types": ["spot"]}}}
    assert feed_once(tmp_path, valkey, options, "--exchange", "binance", "--symbols", "BTC/USDT") == 3
    assert "not reachable" in capfd.readouterr().err


def test_without_the_extra_it_says_how_to_install_it(tmp_path, valkey, capfd, monkeypatch):
    for name in ("ccxt", "ccxt.pro"):
        monkeypatch.setitem(sys.modules, name, None)
    assert feed_once(tmp_path, valkey, {}, "--exchange", "binance", "--symbols", "BTC/USDT") == 3
    assert "quartet-worker[feed]" in capfd.readouterr().err


def feed_once(tmp_path: Path, url: str, config: dict[str, object], *arguments: str) -> int:
    """The exit code of a `quartet feed` that ends by itself, without the seconds of imports."""
    options = tmp_path / "options.json"
    options.write_text(json.dumps(config))
    return invoke(["feed", *arguments, "--options", str(options), "--redis", url])


@pytest.fixture
def publisher(valkey: str, namespace: str) -> Publisher:
    return Publisher(ForgetfulStore(connect(valkey), Keys(namespace)), f"{namespace}:bars", PAIRS, "1s", None)


class ForgetfulStore(RedisStore):
    """A real store whose next reply is lost after the server did what it was told."""

    lose = False

    def append(self, key, entries, *, maxlen=None):
        super().append(key, entries, maxlen=maxlen)
        if self.lose:
            self.lose = False
            raise StoreUnavailableError("the reply was lost")


def rows(*stamps: int) -> list[list[float]]:
    return [[ts * STEP_MS, *ohlcv("BTCUSDT", ts * STEP_MS)] for ts in stamps]


def test_a_write_whose_reply_was_lost_is_not_made_twice(publisher, stream):
    async def scene() -> None:
        assert await publisher.publish(PAIRS[0], rows(1, 2)) == 2
        publisher.store.lose = True
        with pytest.raises(StoreUnavailableError):
            await publisher.publish(PAIRS[0], rows(3))
        assert await publisher.publish(PAIRS[0], rows(2, 3, 4)) == 1

    asyncio.run(scene())
    assert stream.stamps(PAIRS[0]) == [1000, 2000, 3000, 4000]


def test_the_last_bar_of_a_rare_symbol_is_found_far_back(publisher, stream, valkey):
    async def scene() -> None:
        await publisher.publish(PAIRS[1], rows(1))
        await publisher.publish(PAIRS[0], rows(*range(1, 2500)))

    asyncio.run(scene())
    assert read_tail(publisher.store, publisher.key, (*PAIRS, "NEW"), "1s") == {PAIRS[0]: 2_499_000, PAIRS[1]: 1000}
    assert read_tail(publisher.store, publisher.key, PAIRS, "1m") == {}


def test_a_line_that_stays_silent_is_filled_by_history_and_replaced(publisher, stream, exchange):
    """However often that happens, no pause grows: a quiet market is no failure."""

    async def scene() -> None:
        opened = open_exchange("binance", exchange.options)
        feed = SymbolFeed(opened, publisher, PAIRS[0], Plan(history=5, silence_s=0.3), make_logger("error"))
        back_off, failures = feed._back_off, []

        def noted(error: BaseException) -> Awaitable[None]:
            failures.append(error)
            return back_off(error)

        feed._back_off = noted
        task = asyncio.ensure_future(feed.run())
        await asyncio.to_thread(wait_for, lambda: len(stream.stamps(PAIRS[0])) >= 9 and exchange.connections >= 4)
        assert not any(isinstance(error, SilentLineError) for error in failures)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await close_exchange(opened)

    exchange.muted = True
    asyncio.run(asyncio.wait_for(scene(), 2 * LIMIT_S))
    stamps = stream.stamps(PAIRS[0])
    assert stamps == list(range(stamps[0], stamps[-1] + 1, STEP_MS))


def test_a_line_whose_reading_ended_unnoticed_is_replaced(publisher, stream, exchange):
    """ccxt goes on handing it out: without a new one, there would be history alone."""

    async def broken() -> None:
        raise ValueError("no frame of any protocol")

    async def scene() -> None:
        async with opened_feed(publisher, exchange, Plan(history=5, silence_s=1.5)) as feed:
            lines = []

            def lively() -> bool:
                lines[:] = list(feed.exchange.clients.values())
                return len(lines) == 1 and len(stream.stamps(PAIRS[0])) >= 7

            task = asyncio.ensure_future(feed.run())
            await asyncio.to_thread(wait_for, lively)
            lines[0].receive = broken
            await asyncio.to_thread(wait_for, lambda: exchange.connections >= 2)
            assert lines[0] not in feed.exchange.clients.values()
            seen = len(stream.stamps(PAIRS[0]))
            await asyncio.to_thread(wait_for, lambda: len(stream.stamps(PAIRS[0])) >= seen + 2)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(asyncio.wait_for(scene(), 2 * LIMIT_S))
    check_one(stream)


def test_a_line_is_silent_only_if_no_symbol_at_all_was_heard_on_it(exchange):
    async def scene() -> None:
        opened = open_exchange("binance", exchange.options)
        await opened.watch_ohlcv(PAIRS[0], "1s")
        (line,) = opened.clients.values()
        line.heard_s -= 1000 * LIMIT_S
        assert drop_silent_lines(opened, 2000 * LIMIT_S) == 0
        await opened.watch_ohlcv(PAIRS[1], "1s")
        assert drop_silent_lines(opened, 900 * LIMIT_S) == 0
        line.heard_s -= 1000 * LIMIT_S
        assert drop_silent_lines(opened, 900 * LIMIT_S) == 1
        assert not opened.clients
        await close_exchange(opened)

    asyncio.run(asyncio.wait_for(scene(), 2 * LIMIT_S))


@asynccontextmanager
async def opened_feed(
    publisher: Publisher, exchange: Exchange, plan: Plan, skew_ms: int = 0
) -> AsyncIterator[SymbolFeed]:
    """A feed of the first pair in this process, whose clock is wrong by `skew_ms`."""
    opened = open_exchange("binance", exchange.options)
    right = opened.milliseconds
    opened.milliseconds = lambda: right() + skew_ms
    yield SymbolFeed(opened, publisher, PAIRS[0], plan, make_logger("error"))
    await close_exchange(opened)


@asynccontextmanager
async def running_feed(publisher: Publisher, exchange: Exchange, plan: Plan, skew_ms: int = 0) -> AsyncIterator[None]:
    async with opened_feed(publisher, exchange, plan, skew_ms) as feed:
        task = asyncio.ensure_future(feed.run())
        yield
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def check_one(stream: Stream) -> None:
    """Of the first pair: every bar once, none missing, each with its final values."""
    stamps = stream.stamps(PAIRS[0])
    assert stamps == list(range(stamps[0], stamps[-1] + 1, STEP_MS))
    for _, fields in stream.client.xrange(stream.key):
        values = tuple(float(fields[name]) for name in ("open", "high", "low", "close", "volume"))
        assert values == ohlcv("BTCUSDT", int(fields["ts"]))


def test_a_clock_that_is_ahead_never_makes_a_forming_bar_of_the_history_a_closed_one(publisher, stream, exchange):
    async def scene() -> None:
        async with opened_feed(publisher, exchange, Plan(history=20), skew_ms=5 * STEP_MS) as feed:
            for _ in range(5):
                await feed.catch_up()

    asyncio.run(asyncio.wait_for(scene(), 2 * LIMIT_S))
    assert len(stream.stamps(PAIRS[0])) >= 10
    check_one(stream)


def test_a_clock_that_is_behind_does_not_hold_up_live_bars(publisher, stream, exchange):
    async def scene() -> None:
        async with running_feed(publisher, exchange, Plan(history=5), skew_ms=-60_000):
            await asyncio.to_thread(wait_for, lambda: len(stream.stamps(PAIRS[0])) >= 67)

    asyncio.run(asyncio.wait_for(scene(), 2 * LIMIT_S))
    check_one(stream)


def test_a_line_that_was_renewed_without_a_word_closes_no_bar_with_what_came_before(publisher, stream, exchange):
    """It is cut between two waits for an update, when a forming bar is in hand, and is back when the next has begun."""
    cuts = []

    async def scene() -> None:
        async with opened_feed(publisher, exchange, Plan(history=5)) as feed:
            watch, last = feed.exchange.watch_ohlcv, []

            async def cut_between(*arguments: str) -> list[list[float]]:
                forming = last and tuple(last[-1][1:]) != ohlcv("BTCUSDT", last[-1][0])
                if forming and len(cuts) < 3 and len(stream.stamps(PAIRS[0])) > 7 + 3 * len(cuts):
                    cuts.append(last[-1][0])
                    for client in list(feed.exchange.clients.values()):
                        client.on_close(1006)  # what ccxt does when the server is gone: here nobody waits
                    assert not feed.exchange.clients
                    await asyncio.sleep((cuts[-1] + 1.2 * STEP_MS - feed.exchange.milliseconds()) / 1000)
                last[:] = await watch(*arguments)
                return last

            feed.exchange.watch_ohlcv = cut_between
            task = asyncio.ensure_future(feed.run())
            await asyncio.to_thread(wait_for, lambda: len(cuts) == 3 and len(stream.stamps(PAIRS[0])) >= 18)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(asyncio.wait_for(scene(), 2 * LIMIT_S))
    check_one(stream)


class Leaky(Exchange):
    """Keeps the connection, but of every three bars only the first is sent whole, and the third not at all."""

    async def _send(self, socket, symbol, at, closed, now_ms):
        k = at // STEP_MS % 3
        if k == 0 or (k == 1 and not closed):
            await super()._send(socket, symbol, at, closed, now_ms)


def test_a_bar_is_not_closed_by_one_that_is_not_its_successor(publisher, stream):
    async def scene() -> None:
        async with running_feed(publisher, exchange, Plan(history=2)):
            await asyncio.to_thread(wait_for, lambda: len(stream.stamps(PAIRS[0])) >= 9)

    with Leaky() as exchange:
        asyncio.run(asyncio.wait_for(scene(), 2 * LIMIT_S))
    check_one(stream)


class Hollow(Exchange):
    """Its history has no volume of the bar at `hole`."""

    hole: int | None = None

    async def _klines(self, request):
        rows = json.loads((await super()._klines(request)).text)
        return web.json_response([[*r[:5], None, *r[6:]] if r[0] == self.hole else r for r in rows])


def test_a_bar_without_values_is_waited_for_and_nothing_after_it_is_published(publisher, stream):
    async def scene() -> None:
        async with opened_feed(publisher, exchange, Plan(history=20)) as feed:
            exchange.hole = (feed.exchange.milliseconds() // STEP_MS - 8) * STEP_MS
            for _ in range(2):
                await feed.catch_up()
            assert stream.stamps(PAIRS[0])[-1] == exchange.hole - STEP_MS
            exchange.hole = None
            await feed.catch_up()

    with Hollow() as exchange:
        asyncio.run(asyncio.wait_for(scene(), 2 * LIMIT_S))
    assert len(stream.stamps(PAIRS[0])) >= 19
    check_one(stream)


def test_a_server_that_is_killed_and_comes_back_has_every_bar_once(tmp_path, namespace, exchange):
    """What its file lost of the last second is fetched again from history."""
    server = embedded.start(tmp_path)
    url, key = server.url, f"{namespace}:bars"
    stream = Stream(url, key)

    async def scene() -> None:
        opened = open_exchange("binance", exchange.options)
        publisher = Publisher(RedisStore(connect(url), Keys(namespace)), key, PAIRS, "1s", None)
        feeds = [SymbolFeed(opened, publisher, pair, Plan(history=5), make_logger("error")) for pair in PAIRS]
        tasks = [asyncio.ensure_future(feed.run()) for feed in feeds]
        await asyncio.to_thread(stream.grows, 7)
        os.kill(server.address.pid, signal.SIGKILL)
        await asyncio.to_thread(pause)
        second = await asyncio.to_thread(embedded.start, tmp_path)
        assert second.started
        await asyncio.to_thread(stream.grows, 4)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await close_exchange(opened)
        stream.check()
        second.close()

    asyncio.run(asyncio.wait_for(scene(), 2 * LIMIT_S))
    server.close()
