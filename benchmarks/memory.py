"""Whether the worker's memory stays flat: resident MiB per million bars, after its warm-up.

    python -m benchmarks.memory [--json] [--bars 100000]

One worker's loop in this process over an embedded server, the two tree models, batches of 256. The
slope is the least-squares line through the resident memory after every round but the first few.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
from itertools import islice
from pathlib import Path

import numpy as np
import structlog

from benchmarks.machine import demo_models, line
from benchmarks.pipeline import LAST_TS
from streams import embedded
from streams.keys import Keys
from streams.redis import RedisStore, connect, with_baseline
from streams.store import Position
from worker.assembly import load_agents, load_options, pipeline_factory
from worker.demo.publisher import publish
from worker.demo.scene import rounds
from worker.encoding import commit_of
from worker.pipeline import Pipeline
from worker.reload import Shelf
from worker.settings import Settings
from worker.voting import Seat

SYMBOLS = 50
ROUND = 5_000
SKIPPED = 5
"""Rounds until allocators and caches have grown to their size."""


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure(bars: int) -> dict[str, float]:
    quiet = structlog.wrap_logger(structlog.testing.ReturnLogger(), processors=[lambda *_: ""])
    settings = Settings(models=demo_models(), agents=("xgboost", "lightgbm"), quorum=2, namespace="m")
    loadings = load_agents(settings, {}, Shelf(settings.models, load_options(settings)), quiet)
    pipeline = pipeline_factory(settings)([Seat(x.agent, settings.weights[x.agent], x.model) for x in loadings])
    seen = []
    with tempfile.TemporaryDirectory() as name, embedded.start(Path(name)) as server:
        client = connect(server.url)
        store = RedisStore(client, Keys("m"), retain=10_000)
        store.acquire()
        position = store.load(()).position
        minutes = rounds(0, SYMBOLS, bars // SYMBOLS, LAST_TS)
        for _ in range(bars // ROUND):
            publish(client, store.keys.bars, islice(minutes, ROUND // SYMBOLS))
            position = consume(pipeline, store, position)
            client.xtrim(store.keys.bars, maxlen=0, approximate=False)
            gc.collect()
            seen.append(resident_mib())
    at = ROUND * np.arange(len(seen))[SKIPPED:]
    slope = float(np.polyfit(at, seen[SKIPPED:], 1)[0]) * 1e6
    return {"bars": bars, "resident_mib": seen[-1], "mib_per_million_bars": slope, "first_mib": seen[SKIPPED]}


def consume(pipeline: Pipeline, store: RedisStore, position: Position) -> Position:
    """Read, process and commit all there is."""
    while True:
        batch = store.read(position, [store.keys.bars], 256)
        if not batch.entries:
            return position
        result = pipeline.process(batch.entries, LAST_TS)
        position = with_baseline(position, batch.facts).advanced(batch.entries, pipeline.intake.ids.last)
        store.commit(commit_of(store.keys, result, position))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--bars", type=int, default=100_000)
    given = parser.parse_args()
    row = measure(given.bars)
    if given.json:
        print(json.dumps({"machine": line(), "memory": row}))
    else:
        print(f"{row['bars']:,} bars: {row['first_mib']:.1f} MiB at first, {row['resident_mib']:.1f} MiB at the end,")
        print(f"{row['mib_per_million_bars']:+.2f} MiB per million bars")


if __name__ == "__main__":
    main()
