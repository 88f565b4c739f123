"""The chain of stages: what comes out for what goes in, whatever the batches, and what a stored state must be."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from agents.agent import Refusal
from streams.codec import StateCorruptError, to_json
from streams.contracts import V2, V3
from streams.messages import AGENTS, Entry, Reason
from streams.validation import Limits
from tests.worker.small import LAST_TS, batches, falling, market, model, rising, seat
from worker.encoding import feature_messages, signal_messages, vote_messages
from worker.features.bank import FeatureBank
from worker.pipeline import PARTS, Pipeline, Result
from worker.quality import QualityLimits
from worker.voting import Seat

WARM_UP = {"v3": 25, "v2": 30}
SEATS = [seat("xgboost"), seat("lightgbm"), seat("nhits", falling, window=8), seat("patchtst", window=4)]
Stored = dict[str, dict[bytes, bytes]]


class Chain:
    """A pipeline and what it committed, with restarts from that."""

    def __init__(self, seats: Sequence[Seat] = SEATS, **given: Any) -> None:
        self.make: Callable[[], Pipeline] = lambda: Pipeline(seats, **{"warmup_bars": WARM_UP, **given})
        self.pipeline = self.make()
        self.stored: Stored = {part: {} for part in PARTS}
        self.messages: list[bytes] = []
        self.signals: list[dict[str, Any]] = []
        self.votes: dict[str, list[dict[str, Any]]] = {}
        self.results: list[Result] = []

    def feed(self, entries: Sequence[Entry], now_ms: int = LAST_TS + 120_000) -> Chain:
        result = self.pipeline.process(entries, now_ms)
        self.keep(result.state, result.drops)
        signals = list(signal_messages(result))
        self.signals += signals
        for ballot in result.ballots:
            self.votes.setdefault(ballot.agent, []).extend(vote_messages(result.voted_bars, ballot))
        # By bar, so that the order is the same however the batches were cut.
        columns = [signals, *(vote_messages(result.voted_bars, ballot) for ballot in result.ballots)]
        self.messages += [to_json(m) for m in feature_messages(result.vectors)]
        self.messages += [to_json([id_, *row]) for id_, *row in zip(result.voted_ids, *columns, strict=True)]
        self.results.append(result)
        return self

    def keep(self, state: Mapping[str, Sequence[tuple[bytes, bytes]]], drops: Sequence[str]) -> None:
        for part in drops:
            self.stored[part] = {}
        for part, fields in state.items():
            self.stored[part].update(fields)

    def restart(self) -> Chain:
        last = self.pipeline.intake.ids.last
        self.pipeline.voting.close()
        self.pipeline = self.make()
        self.pipeline.restore(self.stored)
        self.pipeline.intake.ids.last = last  # part of the position, not of the state
        return self


*ENTRIES, LATER_1, LATER_2, LATER_3 = market(3, 46)


@pytest.fixture(scope="module")
def whole() -> Chain:
    return Chain().feed(ENTRIES)


def test_every_accepted_bar_gives_one_vector_and_every_ready_one_a_vote_of_each_agent_and_one_signal(
    whole: Chain,
) -> None:
    result, ready = whole.results[0], 3 * (45 - 24)
    assert len(list(feature_messages(result.vectors))) == len(ENTRIES)
    assert len(whole.signals) == ready
    assert {agent: len(votes) for agent, votes in whole.votes.items()} == dict.fromkeys(AGENTS, ready)
    ids = [entry.id for entry in ENTRIES]
    assert result.accepted.ids == ids
    assert result.voted_ids == ids[-ready:]
    assert [signal["bar_id"] for signal in whole.signals] == [bar.bar_id for bar in result.accepted.bars[-ready:]]


@settings(max_examples=8, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 50), st.booleans()), min_size=1, max_size=12))
def test_outputs_are_the_same_bytes_however_batches_are_cut_and_whenever_it_restarts(
    whole: Chain, cuts: list[tuple[int, bool]]
) -> None:
    chain, rest = Chain(), list(ENTRIES)
    for size, restart in cuts:
        chain.feed(rest[:size])
        rest = rest[size:]
        if restart:
            chain.restart()
    for batch in batches(rest, 64):
        chain.feed(batch)
    assert sorted(chain.messages) == sorted(whole.messages)
    assert chain.stored == whole.stored


def test_an_agent_of_31_percent_tips_what_equal_weights_leave_undecided() -> None:
    def run(weights: Sequence[float]) -> list[dict[str, Any]]:
        networks = (rising, rising, falling, falling)
        seats = [seat(a, n, weight=w) for a, n, w in zip(AGENTS, networks, weights, strict=True)]
        return Chain(seats, quorum=2).feed(ENTRIES).signals

    even, uneven = run([0.25] * 4), run([0.31, 0.23, 0.23, 0.23])
    assert {(s["action"], s["status"]) for s in even} == {("HOLD", "no_agreement")}
    assert {(s["action"], s["status"], s["agreeing"], s["voting"]) for s in uneven} == {("BUY", "ok", 2, 4)}
    for signal in uneven:
        assert {a: v["effective_weight"] for a, v in signal["votes"].items()} == pytest.approx(
            dict(zip(AGENTS, [0.31, 0.23, 0.23, 0.23], strict=True)), rel=1e-15
        )
        xgb, lgbm = (signal["votes"][agent]["confidence"] for agent in AGENTS[:2])
        assert signal["confidence"] == pytest.approx(0.31 * xgb + 0.23 * lgbm, rel=1e-12)


def test_the_weight_of_an_agent_that_does_not_vote_goes_to_the_others_in_proportion() -> None:
    gone = Seat("lightgbm", 0.23, refusal=Refusal(Reason.NO_ARTIFACT, "train one"))
    seats = [seat("xgboost", weight=0.31), gone, seat("nhits", weight=0.23), seat("patchtst", falling, weight=0.23)]
    signal = Chain(seats, quorum=2).feed(ENTRIES).signals[-1]
    share = {a: Fraction(w, 77) for a, w in (("xgboost", 31), ("nhits", 23), ("patchtst", 23))} | {"lightgbm": 0}
    for agent, vote in signal["votes"].items():
        assert vote["effective_weight"] == pytest.approx(float(share[agent]), rel=1e-14), agent
        assert vote["weight"] == (0.31 if agent == "xgboost" else 0.23)
    assert [signal[k] for k in ("configured", "loaded", "eligible", "voting", "agreeing")] == [4, 3, 3, 3, 2]
    assert signal["agreement"] == pytest.approx(2 / 3)


def test_a_v2_agent_beside_v3_agents_votes_on_v2_features_once_its_own_warm_up_is_over() -> None:
    v2 = model("lightgbm", feature_set="v2")
    chain = Chain([seat("xgboost"), Seat("lightgbm", 0.25, v2)], quorum=2).feed(ENTRIES)
    votes = chain.votes["lightgbm"]
    assert [v["reason"] for v in votes] == ["insufficient_history"] * 15 + [None] * (len(votes) - 15)
    assert {v["reason"] for v in chain.votes["xgboost"]} == {None}
    bank = FeatureBank((V2,), WARM_UP)
    accepted = chain.results[0].accepted
    values, ready = bank.update(accepted.rows, accepted.ohlcv)
    expected = v2.predict(values[ready[:, 0]])
    assert [v["outputs"] for v in votes[15:]] == expected.tolist()
    *_, message = feature_messages(chain.results[0].vectors)
    assert message["contracts"] == {"v3": V3.contract, "v2": V2.contract}
    assert set(message["values"]) == {*V3.features, *V2.features}
    assert message["values"]["rsi"] == message["values"]["rsi_14"]


def test_after_a_long_gap_a_series_is_as_new_and_the_others_go_on() -> None:
    minutes = batches(market(2, 80), 2)
    lone, both = [minute[0] for minute in minutes], minutes
    gap = [*(e for m in both[:40] for e in m), *(m[1] for m in both[40:45]), *(e for m in both[45:] for e in m)]
    chain = Chain(limits=Limits(max_gap_bars=4)).feed(gap)
    after = Chain(limits=Limits(max_gap_bars=4)).feed(lone[45:])
    first = chain.results[0].accepted.bars[0].symbol
    ts = after.signals[0]["ts"]
    for agent in AGENTS:
        mine = [
            v for v in chain.votes[agent] if v["symbol"] == first and v["ts"] > after.results[0].accepted.bars[0].ts
        ]
        assert mine[0]["ts"] == ts, "no vote while it warms up again"
        kept = ("ts", "action", "confidence", "outputs", "reason")
        assert [[v[k] for k in kept] for v in mine] == [[v[k] for k in kept] for v in after.votes[agent]]
    events = [e for e in chain.results[0].events if e.kind == "gap"]
    assert [(e.symbol, e.evidence["missing"], e.evidence["rewarm"]) for e in events] == [(first, 5, True)]
    other = [v for v in chain.votes["nhits"] if v["symbol"] != first]
    assert sum(v["reason"] == "insufficient_history" for v in other) == 7


def test_an_entry_that_is_no_bar_changes_nothing_of_the_others(whole: Chain) -> None:
    bad = Entry("t:bars", f"{LAST_TS}-9999", {b"symbol": b"SYN01", b"ts": b"soon"})
    chain = Chain().feed([*ENTRIES[:50], bad, *ENTRIES[50:]])
    assert chain.messages == whole.messages
    assert [(r.entry, r.stage) for r in chain.results[0].rejects] == [(bad, "intake")]
    assert chain.results[0].accepted.outcomes == {"accepted": len(ENTRIES), "rejected": 1}


# ---------------------------------------------------------------------- muted and re-admitted

SILENT = [*range(90, 111), *range(642, 664)]
"""Bars on which one agent's model gives NaN: 21 and 22 in a row, which the volume of the bar tells it."""
MUTED_AT, READMITTED_AT, AGAIN_AT = 90 + 19, 110 + 500, 642 + 19
"""A run of 20 mutes, and 500 attempts after the last of them bring back."""


