"""The agent stages: who votes on which row, who abstains and why, and what a swap leaves as it was."""

from __future__ import annotations

import itertools
import threading
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from agents.agent import Refusal
from streams.contracts import V2, V3
from streams.messages import AGENTS, Action, AgentState, Bar, Reason
from tests.helpers import LIMIT_S, wait_for
from tests.worker.small import falling, model, rising, seat
from worker.batches import STATES, Ballot, Vectors
from worker.intake import Accepted
from worker.voting import AgentStage, Seat, VotingStage


def vectors(
    values: NDArray[np.float64],
    rows: NDArray[np.int64] | None = None,
    *,
    names: tuple[str, ...] = V3.features,
    ready: NDArray[np.bool_] | None = None,
    restart: NDArray[np.bool_] | None = None,
) -> Vectors:
    """Feature vectors `[N, F]` of series `rows`, all of one series unless given, all ready unless given."""
    n = len(values)
    rows = np.zeros(n, np.int64) if rows is None else rows
    ready = np.ones(n, np.bool_) if ready is None else ready
    no = np.zeros(n, np.bool_)
    bars = [Bar(f"S{row}", 60_000 * i, "1m", 1.0, 1.0, 1.0, 1.0, 1.0) for i, row in enumerate(rows.tolist())]
    ids = [f"{i + 1}-0" for i in range(n)]
    accepted = Accepted(ids, [0] * n, bars, rows, np.ones((n, 5)), no if restart is None else restart, no, no)
    return Vectors(accepted, names, values, {"v3": ready, "v2": ready}, np.flatnonzero(ready))


def some(n: int, seed: int = 0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).standard_normal((n, len(V3)))


def votes(ballot: Ballot) -> list[tuple[str, str | None, str]]:
    """Action, reason and state of each row."""
    rows = zip(ballot.action.tolist(), ballot.reason, ballot.state.tolist(), strict=True)
    return [(Action(action).name, reason, str(STATES[state])) for action, reason, state in rows]


def raising(x: NDArray[np.float32]) -> NDArray[np.float32]:
    if (x[:, 1] > 100).any():
        raise FloatingPointError("this row cannot be computed")
    return rising(x)


def test_a_model_that_raises_on_one_row_abstains_on_that_row_alone() -> None:
    values = some(7)
    values[3, 1] = 1_000.0
    ballot = VotingStage([seat("xgboost", raising)]).vote(vectors(values))[0]
    assert votes(ballot)[3] == ("ABSTAIN", str(Reason.ERROR_RATE), "active")
    assert (ballot.confidence[3], ballot.answered[3]) == (0.0, False)
    others = np.arange(7) != 3
    alone = VotingStage([seat("xgboost", rising)]).vote(vectors(values[others]))[0]
    assert ballot.outputs is not None
    assert alone.outputs is not None
    assert ballot.outputs[others].tobytes() == alone.outputs.tobytes()
    assert [vote for n, vote in enumerate(votes(ballot)) if n != 3] == [("BUY", None, "active")] * 6
    assert ballot.confidence[others].tobytes() == alone.confidence.tobytes()


def test_an_agent_that_is_asked_again_before_it_answered_answers_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.lanes.cores", lambda: 2)
    values = some(5)
    free, asked = threading.Event(), []

    def slow(x: NDArray[np.float32]) -> NDArray[np.float32]:
        asked.append(len(x))
        assert len(asked) > 1 or free.wait(LIMIT_S)
        return rising(x)

    stage = VotingStage([seat("xgboost", slow), seat("lightgbm")])
    [first, other], [second, _] = (
        stage.ask(vectors(values[:2], ready=np.array([False, True]))),
        stage.ask(vectors(values[2:])),
    )
    wait_for(first.running)
    assert len(stage.ballots([other])[0].action) == 1, "another agent does not wait for it"
    assert not second.done()
    free.set()
    late, early = stage.ballots([second, first])
    assert votes(late) == [("BUY", None, "active")] * 3
    assert votes(early) == [("BUY", None, "active")]
    assert asked == [1, 3]
    stage.close()


