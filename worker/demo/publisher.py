"""The feed of the demonstration, a process of its own: bars of a synthetic market onto a stream.

    python -m worker.demo.publisher URL KEY --symbols 20 --bars 600 --seed 0 [--start N] [--stop N] [--last-ts MS]
    python -m worker.demo.publisher URL KEY --symbols 20 --bars 600 --seed 0 --keep

The rounds from `--start` to `--stop` as fast as the server takes them, all unless given; with `--keep`
those after the `--bars`-th, a round a second and then as they close, without end. It writes what any
feed would, flat fields with XADD. Only numpy and the Redis client are imported.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import redis

from streams.messages import Bar
from worker.demo.scene import rounds
from worker.training.market import MINUTE_MS

ROUNDS_AT_ONCE = 25
KEEP_BEHIND_BARS = 240
"""With `--keep` the first bars end that long before now: four minutes at a round a second until it has caught up."""
KEPT_ENTRIES = 300_000
"""With `--keep` the server holds about so many bars, more than a demonstration publishes at once."""


def fields_of(bar: Bar) -> dict[Any, Any]:
    """The bar as the flat fields of a stream entry."""
    numbers = zip(("open", "high", "low", "close", "volume"), bar.ohlcv, strict=True)
    return {"symbol": bar.symbol, "ts": str(bar.ts), "interval": bar.interval, **{k: repr(v) for k, v in numbers}}


def last_closed_ts(now_ms: int) -> int:
    """The open time of the newest one-minute bar that is closed."""
    return now_ms // MINUTE_MS * MINUTE_MS - MINUTE_MS


def last_shown_ts(now_ms: int, *, keep: bool) -> int:
    """The open time of the last bar that is published at once; with `keep` there is room for more before now."""
    return last_closed_ts(now_ms) - (KEEP_BEHIND_BARS * MINUTE_MS if keep else 0)


def publish(client: redis.Redis, key: str, minutes: Iterable[list[Bar]], most: int | None = None) -> None:
    """All bars of `minutes` as fast as the server takes them; of the stream about the newest `most` are kept."""
    source = iter(minutes)
    while some := list(islice(source, ROUNDS_AT_ONCE)):
        pipe = client.pipeline(transaction=False)
        for bar in (bar for minute in some for bar in minute):
            pipe.xadd(key, fields_of(bar), maxlen=most)
        pipe.execute()


def go_on(client: redis.Redis, key: str, minutes: Iterator[list[Bar]]) -> None:
    """A round a second, but none before its bars are closed; until the parent ends."""
    parent = os.getppid()
    for minute in minutes:
        time.sleep(1)
        while time.time_ns() // 1_000_000 < minute[0].ts + MINUTE_MS:
            time.sleep(0.2)
            if os.getppid() != parent:
                return
        if os.getppid() != parent:
            return
        publish(client, key, [minute], KEPT_ENTRIES)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("key")
    for name in ("--symbols", "--bars", "--seed"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--stop", type=int)
    parser.add_argument("--last-ts", type=int)
    parser.add_argument("--keep", action="store_true")
    given = parser.parse_args(arguments)
    last_ts = given.last_ts or last_shown_ts(time.time_ns() // 1_000_000, keep=given.keep)
    minutes = rounds(given.seed, given.symbols, given.bars, last_ts)
    with redis.Redis.from_url(given.url) as client:
        if given.keep:
            go_on(client, given.key, islice(minutes, given.bars, None))
        else:
            publish(client, given.key, islice(minutes, given.start, given.stop or given.bars))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        main()
    except redis.RedisError as error:
        sys.exit(f"the bars cannot be published: {error}")
