"""What makes a worker ready, a condition at a time: real pipelines, bars under chosen IDs, a clock set by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest

from streams.messages import Entry
from streams.validation import interval_ms
from tests.worker.small import falling, seat
from worker.http import Condition
from worker.pipeline import Pipeline
from worker.status import Status

START_MS = 1_767_225_600_000
"""The open of the first bar of every series: 2026-01-01, midnight UTC."""

AGENTS = ("xgboost", "lightgbm", "nhits")
WARM_UP = 50
WINDOW = 10


class Scene:
    """A pipeline over bars that arrive when they close unless said otherwise; `now_ms` is the clock of its status.

    `nhits` needs 10 ready vectors of a series, the others one: on a young series it has no history.
    """

    def __init__(self, quorum: int = 3) -> None:
        self.now_ms = START_MS
        seats = [seat("xgboost"), seat("lightgbm", falling), seat("nhits", window=WINDOW)]
        self.pipeline = Pipeline(seats, quorum=quorum, warmup_bars={"v3": WARM_UP})
        self.status = Status(AGENTS, quorum, lambda: self.now_ms)
        self.status.server = self.status.owner = Condition(ok=True)
        self._seen: dict[tuple[str, str], int] = {}

    def entry(self, symbol: str, interval: str, entry_id: str | None) -> Entry:
        number = self._seen.get((symbol, interval), 0)
        self._seen[symbol, interval] = number + 1
        step = interval_ms(interval)
        ts = START_MS + number * step
        self.now_ms = max(self.now_ms, ts + step)
        close = 100 + math.sin(number) + number % 7
        plain = {
            "symbol": symbol,
            "ts": ts,
            "interval": interval,
            "open": 100,
            "close": close,
            "volume": 5 + number % 3,
        }
        plain |= {"high": max(100, close), "low": min(100, close)}
        return Entry(
            "bars", entry_id or f"{ts + step}-{len(symbol)}", {k.encode(): f"{v}".encode() for k, v in plain.items()}
        )

    def feed(self, *series: tuple[str, str], bars: int = 1, entry_id: str | None = None) -> None:
        """So many bars of each series in turn, as one batch, told as the worker tells them."""
        entries = [self.entry(symbol, interval, entry_id) for _ in range(bars) for symbol, interval in series]
        result = self.pipeline.process(entries, self.now_ms)
        assert len(result.accepted) == len(entries), result.rejects
        self.status.batch(result, healthy=self.pipeline.intake.health.healthy)
        self.status.agents(self.pipeline.agents)
        self.last = result

    def unmet(self) -> set[str]:
        """The conditions that keep the worker from being ready."""
        readiness = self.status.readiness()
        unmet = {name for name, condition in readiness.conditions.items() if not condition.ok}
        assert readiness.ready is not bool(unmet)
        return unmet

    def counts(self) -> dict[str, int]:
        return dict(self.status.readiness().counts)

    def detail(self, name: str) -> str:
        return self.status.readiness().conditions[name].detail


@pytest.fixture
def scene() -> Iterator[Scene]:
    """Ready: one series with all its history, whose last bar arrived just now."""
    made = Scene()
    made.feed(("OLD", "1m"), bars=80)
    yield made
    made.pipeline.voting.close()


@pytest.fixture
def fresh() -> Iterator[Scene]:
    """Nothing arrived yet."""
    made = Scene()
    yield made
    made.pipeline.voting.close()


def test_all_conditions_met_is_ready_and_the_counts_are_those_of_the_signal(scene: Scene) -> None:
    assert scene.unmet() == set()
    assert scene.counts() == {"configured": 3, "loaded": 3, "eligible": 3, "voting": 3, "agreeing": 2}
    signals = scene.last.signals
    assert (signals.voting[-1], signals.agreeing[-1]) == (3, 2), "as the consensus itself counts them"


def test_a_new_worker_is_not_ready_and_says_of_each_condition_why() -> None:
    readiness = Status(AGENTS, 3).readiness()
    assert {name for name, condition in readiness.conditions.items() if not condition.ok} == {
        "redis", "owner", "warm_up", "fresh_bar", "quorum"
    }  # fmt: skip
    assert all(condition.detail for condition in readiness.conditions.values() if not condition.ok)
    assert readiness.counts == {"configured": 3, "loaded": 0, "eligible": 0, "voting": 0, "agreeing": 0}


def test_without_the_server_it_is_not_ready(scene: Scene) -> None:
    scene.status.server = Condition(ok=False, detail="away")
    assert scene.unmet() == {"redis"}


def test_a_standby_is_not_ready(scene: Scene) -> None:
    scene.status.owner = Condition(ok=False, detail="standing by")
    assert scene.unmet() == {"owner"}


def test_in_the_warm_up_it_is_not_ready(fresh: Scene) -> None:
    fresh.feed(("OLD", "1m"), bars=WARM_UP - 1)
    assert fresh.unmet() == {"warm_up", "quorum"}


def test_a_feed_with_too_many_rejects_makes_it_unready(scene: Scene) -> None:
    scene.status.feed(healthy=False)
    assert scene.unmet() == {"feed"}
    scene.status.feed(healthy=True)
    assert scene.unmet() == set()


# ---------------------------------------------------------------------- fresh bars


def test_a_bar_is_fresh_for_three_intervals_after_it_arrived_and_not_longer(scene: Scene) -> None:
    arrived = scene.now_ms
    scene.now_ms = arrived + 180_000
    assert scene.unmet() == set()
    scene.now_ms += 1
    assert scene.unmet() == {"fresh_bar"}
    scene.now_ms = arrived + 200_000
    assert scene.detail("fresh_bar") == "the last bar of 1m arrived 200 s ago, the limit is 180 s"


def test_bars_that_arrived_long_ago_are_not_fresh_because_they_are_processed_now(scene: Scene) -> None:
    """A backlog of history: what counts is when an entry came to the stream."""
    scene.now_ms = START_MS + 500 * 86_400_000
    scene.feed(("OLD", "1m"))
    assert scene.unmet() == {"fresh_bar"}


def test_an_id_that_is_no_time_counts_as_old(fresh: Scene) -> None:
    fresh.feed(("OLD", "1m"), bars=80, entry_id="7-1")
    assert fresh.unmet() == {"fresh_bar"}


def test_an_id_from_the_future_counts_as_now_and_does_not_stay_fresh(scene: Scene) -> None:
    scene.feed(("OLD", "1m"), entry_id=f"{scene.now_ms * 1_000_000}-0")
    assert scene.unmet() == set()
    scene.now_ms += 180_001
    assert scene.unmet() == {"fresh_bar"}


def test_a_daily_bar_does_not_hide_a_feed_of_minutes_that_is_dead(scene: Scene) -> None:
    scene.now_ms += 10 * 60_000
    scene.feed(("DAILY", "1d"), entry_id=f"{scene.now_ms}-0")
    assert "fresh_bar" in scene.unmet()
    assert scene.detail("fresh_bar").startswith("the last bar of 1m arrived ")


def test_a_bar_of_the_minute_in_the_same_batch_is_seen_beside_a_daily_one(fresh: Scene) -> None:
    fresh.feed(("M", "1m"), ("D", "1d"), bars=1)
    assert fresh.status.last_arrival == ("1m", START_MS + 60_000)


# ---------------------------------------------------------------------- the quorum


def test_one_newly_listed_symbol_does_not_make_a_healthy_worker_unready(scene: Scene) -> None:
    """Its last signal is below quorum, as the network has no history of it; the worker is as well as before."""
    scene.feed(("NEW", "1m"), bars=WARM_UP + 2)
    scene.feed(("OLD", "1m"), ("NEW", "1m"))
    assert scene.last.signals.voting.tolist() == [3, 2]
    assert scene.unmet() == set()
    assert scene.counts()["voting"] == 3


def test_a_series_that_fell_silent_does_not_stand_for_the_worker(scene: Scene) -> None:
    silent_ms = scene.now_ms
    scene.feed(("NEW", "1m"), bars=WARM_UP)
    for minutes in (3, 4):
        scene.now_ms = silent_ms + minutes * 60_000
        scene.feed(("NEW", "1m"), entry_id=f"{scene.now_ms}-0")
        assert scene.counts()["voting"] == {3: 3, 4: 2}[minutes], "the full votes of OLD count for 3 intervals"
    assert scene.unmet() == {"quorum"}
    assert scene.detail("quorum") == "2 voting, quorum 3"


def test_a_daily_series_does_not_stand_for_minutes_on_which_few_vote(fresh: Scene) -> None:
    fresh.feed(("DAILY", "1d"), bars=80)
    assert fresh.counts()["voting"] == 3
    fresh._seen["NEW", "1m"] = 80 * 1440
    fresh.feed(("NEW", "1m"), bars=WARM_UP)
    assert fresh.counts()["voting"] == 2
    assert "quorum" in fresh.unmet()


def test_a_muted_agent_leaves_the_count_at_once_before_any_further_bar(scene: Scene) -> None:
    scene.pipeline.safeguard.mute("lightgbm")
    scene.status.agents(scene.pipeline.agents)
    assert scene.counts() == {"configured": 3, "loaded": 3, "eligible": 2, "voting": 2, "agreeing": 2}
    assert scene.unmet() == {"quorum"}
    assert scene.status.vote is not None
    assert scene.status.vote.effective["lightgbm"] == 0


def test_many_series_are_judged_as_few(fresh: Scene) -> None:
    """More than there is room for at first, and the one with all its history is the last of them."""
    series = [(f"S{n}", "1m") for n in range(70)]
    fresh.feed(*series, bars=WARM_UP)
    assert fresh.counts()["voting"] == 2
    fresh.feed(series[-1], bars=WINDOW - 1)
    assert fresh.counts()["voting"] == 3
    assert fresh.unmet() == set()
