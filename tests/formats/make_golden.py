"""Makes the golden samples: the libraries' own publishers write to a real Redis, whose entries are kept.

Run with a Python 3.11 of its own, which needs a `redis-server` on its path and nothing else of ours:

    python3.11 -m venv DIR
    DIR/bin/pip install cryptofeed==2.4.1 nautilus_trader==1.221.0 redis
    DIR/bin/python tests/formats/make_golden.py

Prices are made up; every byte around them is the libraries'. Each line of a sample is one entry:
key, ID and fields in base64. No exchange is connected to: cryptofeed's Binance and Kraken adapters are
handed messages as those exchanges document them, nautilus_trader's parser of Binance likewise.
"""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import subprocess
import tempfile
import time
from decimal import Decimal
from pathlib import Path

import msgspec
import redis
from cryptofeed.backends.redis import CandlesRedis, CandlesStream
from cryptofeed.types import Candle
from nautilus_trader.adapters.binance.common.schemas.market import BinanceCandlestickMsg
from nautilus_trader.adapters.binance.futures.enums import BinanceFuturesEnumParser
from nautilus_trader.common.component import LiveClock, MessageBus
from nautilus_trader.common.config import DatabaseConfig, MessageBusConfig, msgspec_encoding_hook
from nautilus_trader.core import nautilus_pyo3
from nautilus_trader.core.uuid import UUID4
from nautilus_trader.model.data import Bar, BarType, TradeTick
from nautilus_trader.model.enums import AggressorSide
from nautilus_trader.model.identifiers import InstrumentId, TradeId, TraderId
from nautilus_trader.model.objects import Price, Quantity
from nautilus_trader.serialization.serializer import MsgSpecSerializer

HERE = Path(__file__).parent / "golden"
FIRST_OPEN_S = 1_700_000_040
BARS = 6
BAR_TYPE = "BTCUSDT-PERP.BINANCE-1-MINUTE-LAST-EXTERNAL"


def prices(k: int) -> tuple[str, str, str, str, str]:
    """Open, high, low, close, volume of the k-th bar, as text."""
    start = Decimal("37012.40") + 10 * k
    return tuple(map(str, (start, start + Decimal("5.5"), start - Decimal("3.2"), start + 2, Decimal("1.25") * k)))


def kline(k: int, *, closed: bool) -> dict:
    """A kline message of Binance's websocket."""
    o, h, l, c, v = prices(k)  # noqa: E741
    t = (FIRST_OPEN_S + 60 * k) * 1000
    inner = {"t": t, "T": t + 59_999, "s": "BTCUSDT", "i": "1m", "f": 1, "L": 2, "o": o, "c": c, "h": h, "l": l}
    inner |= {"v": v, "n": 505, "x": closed, "q": "775978.1", "V": "7.1", "Q": "404521.6", "B": "0"}
    return {"e": "kline", "E": t + (60_010 if closed else 30_000), "s": "BTCUSDT", "k": inner}


def candle_binance(k: int, *, closed: bool) -> Candle:
    """As cryptofeed 2.4.1's `Binance._candle` builds it."""
    m = kline(k, closed=closed)
    c = m["k"]
    numbers = (Decimal(c[letter]) for letter in "ochlv")
    return Candle("BINANCE", "BTC-USDT", c["t"] / 1000, c["T"] / 1000, c["i"], c["n"], *numbers, c["x"], m["E"] / 1000)


def candle_kraken(k: int, exchange: str = "KRAKEN") -> Candle:
    """As cryptofeed 2.4.1's `Kraken._candle` builds it: `closed` is never known."""
    o, h, l, c, v = map(Decimal, prices(k))  # noqa: E741
    end = float(FIRST_OPEN_S + 60 * k + 60)
    return Candle(exchange, "SHIB-USD", end - 60, end, "1m", None, o / 10**9, c / 10**9, h / 10**9, l / 10**9, v,
                  None, end - 1.5)  # fmt: skip


async def cryptofeed(port: int) -> None:
    for backend in (CandlesStream, CandlesRedis):
        for exchange in ("BINANCE", "KRAKEN") if backend is CandlesStream else ("OKX",):
            writer = backend(host="127.0.0.1", port=port)
            writer.start(asyncio.get_running_loop())
            for k in range(BARS):
                candles = {
                    "BINANCE": [candle_binance(k, closed=False), candle_binance(k, closed=True)],
                    "KRAKEN": [candle_kraken(k)],
                    "OKX": [candle_kraken(k, "OKX")],
                }[exchange]
                for candle in candles:
                    await writer(candle, FIRST_OPEN_S + 60 * k + 61.5)
            await asyncio.sleep(0.5)
            await writer.stop()