def test_a_model_that_raises_on_every_row_ends_nothing() -> None:
    values = some(3)
    values[:, 1] = 1_000.0
    ballots = VotingStage([seat("xgboost", raising), seat("lightgbm")]).vote(vectors(values))
    assert [action for action, _, _ in votes(ballots[0])] == ["ABSTAIN"] * 3
    assert [action for action, _, _ in votes(ballots[1])] == ["BUY"] * 3


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_a_feature_or_an_output_that_is_not_finite_is_an_abstention(bad: float) -> None:
    def leaking(x: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.where(np.isfinite(x).all(axis=1), rising(x)[:, 0], np.nan)[:, None].astype(np.float32)

    values = some(4)
    values[2, 7] = bad
    ballot = VotingStage([seat("xgboost", leaking)]).vote(vectors(values))[0]
    expected = [("BUY", None, "active")] * 4
    expected[2] = ("ABSTAIN", str(Reason.NON_FINITE_OUTPUT), "active")
    assert votes(ballot) == expected
    assert (ballot.confidence[2], ballot.answered[2]) == (0.0, False)


def test_a_window_with_one_number_that_is_not_finite_abstains_as_long_as_it_is_in_it() -> None:
    values = some(20)
    values[6, 0] = np.nan
    ballot = VotingStage([seat("nhits", window=4)]).vote(vectors(values))[0]
    reasons = [reason for _, reason, _ in votes(ballot)]
    assert reasons == ["insufficient_history"] * 3 + [None] * 3 + ["non_finite_output"] * 4 + [None] * 10


def test_only_the_columns_that_a_model_reads_decide_whether_it_votes() -> None:
    values = some(3)
    values[1, len(V3) - 1] = np.nan
    ballots = VotingStage([seat("xgboost", width=len(V3) - 1), seat("lightgbm")]).vote(vectors(values))
    assert [reason for _, reason, _ in votes(ballots[0])] == [None] * 3
    assert [reason for _, reason, _ in votes(ballots[1])] == [None, "non_finite_output", None]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 11, 64])
def test_an_agent_is_active_from_the_very_row_on_that_fills_a_window_whatever_the_batches(size: int) -> None:
    # Two series in turn and a third that comes late: the first window of 4 is full on row 6, of series 0.
    rows = np.array([0, 1] * 8 + [2, 0] * 8)
    values, stage = some(len(rows)), VotingStage([seat("nhits", window=4), seat("xgboost")])
    cast: dict[str, list[tuple[str, str | None, str]]] = {"nhits": [], "xgboost": []}
    for i in range(0, len(rows), size):
        for ballot in stage.vote(vectors(values[i : i + size], rows[i : i + size])):
            cast[ballot.agent] += votes(ballot)
    seen: dict[int, int] = {}
    for n, row in enumerate(rows.tolist()):
        seen[row] = seen.get(row, 0) + 1
        full = seen[row] >= 4
        reason = None if full else "insufficient_history"
        assert cast["nhits"][n] == ("BUY" if full else "ABSTAIN", reason, "active" if n >= 6 else "warming_up"), n
    assert cast["xgboost"] == [("BUY", None, "active")] * len(rows)


def test_a_restarted_series_fills_its_window_anew_with_nothing_of_before() -> None:
    values, restart = some(20), np.zeros(20, np.bool_)
    restart[9] = True
    whole = VotingStage([seat("nhits", window=4)]).vote(vectors(values, restart=restart))[0]
    after = VotingStage([seat("nhits", window=4)]).vote(vectors(values[9:]))[0]
    reasons = [reason for _, reason, _ in votes(whole)]
    assert reasons == ["insufficient_history"] * 3 + [None] * 6 + ["insufficient_history"] * 3 + [None] * 8
    assert {state for _, _, state in votes(whole)[3:]} == {"active"}, "the agent itself was warm already"
    assert whole.outputs is not None
    assert after.outputs is not None
    np.testing.assert_array_equal(whole.outputs[9:], after.outputs)


def test_vectors_that_are_not_ready_are_in_no_window_and_get_no_vote() -> None:
    values, ready = some(12), np.arange(12) >= 5
    ballot = VotingStage([seat("nhits", window=3), seat("xgboost")]).vote(vectors(values, ready=ready))
    assert [reason for _, reason, _ in votes(ballot[1])] == ["insufficient_history"] * 2 + [None] * 5
    only = VotingStage([seat("nhits", window=3)]).vote(vectors(values[5:]))[0]
    np.testing.assert_array_equal(ballot[1].outputs, only.outputs)


def test_models_of_two_feature_sets_read_their_own_columns_in_their_own_order() -> None:
    names = tuple(dict.fromkeys((*V3.features, *V2.features)))
    values = np.random.default_rng(3).standard_normal((9, len(names)))
    read: dict[str, NDArray[np.float32]] = {}

    def noting(agent: str):
        def network(x: NDArray[np.float32]) -> NDArray[np.float32]:
            read[agent] = x
            return rising(x)

        return network

    seats = [
        seat("xgboost", noting("xgboost")),
        seat("lightgbm", noting("lightgbm"), feature_set="v2"),
        seat("nhits", noting("nhits"), feature_set="v2", window=3),
        seat("patchtst", noting("patchtst"), window=2),
    ]
    stage = VotingStage(seats)
    assert {one.name for one in stage.feature_sets} == {"v2", "v3"}
    stage.vote(vectors(values, names=names))
    v2, v3 = ([names.index(name) for name in one.features] for one in (V2, V3))
    narrow = values.astype(np.float32)
    np.testing.assert_array_equal(read["xgboost"], narrow[:, v3])
    np.testing.assert_array_equal(read["lightgbm"], narrow[:, v2])
    np.testing.assert_array_equal(read["nhits"], np.stack([narrow[i - 2 : i + 1, v2] for i in range(2, 9)]))
    np.testing.assert_array_equal(read["patchtst"], np.stack([narrow[i - 1 : i + 1, v3] for i in range(1, 9)]))


