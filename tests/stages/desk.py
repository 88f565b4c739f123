"""All stages over streams in memory, each turned by hand, with a clock that is set: lateness without waiting."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import structlog
from prometheus_client import CollectorRegistry

from streams.formats import FormatReader
from streams.keys import Keys, agent_stage
from streams.memory import MemoryStore, MemoryStreams
from tests.helpers import wait_for
from worker.assembly import limits_of, load_options, rules_of
from worker.control import Order
from worker.metrics import Metrics
from worker.processes.agent import THRESHOLDS, AgentProcess, read_thresholds
from worker.processes.base import WAIT_S, Options, Process
from worker.processes.consensus import ConsensusProcess
from worker.processes.features import FeatureProcess
from worker.reload import Shelf
from worker.sensors import Sensors
from worker.settings import Settings
from worker.stages.agents import AgentGroup
from worker.stages.consensus import ConsensusStage
from worker.stages.features import FeatureStage
from worker.status import Status

AGENTS = ("xgboost", "lightgbm")
KEYS = Keys()
ROUNDS = 4_000


class StagesDesk:
    """Features, two agents and consensus. `turn` lets some of them work until nothing is left for them to do."""

    def __init__(self, models: Path, **settings: Any) -> None:
        given = {"agents": AGENTS, "quorum": 2, "warmup_bars": {"v3": 30}, "watch_s": 0.0, "models": models}
        self.settings = Settings(**{**given, **settings})
        self.streams = MemoryStreams()
        self.now_s = 0.0
        stages = {"features": "features", **{agent: agent_stage(agent) for agent in AGENTS}, "consensus": "consensus"}
        self.stores = {name: MemoryStore(self.streams, stage) for name, stage in stages.items()}
        self.registries: dict[str, CollectorRegistry] = {}
        self.stages: dict[str, Process] = {}
        self._bars = 0
        for name in self.stores:
            self.start(name)

    def start(self, name: str, **options: Any) -> None:
        """Another process over the same streams, as after a restart or a takeover."""
        if name in self.stages:
            self.stages[name]._close()
        made = {"features": self._features, "consensus": self._consensus}.get(name, lambda: self._agent(name))()
        for option, value in options.items():
            setattr(made.options, option, value)
        assert made._own()
        made._start()
        self.stages[name] = made

    def _common(self, name: str) -> dict[str, Any]:
        self.registries[name] = CollectorRegistry()
        metrics = Metrics(self.registries[name], (name,) if name in AGENTS else ())
        if name == "consensus":
            for agent in AGENTS:
                metrics.add_voter(agent)
        return {
            "sensors": Sensors(metrics),
            "status": Status((name,) if name in AGENTS else AGENTS, self.settings.quorum),
            "log": structlog.wrap_logger(structlog.testing.ReturnLogger(), processors=[lambda *_: ""]),
            "options": Options(),
        }

    def _features(self) -> Process:
        def make() -> FeatureStage:
            return FeatureStage(
                limits_of(self.settings),
                fixed=True,
                warmup_bars=self.settings.warmup_bars,
                reader=FormatReader(rules_of(self.settings)),
            )

        return FeatureProcess(self.settings, self.stores["features"], make, **self._common("features"))

    def _agent(self, name: str) -> Process:
        shelf = Shelf(self.settings.models, load_options(self.settings))
        share, period_ms = self.settings.canary_share, round(self.settings.canary_hours * 3_600_000)

        def make(seats: Any, book: Any) -> AgentGroup:
            return AgentGroup(
                seats, book, quality=self.settings.quality, canary_share=share, canary_period_ms=period_ms
            )

        return AgentProcess(self.settings, name, self.stores[name], make, shelf, {}, **self._common(name))

    def _consensus(self) -> Process:
        def make() -> ConsensusStage:
            return ConsensusStage(len(AGENTS), quorum=self.settings.quorum, ensemble=self.settings.ensemble)

        def thresholds() -> dict[str, float]:
            found: dict[str, float] = {}
            for agent in AGENTS:
                found |= read_thresholds(self.stores[agent].state.get(THRESHOLDS, {}))
            return found

        store = self.stores["consensus"]
        return ConsensusProcess(self.settings, store, make, thresholds, lambda: self.now_s, **self._common("consensus"))

    def close(self) -> None:
        for one in self.stages.values():
            one._close()
            if isinstance(one, AgentProcess):
                one.group.voting.close()

    # ------------------------------------------------------------------ by hand

    def turn(self, *names: str) -> None:
        """Let these stages work, or all of them, until a whole round changes nothing and no model is being loaded."""
        wait_for(lambda: self._is_done(names))

    def _is_done(self, names: Sequence[str]) -> bool:
        """One round of turns; whether it found nothing to do. Some rounds more than any test has batches for."""
        for _ in range(ROUNDS):
            before = self._ends()
            for name in names or self.stages:
                one = self.stages[name]
                one._orders_at = -1.0
                one._idle_since = one._idle_since or 0.0
                one._turn()
            waiting = any(getattr(one, "steering", None) and one.steering.waiting for one in self.stages.values())
            if waiting:
                return False
            if self._ends() == before:
                return True
        pytest.fail(f"after {ROUNDS} rounds there is still something to do")

    def _ends(self) -> Any:
        positions = {name: store.position.encode() for name, store in self.stores.items()}
        return dict(self.streams.added), positions

    def feed(self, bars: Iterable[Mapping[bytes, bytes]], *names: str) -> None:
        """Under IDs that are the same in every run; then the stages `names` work, or all."""
        for fields in bars:
            self.streams.add(KEYS.bars, fields, f"{1_750_000_000_000 + self._bars}-0")
            self._bars += 1
        self.turn(*names)

    def wait(self, seconds: float, *names: str) -> None:
        """Let the clock run on, and `names` see it as often as they look."""
        until_s = self.now_s + seconds
        while self.now_s < until_s:
            self.now_s = min(self.now_s + WAIT_S, until_s)
            self.turn(*names)

    def order(self, order: Order) -> list[dict[str, Any]]:
        """Give one order and turn; the events that answer it."""
        entry_id = self.streams.add(KEYS.control, {b"data": order.encode()})
        self.turn()
        return [event for event in self.read(KEYS.events) if event["evidence"].get("order") == entry_id]

    def read(self, key: str) -> list[dict[str, Any]]:
        return [json.loads(fields[b"data"]) for _, fields in self.streams.after(key, "0-0")]

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        return [event for event in self.read(KEYS.events) if event["kind"] in kinds]

    def signals(self) -> list[dict[str, Any]]:
        return self.read(KEYS.signals)

    def value(self, stage: str, name: str, **labels: str) -> float | None:
        return self.registries[stage].get_sample_value(f"quartet_{name}", labels)

    def outputs(self) -> dict[str, Any]:
        """IDs and bytes of everything that bars gave."""
        keys = [KEYS.features, KEYS.signals, *map(KEYS.votes, (*AGENTS, "xgboost_canary"))]
        return {key: list(self.streams.after(key, "0-0")) for key in keys}
