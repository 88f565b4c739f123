"""A real worker with its page, on a real server, over a small market; and a real browser."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis
from playwright.sync_api import Browser, expect, sync_playwright

from streams import embedded
from streams.keys import Keys
from tests.helpers import LIMIT_S, ROOT, environment, wait_for
from worker.training.market import generate

AGENTS = ("xgboost", "lightgbm", "nhits", "patchtst")
SYMBOLS, BARS = 4, 280
GAP_AT, REJECTED_AT = 250, 240
"""Bars of the first symbol: three are missing before the one, the other is preceded by a bar that cannot be."""
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
Fields = dict[str, str]

expect.set_options(timeout=1000 * LIMIT_S)


@pytest.fixture(scope="module")
def browser(needs: Callable[[str], str]) -> Iterator[Browser]:
    """Debian's Chromium; nothing is downloaded. Each test opens contexts of its own.

    No longer than a module: the driver keeps an event loop running in this thread, and other tests start their own.
    """
    program = needs("chromium")
    with sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=program, headless=True, args=list(FLAGS))
        yield running
        running.close()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four small models, trained in a process of their own: torch and a browser's driver are best kept apart."""
    folder = tmp_path_factory.mktemp("page") / "models"
    code = (
        "import sys; from pathlib import Path; from worker.training.market import generate;"
        "from worker.training.train import train_agents;"
        "train_agents(generate(6, 700, seed=5).bars(), Path(sys.argv[1]), seed=1)"
    )
    subprocess.run([sys.executable, "-c", code, folder], cwd=ROOT, env=environment(), check=True)
    return folder


def market(symbols: int = SYMBOLS, bars: int = BARS) -> list[list[Fields]]:
    """The bars of each minute, as flat fields; the first symbol has one gap of three bars."""
    made = generate(symbols, bars + 3, 11, signal="planted")
    minutes = []
    for ts, rows in zip(made.ts.tolist(), made.ohlcv.tolist(), strict=True):
        minutes.append([fields(symbol, ts, row) for symbol, row in zip(made.symbols, rows, strict=True)])
    for minute in minutes[GAP_AT - 3 : GAP_AT]:
        del minute[0]
    return minutes


def fields(symbol: str, ts: int, row: list[float]) -> Fields:
    numbers = zip(("open", "high", "low", "close", "volume"), row, strict=True)
    return {"symbol": symbol, "ts": str(ts), "interval": "1m", **{name: repr(value) for name, value in numbers}}


@dataclass
class Scene:
    """A running worker: its page's URL, its streams, and the minutes of the market not yet published."""

    url: str
    client: redis.Redis
    keys: Keys
    minutes: list[list[Fields]] = field(default_factory=market)
    published: int = 0
    feed: int | None = None

    @contextmanager
    def still(self) -> Iterator[None]:
        """Hold the demonstration's feed, so that the page and the test read the same streams."""
        if self.feed is None:
            yield
            return
        os.kill(self.feed, signal.SIGSTOP)
        try:
            wait_for(lambda: self.client.xlen(self.keys.features) == self.client.xlen(self.keys.bars))
            yield
        finally:
            os.kill(self.feed, signal.SIGCONT)

    def publish(self, minutes: int) -> None:
        """The next minutes, and wait until each bar has been answered."""
        pipe = self.client.pipeline(transaction=False)
        for minute in self.minutes[:minutes]:
            for bar in minute:
                pipe.xadd(self.keys.bars, bar)
                self.published += 1
        pipe.execute()
        del self.minutes[:minutes]
        self.wait()

    def publish_impossible(self) -> str:
        """A bar of the first symbol at its next time whose high is below its low; that time."""
        bar = dict(self.minutes[0][0])
        bar["high"], bar["low"] = bar["low"], bar["high"]
        self.client.xadd(self.keys.bars, bar)
        self.published += 1
        self.wait()
        return bar["ts"]

    def wait(self) -> None:
        wait_for(lambda: self.client.xlen(self.keys.features) + self.client.xlen(self.keys.rejected) == self.published)

    def messages(self, key: str, symbol: str | None = None) -> list[dict[str, Any]]:
        """What lies on a stream, read here and not by the page."""
        found = [json.loads(entry[b"data"]) for _, entry in self.client.xrange(key)]
        return [one for one in found if symbol in (None, one["symbol"])]

    def ready(self) -> Any:
        """What `/readyz` says, ready or not."""
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=LIMIT_S)
        connection.request("GET", "/readyz")
        try:
            return json.load(connection.getresponse())
        finally:
            connection.close()