def test_a_ballot_names_the_features_that_its_model_read() -> None:
    empty = Seat("nhits", 0.3, refusal=Refusal(Reason.SCALER_MISSING, "put it beside the model"))
    ballots = VotingStage([seat("xgboost", width=7), seat("lightgbm"), empty]).vote(vectors(some(3)))
    assert [ballot.features for ballot in ballots] == [V3.features[:7], V3.features, ()]


def test_an_agent_whose_set_is_not_ready_yet_abstains_while_others_vote() -> None:
    given = vectors(some(6))
    given = replace(given, ready={"v3": np.ones(6, np.bool_), "v2": np.arange(6) >= 4}, names=(*V3.features,))
    names = tuple(dict.fromkeys((*V3.features, *V2.features)))
    wide = np.concatenate([given.values, np.ones((6, len(names) - len(V3)))], axis=1)
    ballots = VotingStage([seat("xgboost"), seat("lightgbm", feature_set="v2")]).vote(
        replace(given, values=wide, names=names)
    )
    assert [reason for _, reason, _ in votes(ballots[0])] == [None] * 6
    assert [reason for _, reason, _ in votes(ballots[1])] == ["insufficient_history"] * 4 + [None] * 2


def test_a_seat_without_a_model_abstains_with_its_refusal_on_every_row() -> None:
    empty = Seat("nhits", 0.3, refusal=Refusal(Reason.SCALER_MISSING, "put it beside the model"))
    ballot = VotingStage([empty]).vote(vectors(some(3)))[0]
    assert votes(ballot) == [("ABSTAIN", "scaler_missing", "refused")] * 3
    assert (ballot.outputs, ballot.version, ballot.weight) == (None, None, 0.3)
    assert not ballot.answered.any()


def test_ballots_come_in_the_one_order_of_agents_however_they_were_seated() -> None:
    canary = Seat("nhits_canary", 0.1, model("nhits"), role=AgentState.CANARY)
    for order in itertools.permutations([*map(seat, AGENTS), canary], 5):
        stage = VotingStage(order)
        assert [one.seat.agent for one in stage.stages] == [*AGENTS, "nhits_canary"]
        stage.close()


def test_a_swapped_model_takes_the_seat_with_its_warm_up_and_its_windows() -> None:
    stage, values = VotingStage([seat("nhits", window=4), seat("xgboost")]), some(12)
    stage.vote(vectors(values[:6]))
    stage.reseat(seat("nhits", falling, window=4))
    ballots = stage.vote(vectors(values[6:]))
    assert [ballot.agent for ballot in ballots] == ["xgboost", "nhits"]
    assert votes(ballots[1]) == [("SELL", None, "active")] * 6


def test_a_seat_that_is_emptied_forgets_the_windows_that_nobody_else_reads() -> None:
    stage, values = VotingStage([seat("nhits", window=4), seat("xgboost")]), some(12)
    stage.vote(vectors(values[:6]))
    assert stage.window_sets == ("v3",)
    stage.reseat(Seat("nhits", 0.25, refusal=Refusal(Reason.NO_ARTIFACT, "gone")))
    assert stage.window_sets == ()
    stage.vote(vectors(values[6:8]))
    stage.reseat(seat("nhits", window=4))
    reasons = [reason for _, reason, _ in votes(stage.vote(vectors(values[8:]))[1])]
    assert reasons == ["insufficient_history"] * 3 + [None], "vectors that came meanwhile are not in the window"


def test_windows_that_another_model_reads_stay_when_one_is_taken_away() -> None:
    canary = Seat("patchtst_canary", 0.1, model("patchtst", window=3), role=AgentState.CANARY)
    stage = VotingStage([seat("nhits", window=4), canary])
    stage.vote(vectors(some(6)))
    stage.remove("patchtst_canary")
    assert stage.stage("patchtst_canary") is None
    assert [reason for _, reason, _ in votes(stage.vote(vectors(some(2)))[0])] == [None, None]


def test_a_stage_says_what_it_is_between_two_batches() -> None:
    stage = AgentStage(seat("nhits", window=4))
    assert (stage.state, stage.reason) == (AgentState.WARMING_UP, "insufficient_history")
    stage.active = True
    assert (stage.state, stage.reason) == (AgentState.ACTIVE, None)
    refused = AgentStage(Seat("nhits", 0.2, refusal=Refusal(Reason.CORRUPT_ARTIFACT, "")), active=True)
    assert (refused.state, refused.reason) == (AgentState.REFUSED, "corrupt_artifact")


@pytest.mark.parametrize("network", [rising, falling])
def test_no_row_gives_no_vote_and_no_error(network) -> None:
    ballots = VotingStage([seat("nhits", network, window=4), seat("xgboost", network)]).vote(vectors(some(0)))
    assert [len(ballot.action) for ballot in ballots] == [0, 0]
