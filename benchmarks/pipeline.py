"""The whole way of a bar through a real server: bars a second, and where the time goes.

    python -m benchmarks.pipeline [--json] [--runs 3] [--scale 1.0]

The worker's own loop over an embedded server, one commit a batch, the demonstration's four models, all
symbols past their warm-up: every bar gets four votes and a signal. Batches of 1 mean one bar a commit.
The last column but the stages is the ratio to the models' own time: the four models alone, one after the
other, on batches of that size.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any

import numpy as np
import structlog
import torch
from prometheus_client import CollectorRegistry

from agents.artifacts import Loading
from benchmarks.machine import demo_models, line, microseconds
from streams import embedded
from streams.keys import Keys
from streams.messages import Bar
from streams.redis import RedisStore, connect
from worker.assembly import load_agents, load_options, pipeline_factory
from worker.demo.publisher import publish
from worker.demo.scene import rounds
from worker.lease import LeaseKeeper
from worker.metrics import Metrics
from worker.reload import Shelf
from worker.roster import Record
from worker.sensors import Sensors
from worker.service import Options, Worker
from worker.settings import Settings
from worker.status import Status

SYMBOLS = 20
WARM_UP = 30
WARM_ROUNDS = WARM_UP + 64
"""After them every symbol is past its warm-up and has its whole window; shorter than usual, to save time."""
BARS = {1: 100, 64: 960, 256: 2_560}
"""Bars that are measured at each batch size."""
LAST_TS = 1_750_000_020_000


class Clock(Sensors):
    """Adds up the stages, and notes when the first read began and the last commit ended."""

    def __init__(self, metrics: Metrics) -> None:
        super().__init__(metrics)
        self.stages: dict[str, float] = {}
        self.began = self.ended = 0.0

    @contextmanager
    def stopwatch(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        self.began = self.began or started
        yield
        ended = time.perf_counter()
        self.stages[stage] = self.stages.get(stage, 0.0) + ended - started
        if stage == "commit":
            self.ended = ended


class _Stop(threading.Event):
    """Set as soon as `until` holds."""

    def __init__(self, until: Callable[[], bool]) -> None:
        super().__init__()
        self._until = until

    def is_set(self) -> bool:
        return super().is_set() or self._until()


def work(
    settings: Settings,
    shelf: Shelf,
    records: Mapping[str, Record] = MappingProxyType({}),
    until: Callable[[], bool] = lambda: False,
) -> Clock:
    """Let a worker consume all there is, or stop between two batches once `until` holds."""
    client = connect(settings.redis)
    store = RedisStore(client, Keys(settings.namespace))
    clock, status = Clock(Metrics(CollectorRegistry())), Status(settings.agents, settings.quorum)
    worker = Worker(
        settings,
        store,
        pipeline_factory(settings),
        shelf,
        records,
        sensors=clock,
        status=status,
        log=structlog.wrap_logger(structlog.testing.ReturnLogger(), processors=[lambda *_: ""]),
        options=Options(until_idle_s=0, stop=_Stop(until)),
    )
    worker.run(LeaseKeeper(store.with_client(connect(settings.redis)).renew, lambda: status.heartbeat, 0.5))
    return clock


def one_run(url: str, name: str, bars: Mapping[int, int], shelf: Shelf) -> dict[int, dict[str, float]]:
    """By batch size: seconds of each stage, and of the whole from the first read to the last commit."""
    minutes: Iterator[list[Bar]] = rounds(0, SYMBOLS, WARM_ROUNDS + sum(bars.values()) // SYMBOLS, LAST_TS)
    settings = Settings(
        redis=url, namespace=name, models=demo_models(), batch_size=256, warmup_bars={"v3": WARM_UP}, watch_s=0
    )
    keys, found = Keys(name), {}
    with connect(url) as client:
        publish(client, keys.bars, islice(minutes, WARM_ROUNDS))
        work(settings, shelf)
        signals = SYMBOLS * (WARM_ROUNDS - WARM_UP + 1)
        for batch, count in bars.items():
            publish(client, keys.bars, islice(minutes, count // SYMBOLS))
            clock = work(settings.model_copy(update={"batch_size": batch}), shelf)
            found[batch] = {**clock.stages, "whole": clock.ended - clock.began}
            signals += count
        assert client.xlen(keys.signals) == signals
        client.flushall()
    return found


def models_alone(loadings: list[Loading], batch: int) -> float:
    """Microseconds a bar of the four models, one after the other."""
    total = 0.0
    for loading in loadings:
        model = loading.model
        assert model is not None
        rows = np.random.default_rng(2).standard_normal((batch, *model.input_shape))
        total += microseconds(lambda model=model, rows=rows: model.predict(rows), 0.3) / batch
    return total


def measure(runs: int, scale: float) -> list[dict[str, Any]]:
    quiet = structlog.wrap_logger(structlog.testing.ReturnLogger(), processors=[lambda *_: ""])
    settings = Settings(models=demo_models())
    shelf = Shelf(settings.models, load_options(settings))
    loadings = load_agents(settings, {}, shelf, quiet)
    bars = {batch: max(SYMBOLS, round(full * scale) // SYMBOLS * SYMBOLS) for batch, full in BARS.items()}
    with tempfile.TemporaryDirectory() as directory, embedded.start(Path(directory)) as server:
        done = [one_run(server.url, f"r{run}", bars, shelf) for run in range(runs)]
    return [_row(batch, bars[batch], [one[batch] for one in done], models_alone(loadings, batch)) for batch in bars]


def _row(batch: int, bars: int, done: list[dict[str, float]], own: float) -> dict[str, Any]:
    """Medians over the runs, in microseconds a bar."""
    us = {stage: median(one[stage] for one in done) / bars * 1e6 for stage in done[0]}
    whole = us.pop("whole")
    return {
        "batch": batch,
        "bars_per_second": 1e6 / whole,
        "us_a_bar": whole,
        "models_alone_us": own,
        "whole_over_models": whole / own,
        "stages_us": {name: value for name, value in us.items() if not name.startswith("agent:")},
    }


def show(rows: list[dict[str, Any]]) -> None:
    names = list(rows[0]["stages_us"])
    print(
        f"{'batch':>6}{'bars/s':>9}{'us a bar':>10}{'models':>8}{'ratio':>7}   share of the whole: " + " ".join(names)
    )
    for row in rows:
        shares = " ".join(f"{row['stages_us'][n] / row['us_a_bar']:>{len(n)}.0%}" for n in names)
        print(
            f"{row['batch']:>6}{row['bars_per_second']:>9,.0f}{row['us_a_bar']:>10.0f}{row['models_alone_us']:>8.0f}"
            f"{row['whole_over_models']:>7.2f}{'':23}{shares}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--runs", type=int, default=3, help="the figures are medians of so many runs")
    parser.add_argument("--scale", type=float, default=1.0, help="bars, as a multiple of the usual")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(given.runs, given.scale)
    if given.json:
        print(json.dumps({"machine": line(), "pipeline": rows}))
    else:
        show(rows)


if __name__ == "__main__":
    main()
