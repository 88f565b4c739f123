"""How long a killed worker takes from owning the namespace to its first commit of new bars.

    python -m benchmarks.recovery [--json] [--symbols 1000]

All four models are loaded and imported before the clock starts. Every symbol has its whole warm-up and
its windows in the stored state, which is read back and checked, and the first bars after an end that was
not clean go one by one.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from itertools import islice
from pathlib import Path

import structlog
import torch

from agents.artifacts import Loading
from benchmarks.machine import demo_models, line
from benchmarks.pipeline import LAST_TS, work
from streams import embedded
from streams.keys import Keys
from streams.redis import RedisStore, connect
from streams.store import Commit
from worker.assembly import load_agents
from worker.demo.publisher import publish
from worker.demo.scene import rounds
from worker.settings import Settings

WARM_UP = 30
BARS = WARM_UP + 64
"""Bars a symbol in the stored state: after them every window is full."""


def measure(symbols: int) -> dict[str, float]:
    quiet = structlog.wrap_logger(structlog.testing.ReturnLogger(), processors=[lambda *_: ""])
    loadings = load_agents(Settings(models=demo_models()), {}, quiet)
    with tempfile.TemporaryDirectory() as name, embedded.start(Path(name)) as server:
        settings = Settings(redis=server.url, namespace="r", models=demo_models(), warmup_bars={"v3": WARM_UP})
        minutes = rounds(0, symbols, BARS + 1, LAST_TS)
        with connect(server.url) as client:
            for _ in range(BARS):
                publish(client, Keys("r").bars, islice(minutes, 1))
            work(settings, loadings)
            client.hset(Keys("r").owner("chain"), "clean", "0")
            publish(client, Keys("r").bars, minutes)
            size = sum(client.memory_usage(key, samples=0) or 0 for key in client.keys("r:state:*"))
        return {"symbols": symbols, "state_mib": size / 2**20, "seconds": restart(settings, loadings)}


def restart(settings: Settings, loadings: list[Loading]) -> float:
    """Seconds until the first commit that moves the input."""
    committed: list[float] = []
    original = RedisStore.commit

    def commit(self: RedisStore, commit: Commit) -> None:
        original(self, commit)
        committed.append(time.perf_counter())

    RedisStore.commit = commit  # type: ignore[method-assign]
    try:
        started = time.perf_counter()
        work(settings, loadings)
    finally:
        RedisStore.commit = original  # type: ignore[method-assign]
    return committed[1] - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--symbols", type=int, default=1_000)
    given = parser.parse_args()
    torch.set_num_threads(1)
    row = measure(given.symbols)
    if given.json:
        print(json.dumps({"machine": line(), "recovery": row}))
    else:
        print(
            f"{row['symbols']} symbols, {row['state_mib']:.0f} MiB of state: first commit after {row['seconds']:.2f} s"
        )


if __name__ == "__main__":
    main()
