"""What the tests of orders share: three trained versions of one agent, and a worker over streams in memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import structlog
from prometheus_client import CollectorRegistry
from structlog.typing import FilteringBoundLogger

from streams.keys import Keys
from streams.memory import MemoryStore
from worker.assembly import load_options, pipeline_factory, stored_records
from worker.control import Order
from worker.metrics import Metrics
from worker.reload import Shelf
from worker.sensors import Sensors
from worker.service import Options, Worker
from worker.settings import Settings
from worker.status import Status
from worker.training.market import generate
from worker.training.train import train_agents

AGENTS = ("xgboost", "lightgbm")
FIRST, SECOND, LAZY = "v20260101_000000_v3", "v20260201_000000_v3", "v20260301_000000_v3"
KEYS = Keys()


def train(folder: Path) -> None:
    """`models`: both agents; `next`: another xgboost; `lazy`: one that always says HOLD, as its threshold is 1000 %."""
    bars = generate(4, 900, 3, signal="planted").bars()
    train_agents(bars, folder / "models", agents=AGENTS, seed=1, now=datetime(2026, 1, 1, tzinfo=UTC))
    train_agents(bars, folder / "next", agents=["xgboost"], seed=2, now=datetime(2026, 2, 1, tzinfo=UTC))
    (folder / "lazy").mkdir()
    for file in (folder / "next").glob(f"xgboost_{SECOND}*"):
        shutil.copy(file, folder / "lazy" / file.name.replace(SECOND, LAZY))
    meta = folder / "lazy" / f"xgboost_{LAZY}_meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"threshold": 10.0}))


def model_file(folder: Path, version: str) -> Path:
    names = {FIRST: "models", SECOND: "next", LAZY: "lazy"}
    return folder / names[version] / f"xgboost_{version}.ubj"


def put(folder: Path, version: str, models: Path) -> None:
    """Put a version into the models folder as any tool should: the model last."""
    found = sorted(model_file(folder, version).parent.glob(f"xgboost_{version}*"), key=lambda f: f.suffix == ".ubj")
    for file in found:
        shutil.copy(file, models / file.name)


def trial(folder: Path, version: str, kind: str = "canary") -> Order:
    file = model_file(folder, version)
    return Order(kind, "xgboost", str(file), sha256(file.read_bytes()).hexdigest(), "a test")


def market(symbols: int, bars: int, seed: int = 11) -> list[Mapping[bytes, bytes]]:
    """Flat fields of a generated market, minute by minute."""
    made = generate(symbols, bars, seed, signal="planted")
    names = (b"open", b"high", b"low", b"close", b"volume")
    return [
        {
            b"symbol": symbol.encode(),
            b"ts": str(int(ts)).encode(),
            **{name: repr(float(x)).encode() for name, x in zip(names, row, strict=True)},
        }
        for ts, rows in zip(made.ts, made.ohlcv, strict=True)
        for symbol, row in zip(made.symbols, rows, strict=True)
    ]


class Desk:
    """A worker over streams in memory, turned by hand; `restart` is another process over the same streams."""

    def __init__(self, models: Path, log: FilteringBoundLogger | None = None, **settings: Any) -> None:
        silent = structlog.wrap_logger(structlog.testing.ReturnLogger(), processors=[lambda *_: ""])
        self._log = log or silent
        given = {"agents": AGENTS, "quorum": 2, "warmup_bars": {"v3": 30}, "watch_s": 0.0, "models": models}
        self.settings = Settings(**{**given, **settings})
        self.store = MemoryStore()
        self.registry = CollectorRegistry()
        self._bars = 0
        self.worker = self._start()

    def _start(self) -> Worker:
        self.registry = CollectorRegistry()
        shelf = Shelf(self.settings.models, load_options(self.settings))
        worker = Worker(
            self.settings,
            self.store,
            pipeline_factory(self.settings),
            shelf,
            stored_records(self.store, rebuild=False),
            sensors=Sensors(Metrics(self.registry, self.settings.agents)),
            status=Status(self.settings.agents, self.settings.quorum),
            log=self._log,
            options=Options(),
        )
        assert worker._own()
        worker._start()
        return worker

    def restart(self) -> None:
        self.close()
        self.worker = self._start()

    def close(self) -> None:
        self.worker.steering.close()
        self.worker.pipeline.voting.close()

    def turn(self) -> None:
        """Until all that is there is done."""
        self.worker._idle_since = None
        while self.worker._idle_since is None:
            self.worker._orders_at = 0.0
            self.worker._turn()

    def feed(self, bars: Iterable[Mapping[bytes, bytes]]) -> None:
        """Under IDs that are the same in every run."""
        for fields in bars:
            self.store.streams.add(KEYS.bars, fields, f"{1_750_000_000_000 + self._bars}-0")
            self._bars += 1
        self.turn()

    def write(self, data: bytes, field: bytes = b"data") -> str:
        return self.store.streams.add(KEYS.control, {field: data})

    def order(self, *words: Any) -> list[dict[str, Any]]:
        """Give one order and turn; the events that answer it."""
        given = words[0] if isinstance(words[0], Order) else Order(*words, by="a test")
        entry_id = self.write(given.encode())
        self.turn()
        return [event for event in self.events() if event["evidence"].get("order") == entry_id]

    def read(self, key: str) -> list[dict[str, Any]]:
        return [json.loads(fields[b"data"]) for _, fields in self.store.streams.after(key, "0-0")]

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        return [event for event in self.read(KEYS.events) if not kinds or event["kind"] in kinds]

    def votes(self, agent: str = "xgboost") -> list[dict[str, Any]]:
        return self.read(KEYS.votes(agent))

    def signals(self) -> list[dict[str, Any]]:
        return self.read(KEYS.signals)

    def versions(self, agent: str = "xgboost") -> list[str]:
        """The versions that voted, each once for each time that it took over."""
        versions = [vote["version"] for vote in self.votes(agent)]
        return [v for i, v in enumerate(versions) if i == 0 or versions[i - 1] != v]

    def outputs(self, names: Sequence[str] = ("xgboost", "lightgbm", "xgboost_canary")) -> dict[str, Any]:
        """IDs and bytes of everything that bars gave."""
        keys = [KEYS.features, KEYS.signals, *map(KEYS.votes, names)]
        return {key: list(self.store.streams.after(key, "0-0")) for key in keys}
