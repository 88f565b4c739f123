"""Stages as processes against the chained one, and how long a standby of each takes to take over.

    python -m benchmarks.stages [--json] [--bars 5120]

The program itself, started as users start it, with the demonstration's four models and the default lease of
2 s, over an embedded server. Bars a second: from publishing bars to the last signal of them, all processes
warm. Takeover: from kill -9 to the standby's first commit, while bars flow.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import redis

from benchmarks.machine import demo_models, line
from streams import embedded
from streams.keys import Keys
from streams.messages import AGENTS, Bar
from streams.redis import connect
from worker.demo.publisher import publish
from worker.demo.scene import rounds

SYMBOLS, WARM_UP = 20, 30
WARM_ROUNDS = WARM_UP + 64
LAST_TS = 1_750_000_020_000
LIMIT_S = 300.0
STAGES = ("features", *(f"agent:{agent}" for agent in AGENTS), "consensus")


class Program:
    """One namespace with its processes: all stages in one where none is named."""

    def __init__(self, url: str, folder: Path, namespace: str, stages: Sequence[str]) -> None:
        self.keys = Keys(namespace)
        self.client: redis.Redis = connect(url)
        self.minutes: Iterator[list[Bar]] = rounds(0, SYMBOLS, 100_000, LAST_TS)
        flags = ["--redis", url, "--namespace", namespace, "--models", str(demo_models().resolve())]
        self._command = [sys.executable, "-m", "worker", "run", *flags, "--http-port", "0", "--state-dir", str(folder)]
        self._log = (folder / f"{namespace}.log").open("ab")
        self.running = {stage: self.start(stage) for stage in stages or [""]}
        self.signals = 0

    def start(self, stage: str) -> subprocess.Popen[bytes]:
        env = {**os.environ, "QUARTET_WARMUP_BARS__V3": str(WARM_UP), "QUARTET_DEADLINE_S": str(LIMIT_S)}
        command = [*self._command, *(["--stage", stage] if stage else [])]
        return subprocess.Popen(command, env=env, stderr=self._log, stdout=self._log)

    @property
    def standing_by(self) -> int:
        """How many processes have said so."""
        return Path(self._log.name).read_bytes().count(b"standing by")

    def publish(self, minutes: int, ready: bool = True) -> None:
        publish(self.client, self.keys.bars, islice(self.minutes, minutes))
        self.signals += SYMBOLS * minutes if ready else SYMBOLS * (minutes - WARM_UP + 1)

    def drain(self) -> None:
        until(lambda: self.client.xlen(self.keys.signals) >= self.signals)

    def close(self) -> None:
        for process in self.running.values():
            process.terminate()
        for process in self.running.values():
            process.wait()
        self._log.close()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing more came within {LIMIT_S:g} s")
        time.sleep(0.005)


def bars_per_second(program: Program, bars: int) -> float:
    program.publish(WARM_ROUNDS, ready=False)
    program.drain()
    minutes = bars // SYMBOLS
    began = time.perf_counter()
    program.publish(minutes)
    program.drain()
    return minutes * SYMBOLS / (time.perf_counter() - began)


def takeover_s(program: Program, stage: str) -> float:
    """Kill the owner of a stage whose standby waits; until the standby has written, while a minute comes each 50 ms."""
    key = {"features": program.keys.features, "consensus": program.keys.signals}.get(stage)
    key = key or program.keys.votes(stage.removeprefix("agent:"))
    waiting = program.standing_by
    standby, owner = program.start(stage), program.running[stage]
    until(lambda: program.standing_by > waiting)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    at_kill, began = program.client.xlen(key), time.perf_counter()
    program.running[stage] = standby
    deadline = time.monotonic() + LIMIT_S
    while program.client.xlen(key) <= at_kill and time.monotonic() < deadline:
        program.publish(1)
        time.sleep(0.05)
    took = time.perf_counter() - began
    program.drain()
    return took


def measure(bars: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name, embedded.start(Path(name)) as server:
        chained = Program(server.tcp_url, Path(name), "chained", ())
        try:
            one = bars_per_second(chained, bars)
        finally:
            chained.close()
        split = Program(server.tcp_url, Path(name), "split", STAGES)
        try:
            several = bars_per_second(split, bars)
            took = {stage: takeover_s(split, stage) for stage in STAGES}
        finally:
            split.close()
    return {"chained_bars_per_second": one, "split_bars_per_second": several, "takeover_s": took}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--bars", type=int, default=5_120)
    given = parser.parse_args()
    row = measure(given.bars)
    if given.json:
        print(json.dumps({"machine": line(), "stages": row}))
        return
    print(f"chained {row['chained_bars_per_second']:,.0f} bars/s, split {row['split_bars_per_second']:,.0f} bars/s")
    print("takeover:", ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in row["takeover_s"].items()))


if __name__ == "__main__":
    main()
