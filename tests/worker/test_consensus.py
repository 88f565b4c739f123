"""Consensus against a second implementation that reads like the contract, one row and one dict at a time."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.messages import AGENTS, Action, AgentState
from worker.batches import STATE_CODE, Ballot
from worker.consensus import decide

DEFAULT_WEIGHTS = (0.30, 0.30, 0.20, 0.20)
ABSENT = (AgentState.LOADING, AgentState.REFUSED)


def naive(votes, weights, quorum, withheld, stale):
    """Section 1 of the contract for one bar; `votes` are (action name, confidence, state) by agent."""
    loaded = sum(state not in ABSENT for _, _, state in votes)
    eligible = sum(state is AgentState.ACTIVE for _, _, state in votes)
    voters = [
        (action, confidence, weight)
        for (action, confidence, state), weight in zip(votes, weights, strict=True)
        if state is AgentState.ACTIVE and action != "ABSTAIN"
    ]
    total = sum(Fraction(w) for _, _, w in voters)
    by_action = {"SELL": Fraction(0), "HOLD": Fraction(0), "BUY": Fraction(0)}
    for action, _, weight in voters:
        by_action[action] += Fraction(weight) / total if total else 0
    ranked = sorted(by_action.items(), key=lambda pair: -pair[1])
    winner = None if ranked[0][1] - ranked[1][1] <= Fraction(1, 10**12) else ranked[0][0]
    agreeing = [v for v in voters if v[0] == winner]
    if withheld:
        status = "withheld"
    elif stale:
        status = "stale"
    elif len(voters) < quorum:
        status = "below_quorum"
    elif winner is None or (winner != "HOLD" and len(agreeing) < quorum):
        status = "no_agreement"
    elif winner == "HOLD":
        status = "hold"
    else:
        status = "ok"
    silent = status in ("withheld", "stale", "below_quorum")
    confidence = 0 if silent or not total else sum(Fraction(w) * Fraction(c) for _, c, w in agreeing) / total
    return {
        "action": winner if status == "ok" else "HOLD",
        "status": status,
        "loaded": loaded,
        "eligible": eligible,
        "voting": len(voters),
        "agreeing": len(agreeing),
        "agreement": len(agreeing) / len(voters) if voters else 0.0,
        "confidence": float(confidence),
    }


def ballots_of(rows, weights, agents=AGENTS):
    """Ballots from rows of (action name, confidence, state) by agent."""
    return [
        Ballot(
            agent=agent,
            version="v",
            weight=weights[place],
            action=np.array([Action[row[place][0]] for row in rows], np.int8),
            confidence=np.array([row[place][1] for row in rows], np.float64),
            outputs=None,
            answered=np.zeros(len(rows), np.bool_),
            state=np.array([STATE_CODE[row[place][2]] for row in rows], np.int8),
            reason=(None,) * len(rows),
        )
        for place, agent in enumerate(agents)
    ]


def decided(rows, weights=DEFAULT_WEIGHTS, quorum=3, withheld=None, stale=None, agents=AGENTS):
    none = np.zeros(len(rows), np.bool_)
    return decide(
        ballots_of(rows, weights, agents),
        configured=4,
        quorum=quorum,
        withheld=none if withheld is None else np.array(withheld),
        stale=none if stale is None else np.array(stale),
    )


def row_of(signals, i):
    return {
        "action": Action(signals.action[i]).name,
        "status": signals.status[i],
        **{name: int(getattr(signals, name)[i]) for name in ("loaded", "eligible", "voting", "agreeing")},
        "agreement": float(signals.agreement[i]),
        "confidence": float(signals.confidence[i]),
    }


# An abstention keeps its state: active without a window, muted with an action, refused with neither.
vote = st.tuples(
    st.sampled_from(["BUY", "SELL", "HOLD", "ABSTAIN"]),
    st.floats(0, 1),
    st.sampled_from([s for s in AgentState if s is not AgentState.CANARY]),
).map(lambda v: ("ABSTAIN", 0.0, v[2]) if v[2] in ABSENT else v)


@settings(max_examples=300, deadline=None)
@given(
    rows=st.lists(st.tuples(vote, vote, vote, vote), min_size=1, max_size=6),
    weights=st.sampled_from([DEFAULT_WEIGHTS, (0.31, 0.29, 0.2, 0.2), (0.25,) * 4, (1.0, 0.0, 0.5, 0.5), (3, 1, 1, 1)]),
    quorum=st.integers(1, 4),
    data=st.data(),
)
def test_every_row_is_what_the_contract_says(rows, weights, quorum, data):
    withheld = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    stale = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    signals = decided(rows, weights, quorum, withheld, stale)
    for i, row in enumerate(rows):
        expected = naive(row, weights, quorum, withheld[i], stale[i])
        assert 0 <= signals.confidence[i] <= 1
        assert row_of(signals, i) == {**expected, "confidence": pytest.approx(expected["confidence"], abs=1e-12)}


A = AgentState.ACTIVE


def test_three_of_four_agree_with_their_weighted_confidence():
    """(0.3 x 0.9 + 0.3 x 0.6 + 0.2 x 0.5) / 1.0, worked by hand."""
    signals = decided([[("BUY", 0.9, A), ("BUY", 0.6, A), ("BUY", 0.5, A), ("SELL", 0.8, A)]])
    assert row_of(signals, 0) == {
        "action": "BUY",
        "status": "ok",
        "loaded": 4,
        "eligible": 4,
        "voting": 4,
        "agreeing": 3,
        "agreement": 0.75,
        "confidence": pytest.approx(0.55),
    }


def test_the_heavier_side_wins_only_with_the_quorum():
    """31 % and 29 % for BUY outweigh 20 % and 20 %, but two agents are no quorum of three."""
    row = [("BUY", 0.9, A), ("BUY", 0.9, A), ("SELL", 0.9, A), ("SELL", 0.9, A)]
    assert decided([row], (0.31, 0.29, 0.2, 0.2)).status == ("no_agreement",)
    assert decided([row], (0.31, 0.29, 0.2, 0.2), quorum=2).status == ("ok",)


def test_a_confidence_is_never_over_one():
    """Weights whose shares add up to a little more than 1 in floats."""
    row = [("BUY", 1.0, A), ("BUY", 1.0, A), ("BUY", 1.0, A), ("ABSTAIN", 0.0, A)]
    assert decided([row], (0.17, 0.19, 0.31, 0.2)).confidence[0] == 1.0


def test_a_tie_has_no_winner():
    """0.3 + 0.2 against 0.3 + 0.2, whose float sums need not be equal to the last bit."""
    row = [("BUY", 0.9, A), ("SELL", 0.9, A), ("BUY", 0.9, A), ("SELL", 0.9, A)]
    signals = decided([row], quorum=1)
    assert (signals.status, signals.agreeing[0], signals.confidence[0]) == (("no_agreement",), 0, 0.0)


def test_the_muted_vote_is_seen_but_weighs_nothing():
    row = [("BUY", 0.9, A), ("BUY", 0.9, A), ("BUY", 0.9, A), ("SELL", 1.0, AgentState.MUTED)]
    signals = decided([row])
    assert signals.effective[0].tolist() == pytest.approx([0.375, 0.375, 0.25, 0.0])
    assert (signals.loaded[0], signals.eligible[0], signals.voting[0]) == (4, 3, 3)


def test_a_canary_adds_a_tenth_of_the_weight_and_is_in_no_count():
    agents = (*AGENTS, "nhits_canary")
    row = [("BUY", 0.5, A), ("BUY", 0.5, A), ("HOLD", 0.5, A), ("BUY", 0.5, A), ("BUY", 1.0, AgentState.CANARY)]
    signals = decided([row], (*DEFAULT_WEIGHTS, 0.2), agents=agents)
    assert signals.effective[0].tolist() == pytest.approx([0.27, 0.27, 0.18, 0.18, 0.10])
    assert [int(x[0]) for x in (signals.loaded, signals.eligible, signals.voting, signals.agreeing)] == [4, 4, 4, 3]
    assert signals.confidence[0] == pytest.approx(0.72 * 0.5 + 0.10)


def test_the_bits_of_a_row_do_not_depend_on_its_neighbours():
    rng = np.random.default_rng(7)
    rows = [
        [(("BUY", "SELL", "HOLD", "ABSTAIN")[rng.integers(4)], float(rng.random()), A) for _ in range(4)]
        for _ in range(257)
    ]
    together = decided(rows, (0.31, 0.23, 0.27, 0.19))
    for i, row in enumerate(rows):
        alone = decided([row], (0.31, 0.23, 0.27, 0.19))
        assert row_of(alone, 0) == row_of(together, i)
        assert alone.effective[0].tobytes() == together.effective[i].tobytes()
