"""The scoreboard and the watch over the ensemble, against lists, whatever the batches and restarts."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.messages import AGENTS, Action, AgentState, Bar, Status
from worker.batches import STATE_CODE, Ballot, Signals, Vectors
from worker.ensemble import EnsembleWatch
from worker.intake import Accepted
from worker.quality import EnsembleLimits
from worker.scoreboard import CONSENSUS, SLOTS, Scoreboard

MINUTE_MS = 60_000
T0 = 1_767_225_600_000
THRESHOLDS = {"xgboost": 0.004, "nhits": 0.002}
AGENTS_HERE = ("xgboost", "nhits")
Vote = tuple[Action, float]


@dataclass
class Row:
    """One accepted bar. `votes` by agent, empty where the vector was not ready; `signal` is the decision."""

    series: int
    ts: int
    close: float
    restart: bool = False
    votes: dict[str, Vote] = field(default_factory=dict)
    signal: tuple[Action, float, Status] = (Action.HOLD, 0.0, Status.BELOW_QUORUM)


def batch(rows: list[Row]) -> tuple[Vectors, list[Ballot], Signals]:
    bars = [Bar(f"S{r.series}", r.ts, "1m", r.close, r.close, r.close, r.close, 1.0) for r in rows]
    no = np.zeros(len(rows), np.bool_)
    accepted = Accepted(
        *([f"{r.ts}-0" for r in rows], [r.ts for r in rows], bars),
        *(np.array([r.series for r in rows], np.int64), np.array([bar.ohlcv for bar in bars])),
        *(np.array([r.restart for r in rows], np.bool_), no, no),
    )
    index = np.array([i for i, r in enumerate(rows) if r.votes], np.int64)
    voted = [rows[i] for i in index]
    vectors = Vectors(accepted, ("x",), np.zeros((len(rows), 1)), {"v3": ~no}, index)
    ballots = [ballot(agent, [r.votes[agent] for r in voted]) for agent in AGENTS_HERE]
    return vectors, ballots, decisions([r.signal for r in voted])


def ballot(agent: str, votes: list[Vote], states: list[AgentState] | None = None) -> Ballot:
    n = len(votes)
    return Ballot(
        *(agent, "1", 0.5, np.array([a for a, _ in votes], np.int8), np.array([c for _, c in votes], np.float64)),
        *(None, np.ones(n, np.bool_)),
        np.array([STATE_CODE[s] for s in states or [AgentState.ACTIVE] * n], np.int8),
        (None,) * n,
    )


def decisions(made: list[tuple[Action, float, Status]], agreeing: list[int] | None = None, voting: int = 2) -> Signals:
    n = len(made)
    counts = np.full(n, voting)
    return Signals(
        *(np.array([a for a, _, _ in made], np.int8), np.array([c for _, c, _ in made], np.float64), np.ones(n)),
        *(counts, counts, counts, np.array(agreeing or [voting] * n)),
        *(tuple(str(s) for _, _, s in made), np.zeros((n, 2)), 2, 2),
    )


class Naive:
    """Each series a list; every vote looked up when its twelfth bar comes."""

    def __init__(self, window: int) -> None:
        self.series: dict[int, list[Row]] = {}
        self.scored: deque[tuple[float, Row]] = deque(maxlen=window)

    def take(self, row: Row) -> None:
        seen = self.series.setdefault(row.series, [])
        if seen and (row.restart or row.ts != seen[-1].ts + MINUTE_MS):
            seen.clear()
        seen.append(row)
        if len(seen) > 12 and seen[-13].votes:
            then = seen[-13]
            if any(a is not Action.ABSTAIN for a, _ in then.votes.values()) or then.signal[2] in ("ok", "hold"):
                self.scored.append((row.close / then.close - 1.0, then))

    def votes_of(self, agent: str) -> list[tuple[float, Action, float]]:
        found = []
        for r, row in self.scored:
            action, confidence = row.votes[agent] if agent != CONSENSUS else row.signal[:2]
            named = action is not Action.ABSTAIN if agent != CONSENSUS else row.signal[2] in ("ok", "hold")
            if named:
                found.append((r, action, confidence))
        return found

    def expect(self, agent: str) -> dict[str, float | None]:
        threshold = THRESHOLDS.get(agent, 0.003)
        votes = self.votes_of(agent)
        acted = [(r, a) for r, a, _ in votes if a is not Action.HOLD]
        signed = [r if a is Action.BUY else -r for r, a in acted]
        right = [
            abs(r) <= threshold if a is Action.HOLD else (r > 0 if a is Action.BUY else r < 0) for r, a, _ in votes
        ]
        brier = [(c - float(ok)) ** 2 for (_, _, c), ok in zip(votes, right, strict=True)]
        return {
            "scored": len(votes),
            "acted": len(acted),
            "hit_ratio": float(np.mean([s > 0 for s in signed])) if signed else None,
            "signed_return_mean": float(np.mean(signed)) if signed else None,
            "brier_score": float(np.mean(brier)) if brier else None,
        }


def market(seed: int, n: int, gaps: bool = True) -> list[Row]:
    rng = random.Random(seed)
    close, ts, rows = {}, {}, []
    for _ in range(n):
        s = rng.randrange(2)
        close[s] = close.get(s, 100.0) * (1 + rng.choice((-0.003, -0.001, 0.0, 0.001, 0.003)))
        missing = 2 if gaps and rng.random() < 0.01 else 1
        ts[s] = ts.get(s, T0) + missing * MINUTE_MS
        row = Row(s, ts[s], close[s], restart=gaps and rng.random() < 0.005)
        if rng.random() < 0.9:
            row.votes = {a: (rng.choice(list(Action)), rng.random()) for a in AGENTS_HERE}
            status = rng.choice(list(Status))
            row.signal = (rng.choice((Action.BUY, Action.SELL)) if status == "ok" else Action.HOLD, 0.5, status)
        rows.append(row)
    return rows


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    n=st.integers(1, 260),
    sizes=st.lists(st.integers(1, 90), min_size=1, max_size=5),
    restarts=st.sets(st.integers(0, 30)),
)
def test_scores_are_those_of_lists_whatever_the_batches_and_restarts(
    seed: int, n: int, sizes: list[int], restarts: set[int]
) -> None:
    rows, window = market(seed, n), 60
    board, naive = Scoreboard(window=window), Naive(window)
    stored: dict[str, dict[bytes, bytes]] = {"pending": {}, "scores": {}}
    at = number = 0
    while at < n:
        if number in restarts:
            board = Scoreboard(window=window)
            board.restore(stored)
        size = sizes[number % len(sizes)]
        board.score(*batch(rows[at : at + size]), THRESHOLDS)
        for part, fields in board.changes().items():
            stored[part].update(fields)
        for row in rows[at : at + size]:
            naive.take(row)
        at, number = at + size, number + 1
    for agent in (*AGENTS_HERE, CONSENSUS):
        found, expected = board.scores(agent), naive.expect(agent)
        assert {name: getattr(found, name) for name in expected} == pytest.approx(expected, abs=1e-12)


def straight(closes: list[float], action: Action, confidence: float = 0.8) -> list[Row]:
    return [
        Row(0, T0 + i * MINUTE_MS, close, votes=dict.fromkeys(AGENTS_HERE, (action, confidence)))
        for i, close in enumerate(closes)
    ]


def test_a_vote_is_scored_on_the_twelfth_bar_after_it_not_before() -> None:
    closes = [100.0] * 12 + [101.0]
    board = Scoreboard()
    board.score(*batch(straight(closes[:12], Action.BUY)), THRESHOLDS)
    assert board.scores("xgboost").scored == 0
    board.score(*batch(straight(closes, Action.BUY)[12:]), THRESHOLDS)
    scores = board.scores("xgboost")
    assert (scores.scored, scores.acted, scores.hit_ratio) == (1, 1, 1.0)
    assert scores.signed_return_mean == pytest.approx(0.01)
    assert scores.brier_score == pytest.approx(0.04)


@pytest.mark.parametrize(
    ("action", "last", "right"),
    [
        (Action.BUY, 100.1, True),
        (Action.BUY, 99.9, False),
        (Action.SELL, 99.9, True),
        (Action.SELL, 100.0, False),
        (Action.HOLD, 100.39, True),
        (Action.HOLD, 100.41, False),
        (Action.HOLD, 99.59, False),
    ],
)
def test_buy_is_right_before_a_rise_sell_before_a_fall_hold_within_the_threshold(
    action: Action, last: float, right: bool
) -> None:
    """The threshold of xgboost is 0.4 %."""
    board = Scoreboard()
    board.score(*batch(straight([100.0] * 12 + [last], action)), THRESHOLDS)
    scores = board.scores("xgboost")
    assert scores.brier_score == pytest.approx(0.04 if right else 0.64)
    assert scores.hit_ratio == (None if action is Action.HOLD else float(right))


def test_a_missing_bar_drops_what_waits_in_its_series_only() -> None:
    rows = straight([100.0] * 24, Action.BUY)
    for row in rows[6:]:
        row.ts += MINUTE_MS
    board = Scoreboard()
    board.score(*batch(rows), THRESHOLDS)
    assert board.scores("xgboost").scored == 24 - 6 - 12


def test_muted_votes_are_scored_too_and_a_refused_agents_are_not() -> None:
    rows = straight([100.0] * 12 + [101.0], Action.BUY)
    vectors, _, signals = batch(rows)
    muted = ballot("xgboost", [(Action.BUY, 0.8)] * 13, [AgentState.MUTED] * 13)
    refused = ballot("nhits", [(Action.ABSTAIN, 0.0)] * 13, [AgentState.REFUSED] * 13)
    board = Scoreboard()
    board.score(vectors, [muted, refused], signals, THRESHOLDS)
    assert (board.scores("xgboost").scored, board.scores("nhits").scored) == (1, 0)


def test_every_agent_its_canary_and_the_consensus_have_a_place() -> None:
    assert list(SLOTS) == [*AGENTS, *(f"{agent}_canary" for agent in AGENTS), "consensus"]


# ---------------------------------------------------------------------- the ensemble


def say(*actions: Action) -> list[Ballot]:
    """One bar: what each of four agents votes."""
    return [ballot(agent, [(action, 0.7)]) for agent, action in zip(AGENTS, actions, strict=True)]


def one_signal(agreeing: int, voting: int) -> Signals:
    return decisions([(Action.HOLD, 0.5, Status.HOLD)], [agreeing], voting)


BAR = Bar("BTC", T0, "1m", 1.0, 1.0, 1.0, 1.0, 1.0)
ALL_BUY = say(*[Action.BUY] * 4)
OPPOSED = say(Action.BUY, Action.SELL, Action.HOLD, Action.HOLD)


def feed(watch: EnsembleWatch, seen: list[tuple[list[Ballot], int, int]]) -> list[tuple[int, str, str]]:
    """The events, with the index of the signal on which each came."""
    found = []
    for i, (ballots, agreeing, voting) in enumerate(seen):
        found += [(i, e.kind, e.reason) for e in watch.watch([BAR], ballots, one_signal(agreeing, voting))]
    return found


def test_agreement_at_its_bounds_is_no_concern_and_past_them_it_is_an_event_once() -> None:
    held = [(ALL_BUY, 4, 4)] * 40 + [(ALL_BUY, 3, 4)] * 160  # (40 + 120) / 200 is 80 %
    assert feed(EnsembleWatch(), held) == []
    tripped = [(ALL_BUY, 4, 4)] * 41 + [(ALL_BUY, 3, 4)] * 159
    assert feed(EnsembleWatch(), tripped) == [(199, "ensemble_outside", "agreement_high")]
    low = [(ALL_BUY, 3, 4)] * 40 + [(ALL_BUY, 2, 4)] * 160  # 55 %
    assert feed(EnsembleWatch(), low) == []
    assert feed(EnsembleWatch(), low[1:] + low[-1:]) == [(199, "ensemble_outside", "agreement_low")]


def test_buy_and_sell_in_over_a_fifth_of_the_bars_is_a_concern() -> None:
    held = [(OPPOSED, 3, 4)] * 40 + [(ALL_BUY, 3, 4)] * 160
    assert feed(EnsembleWatch(), held) == []
    tripped = [(OPPOSED, 3, 4)] * 41 + [(ALL_BUY, 3, 4)] * 159
    watch = EnsembleWatch()
    assert feed(watch, tripped) == [(199, "ensemble_outside", "hard_disagreement")]
    assert watch.hard_disagreement_ratio == 0.205
    assert feed(watch, [(ALL_BUY, 3, 4)] * 400)[0] == (4, "ensemble_inside", "hard_disagreement")  # 41 of 205


def test_muted_agents_and_lone_voters_say_nothing_about_agreement() -> None:
    watch = EnsembleWatch()
    muted = [ballot(a, [(x, 0.7)], [s]) for a, x, s in zip(
        AGENTS, (Action.BUY, Action.SELL, Action.BUY, Action.BUY),
        (AgentState.ACTIVE, AgentState.MUTED, AgentState.ACTIVE, AgentState.ACTIVE), strict=True)]  # fmt: skip
    feed(watch, [(muted, 3, 3)] * 10 + [(ALL_BUY, 1, 1)] * 10 + [(ALL_BUY, 0, 0)] * 10)
    assert (watch.signals, watch.hard_disagreement_ratio, watch.agreement_ratio) == (10, 0.0, 1.0)


@settings(max_examples=60, deadline=None)
@given(
    seen=st.lists(st.tuples(st.sampled_from([1, 2, 3, 4]), st.integers(1, 4), st.booleans()), max_size=150),
    size=st.integers(1, 40),
    restart=st.integers(0, 150),
)
def test_the_ratios_are_exact_over_the_window_whatever_the_restarts(
    seen: list[tuple[int, int, bool]], size: int, restart: int
) -> None:
    rows = [(OPPOSED if hard else ALL_BUY, min(agreeing, voting), voting) for agreeing, voting, hard in seen]
    limits = EnsembleLimits(minimum=20)
    watch, whole = EnsembleWatch(limits, window=size), EnsembleWatch(limits, window=size)
    expected = feed(whole, rows)
    before = feed(watch, rows[:restart])
    again = EnsembleWatch(limits, window=size)
    again.restore(dict(watch.changes()))
    assert before + [(i + len(rows[:restart]), *rest) for i, *rest in feed(again, rows[restart:])] == expected
    counted = [row for row in rows if row[2] >= 2][-size:]
    assert again.signals == len(counted)
    if counted:
        assert again.agreement_ratio == pytest.approx(np.mean([a / v for _, a, v in counted]))
        assert again.hard_disagreement_ratio == np.mean([ballots is OPPOSED for ballots, _, _ in counted])
