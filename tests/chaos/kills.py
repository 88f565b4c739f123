"""`python -m tests.chaos.kills --kills 200`: kill -9 in mid-run, many times, and compare every byte that came out.

CI does the same with fewer: see `test_kills.py`. `--full` runs all four agents instead of the two tree
models; `--freezes N` freezes the owner N times instead, lets a second instance take over and thaws the first.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from streams import embedded
from streams.keys import Keys
from streams.messages import AGENTS
from tests.chaos.scene import TREES, Stage, added, assert_same, forge, market, until

SYMBOLS = 4
LATER = 16
"""Bars that come before each kill, so that there is work for every life, however much the one before it did."""


def bars_for(kills: int) -> int:
    """Bars a symbol, so that no kill comes too late."""
    return 150 + 6 * kills


def killed_equals_calm(make: Callable[[str], Stage], kills: int, seed: int, *, batch: int = 16) -> int:
    """Run once in peace and once with `kills` kills; the bytes are the same. How many kills hit work."""
    entries = market(SYMBOLS, bars_for(kills))
    calm, killed = make("calm"), make("killed")
    for each in (calm, killed):
        each.env["QUARTET_BATCH_SIZE"] = str(batch)
    calm.feed(entries)
    calm.finish()
    first, hits, rng = len(entries) - kills * LATER, 0, random.Random(seed)
    killed.feed(entries[:first])
    for place in range(first, len(entries), LATER):
        killed.feed(entries[place : place + LATER], place)
        hits += killed.kill_in_work(rng)
    killed.finish()
    assert_same(killed.outputs(), calm.outputs())
    return hits


def frozen_is_fenced(stage: Stage, rng: random.Random, first: int) -> float:
    """Freeze the owner, let a second take over, thaw the first: it exits 75. Seconds until the takeover."""
    entries = market(SYMBOLS, 60, seed=first)
    before = stage.progress()
    owner = stage.start()
    stage.feed(shifted(entries, first), first)
    until(lambda: stage.progress() > before, owner)
    time.sleep(rng.random() * 0.02)
    os.kill(owner.pid, signal.SIGSTOP)
    at_freeze, started = stage.progress(), time.monotonic()
    second = stage.start()
    stage.feed(shifted(market(SYMBOLS, 10, seed=first + 1), first + 240), first + 240)
    until(lambda: stage.progress() > at_freeze, second)
    took_s = time.monotonic() - started
    os.kill(owner.pid, signal.SIGCONT)
    assert owner.wait() == 75, owner.text
    assert "another instance" in owner.text
    assert second.terminate() == 0, second.text
    return took_s


def shifted(entries: list[dict[bytes, bytes]], first: int) -> list[dict[bytes, bytes]]:
    """The bars under symbols of their own, so that each round starts anew."""
    return [{**entry, b"symbol": entry[b"symbol"] + b"-%d" % first} for entry in entries]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--kills", type=int, default=200)
    arguments.add_argument("--freezes", type=int, default=0)
    arguments.add_argument("--seed", type=int, default=1)
    arguments.add_argument("--full", action="store_true")
    given = arguments.parse_args()
    os.environ.setdefault("NUMBA_CACHE_DIR", str(Path(".quartet/numba").resolve()))
    from worker.training.market import generate
    from worker.training.train import ensure_models

    with tempfile.TemporaryDirectory() as name, embedded.start(Path(name)) as server, forge() as parent:
        folder = Path(name)
        ensure_models(folder / "models", generate(4, 900, 3, signal="planted").bars(), seed=1)

        def make(namespace: str) -> Stage:
            agents = AGENTS if given.full else TREES
            return Stage(parent, server.tcp_url, namespace, folder / "models", folder, agents)

        started = time.monotonic()
        if given.freezes:
            stage, rng = make("frozen"), random.Random(given.seed)
            took = [frozen_is_fenced(stage, rng, 1_000 * n) for n in range(given.freezes)]
            stage.finish()
            everything_once(server.tcp_url, stage, 280 * given.freezes)
            print(f"{given.freezes} freezes: 75 each time, nothing doubled or lost; takeover within {max(took):.1f} s")
        else:
            hits = killed_equals_calm(make, given.kills, given.seed)
            print(f"{given.kills} kills ({hits} with work left): 0 lost, 0 doubled, 0 different")
        print(f"{time.monotonic() - started:.0f} s")


def everything_once(url: str, stage: Stage, bars: int) -> None:
    """Every bar gave one feature vector, under its own ID."""
    assert added(url, Keys(stage.namespace).bars) == bars
    ids = [entry_id for entry_id, _ in stage.outputs()[":features"]]
    assert len(ids) == len(set(ids)) == bars


if __name__ == "__main__":
    main()