def faltering(x: NDArray[np.float32]) -> NDArray[np.float32]:
    volume = x[:, -1, V3.features.index("volume")] if x.ndim == 3 else x[:, V3.features.index("volume")]
    return np.where(volume[:, None] == 77.0, np.float32(np.nan), rising(x))


def quiet(place: int, entry: Entry) -> Entry:
    return replace(entry, fields={**entry.fields, b"volume": b"77"}) if place in SILENT else entry


DAY = [quiet(place, entry) for place, entry in enumerate(market(3, 225))]
LENIENT = QualityLimits(action_share=1.0, hold_share=1.0, confidence_stddev=0.0, confidence_range=0.0)
WATCHED: dict[str, Any] = {
    "seats": [seat("xgboost"), seat("lightgbm", falling), seat("nhits", faltering, window=4), seat("patchtst")],
    "quality": {**dict.fromkeys(AGENTS, LENIENT), "nhits": replace(LENIENT, constant_run=10_000)},
}


def transitions(chain: Chain) -> list[tuple[str, str, str]]:
    events = [event for result in chain.results for event in result.events]
    return [(e.kind, e.agent, e.bar_id) for e in events if e.kind.startswith("agent_")]


@pytest.fixture(scope="module")
def day() -> Chain:
    return Chain(**WATCHED).feed(DAY)


