"""Verifying a long recording: its time against the models' own time on the same batches.

    python -m benchmarks.replay [--json] [--bars 2000] [--models full|demo] [--runs 5]

A recording of 20 symbols is made in memory and written to disk. `verify` is everything after the models
are loaded: reading, features, models, consensus, comparing. `models` is the voting stage alone, side
by side as in the worker, over the same batches of the same vectors. Reading is not the limit while the
ratio stays under 1.3.

On one core the ratio is that of the work. On two, `models` keeps both busy as well. Every run and every
neighbour differs.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch

from agents.agent import Model
from agents.artifacts import Loading, LoadOptions, load_agent
from agents.heads import head_for
from benchmarks.agents import full
from benchmarks.machine import demo_models, line
from streams.contracts import FEATURE_SETS
from streams.messages import AGENTS
from streams.recording import Recorded, Recording, Writer
from streams.store import Position
from streams.validation import LATEST_TS_MS
from worker.assembly import pipeline_factory
from worker.builds import build, started
from worker.replay import chain, verify
from worker.replay.lines import read_lines
from worker.replay.outline import note_of
from worker.replay.source import Source
from worker.roster import Artifact
from worker.settings import Settings
from worker.testing import Quartet
from worker.training.market import generate
from worker.voting import Seat

SYMBOLS = 20
BATCH = 256
NAMES = ("symbol", "ts", "interval", "open", "high", "low", "close", "volume")


class Held:
    """The models of this process, as a shelf of artifacts."""

    def __init__(self, models: dict[str, Model]) -> None:
        self.missing: dict[tuple[str, str], str] = {}
        self._models = models

    def find(self, agent: str, wanted: Artifact) -> Loading:
        assert wanted.version == self._models[agent].version
        return Loading(agent, self._models[agent])


def models_of(size: str) -> dict[str, Model]:
    """The demonstration's models, or networks and trees of full size with seeded weights over v6."""
    if size == "demo":
        loaded = {agent: load_agent(demo_models(), agent, LoadOptions()).model for agent in AGENTS}
        return {agent: model for agent, model in loaded.items() if model is not None}
    v6 = FEATURE_SETS["v6"]
    return {
        agent: Model(
            agent, "v1", Path(agent), agent, v6.name, v6.features, v6.contract, built.window,
            built.parameters, built.outputs, built.network, head_for(built.outputs, 0.001, 0.01),
        )
        for agent, built in full()
    }  # fmt: skip


def make_recording(file: Path, settings: Settings, models: dict[str, Model], bars: int) -> None:
    """What the recorder would have written, by a worker in memory."""
    seats = [Seat(agent, settings.weights[agent], model) for agent, model in models.items()]
    worker = Quartet(settings)
    worker._pipeline = pipeline_factory(settings)(seats)  # noqa: SLF001
    made = generate(SYMBOLS, bars, seed=3).bars()
    columns = zip(made.symbol, made.ts.tolist(), made.interval, *made.ohlcv.T.tolist(), strict=True)
    worker.run({name: str(x) for name, x in zip(NAMES, row, strict=True)} for row in columns)
    worker.close()
    prefix = f"{settings.namespace}:"
    ordered = sorted(
        ((int(entry_id.partition("-")[0]), place, key, entry_id, fields)
         for place, (key, entries) in enumerate(worker.streams.streams.items()) for entry_id, fields in entries),
        key=lambda row: row[:2],
    )  # fmt: skip
    event = started(settings, [Loading(agent, model) for agent, model in models.items()], Position())
    header = {"id": "x", "part": 1, "namespace": settings.namespace, "inputs": [worker.keys.bars]}
    with Writer(file, note_of) as writer:
        writer.header({**header, "started": event.evidence, "build": build(), "positions": {}})
        for _, _, key, entry_id, fields in ordered:
            writer.add(Recorded(key.removeprefix(prefix), key, entry_id, fields))


def models_alone(file: Path, settings: Settings, models: dict[str, Model]) -> float:
    """Seconds of the voting stage on the same batches."""
    pipeline = pipeline_factory(settings)([Seat(a, settings.weights[a], model) for a, model in models.items()])
    total = 0.0
    source = Source(Recording(file))
    while entries := source.entries(BATCH):
        vectors = pipeline.features.process(entries, LATEST_TS_MS)
        began = time.perf_counter()
        pipeline.voting.vote(vectors)
        total += time.perf_counter() - began
    pipeline.voting.close()
    return total


@contextmanager
def on(cores: set[int]) -> Iterator[None]:
    """Run on these cores alone, threads that begin meanwhile included."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def measure(size: str, bars: int, runs: int) -> dict[str, float]:
    models = models_of(size)
    warmup = {name: FEATURE_SETS[name].longest_window for name in ("v2", "v3", "v6")}
    settings = Settings(batch_size=BATCH, warmup_bars=warmup)
    chain.Shelf = lambda *_: Held(models)  # the networks of full size are no files
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "long.jsonl.zst"
        make_recording(file, settings, models, bars)
        every = os.sched_getaffinity(0)
        found = {}
        for name, cores in {"one_core": {min(every)}, "all_cores": every}.items():
            with on(cores):
                found[name] = [compare(file, settings, models) for _ in range(runs)]
        began = time.perf_counter()
        for _, lines in read_lines(Recording(file)):
            deque(lines, maxlen=0)
        reading = time.perf_counter() - began
        size_mb = file.stat().st_size / 1e6
    total = SYMBOLS * bars
    figures = {"bars": total, "file_mb": size_mb, "reading_us": reading / total * 1e6}
    for name, pairs in found.items():
        took, own = (median(column) / total * 1e6 for column in zip(*pairs, strict=True))
        ratio = median(one / other for one, other in pairs)
        figures |= {f"{name}_verify_us": took, f"{name}_models_us": own, f"{name}_ratio": ratio}
    return figures


def compare(file: Path, settings: Settings, models: dict[str, Model]) -> tuple[float, float]:
    """Seconds of verifying and of the models alone, one straight after the other."""
    verdict = verify.verify(file, settings)
    assert verdict.ok, verdict.as_json()
    return verdict.seconds - verdict.loading_s, models_alone(file, settings, models)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--bars", type=int, default=2_000, help="bars of each symbol")
    parser.add_argument("--models", choices=("full", "demo"), default="full", help="how large the models are")
    parser.add_argument("--runs", type=int, default=5, help="the figures are medians of so many runs")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(given.models, given.bars, given.runs)
    if given.json:
        print(json.dumps({"machine": line(), "replay": found}))
        return
    print(f"{found['bars']:,.0f} bars, {found['file_mb']:.1f} MB; microseconds a bar, batches of {BATCH}:")
    for name in ("one_core", "all_cores"):
        verifying, alone, ratio = (found[f"{name}_{what}"] for what in ("verify_us", "models_us", "ratio"))
        print(f"{name.replace('_', ' '):10s} verify {verifying:.0f}   models {alone:.0f}   ratio {ratio:.2f}")
    print(f"reading    {found['reading_us']:.0f}")


if __name__ == "__main__":
    main()
