"""What the loop's sensors tell the metrics: the same as `/readyz`, over real pipelines and a clock set by hand."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry

from tests.worker.test_status import AGENTS, WARM_UP, Scene
from worker.metrics import ENSEMBLE, Metrics
from worker.sensors import Sensors


class Watched(Scene):
    """The scene with sensors, told as the worker tells them; `late_ms` is how far its clock is from the server's."""

    def __init__(self) -> None:
        super().__init__()
        self.registry = CollectorRegistry()
        self.sensors = Sensors(Metrics(self.registry, AGENTS))
        self.sensors.agents(self.pipeline)
        self.late_ms = 0

    def feed(self, *series: tuple[str, str], bars: int = 1, entry_id: str | None = None) -> None:
        super().feed(*series, bars=bars, entry_id=entry_id)
        self.sensors.batch(self.last, self.now_ms + self.late_ms)
        self.sensors.agents(self.pipeline)
        self.sensors.standing(self.status)

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"quartet_{name}", labels)

    def ensemble(self) -> dict[str, float | None]:
        return {kind: self.value("ensemble_agents", kind=kind) for kind in ENSEMBLE}


@pytest.fixture
def fresh() -> Iterator[Watched]:
    made = Watched()
    yield made
    made.pipeline.voting.close()


@pytest.fixture
def scene(fresh: Watched) -> Watched:
    """One series with all its history, whose last bar arrived just now."""
    fresh.feed(("OLD", "1m"), bars=80)
    return fresh


def test_the_configured_weight_is_there_before_the_first_signal(fresh: Watched) -> None:
    weights = [fresh.value("agent_weight", agent=agent, kind="configured") for agent in AGENTS]
    assert weights == [0.25, 0.25, 0.25]
    assert fresh.value("agent_weight", agent="nhits", kind="effective") is None, "nothing was decided yet"


def test_the_counts_are_those_of_readyz(scene: Watched) -> None:
    for _ in range(2):
        counts = scene.counts()
        assert scene.ensemble() == {kind: counts[kind] for kind in ENSEMBLE}
        scene.pipeline.safeguard.mute("lightgbm")
        scene.status.agents(scene.pipeline.agents)
        scene.sensors.standing(scene.status)
    assert scene.ensemble() == {"configured": 3, "loaded": 3, "eligible": 2, "voting": 2}
    assert scene.value("agent_weight", agent="lightgbm", kind="effective") == 0


def test_one_newly_listed_symbol_lowers_neither_voting_nor_a_weight(scene: Watched) -> None:
    scene.feed(("NEW", "1m"), bars=WARM_UP + 2)
    scene.feed(("OLD", "1m"), ("NEW", "1m"))
    assert scene.last.signals.voting.tolist() == [3, 2]
    assert scene.last.signals.effective[1].tolist() == pytest.approx([0.5, 0.5, 0.0])
    assert scene.ensemble()["voting"] == 3
    for agent in AGENTS:
        assert scene.value("agent_weight", agent=agent, kind="effective") == pytest.approx(1 / 3)


def test_the_last_bar_arrived_when_its_id_says_not_when_it_was_processed(scene: Watched) -> None:
    arrived_ms = scene.now_ms
    scene.now_ms += 500 * 86_400_000
    scene.feed(("OLD", "1m"), entry_id=f"{arrived_ms + 1_000}-0")
    assert scene.value("last_bar_timestamp_seconds") == (arrived_ms + 1_000) / 1000


def test_an_id_from_the_future_is_a_bar_of_now_and_one_that_is_no_time_is_old(fresh: Watched) -> None:
    assert fresh.value("last_bar_timestamp_seconds") == 0
    fresh.feed(("OLD", "1m"), entry_id="9-0")
    assert fresh.value("last_bar_timestamp_seconds") == 0.009
    fresh.feed(("OLD", "1m"), entry_id=f"{fresh.now_ms * 1_000_000}-0")
    assert fresh.value("last_bar_timestamp_seconds") == fresh.now_ms / 1000


def test_a_daily_bar_does_not_hide_when_the_last_minute_arrived(scene: Watched) -> None:
    minute_ms = scene.now_ms
    scene.now_ms += 600_000
    scene.feed(("DAILY", "1d"), entry_id=f"{scene.now_ms}-0")
    assert scene.value("last_bar_timestamp_seconds") == minute_ms / 1000


def test_a_latency_that_would_be_negative_is_counted_as_none(scene: Watched) -> None:
    """The two clocks are 5 ms apart."""
    before, total = (scene.value(f"bar_to_signal_seconds_{part}") for part in ("count", "sum"))
    scene.late_ms = -5
    scene.feed(("OLD", "1m"))
    assert before is not None
    assert scene.value("bar_to_signal_seconds_count") == before + 1
    assert scene.value("bar_to_signal_seconds_sum") == total


def test_a_bar_of_long_ago_was_not_live_and_has_no_latency(scene: Watched) -> None:
    before = scene.value("bar_to_signal_seconds_count")
    scene.late_ms = 2 * 86_400_000
    scene.feed(("OLD", "1m"))
    assert scene.value("bar_to_signal_seconds_count") == before