def test_an_agent_is_muted_and_readmitted_on_the_very_bars(day: Chain) -> None:
    bars = day.results[0].accepted.bars
    assert transitions(day) == [
        ("agent_muted", "nhits", bars[MUTED_AT].bar_id),
        ("agent_readmitted", "nhits", bars[READMITTED_AT].bar_id),
        ("agent_muted", "nhits", bars[AGAIN_AT].bar_id),
    ]
    states = [vote["state"] for vote in day.votes["nhits"]]
    first, back, again = (place - 3 * 24 for place in (MUTED_AT, READMITTED_AT, AGAIN_AT))
    active = [state == "active" for state in states[9:]]
    assert active == [not (first <= place < back or place >= again) for place in range(9, len(states))]


@pytest.mark.parametrize("restarts", ["none", "on the bars of a decision", "often"])
@pytest.mark.parametrize("size", [1, 7, 256])
def test_muting_is_the_same_bytes_however_batches_are_cut_and_whenever_it_restarts(
    day: Chain, size: int, restarts: str
) -> None:
    """A batch that ends with the deciding bar and a restart right after it included; the clock goes back meanwhile."""
    chain, decided = Chain(**WATCHED), {MUTED_AT + 1, READMITTED_AT + 1, AGAIN_AT + 1}
    after = {"none": set(), "on the bars of a decision": decided, "often": {*range(0, len(DAY), 7), *decided}}[restarts]
    cuts = {0, *range(size, len(DAY), size), *(decided if restarts != "none" else ()), len(DAY)}
    for start, end in pairwise(sorted(cuts)):
        chain.feed(DAY[start:end], LAST_TS + 900_000 - start)
        if end in after:
            chain.restart()
    assert transitions(chain) == transitions(day)
    assert sorted(chain.messages) == sorted(day.messages)


# ---------------------------------------------------------------------- another model under the name

LONG = market(3, 70)
SWAP = 3 * 45
"""Bars before the swap: each series has had 21 ready vectors of v3, and none of v2 with a warm-up of 60."""
LATE = {"v3": 25, "v2": 60}
NEXT = {
    # At bar 60 v2 is ready for the first series; windows of 30 are full at bar 25 + 29, those of 8 at once.
    "another set": (model("nhits", feature_set="v2"), 3 * 59),
    "a longer window": (model("nhits", falling, window=30), 3 * 53),
    "a shorter window": (model("nhits", falling, window=4), SWAP),
    "a window of another set": (model("nhits", feature_set="v2", window=3), 3 * 61),
    "no window": (model("nhits", falling), SWAP),
}


