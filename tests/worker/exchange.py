"""A local exchange: Binance's spot protocol on loopback, REST and websocket, with bars of one second.

Prices are a pure function of the bar's open time, so a test knows every bar without asking. It can
cut all connections, send a message twice, stay silent, and refuse requests.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from typing import Any, Self

from aiohttp import WSMsgType, web

from tests.helpers import LIMIT_S

STEP_MS = 1000
SYMBOLS = {"BTCUSDT": ("BTC", "USDT"), "ETHUSDT": ("ETH", "USDT")}


def ohlcv(symbol: str, ts: int) -> tuple[float, float, float, float, float]:
    """Every finished bar: any function will do, if neighbours differ."""
    k = ts // STEP_MS
    start = 100 + (k * (7 if symbol == "BTCUSDT" else 11)) % 50
    return start + 0.5, start + 3.25, start - 1.75, start + 1.125, 1.5 + k % 9


def row(symbol: str, ts: int, now_ms: int) -> list[Any]:
    """A row of the REST table; while it forms, its close and volume are others."""
    o, h, l, c, v = ohlcv(symbol, ts)  # noqa: E741
    if ts + STEP_MS > now_ms:
        c, v = o, v / 2
    return [ts, str(o), str(h), str(l), str(c), str(v), ts + STEP_MS - 1, "0", 1, "0", "0", "0"]


class Exchange:
    """Serves from a thread of its own; `url` is where, `options` are what ccxt's class needs to find it."""

    def __init__(self) -> None:
        self.requests: list[int] = []
        self.connections = 0
        self.refused = 0
        self.refusing = False
        self.muted = False
        self._sockets: dict[web.WebSocketResponse, set[str]] = {}
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(LIMIT_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(LIMIT_S)

    @property
    def options(self) -> dict[str, Any]:
        rest = f"http://127.0.0.1:{self.port}/api/v3"
        socket = {"spot": f"ws://127.0.0.1:{self.port}/stream"}
        return {
            "urls": {"api": {"public": rest, "ws": socket}},
            "options": {"fetchMarkets": {"types": ["spot"]}},
            "has": {"fetchCurrencies": False},
        }

    def cut(self) -> None:
        """Close every websocket without a word."""
        self._loop.call_soon_threadsafe(lambda: self._loop.create_task(self._cut()))

    async def _cut(self) -> None:
        for socket in list(self._sockets):
            transport = socket._req.transport if socket._req else None
            if transport is not None:
                transport.abort()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._start())
        self._ready.set()
        self._loop.run_forever()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))

    async def _start(self) -> None:
        app = web.Application()
        app.router.add_get("/api/v3/exchangeInfo", self._info)
        app.router.add_get("/api/v3/klines", self._klines)
        app.router.add_get("/stream/{number}", self._stream)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.port = runner.addresses[0][1]
        self._pump = self._loop.create_task(self._publish())

    async def _info(self, _: web.Request) -> web.Response:
        symbols = [
            {"symbol": name, "status": "TRADING", "baseAsset": base, "quoteAsset": quote, "permissions": ["SPOT"],
             "isSpotTradingAllowed": True, "filters": [], "orderTypes": []}
            for name, (base, quote) in SYMBOLS.items()
        ]  # fmt: skip
        return web.json_response({"timezone": "UTC", "serverTime": 0, "rateLimits": [], "symbols": symbols})

    async def _klines(self, request: web.Request) -> web.Response:
        if self.refusing:
            self.refused += 1
            return web.json_response({"code": -1000, "msg": "down"}, status=503)
        now_ms = time.time_ns() // 1_000_000
        start = -(-int(request.query["startTime"]) // STEP_MS) * STEP_MS
        self.requests.append(start)
        count = min(int(request.query.get("limit", 500)), 200)  # fewer than asked for, as some exchanges do
        stamps = range(start, min(now_ms + 1, start + count * STEP_MS), STEP_MS)
        return web.json_response([row(request.query["symbol"], ts, now_ms) for ts in stamps])

    async def _stream(self, request: web.Request) -> web.WebSocketResponse:
        if self.refusing:
            raise web.HTTPServiceUnavailable
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        self._sockets[socket] = set()
        self.connections += 1
        try:
            async for message in socket:
                if message.type is WSMsgType.TEXT:
                    said = json.loads(message.data)
                    self._sockets[socket] |= set(said["params"])
                    await socket.send_json({"result": None, "id": said["id"]})
        finally:
            self._sockets.pop(socket, None)
        return socket

    async def _publish(self) -> None:
        """Several updates of each bar, the final one twice, as the clock goes."""
        last = 0
        while True:
            await asyncio.sleep(0.1)
            now_ms = time.time_ns() // 1_000_000
            ts = now_ms // STEP_MS * STEP_MS
            for socket, names in list(self._sockets.items()):
                for name in names:
                    symbol = name.partition("@")[0].upper()
                    updates = [(ts, False)] if ts == last or not last else [(last, True), (last, True), (ts, False)]
                    for at, closed in updates:
                        if not self.muted and not socket.closed:
                            await self._send(socket, symbol, at, closed, now_ms)
            last = ts

    async def _send(self, socket: web.WebSocketResponse, symbol: str, ts: int, closed: bool, now_ms: int) -> None:
        r = row(symbol, ts, now_ms)
        kline = {"t": ts, "T": r[6], "s": symbol, "i": "1s", "f": 1, "L": 2, "o": r[1], "h": r[2], "l": r[3],
                 "c": r[4], "v": r[5], "n": 1, "x": closed, "q": "0", "V": "0", "Q": "0", "B": "0"}  # fmt: skip
        try:
            await socket.send_json({"e": "kline", "E": now_ms, "s": symbol, "k": kline})
        except (ConnectionError, RuntimeError):
            self._sockets.pop(socket, None)