@contextmanager
def worker(
    url: str, namespace: str, models: Path, home: Path, port: int = 0, **env: str
) -> Iterator[tuple[subprocess.Popen[bytes], Scene]]:
    """`quartet run`, loaded and waiting for bars."""
    home.mkdir(exist_ok=True)
    log = home / "worker.log"
    arguments = ["run", "--redis", url, "--namespace", namespace, "--models", str(models), "--http-port", str(port)]
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "worker", *arguments, "--state-dir", str(home / "state")],
            cwd=home, env=environment(env), stderr=stderr, stdout=subprocess.DEVNULL,
        )  # fmt: skip

    def logged(event: str) -> dict[str, Any] | None:
        assert process.poll() is None, log.read_text()
        lines = (json.loads(text) for text in log.read_text().splitlines() if text.startswith("{"))
        return next((line for line in lines if line["event"].startswith(event)), None)

    try:
        wait_for(lambda: logged("ensemble") is not None)
        line = logged("metrics and health")
        assert line is not None
        with redis.Redis.from_url(url) as client:
            yield process, Scene(line["url"], client, Keys(namespace))
    finally:
        process.terminate()
        process.wait(LIMIT_S)


@pytest.fixture(scope="module")
def live(valkey: str, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """A worker that has answered a market with a gap and a rejected bar, but for its last ten minutes.

    Each module has its own: tests publish to it.
    """
    home = tmp_path_factory.mktemp("live")
    with worker(valkey, home.name, models, home) as (_, scene):
        scene.publish(REJECTED_AT)
        scene.publish_impossible()
        scene.publish(BARS - 10 - REJECTED_AT)
        yield scene


@contextmanager
def demonstration(models: Path, home: Path, *flags: str) -> Iterator[Scene]:
    """`quartet demo --keep`, once it has shown its summary."""
    home.mkdir(exist_ok=True)
    arguments = ["demo", "--json", "--keep", "--symbols", "4", "--bars", "400", "--http-port", "0", *flags]
    with (home / "demo.log").open("wb") as stderr, (home / "demo.json").open("wb") as stdout:
        process = subprocess.Popen(
            [sys.executable, "-m", "worker", *arguments, "--models", str(models)],
            cwd=home, env=environment(), stderr=stderr, stdout=stdout,
        )  # fmt: skip

    def summary() -> dict[str, Any] | None:
        assert process.poll() is None, (home / "demo.log").read_text()
        text = (home / "demo.json").read_text()
        found: dict[str, Any] = json.loads(text) if text.rstrip().endswith("\n}") else {}
        return found or None

    try:
        wait_for(lambda: summary() is not None, 3 * LIMIT_S)
        url = (summary() or {})["metrics"]["url"]
        server = embedded.find(home / ".quartet" / "demo")
        assert server is not None
        wait_for(lambda: feed_of(process.pid) is not None)
        with redis.Redis.from_url(server) as client:
            yield Scene(url, client, Keys(), feed=feed_of(process.pid))
    finally:
        process.terminate()
        process.wait(LIMIT_S)


def feed_of(parent: int) -> int | None:
    """The process of a demonstration that publishes its bars, which starts once the summary is shown."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            started_by = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if started_by == parent and b"worker.demo.publisher" in (folder / "cmdline").read_bytes():
                return int(folder.name)
    return None


@pytest.fixture(scope="session")
def demo(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """`quartet demo`: four agents as they should be."""
    with demonstration(models, tmp_path_factory.mktemp("page") / "demo") as scene:
        yield scene


@pytest.fixture(scope="session")
def sabotaged(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """`quartet demo --sabotage`: one artifact refused, one model that has collapsed."""
    with demonstration(models, tmp_path_factory.mktemp("page") / "sabotaged", "--sabotage") as scene:
        yield scene