@pytest.mark.parametrize("how", ["reload", "reload and restart", "restart with another"])
@pytest.mark.parametrize("size", [1, 7, 256])
@pytest.mark.parametrize("which", NEXT)
def test_an_agent_is_active_with_another_model_from_the_first_row_on_which_that_can_vote(
    which: str, size: int, how: str
) -> None:
    """Until then it is warming up in votes, reports and counts, whatever the model before it was."""
    other, first = NEXT[which]
    chain = Chain(warmup_bars=LATE)
    for batch in batches(LONG[:SWAP], size):
        chain.feed(batch)
    other = replace(other, sha256="2" * 64)
    seats = [s if s.agent != "nhits" else Seat("nhits", 0.25, other) for s in SEATS]
    chain.make = lambda: Pipeline(seats, warmup_bars=LATE)
    if "reload" in how:
        chain.pipeline.install("nhits", other, pinned=False)
        chain.keep(*chain.pipeline.changes())
    if "restart" in how:
        chain.restart()
    (report,) = [r for r in chain.pipeline.reports() if r.agent == "nhits"]
    assert report.state == ("active" if first == SWAP else "warming_up")
    for batch in batches(LONG[SWAP:], size):
        chain.feed(batch)
    after = chain.votes["nhits"][SWAP - 3 * 24 :]
    assert [v["state"] for v in after] == ["warming_up"] * (first - SWAP) + ["active"] * (len(LONG) - first)
    assert {v["action"] for v in after[: first - SWAP]} <= {"ABSTAIN"}
    assert after[first - SWAP]["action"] != "ABSTAIN"
    assert [s["eligible"] for s in chain.signals[-len(after) :]] == [3] * (first - SWAP) + [4] * (len(LONG) - first)


# ---------------------------------------------------------------------- stored state


def without(stored: Stored, part: str, *rows: bytes) -> Stored:
    """The state without some series of a part, or without the whole part."""
    kept = {k: v for k, v in stored[part].items() if rows and k.partition(b":")[0] not in rows}
    return {**stored, part: kept}


@pytest.mark.parametrize(
    ("part", "rows", "says"),
    [
        ("features", [], "'features': it holds 0 series, the part 'series' 3; only one of them has 0, 1, 2"),
        ("features", [b"1"], "'features': it holds 2 series, the part 'series' 3; only one of them has 1"),
        ("features", [b"2"], "'features': it holds 2 series, the part 'series' 3; only one of them has 2"),
        ("series", [], "'features': it holds 3 series, the part 'series' 0; only one of them has 0, 1, 2"),
        ("series", [b"2"], "'features': it holds 3 series, the part 'series' 2; only one of them has 2"),
    ],
)
def test_a_state_whose_parts_do_not_hold_the_same_series_is_refused(
    whole: Chain, part: str, rows: list[bytes], says: str
) -> None:
    with pytest.raises(StateCorruptError, match="quartet run --rebuild") as caught:
        Chain().make().restore(without(whole.stored, part, *rows))
    assert says in str(caught.value)


def test_windows_of_a_series_that_is_nowhere_else_are_refused(whole: Chain) -> None:
    windows = whole.stored["windows:v3"]
    stored = without(without(whole.stored, "features", b"2"), "series", b"2")
    with pytest.raises(StateCorruptError, match="'windows:v3': it holds 3 series, the part 'series' 2"):
        Chain().make().restore({**stored, "windows:v3": windows})


@pytest.mark.parametrize("part", ["series", "features", "windows:v3", "agents", "quality"])
def test_one_flipped_bit_in_any_part_is_refused(whole: Chain, part: str) -> None:
    for name in list(whole.stored[part])[:40]:
        blob = bytearray(whole.stored[part][name])
        blob[len(blob) // 2] ^= 4
        with pytest.raises(StateCorruptError):
            Chain().make().restore({**whole.stored, part: {**whole.stored[part], name: bytes(blob)}})


def test_an_empty_state_is_a_first_start_and_windows_may_begin_later_than_the_rest(whole: Chain) -> None:
    Chain().make().restore({})
    Chain().make().restore({part: {} for part in PARTS})
    later = without(whole.stored, "windows:v3", b"0", b"2")
    pipeline = Chain().make()
    pipeline.restore(later)
    signals = list(signal_messages(pipeline.process([LATER_1, LATER_2, LATER_3], LAST_TS + 120_000)))
    reasons = {s["symbol"]: s["votes"]["nhits"]["reason"] for s in signals}
    assert reasons == {"SYN01": "insufficient_history", "SYN02": None, "SYN03": "insufficient_history"}
