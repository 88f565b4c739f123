"""How long a killed worker takes from owning the namespace to its first commit of new bars.

    python -m benchmarks.recovery [--json] [--symbols 1000] [--runs 3]

All four models are loaded and imported before the clock starts. Every symbol has its whole warm-up and
its windows in the stored state, which is read back and checked, and the first bars after an end that was
not clean go one by one.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import structlog
import torch

from benchmarks.machine import demo_models, line
from benchmarks.pipeline import LAST_TS, work
from streams import embedded
from streams.keys import Keys
from streams.messages import Bar, Entry
from streams.redis import RedisStore, connect
from streams.store import Commit, InputPosition, Position
from worker.assembly import load_agents, load_options, pipeline_factory
from worker.demo.publisher import fields_of, publish
from worker.reload import Shelf
from worker.roster import Record, records_of
from worker.settings import Settings
from worker.training.market import MINUTE_MS, generate
from worker.voting import Seat

WARM_UP = 30
BARS = WARM_UP + 64
"""Bars a symbol in the stored state: after them every window is full."""

State = Mapping[str, Mapping[bytes, bytes]]


def minutes_of(symbols: int) -> list[list[Bar]]:
    """`BARS + 1` minutes of one bar each."""
    market = generate(symbols, BARS + 1, 0, LAST_TS)
    return [
        [Bar(name, ts, "1m", *candle) for name, candle in zip(market.symbols, row, strict=True)]
        for ts, row in zip(market.ts.tolist(), market.ohlcv.tolist(), strict=True)
    ]


def state_after(settings: Settings, seats: Sequence[Seat], minutes: Sequence[Sequence[Bar]]) -> State:
    """What a worker has committed after `minutes`; nothing is published or written for it."""
    pipeline, stored = pipeline_factory(settings)(seats), dict[str, dict[bytes, bytes]]()
    for minute in minutes:
        entries = [
            Entry("b", f"{bar.ts + MINUTE_MS}-{n}", {k.encode(): v.encode() for k, v in fields_of(bar).items()})
            for n, bar in enumerate(minute)
        ]
        for part, fields in pipeline.process(entries, LAST_TS).state.items():
            stored.setdefault(part, {}).update(fields)
    pipeline.voting.close()
    return stored


def put(url: str, state: State) -> None:
    """Store `state` as a worker would have that was killed afterwards."""
    store = RedisStore(connect(url), Keys("r"))
    store.acquire()
    position = Position({store.keys.bars: InputPosition("0-0", 0)})
    for part, fields in state.items():
        store.commit(Commit(position, state={part: list(fields.items())}))
    store.release()
    store.client.hset(store.keys.owner("chain"), "clean", "0")


def measure(symbols: int, runs: int) -> dict[str, float]:
    quiet = structlog.wrap_logger(structlog.testing.ReturnLogger(), processors=[lambda *_: ""])
    settings = Settings(namespace="r", models=demo_models(), warmup_bars={"v3": WARM_UP})
    shelf = Shelf(settings.models, load_options(settings))
    loadings = load_agents(settings, {}, shelf, quiet)
    seats = [Seat(x.agent, settings.weights[x.agent], x.model, x.refusal) for x in loadings]
    *before, new = minutes_of(symbols)
    state = state_after(settings, seats, before)
    records = records_of(state["agents"])
    seconds = [one_restart(settings, shelf, records, state, new) for _ in range(runs)]
    size = sum(len(name) + len(blob) for fields in state.values() for name, blob in fields.items())
    return {
        "symbols": symbols,
        "state_mib": size / 2**20,
        "state_fields": sum(len(fields) for fields in state.values()),
        "seconds": median(seconds),
        "slowest_seconds": max(seconds),
    }


def one_restart(
    settings: Settings, shelf: Shelf, records: Mapping[str, Record], state: State, new: Sequence[Bar]
) -> float:
    """Seconds until the first commit that moves the input, over a server of its own."""
    with tempfile.TemporaryDirectory() as name, embedded.start(Path(name)) as server:
        put(server.url, state)
        with connect(server.url) as client:
            publish(client, Keys("r").bars, [list(new)])
            seconds = restart(settings.model_copy(update={"redis": server.url}), shelf, records)
            signals = [json.loads(fields[b"data"]) for _, fields in client.xrange(Keys("r").signals)]
        assert [signal["voting"] for signal in signals] == [4], "one bar, and every window of it was restored"
        return seconds


def restart(settings: Settings, shelf: Shelf, records: Mapping[str, Record]) -> float:
    committed: list[float] = []
    original = RedisStore.commit

    def commit(self: RedisStore, commit: Commit) -> None:
        original(self, commit)
        committed.append(time.perf_counter())

    RedisStore.commit = commit  # type: ignore[method-assign]
    try:
        started = time.perf_counter()
        work(settings, shelf, records, until=lambda: len(committed) > 1)
    finally:
        RedisStore.commit = original  # type: ignore[method-assign]
    return committed[1] - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--symbols", type=int, default=1_000)
    parser.add_argument("--runs", type=int, default=3, help="the figure is the median of so many restarts")
    given = parser.parse_args()
    torch.set_num_threads(1)
    row = measure(given.symbols, given.runs)
    if given.json:
        print(json.dumps({"machine": line(), "recovery": row}))
    else:
        print(
            f"{row['symbols']} symbols, {row['state_fields']:,} fields, {row['state_mib']:.0f} MiB of state: "
            f"first commit after {row['seconds']:.2f} s (median of {given.runs}, slowest {row['slowest_seconds']:.2f})"
        )


if __name__ == "__main__":
    main()