def nautilus(port: int, trader: str, **settings: object) -> None:
    config = MessageBusConfig(database=DatabaseConfig(host="127.0.0.1", port=port), **settings)
    instance = UUID4()
    database = nautilus_pyo3.RedisMessageBusDatabase(
        trader_id=nautilus_pyo3.TraderId(trader),
        instance_id=nautilus_pyo3.UUID4.from_str(instance.value),
        config_json=msgspec.json.encode(config, enc_hook=msgspec_encoding_hook),
    )
    encoding = msgspec.json if config.encoding == "json" else msgspec.msgpack
    serializer = MsgSpecSerializer(
        encoding=encoding, timestamps_as_str=True, timestamps_as_iso8601=config.timestamps_as_iso8601
    )
    bus = MessageBus(TraderId(trader), LiveClock(), instance, None, serializer, database, config)
    publish(bus)
    time.sleep(1)
    database.close()


def publish(bus: MessageBus) -> None:
    """Trades and bars by turns, the last bar once more with another close: a revision."""
    bar_type = BarType.from_str(BAR_TYPE)
    instrument = InstrumentId.from_str("BTCUSDT-PERP.BINANCE")
    for k in range(BARS):
        o, h, l, c, v = prices(k)  # noqa: E741
        close_ns = (FIRST_OPEN_S + 60 * k + 60) * 10**9
        trade = TradeTick(instrument, Price.from_str(c), Quantity.from_str("0.5"), AggressorSide.BUYER,
                          TradeId(str(k)), close_ns - 5, close_ns)  # fmt: skip
        bus.publish("data.trades.BINANCE.BTCUSDT-PERP", trade)
        bar = Bar(bar_type, *map(Price.from_str, (o, h, l, c)), Quantity.from_str(v), close_ns, close_ns + 500)
        bus.publish(f"data.bars.{bar_type}", bar)
    revised = Bar(bar_type, *map(Price.from_str, (o, h, l, h)), Quantity.from_str(v), close_ns, close_ns + 900, True)
    bus.publish(f"data.bars.{bar_type}", revised)


def publish_binance(bus: MessageBus) -> None:
    """Bars as nautilus_trader's own Binance adapter makes them of websocket messages."""
    decoder = msgspec.json.Decoder(BinanceCandlestickMsg)
    instrument = InstrumentId.from_str("BTCUSDT-PERP.BINANCE")
    for k in range(BARS):
        text = json.dumps({"stream": "btcusdt@kline_1m", "data": kline(k, closed=True)})
        bar = decoder.decode(text).data.k.parse_to_binance_bar(instrument, BinanceFuturesEnumParser(), None)
        bus.publish(f"data.bars.{bar.bar_type}", bar)


def dump(client: redis.Redis, name: str) -> None:
    lines = []
    for key in sorted(client.scan_iter()):
        if client.type(key) != b"stream":
            print(f"{name}: {key.decode()} is a {client.type(key).decode()}")
            continue
        for entry_id, fields in client.xrange(key):
            packed = {k.decode(): base64.b64encode(v).decode() for k, v in fields.items()}
            lines.append(json.dumps({"key": key.decode(), "id": entry_id.decode(), "fields": packed}))
    (HERE / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    print(f"{name}: {len(lines)} entries")
    client.flushall()


def main(port: int) -> None:
    global publish  # noqa: PLW0603
    client = redis.Redis(port=port)
    asyncio.run(cryptofeed(port))
    dump(client, "cryptofeed-2.4.1")
    nautilus(port, "TESTER-001", encoding="json")
    dump(client, "nautilus-1.221-json")
    nautilus(port, "TESTER-001", encoding="msgpack", stream_per_topic=False)
    dump(client, "nautilus-1.221-msgpack-one-stream")
    nautilus(port, "TESTER-001", encoding="json", timestamps_as_iso8601=True, stream_per_topic=False)
    dump(client, "nautilus-1.221-iso-one-stream")
    publish = publish_binance
    nautilus(port, "TESTER-001", encoding="msgpack")
    dump(client, "nautilus-1.221-binance")


if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as directory:
        server = subprocess.Popen(
            ["redis-server", "--port", str(free), "--bind", "127.0.0.1", "--save", "", "--dir", directory],
            stdout=subprocess.DEVNULL,
        )
        try:
            time.sleep(0.5)
            main(free)
        finally:
            server.terminate()
            server.wait()
