"""The safeguard against a naive one written from its description, row by row, whatever the batches and restarts."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.codec import StateCorruptError
from streams.messages import Action, AgentState, Bar, Reason
from worker.batches import STATE_CODE, STATES, Ballot, Vectors
from worker.intake import Accepted
from worker.qsc import Safeguard, criteria_of
from worker.quality import CRITERIA, QualityLimits

DAY_MS = 86_400_000
T0 = 1_767_225_600_000
ACTIVE = STATE_CODE[AgentState.ACTIVE]

Row = tuple[Action, float, tuple[float, ...], str | None, int]
"""Action, confidence, outputs, reason of an abstention, and which inputs."""


@dataclass
class Naive:
    """The description, literally: everything computed anew from lists at every attempt."""

    limits: QualityLimits
    window: int
    attempts: list[tuple[Row, int]] = field(default_factory=list)
    muted: str | None = None
    locked: bool = False
    fresh_from: int = 0
    readmitted: list[int] = field(default_factory=list)

    def step(self, row: Row, ts: int) -> tuple[str, str | None, list[Reason], str]:
        """State, reason, violations, and what happened."""
        if row[0] is Action.ABSTAIN and row[3] == "insufficient_history":
            return self._state(row), self._reason(row), [], ""
        self.attempts.append((row, ts))
        violated = self._violations()
        happened = ""
        if Reason.CONSTANT_OUTPUT in violated or self._run_of_failures() >= self.limits.non_finite_run:
            self.fresh_from = len(self.attempts)
        if self.muted is None and violated:
            self.muted, self.fresh_from, happened = violated[0], len(self.attempts), "agent_muted"
        elif self.muted and not violated and not self.locked and self._mended():
            recent = [t for t in self.readmitted if ts - t < DAY_MS]
            if len(recent) >= 3:
                self.locked, happened = True, "agent_locked"
            else:
                self.readmitted.append(ts)
                self.muted, happened = None, "agent_readmitted"
        return self._state(row), self._reason(row), violated, happened

    def _votes(self) -> list[Row]:
        return [row for row, _ in self.attempts[-self.window :] if row[0] is not Action.ABSTAIN]

    def _mended(self) -> bool:
        """A fresh full window in which there are votes enough to judge."""
        fresh = len(self.attempts) - self.fresh_from >= self.window
        return fresh and len(self._votes()) >= self.limits.minimum

    def _run_of_failures(self) -> int:
        trailing = 0
        for row, _ in reversed(self.attempts):
            if row[3] != "non_finite_output":
                break
            trailing += 1
        return trailing

    def _state(self, row: Row) -> str:
        if self.muted:
            return "muted"
        return "shadow" if self.limits.probation == "shadow" and len(self._votes()) < self.limits.minimum else "active"

    def _reason(self, row: Row) -> str | None:
        return row[3] if row[0] is Action.ABSTAIN else self.muted

    def _violations(self) -> list[Reason]:
        rows = [row for row, _ in self.attempts[-self.window :]]
        votes = [row for row in rows if row[0] is not Action.ABSTAIN]
        limits, found = self.limits, []
        if len(votes) >= limits.minimum:
            buys = sum(v[0] is Action.BUY for v in votes)
            sells = sum(v[0] is Action.SELL for v in votes)
            holds = len(votes) - buys - sells
            confidence = np.array([v[1] for v in votes])
            low, high = np.quantile(confidence, [0.1, 0.9])
            found += [Reason.ACTION_COLLAPSE] * (max(buys, sells) / len(votes) > limits.action_share)
            found += [Reason.DEAD_ZONE] * (holds / len(votes) > limits.hold_share)
            found += [Reason.FLAT_CONFIDENCE] * bool(np.std(confidence, ddof=1) < limits.confidence_stddev)
            found += [Reason.NARROW_RANGE] * bool(high - low < limits.confidence_range)
            found += [Reason.CONSTANT_OUTPUT] * (self._same_outputs() >= limits.constant_run)
        reasons = [row[3] for row in rows]
        share = reasons.count("non_finite_output") / len(rows)
        scattered = len(rows) >= limits.minimum and share > limits.non_finite_share
        found += [Reason.NON_FINITE_OUTPUT] * (scattered or self._run_of_failures() >= limits.non_finite_run)
        if len(rows) >= limits.minimum:
            found += [Reason.ERROR_RATE] * (reasons.count("error_rate") / len(rows) > limits.error_share)
            found += [Reason.DEADLINE_MISSED] * (reasons.count("deadline_missed") / len(rows) > limits.deadline_share)
            found += [Reason.STALE] * (reasons.count("stale") / len(rows) > limits.stale_share)
        return found

    def _same_outputs(self) -> int:
        """The last run of equal outputs, counting only votes whose inputs differ from the attempt before."""
        run, first, before = 0, None, None
        for row, _ in self.attempts:
            if row[0] is not Action.ABSTAIN:
                if first is None or max(abs(a - b) for a, b in zip(row[2], first, strict=True)) > 1e-9:
                    run, first = 1, row[2]
                elif row[4] != before:
                    run += 1
            before = row[4]
        return run


STYLES = ("healthy", "collapse", "hold", "flat", "constant", "frozen", "nan", "error", "deadline", "stale", "short")


def rows_of(style: str, n: int, seed: int) -> list[Row]:
    """`n` rows in one manner. Confidences are multiples of 1/64, so that shares and quantiles hit limits exactly."""
    rng = random.Random(seed)
    failures = {"nan": "non_finite_output", "error": "error_rate", "deadline": "deadline_missed"}
    failures |= {"stale": "stale", "short": "insufficient_history"}
    rows: list[Row] = []
    for _ in range(n):
        action = rng.choice((Action.SELL, Action.HOLD, Action.BUY))
        confidence, outputs, inputs = rng.randrange(16, 64) / 64, (rng.gauss(0, 1),), rng.randrange(10**6)
        if style in failures:
            rows.append((Action.ABSTAIN, 0.0, (0.0,), failures[style], inputs))
            continue
        action = {"collapse": Action.BUY, "hold": Action.HOLD, "frozen": Action.SELL}.get(style, action)
        confidence = 0.5 + rng.randrange(2) / 64 if style == "flat" else confidence
        outputs = (0.25,) if style in ("constant", "frozen") else outputs
        rows.append((action, confidence, outputs, None, 5 if style == "frozen" else inputs))
    return rows


def vectors_and_ballot(rows: list[Row], ts: list[int], agent: str = "nhits") -> tuple[Vectors, Ballot]:
    n = len(rows)
    bars = [Bar("BTC", t, "1m", 1.0, 1.0, 1.0, 1.0, 1.0) for t in ts]
    no = np.zeros(n, np.bool_)
    accepted = Accepted([f"{t}-0" for t in ts], ts, bars, np.zeros(n, np.int64), np.ones((n, 5)), no, no, no)
    inputs = np.array([[row[4]] for row in rows], np.float64).reshape(n, 1)
    vectors = Vectors(accepted, ("x",), inputs, {"v3": ~no}, np.arange(n))
    answered = np.array([row[0] is not Action.ABSTAIN for row in rows], np.bool_)
    outputs = np.array([row[2] for row in rows], np.float64).reshape(n, -1)
    outputs[~answered] = np.nan
    return vectors, Ballot(
        agent=agent,
        version="1",
        weight=0.25,
        action=np.array([row[0] for row in rows], np.int8),
        confidence=np.array([row[1] for row in rows], np.float64),
        outputs=outputs,
        answered=answered,
        state=np.full(n, ACTIVE, np.int8),
        reason=tuple(row[3] for row in rows),
    )


def run(
    guard: Safeguard,
    rows: list[Row],
    ts: list[int],
    sizes: list[int],
    restarts: set[int],
    limits: QualityLimits,
    window: int,
) -> tuple[list[tuple[str, str | None]], list[tuple[str, str]]]:
    """State and reason of every row, and the events, with a restart from what was stored before some batches."""
    stored: dict[bytes, bytes] = {}
    states, events, at, batch = [], [], 0, 0
    while at < len(rows):
        if batch in restarts:
            guard = Safeguard({"nhits": limits}, window=window)
            guard.restore(stored)
        size = sizes[batch % len(sizes)]
        vectors, ballot = vectors_and_ballot(rows[at : at + size], ts[at : at + size])
        (judged,), found = guard.watch(vectors, [ballot])
        states += [(str(STATES[s]), r) for s, r in zip(judged.state, judged.reason, strict=True)]
        events += [(event.kind, event.bar_id) for event in found]
        stored |= dict(guard.changes())
        at, batch = at + size, batch + 1
    return states, events


@settings(max_examples=150, deadline=None)
@given(
    segments=st.lists(st.tuples(st.sampled_from(STYLES), st.integers(1, 60)), min_size=1, max_size=12),
    seed=st.integers(0, 2**16),
    sizes=st.lists(st.integers(1, 70), min_size=1, max_size=5),
    restarts=st.sets(st.integers(0, 40)),
    step_ms=st.sampled_from([60_000, 3_600_000]),
    shadow=st.booleans(),
    lenient=st.booleans(),
)
def test_every_row_and_every_transition_are_the_naive_ones(
    segments: list[tuple[str, int]],
    seed: int,
    sizes: list[int],
    restarts: set[int],
    step_ms: int,
    shadow: bool,
    lenient: bool,
) -> None:
    limits = QualityLimits(minimum=15, constant_run=12, non_finite_run=7, probation="shadow" if shadow else "vote")
    if lenient:  # failures do not count, so that only the want of votes keeps a muted agent muted
        limits = replace(limits, non_finite_share=1.0, error_share=1.0, deadline_share=1.0, stale_share=1.0)
    window = 40
    rows = [row for place, (style, n) in enumerate(segments) for row in rows_of(style, n, seed + place)]
    ts = [T0 + i * step_ms for i in range(len(rows))]
    naive = Naive(limits, window)
    expected = [naive.step(row, t) for row, t in zip(rows, ts, strict=True)]
    guard = Safeguard({"nhits": limits}, window=window)
    states, events = run(guard, rows, ts, sizes, restarts, limits, window)
    assert states == [(state, reason) for state, reason, _, _ in expected]
    bar_ids = [f"BTC|1m|{t}" for t in ts]
    assert events == [(kind, bar) for (*_, kind), bar in zip(expected, bar_ids, strict=True) if kind]


@settings(max_examples=40, deadline=None)
@given(styles=st.lists(st.sampled_from(STYLES), min_size=1, max_size=8), seed=st.integers(0, 2**16))
def test_figures_are_those_of_numpy_over_the_window(styles: list[str], seed: int) -> None:
    rows = [row for place, style in enumerate(styles) for row in rows_of(style, 17, seed + place)]
    guard = Safeguard(window=40)
    guard.watch(*_one(rows))
    quality = guard.quality("nhits")
    attempts = [row for row in rows if row[3] != "insufficient_history"][-40:]
    votes = [row for row in attempts if row[3] is None]
    assert (quality.attempts, quality.votes) == (len(attempts), len(votes))
    if votes:
        confidence = np.array([row[1] for row in votes])
        deviation = np.std(confidence, ddof=1) if len(votes) > 1 else 0.0
        assert quality.figures[Reason.FLAT_CONFIDENCE] == pytest.approx(deviation, abs=1e-15)
        spread = np.quantile(confidence, 0.9) - np.quantile(confidence, 0.1)
        assert quality.figures[Reason.NARROW_RANGE] == pytest.approx(spread, abs=1e-15)
        assert quality.figures[Reason.DEAD_ZONE] == sum(row[0] is Action.HOLD for row in votes) / len(votes)
    else:
        assert np.isnan(quality.figures[Reason.DEAD_ZONE])


def _one(rows: list[Row], agent: str = "nhits", step_ms: int = 60_000, start: int = T0) -> tuple[Vectors, list[Ballot]]:
    vectors, ballot = vectors_and_ballot(rows, [start + i * step_ms for i in range(len(rows))], agent)
    return vectors, [ballot]


def states_of(guard: Safeguard, rows: list[Row], **how: int) -> tuple[list[str], list[tuple[int, str]]]:
    """States by row, and the events with the row on which they happened."""
    vectors, ballots = _one(rows, **how)
    (judged,), events = guard.watch(vectors, ballots)
    places = {bar.bar_id: i for i, bar in enumerate(vectors.accepted.bars)}
    return [str(STATES[s]) for s in judged.state], [(places[e.bar_id], e.kind) for e in events]


def test_a_collapse_mutes_on_the_200th_vote_and_500_clean_ones_bring_it_back() -> None:
    rows = rows_of("collapse", 200, 1) + rows_of("healthy", 500, 2)
    states, events = states_of(Safeguard(), rows)
    assert events == [(199, "agent_muted"), (699, "agent_readmitted")]
    assert states == ["active"] * 199 + ["muted"] * 500 + ["active"]


def test_the_inputs_of_an_agent_are_what_its_model_reads_and_not_what_others_do() -> None:
    """The market stands still and only the volume moves: a model that does not read it must answer the same."""
    vectors, (ballot,) = _one(rows_of("constant", 250, 1))
    still = np.full((250, 1), 7.0)
    beside = replace(vectors, names=("volume", "close"), values=np.concatenate([vectors.values, still], axis=1))
    for features, muted in ((("close",), 0), (("close", "volume"), 1), ((), 1)):
        _, events = Safeguard().watch(beside, [replace(ballot, features=features)])
        assert [event.reason for event in events] == ["constant_output"] * muted, features


def test_a_muted_vote_keeps_its_action_confidence_and_outputs() -> None:
    rows = rows_of("collapse", 210, 1)
    vectors, (ballot,) = _one(rows)
    (judged,), _ = Safeguard().watch(vectors, [ballot])
    assert (judged.state[199:] == STATE_CODE[AgentState.MUTED]).all()
    assert judged.action is ballot.action
    assert judged.confidence is ballot.confidence
    assert judged.outputs is ballot.outputs
    assert set(judged.reason[199:]) == {"action_collapse"}


def test_an_agent_that_fails_on_19_of_20_bars_is_muted_and_stays_so() -> None:
    """No run of it reaches 20, and under 200 votes nothing else can be judged: the share of failures says it."""
    rows = (rows_of("nan", 19, 1) + rows_of("healthy", 1, 2)) * 80
    states, events = states_of(Safeguard(), rows)
    assert events == [(199, "agent_muted")]
    assert set(states[199:]) == {"muted"}


def test_an_agent_that_collapsed_is_not_readmitted_on_attempts_that_cannot_be_judged() -> None:
    """500 attempts after it was muted, of which 160 are votes: too few to say that it mended. 200 are enough."""
    limits = {"nhits": QualityLimits(error_share=1.0)}
    mostly = rows_of("error", 17, 3) + rows_of("healthy", 8, 4)
    rows = rows_of("collapse", 200, 1) + mostly * 40
    states, events = states_of(Safeguard(limits), rows)
    assert (events, set(states[199:])) == ([(199, "agent_muted")], {"muted"})
    half = rows_of("error", 15, 5) + rows_of("healthy", 10, 6)
    _, events = states_of(Safeguard(limits), rows_of("collapse", 200, 1) + half * 40)
    assert events == [(199, "agent_muted"), (699, "agent_readmitted")]


def test_a_run_of_failures_starts_the_fresh_window_over() -> None:
    """It leaves no trace in the shares, so it must not be forgotten by the 500th attempt."""
    limits = QualityLimits(minimum=500, non_finite_run=20)
    good = rows_of("healthy", 480, 3)
    rows = rows_of("nan", 20, 1) + good[:100] + rows_of("nan", 20, 2) + good + rows_of("healthy", 30, 4)
    _, events = states_of(Safeguard({"nhits": limits}), rows)
    assert events == [(19, "agent_muted"), (139 + 500, "agent_readmitted")]


def test_the_fourth_readmission_of_a_day_is_an_operators() -> None:
    """Four rounds of 20 failures and 500 clean votes, half a minute apart, take 17 hours."""
    once = rows_of("nan", 20, 1) + rows_of("healthy", 500, 2)
    guard = Safeguard()
    _, events = states_of(guard, once * 4 + rows_of("healthy", 600, 3), step_ms=30_000)
    ends = [520 * round_ + 519 for round_ in range(4)]
    assert [e for e in events if e[1] != "agent_muted"] == [
        *((end, "agent_readmitted") for end in ends[:3]),
        (ends[3], "agent_locked"),
    ]
    assert guard.status("nhits", AgentState.ACTIVE) == (AgentState.MUTED, "non_finite_output")
    guard.unmute("nhits")
    assert guard.status("nhits", AgentState.ACTIVE) == (AgentState.ACTIVE, None)
    _, events = states_of(guard, once, start=T0 + DAY_MS * 9)
    assert [kind for _, kind in events] == ["agent_muted", "agent_readmitted"]


def test_a_day_later_it_may_come_back_again() -> None:
    once = rows_of("nan", 20, 1) + rows_of("healthy", 500, 2)
    _, events = states_of(Safeguard(), once * 4, step_ms=3_600_000)
    assert [kind for _, kind in events] == ["agent_muted", "agent_readmitted"] * 4


def test_an_operators_mute_lasts_until_an_operator_ends_it() -> None:
    guard = Safeguard()
    guard.mute("nhits")
    states, events = states_of(guard, rows_of("healthy", 700, 1))
    assert (set(states), events) == ({"muted"}, [])
    assert guard.status("nhits", AgentState.ACTIVE) == (AgentState.MUTED, "operator")
    again = Safeguard()
    again.restore(dict(guard.changes()))
    assert again.status("nhits", AgentState.ACTIVE) == (AgentState.MUTED, "operator")


def test_after_an_unmute_the_old_votes_do_not_mute_again() -> None:
    guard = Safeguard()
    states_of(guard, rows_of("collapse", 300, 1))
    guard.unmute("nhits")
    assert guard.quality("nhits").votes == 0
    states, _ = states_of(guard, rows_of("healthy", 100, 2), start=T0 + DAY_MS)
    assert set(states) == {"active"}


def test_another_model_under_the_name_starts_anew() -> None:
    guard = Safeguard()
    states_of(guard, rows_of("collapse", 300, 1))
    guard.forget("nhits")
    assert guard.status("nhits", AgentState.ACTIVE) == (AgentState.ACTIVE, None)
    assert guard.quality("nhits").attempts == 0


def test_under_200_votes_an_agent_votes_or_is_in_the_shadow_as_set() -> None:
    rows = rows_of("healthy", 210, 1)
    assert set(states_of(Safeguard(), rows)[0]) == {"active"}
    shadowed = Safeguard({"nhits": QualityLimits(probation="shadow")})
    assert states_of(shadowed, rows[:150])[0] == ["shadow"] * 150
    assert shadowed.status("nhits", AgentState.ACTIVE) == (AgentState.SHADOW, None)
    assert states_of(shadowed, rows[150:], start=T0 + DAY_MS)[0] == ["shadow"] * 49 + ["active"] * 11
    assert shadowed.status("nhits", AgentState.ACTIVE) == (AgentState.ACTIVE, None)


def test_a_refused_agents_reason_is_no_attempt() -> None:
    """A probe refuses for `non_finite_output` too; that is no failure of a model that serves."""
    guard = Safeguard()
    vectors, (ballot,) = _one(rows_of("nan", 100, 1))
    refused = replace(ballot, state=np.full(100, STATE_CODE[AgentState.REFUSED], np.int8))
    (judged,), events = guard.watch(vectors, [refused])
    assert (judged.state == STATE_CODE[AgentState.REFUSED]).all()
    assert events == []
    assert guard.quality("nhits").attempts == 0


def test_agents_and_canaries_have_their_own_windows_and_the_limits_of_their_agent() -> None:
    guard = Safeguard({"nhits": QualityLimits(non_finite_run=5)})
    for agent, muted in (("nhits_canary", True), ("patchtst", False)):
        vectors, ballots = _one(rows_of("nan", 6, 1), agent)
        _, events = guard.watch(vectors, ballots)
        assert [e.agent for e in events] == [agent] * muted
    assert guard.quality("nhits").attempts == 0


def test_events_come_in_the_order_of_the_bars_not_of_the_agents() -> None:
    guard = Safeguard()
    late, early = rows_of("healthy", 5, 1) + rows_of("nan", 25, 1), rows_of("nan", 30, 1)
    vectors, (first,) = _one(late, "xgboost")
    _, (second,) = _one(early, "patchtst")
    _, events = guard.watch(vectors, [first, second])
    assert [(e.agent, e.ts) for e in events] == [("patchtst", T0 + 19 * 60_000), ("xgboost", T0 + 24 * 60_000)]


def test_an_event_carries_its_evidence() -> None:
    _, (event,) = Safeguard().watch(*_one(rows_of("collapse", 200, 1)))
    assert (event.kind, event.reason, event.agent) == ("agent_muted", "action_collapse", "nhits")
    assert event.evidence["violations"] == ["action_collapse"]
    assert (event.evidence["votes"], event.evidence["action_collapse"], event.evidence["dead_zone"]) == (200, 1.0, 0.0)


def test_what_is_stored_after_a_batch_is_a_blob_for_every_25_attempts_and_one_more() -> None:
    guard = Safeguard()
    states_of(guard, rows_of("healthy", 250, 1))
    assert len(guard.changes()) == 1 + 250 // 25
    states_of(guard, rows_of("healthy", 1, 2), start=T0 + DAY_MS)
    assert len(guard.changes()) == 2
    assert guard.changes() == []


def test_a_stored_blob_with_a_changed_byte_is_refused() -> None:
    guard = Safeguard()
    states_of(guard, rows_of("healthy", 20, 1))
    stored = dict(guard.changes())
    field_, blob = next(iter(stored.items()))
    stored[field_] = blob[:-1] + bytes([blob[-1] ^ 1])
    with pytest.raises(StateCorruptError):
        Safeguard().restore(stored)


def test_bits_name_the_criteria_in_their_order() -> None:
    assert criteria_of(0) == ()
    assert criteria_of(0b100000001) == (CRITERIA[0], CRITERIA[8])
