"""What the chaos tests share: bars with fixed IDs, workers to kill, and what came out."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import redis

from streams.keys import Keys
from streams.messages import AGENTS
from tests.helpers import ROOT, environment, wait_for
from worker.training.market import generate

FIRST_MS = 1_750_000_000_000
TREES = ("xgboost", "lightgbm")
Outputs = dict[str, list[tuple[bytes, bytes]]]
Fields = dict[bytes, bytes]


def market(symbols: int, bars: int, seed: int = 11) -> list[Fields]:
    """Flat fields of a generated market, minute by minute."""
    made = generate(symbols, bars, seed, signal="planted")
    return [
        {
            b"symbol": symbol.encode(),
            b"ts": str(int(ts)).encode(),
            **{
                name: repr(float(x)).encode()
                for name, x in zip((b"open", b"high", b"low", b"close", b"volume"), row, strict=True)
            },
        }
        for ts, rows in zip(made.ts, made.ohlcv, strict=True)
        for symbol, row in zip(made.symbols, rows, strict=True)
    ]


def feed(url: str, key: str, entries: Sequence[Fields], first: int = 0) -> None:
    """Publish under IDs that are the same in every namespace: `first` is the number of the first entry."""
    with redis.Redis.from_url(url) as client:
        pipe = client.pipeline(transaction=False)
        for number, fields in enumerate(entries, first):
            pipe.xadd(key, fields, id=f"{FIRST_MS + number}-0")
        pipe.execute()


def outputs(url: str, namespace: str, agents: Sequence[str] = AGENTS) -> Outputs:
    """ID and bytes of every entry of features, votes and signals."""
    keys = Keys(namespace)
    names = [keys.features, keys.signals, *map(keys.votes, agents)]
    with redis.Redis.from_url(url) as client:
        return {
            name.removeprefix(namespace): [(entry_id, fields[b"data"]) for entry_id, fields in client.xrange(name)]
            for name in names
        }


def added(url: str, key: str) -> int:
    """Entries of a stream; 0 while the server is away."""
    with redis.Redis.from_url(url, socket_connect_timeout=1.0) as client:
        try:
            return int(client.xlen(key))
        except redis.RedisError:
            return 0


@dataclass
class Forge:
    """The warmed-up parent of the workers. One conversation at a time."""

    process: subprocess.Popen[str]
    lock: threading.Lock = field(default_factory=threading.Lock)

    def ask(self, **order: object) -> int:
        with self.lock:
            assert self.process.stdin is not None
            assert self.process.stdout is not None
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
            return int(self.process.stdout.readline())


@contextmanager
def forge() -> Iterator[Forge]:
    """Start the parent of the workers; it ends with its standard input."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.chaos.worker"],
        cwd=ROOT,
        env=environment({"NUMBA_CACHE_DIR": os.environ["NUMBA_CACHE_DIR"]}),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield Forge(process)
        assert process.stdin is not None
        process.stdin.close()


@dataclass
class Life:
    """One run of the worker."""

    forge: Forge
    pid: int
    log: Path

    def kill(self) -> int:
        return self.signal(signal.SIGKILL)

    def terminate(self) -> int:
        return self.signal(signal.SIGTERM)

    def signal(self, number: int) -> int:
        os.kill(self.pid, number)
        return self.wait()

    def wait(self) -> int:
        """The exit code; a signal is negative."""
        return self.forge.ask(do="wait", pid=self.pid)

    def alive(self) -> bool:
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return False
        return state not in "ZX"

    @property
    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


@dataclass
class Stage:
    """A namespace of a server with models: where workers live and die."""

    forge: Forge
    url: str
    namespace: str
    models: Path
    directory: Path
    agents: Sequence[str] = AGENTS
    env: dict[str, str] = field(default_factory=dict)
    started: list[Life] = field(default_factory=list)

    @property
    def keys(self) -> Keys:
        return Keys(self.namespace)

    def start(self, *arguments: str, **env: str) -> Life:
        """Start `quartet run`; networks vote from the 94th bar of a symbol on."""
        log = self.directory / f"{self.namespace}-{len(self.started) + 1}.log"
        settings = {
            "QUARTET_WARMUP_BARS__V3": "30",
            "QUARTET_LEASE_S": "0.4",
            "QUARTET_AGENTS": ",".join(self.agents),
            "QUARTET_QUORUM": str(min(3, len(self.agents))),
        }
        flags = ["--redis", self.url, "--namespace", self.namespace, "--models", str(self.models)]
        flags += ["--http-port", "0", "--state-dir", str(self.directory)]
        order = {"arguments": [*flags, *arguments], "env": {**settings, **self.env, **env}, "log": str(log)}
        self.started.append(Life(self.forge, self.forge.ask(do="start", **order), log))
        return self.started[-1]

    def end(self) -> None:
        """Kill what still runs: a worker may not outlive a test that failed."""
        for life in self.started:
            if life.alive():
                life.kill()

    def finish(self, *arguments: str, **env: str) -> str:
        """Run until the input is used up; the log."""
        life = self.start("--until-idle", "0.1", *arguments, **env)
        code = life.wait()
        assert code == 0, life.text
        return life.text

    def feed(self, entries: Sequence[Fields], first: int = 0) -> None:
        feed(self.url, self.keys.bars, entries, first)

    def outputs(self) -> Outputs:
        return outputs(self.url, self.namespace, self.agents)

    def progress(self) -> int:
        return added(self.url, self.keys.features)

    def kill_in_work(self, rng: random.Random, *arguments: str) -> bool:
        """Start, see progress, kill -9 within 20 ms; whether there was work left to be hit."""
        before = self.progress()
        life = self.start(*arguments)
        entries = added(self.url, self.keys.bars)
        wait_for(lambda: self.progress() > before)
        time.sleep(rng.random() * 0.02)
        code = life.kill()
        assert code == -signal.SIGKILL, life.text
        return self.progress() < entries


def assert_same(found: Outputs, expected: Outputs) -> None:
    """None lost, none doubled, none different: IDs and bytes, and not vacuously."""
    for stream, entries in expected.items():
        assert entries, f"{stream} is empty even without a crash"
        assert [x[0] for x in found[stream]] == [x[0] for x in entries], f"{stream}: lost or doubled"
        assert found[stream] == entries, f"{stream}: different"


def until(condition: Callable[[], bool], life: Life) -> None:
    """Wait for `condition`; show what the worker said if it does not come."""
    try:
        wait_for(condition)
    except BaseException:
        print(life.text)
        raise
