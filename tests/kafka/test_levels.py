"""Many partitions in one process: counts add up, gauges show the worst, and nothing of a lost partition stays."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping

import pytest
from aiokafka.errors import MessageSizeTooLargeError, NotEnoughReplicasError, TopicAuthorizationFailedError
from faust.exceptions import ProducerSendError
from faust.types import TP
from prometheus_client import CollectorRegistry

from streams.messages import AgentState
from streams.store import FencedError
from tests.helpers import wait_for
from worker.errors import CheckFailed, Unavailable, UsageError
from worker.http import Condition
from worker.kafka.engine import Engine
from worker.kafka.health import Health
from worker.kafka.levels import WORST_FIRST, Levels, worst
from worker.kafka.refusals import accepted
from worker.kafka.serving import serve
from worker.kafka.watchdog import Watchdog
from worker.logs import make_logger
from worker.metrics import Metrics
from worker.processes.base import Options
from worker.settings import Settings, load
from worker.status import Status

AGENTS = ("xgboost", "nhits")


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def levels(registry: CollectorRegistry) -> Levels:
    return Levels(Metrics(registry, AGENTS), AGENTS)


def state_of(registry: CollectorRegistry, agent: str) -> str:
    [held] = [s for s in AgentState if registry.get_sample_value("quartet_agent_state", {"agent": agent, "state": s})]
    return str(held)


def counts(voting: int) -> Mapping[str, int]:
    return {"configured": 2, "loaded": 2, "eligible": 2, "voting": voting}


def test_every_state_has_its_place_from_worst_to_best() -> None:
    assert set(WORST_FIRST) == set(AgentState)
    assert worst([AgentState.ACTIVE, AgentState.MUTED, AgentState.WARMING_UP]) is AgentState.MUTED


def test_counts_add_up_and_gauges_show_the_worst(levels: Levels, registry: CollectorRegistry) -> None:
    for partition, (state, voting, lag) in enumerate([(AgentState.ACTIVE, 2, 5), (AgentState.MUTED, 1, 7)]):
        metrics = levels.of(partition)
        metrics.bars("accepted", 10)
        metrics.last_bar(100.0 + partition)
        metrics.agent_state("nhits", state)
        metrics.ensemble(counts(voting))
        metrics.lag("bars", lag)
        metrics.quality("nhits", top_action=0.5 + partition / 10, hold=0.1, stddev=0.2 - partition / 10, p10_p90=0.3)
        metrics.scores("nhits", 9, 0.5 if partition else None, 0.1, 0.2 + partition)
        metrics.drift({"close": 1.0 + partition})
    value = registry.get_sample_value
    assert value("quartet_bars_total", {"outcome": "accepted"}) == 20
    assert state_of(registry, "nhits") == "muted"
    assert value("quartet_ensemble_agents", {"kind": "voting"}) == 1
    assert value("quartet_stream_lag", {"stream": "bars"}) == 12
    assert value("quartet_last_bar_timestamp_seconds") == 101
    assert value("quartet_agent_top_action_ratio", {"agent": "nhits"}) == 0.6
    assert value("quartet_agent_confidence_stddev", {"agent": "nhits"}) == 0.1
    assert value("quartet_agent_hit_ratio", {"agent": "nhits"}) == 0.5
    assert value("quartet_agent_brier_score", {"agent": "nhits"}) == 1.2
    assert value("quartet_feature_drift", {"feature": "close"}) == 2.0


def test_a_partition_without_a_bar_says_nothing_of_the_agents(levels: Levels, registry: CollectorRegistry) -> None:
    levels.of(0).agent_state("xgboost", AgentState.WARMING_UP)
    assert state_of(registry, "xgboost") == "warming_up"
    levels.of(1).agent_state("xgboost", AgentState.ACTIVE)
    levels.of(1).last_bar(1.0)
    assert state_of(registry, "xgboost") == "active"
    levels.of(0).last_bar(2.0)
    assert state_of(registry, "xgboost") == "warming_up"


def test_what_a_lost_partition_said_is_gone(levels: Levels, registry: CollectorRegistry) -> None:
    for partition, state in enumerate((AgentState.MUTED, AgentState.ACTIVE)):
        levels.of(partition).agent_state("xgboost", state)
        levels.of(partition).ensemble(counts(partition))
        levels.of(partition).lag("bars", 4)
        levels.of(partition).add_agent("xgboost_canary")
        levels.of(partition).last_bar(1.0)
    levels.forget(0)
    assert state_of(registry, "xgboost") == "active"
    assert registry.get_sample_value("quartet_stream_lag", {"stream": "bars"}) == 4
    canary = {"agent": "xgboost_canary", "state": "loading"}
    assert registry.get_sample_value("quartet_agent_state", canary) == 1
    levels.forget(1)
    assert state_of(registry, "xgboost") == "loading"
    assert registry.get_sample_value("quartet_ensemble_agents", {"kind": "voting"}) == 0
    assert registry.get_sample_value("quartet_ensemble_agents", {"kind": "configured"}) == 2
    assert registry.get_sample_value("quartet_stream_lag", {"stream": "bars"}) == 0
    assert registry.get_sample_value("quartet_agent_state", canary) is None


def status(*, feed: bool = True, arrived: bool = True) -> Status:
    made = Status(AGENTS, 1, now_ms=lambda: 1_000)
    made.server = made.owner = Condition(ok=True)
    made.feed(healthy=feed)
    made.last_arrival = ("1m", 900) if arrived else None
    return made


def test_a_worker_is_as_healthy_as_its_worst_partition_with_bars() -> None:
    health = Health(AGENTS)
    assert not health.readiness().ready
    health.group = Condition(ok=True)
    assert health.readiness().conditions["owner"].detail == "no partition is assigned to this worker"
    health.own({0: status(), 3: status(feed=False), 5: status(arrived=False)})
    told = health.readiness().conditions
    assert told["owner"].detail == "partitions 0, 3, 5"
    assert told["feed"] == Condition(ok=False, detail="partition 3: over 5 % rejects")
    assert told["fresh_bar"].ok
    assert told["kafka"].ok
    away = status()
    away.server = Condition(ok=False, detail="away")
    away.heartbeat = 1.0
    health.own({0: status(), 2: away})
    assert health.readiness().conditions["kafka"] == Condition(ok=False, detail="partition 2: away")
    assert health.last_beat() == 1.0


def test_the_watchdog_ends_what_stands_still_and_says_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    stalled, ended, asked = [0.0], threading.Event(), [0]
    codes: list[int] = []

    def stalled_s() -> tuple[str, float]:
        asked[0] += 1
        return "recovery", stalled[0]

    def end(code: int) -> None:
        codes.append(code)
        ended.set()

    watchdog = Watchdog(stalled_s, make_logger("info"), limit_s=60.0, every_s=0.001, end=end)
    watchdog.start()
    wait_for(lambda: asked[0] > 5)
    assert not codes
    stalled[0] = 61.0
    wait_for(ended.is_set)
    assert codes == [3]
    assert "recovery has stood still for 61 s, the limit is 60 s" in capsys.readouterr().err


def test_the_watchdog_ends_a_process_that_was_frozen_as_fenced_off(capsys: pytest.CaptureFixture[str]) -> None:
    """It may be the first thread that runs again, and everything looks stalled by then."""
    codes: list[int] = []
    ended = threading.Event()

    def stalled_s() -> tuple[str, float]:
        raise FencedError("this process stood still for 100 s")

    def end(code: int) -> None:
        codes.append(code)
        ended.set()

    Watchdog(stalled_s, make_logger("info"), every_s=0.001, end=end).start()
    wait_for(ended.is_set)
    assert codes == [75]
    assert "stood still for 100 s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (MessageSizeTooLargeError("1048577 bytes"), "max.message.bytes of the topic"),
        (TopicAuthorizationFailedError("denied"), "allow this worker to write to it"),
    ],
)
def test_what_the_broker_refuses_for_good_is_not_tried_again(error: Exception, remedy: str) -> None:
    """As aiokafka raises it, and as Faust wraps it; what passes by itself stays what it was."""

    async def write(error: Exception, cause: Exception | None = None) -> None:
        raise error from cause

    for call in (lambda: write(error), lambda: write(ProducerSendError("while sending"), error)):
        with pytest.raises(CheckFailed, match=f"refuses a record for topic quartet.features .*{remedy}"):
            asyncio.run(accepted("quartet.features", call()))
    with pytest.raises(NotEnoughReplicasError):
        asyncio.run(accepted("quartet.features", write(NotEnoughReplicasError())))


@pytest.mark.parametrize("broker", ["redis://localhost:6379", "kafka://localhost", "kafka://:9092", "localhost:9092"])
def test_a_broker_that_is_no_address_is_wrong_usage(broker: str) -> None:
    with pytest.raises(UsageError, match=r"broker \(flags\): expected kafka://HOST:PORT"):
        load(broker=broker)


@pytest.mark.parametrize(
    ("settings", "options", "says"),
    [
        ({"bars": ("candles-*",)}, Options(), "are for Redis"),
        ({}, Options(rebuild=True), "--rebuild is for Redis"),
        ({"namespace": "a/b"}, Options(), "cannot be a topic"),
    ],
)
def test_what_kafka_has_no_use_for_is_wrong_usage(settings: dict[str, object], options: Options, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        serve(Settings(broker="kafka://127.0.0.1:9", **settings), options, make_logger("info"))


def test_without_a_broker_the_worker_is_unavailable() -> None:
    with pytest.raises(Unavailable, match=r"no Kafka broker answers at 127\.0\.0\.1:9 "):
        serve(Settings(broker="kafka://127.0.0.1:9"), Options(), make_logger("info"))


def test_a_record_that_was_skipped_is_read_again_and_a_gap_that_stays_is_none() -> None:
    """Offsets as Faust may give them: doubles, a batch that it dropped, and the marker of a transaction."""
    sought: list[int] = []

    class Consumer:
        async def seek(self, _tp: TP, offset: int) -> None:
            sought.append(offset)

    async def taken(offsets: list[int]) -> list[int]:
        engine = Engine(Settings(broker="kafka://127.0.0.1:9"), "127.0.0.1:9", Options(), make_logger("info"))
        engine.app._consumer = Consumer()
        engine._sequencer.next[tp] = 3
        return [offset for offset in offsets if await engine._is_next(tp, offset)]

    tp = TP("quartet.bars", 0)
    assert asyncio.run(taken([2, 3, 4, 4, 3, 5])) == [3, 4, 5]
    assert sought == []
    assert asyncio.run(taken([7, 8, 9, 3, 4, 5, 6, 7])) == [3, 4, 5, 6, 7]
    assert sought == [3]
    assert asyncio.run(taken([3, 5, 6, 5, 6, 8, 9, 8, 9])) == [3, 5, 6, 8, 9]
    assert sought == [3, 4, 7]
