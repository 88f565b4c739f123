"""Canary and shadow: a version beside the running one, judged bar by bar, rolled back on the very bar."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import xgboost

from streams.contracts import V6
from tests.agents import builders
from tests.worker.orders import AGENTS, FIRST, KEYS, LAZY, SECOND, market, trial
from worker.control import Order

BARS = market(2, 330)
HEAD = 80
"""Bars before the order; the first 58 warm up."""
LENIENT = {"minimum": 4, "action_share": 1.0, "hold_share": 1.0, "confidence_stddev": 0.0, "confidence_range": 0.0}
"""Judged from the fourth vote on, and hardly anything is a violation."""


def test_a_canary_weighs_a_tenth_and_is_in_no_count(desk, versions):
    """0.3 and 0.3 share the rest in proportion: 0.45 each."""
    one = desk()
    one.feed(BARS[:HEAD])
    (event,) = one.order(trial(versions, SECOND))
    one.feed(BARS[HEAD:120])
    assert (event["kind"], event["agent"]) == ("canary_started", "xgboost_canary")
    after = one.signals()[-40:]
    for signal in after:
        assert signal["votes"]["xgboost_canary"]["effective_weight"] == pytest.approx(0.10)
        assert signal["votes"]["xgboost_canary"]["state"] == "canary"
        assert signal["votes"]["xgboost_canary"]["version"] == SECOND
        assert signal["votes"]["xgboost"]["effective_weight"] == pytest.approx(0.45)
        assert signal["configured"] == signal["loaded"] == signal["eligible"] == signal["voting"] == 2
    assert [v["bar_id"] for v in one.votes("xgboost_canary")] == [s["bar_id"] for s in after]
    assert one.registry.get_sample_value("quartet_agent_state", {"agent": "xgboost_canary", "state": "canary"}) == 1


def test_the_share_of_a_canary_is_a_setting(desk, versions):
    one = desk(canary_share=0.2)
    one.feed(BARS[:HEAD])
    one.order(trial(versions, SECOND))
    one.feed(BARS[HEAD:90])
    weights = {agent: vote["effective_weight"] for agent, vote in one.signals()[-1]["votes"].items()}
    assert weights == pytest.approx({"xgboost": 0.4, "lightgbm": 0.4, "xgboost_canary": 0.2})


def test_a_shadow_changes_no_signal(desk, versions):
    """Everything but the entry in `votes` is as without it."""
    plain, shadowed = desk(), desk()
    for one in (plain, shadowed):
        one.feed(BARS[:HEAD])
    (event,) = shadowed.order(trial(versions, SECOND, "shadow"))
    for one in (plain, shadowed):
        one.feed(BARS[HEAD:200])
    assert event["kind"] == "shadow_started"
    found = shadowed.signals()
    beside = [signal["votes"].pop("xgboost_canary", None) for signal in found]
    assert found == plain.signals()
    assert [v["effective_weight"] for v in beside if v] == [0.0] * 120
    assert {v["state"] for v in beside if v} == {"shadow"}


@pytest.mark.parametrize("batch_size", [1, 7, 256])
def test_a_violation_rolls_a_canary_back_on_its_very_bar(desk, versions, batch_size):
    """It says HOLD only: the 200th vote is the first that can be judged, whatever else shares its batch."""
    one = desk(batch_size=batch_size)
    one.feed(BARS[:HEAD])
    one.order(trial(versions, LAZY))
    one.feed(BARS[HEAD:])
    votes = one.votes("xgboost_canary")
    (event,) = one.events("rolled_back")
    assert len(votes) == 200
    assert event["bar_id"] == votes[-1]["bar_id"]
    assert event["agent"] == "xgboost_canary"
    assert event["evidence"]["version"] == LAZY
    assert event["reason"] in event["evidence"]["violations"]
    assert event["detail"].endswith("newer files wait for `quartet models reload xgboost`")
    assert votes[-1]["state"] == "muted"
    assert {v["state"] for v in votes[:-1]} == {"canary"}
    with_it = [signal for signal in one.signals() if "xgboost_canary" in signal["votes"]]
    assert [signal["bar_id"] for signal in with_it] == [vote["bar_id"] for vote in votes]
    assert len(one.signals()) == len(BARS) - 58
    assert one.registry.get_sample_value("quartet_agent_state", {"agent": "xgboost_canary", "state": "canary"}) is None
    assert one.events("agent_muted") == []


def test_batch_sizes_give_the_same_bytes(desk, versions):
    """Orders lie at batch boundaries: everything that bars gave is equal, and so are the events."""
    found = []
    for batch_size in (1, 7, 256):
        one = desk(batch_size=batch_size)
        one.feed(BARS[:HEAD])
        one.order(trial(versions, LAZY))
        one.feed(BARS[HEAD:400])
        one.order("mute", "lightgbm")
        one.feed(BARS[400:450])
        one.order("unmute", "lightgbm")
        one.order(trial(versions, SECOND, "shadow"))
        one.feed(BARS[450:500])
        one.order("rollback", "xgboost")
        one.feed(BARS[500:520])
        events = [(e["kind"], e["agent"], e["bar_id"], e["reason"]) for e in one.events()]
        found.append((one.outputs(), events))
    assert found[0][0][KEYS.votes("xgboost_canary")]
    for outputs, events in found[1:]:
        assert events == found[0][1]
        assert outputs == found[0][0]


@pytest.mark.parametrize("batch_size", [1, 7, 256])
def test_six_hours_of_bars_pass_a_canary_that_can_be_judged_and_it_stays_one(desk, versions, batch_size):
    """A minute a bar: the bar 3 minutes after the first vote says so, with `canary_hours` of 0.05."""
    one = desk(canary_hours=0.05, quality=LENIENT, batch_size=batch_size)
    one.feed(BARS[:HEAD])
    one.order(trial(versions, SECOND))
    one.feed(BARS[HEAD:120])
    first = one.votes("xgboost_canary")[0]
    (event,) = one.events("canary_passed")
    assert event["ts"] == first["ts"] + 180_000
    assert event["evidence"]["since"] == first["ts"]
    assert event["evidence"]["votes"] == 7
    assert one.votes("xgboost_canary")[-1]["state"] == "canary"
    assert one.worker.pipeline.records["xgboost"].trial.passed


@pytest.mark.parametrize("batch_size", [1, 7, 256])
def test_a_period_lasts_until_there_are_votes_enough_to_judge(desk, versions, batch_size):
    """Three minutes hold 7 votes; the 200th, on which the window is first judged, is the end of it."""
    one = desk(canary_hours=0.05, batch_size=batch_size)
    one.feed(BARS[:HEAD])
    one.order(trial(versions, SECOND))
    one.feed(BARS[HEAD : HEAD + 199])
    assert one.events("canary_passed") == []
    one.feed(BARS[HEAD + 199 :])
    (event,) = one.events("canary_passed")
    assert event["bar_id"] == one.votes("xgboost_canary")[199]["bar_id"]
    assert event["evidence"]["votes"] == 200


@pytest.mark.parametrize("batch_size", [1, 7, 256])
def test_a_collapse_is_rolled_back_though_the_hours_are_over_before_it_can_be_judged(desk, versions, batch_size):
    one = desk(canary_hours=0.05, batch_size=batch_size)
    one.feed(BARS[:HEAD])
    one.order(trial(versions, LAZY))
    one.feed(BARS[HEAD:])
    assert one.events("canary_passed", "agent_muted") == []
    (event,) = one.events("rolled_back")
    votes = one.votes("xgboost_canary")
    assert (len(votes), event["bar_id"]) == (200, votes[-1]["bar_id"])


def test_after_its_period_a_violation_mutes_it_only(desk, versions):
    """Its first ten votes are HOLD, and then it says BUY and SELL."""
    one = desk(canary_hours=0.05, quality=LENIENT | {"action_share": 0.2})
    one.feed(BARS[:HEAD])
    one.order(trial(versions, SECOND))
    one.feed(BARS[HEAD:])
    assert len(one.events("canary_passed")) == 1
    assert one.events("rolled_back") == []
    assert "xgboost_canary" in [event["agent"] for event in one.events("agent_muted")]
    assert len(one.votes("xgboost_canary")) == len(BARS) - HEAD
    assert one.votes("xgboost_canary")[-1]["state"] == "muted"


def test_promotion_needs_200_votes_without_a_violation(desk, versions):
    one = desk()
    one.feed(BARS[:HEAD])
    assert [(e["kind"], e["reason"]) for e in one.order("promote", "xgboost")] == [("order_refused", "no_trial")]
    one.order(trial(versions, SECOND))
    one.feed(BARS[HEAD : HEAD + 199])
    (early,) = one.order("promote", "xgboost")
    assert (early["kind"], early["reason"], early["evidence"]["votes"]) == ("order_refused", "insufficient", 199)
    one.feed(BARS[HEAD + 199 : HEAD + 200])
    (done,) = one.order("promote", "xgboost")
    assert (done["kind"], done["agent"]) == ("promoted", "xgboost")
    assert done["evidence"]["version"] == SECOND
    assert done["evidence"]["replaces"]["version"] == FIRST
    one.feed(BARS[HEAD + 200 : HEAD + 240])
    assert one.versions() == [FIRST, SECOND]
    assert len(one.votes("xgboost_canary")) == 200
    assert "xgboost_canary" not in one.signals()[-1]["votes"]


@pytest.mark.parametrize("restart", [False, True])
def test_a_promoted_version_keeps_the_votes_that_justified_it(desk, versions, restart):
    """On probation it would else be in the shadow for 200 votes more: the promotion would silence the agent."""
    one = desk(quality={"probation": "shadow"})
    one.feed(BARS[:HEAD])
    one.order(trial(versions, SECOND))
    one.feed(BARS[HEAD : HEAD + 210])
    before = one.worker.pipeline.safeguard.quality("xgboost_canary")
    (done,) = one.order("promote", "xgboost")
    assert (done["kind"], before.votes) == ("promoted", 210)
    if restart:
        one.restart()
    assert one.worker.pipeline.safeguard.quality("xgboost") == before
    assert one.worker.pipeline.safeguard.quality("xgboost_canary").attempts == 0
    one.feed(BARS[HEAD + 210 : HEAD + 240])
    after = one.votes()[-30:]
    assert {vote["version"] for vote in after} == {SECOND}
    assert {vote["state"] for vote in after} == {"active"}
    assert one.worker.pipeline.safeguard.quality("xgboost").votes == 240


def test_a_promotion_ends_no_operators_mute(desk, versions):
    one = desk()
    one.feed(BARS[:HEAD])
    one.order(trial(versions, SECOND))
    one.feed(BARS[HEAD : HEAD + 200])
    one.order("mute", "xgboost")
    assert [event["kind"] for event in one.order("promote", "xgboost")] == ["promoted"]
    one.restart()
    one.feed(BARS[HEAD + 200 : HEAD + 210])
    vote = one.votes()[-1]
    assert (vote["version"], vote["state"], vote["reason"]) == (SECOND, "muted", "operator")


def test_a_violation_refuses_the_promotion(desk, versions):
    """Muted after its period: the gate fails with that reason."""
    one = desk(canary_hours=0.05, quality=LENIENT | {"action_share": 0.2})
    one.feed(BARS[:HEAD])
    one.order(trial(versions, SECOND))
    one.feed(BARS[HEAD:])
    assert one.votes("xgboost_canary")[-1]["state"] == "muted"
    (event,) = one.order("promote", "xgboost")
    assert (event["kind"], event["reason"]) == ("order_refused", "action_collapse")
    assert one.worker.pipeline.records["xgboost"].artifact.version == FIRST


def test_rollback_takes_a_canary_away_and_then_goes_back_a_version(desk, versions):
    one = desk()
    one.feed(BARS[:HEAD])
    assert [e["reason"] for e in one.order("rollback", "xgboost")] == ["nothing_before"]
    one.order(trial(versions, SECOND))
    one.feed(BARS[HEAD : HEAD + 200])
    (away,) = one.order("rollback", "xgboost")
    assert (away["kind"], away["agent"], away["reason"]) == ("rolled_back", "xgboost_canary", "operator")
    one.order(trial(versions, SECOND))
    one.feed(BARS[HEAD + 200 : HEAD + 400])
    assert [e["kind"] for e in one.order("promote", "xgboost")] == ["promoted"]
    one.feed(BARS[HEAD + 400 : HEAD + 420])
    (back,) = one.order("rollback", "xgboost")
    assert (back["kind"], back["agent"], back["evidence"]["version"]) == ("rolled_back", "xgboost", FIRST)
    one.feed(BARS[HEAD + 420 : HEAD + 440])
    assert one.versions() == [FIRST, SECOND, FIRST]
    assert one.worker.pipeline.records["xgboost"].pinned


def test_a_second_canary_waits_for_the_first_to_go(desk, versions):
    one = desk()
    one.feed(BARS[:HEAD])
    one.order(trial(versions, SECOND))
    (event,) = one.order(trial(versions, LAZY))
    assert (event["kind"], event["reason"], event["evidence"]["version"]) == ("order_refused", "trial_running", SECOND)


def test_a_changed_or_missing_file_is_no_canary(desk, versions):
    one = desk()
    right = trial(versions, SECOND)
    wrong = Order(right.order, right.agent, right.file, "0" * 64, right.by)
    missing = Order(right.order, right.agent, f"xgboost_{LAZY}.ubj", right.sha256, right.by)
    assert [e["reason"] for e in one.order(wrong)] == ["file_changed"]
    assert [e["reason"] for e in one.order(missing)] == ["no_artifact"]
    assert one.worker.pipeline.records["xgboost"].trial is None


def test_a_canary_survives_a_restart_bit_for_bit(desk, versions):
    """Restarts in its warm-up of votes, before the violation: the same bytes as without."""
    runs = []
    for restarts in (False, True):
        one = desk()
        one.feed(BARS[:HEAD])
        one.order(trial(versions, LAZY))
        for start in range(HEAD, len(BARS), 110):
            one.feed(BARS[start : start + 110])
            if restarts:
                one.restart()
        runs.append(one)
    assert runs[1].outputs() == runs[0].outputs()
    assert [e["bar_id"] for e in runs[1].events("rolled_back")] == [e["bar_id"] for e in runs[0].events("rolled_back")]
    assert len(runs[0].events("rolled_back")) == 1


def test_a_canary_whose_file_is_gone_is_rolled_back_at_the_next_start(desk, versions, tmp_path):
    import shutil

    elsewhere = shutil.copytree(versions / "next", tmp_path / "next")
    one = desk()
    one.feed(BARS[:HEAD])
    right = trial(versions, SECOND)
    one.order(Order(right.order, right.agent, str(elsewhere / f"xgboost_{SECOND}.ubj"), right.sha256, right.by))
    shutil.rmtree(elsewhere)
    one.restart()
    one.feed(BARS[HEAD:120])
    (event,) = one.events("rolled_back")
    assert (event["agent"], event["reason"]) == ("xgboost_canary", "no_artifact")
    assert one.votes("xgboost_canary") == []
    assert one.worker.pipeline.records["xgboost"].trial is None


def wide(folder: Path) -> Order:
    """A canary over the 49 features of v6 without metadata: under a threshold of 1000 % it always says HOLD."""
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((200, len(V6))), rng.standard_normal(200)
    data = xgboost.DMatrix(x, y, feature_names=list(V6.features))
    booster = xgboost.train({"max_depth": 2, "base_score": 0.0, "nthread": 1}, data, 5)
    file = folder / "xgboost_v20260401_000000_v6.ubj"
    file.write_bytes(bytes(booster.save_raw("ubj")))
    return Order("canary", "xgboost", str(file), hashlib.sha256(file.read_bytes()).hexdigest(), "a test")


def test_the_features_of_a_canary_come_and_go_with_it(desk, tmp_path):
    """v6 is among the values from the order to the bar of the rollback, whatever shares its batch."""
    bars, found = market(2, 400), []
    for batch_size in (7, 256):
        one = desk(
            batch_size=batch_size,
            allow_unscaled=("xgboost",),
            threshold={"xgboost": 10.0},
            warmup_bars={"v3": 30, "v6": V6.longest_window},
        )
        one.feed(bars[:HEAD])
        assert [e["kind"] for e in one.order(wide(tmp_path))] == ["canary_started"]
        one.feed(bars[HEAD:])
        assert len(one.events("rolled_back")) == 1
        found.append(one)
    small, large = found
    assert large.outputs() == small.outputs()
    features = large.read(KEYS.features)
    last = next(i for i, f in enumerate(features) if f["bar_id"] == large.events("rolled_back")[0]["bar_id"])
    widths = [(len(f["values"]), sorted(f["contracts"])) for f in features]
    assert widths[:HEAD] == [(23, ["v3"])] * HEAD
    assert {tuple(sets) for _, sets in widths[HEAD : last + 1]} == {("v3", "v6")}
    assert widths[last + 1 :] == [(23, ["v3"])] * (len(bars) - last - 1)
    answered = [vote for vote in large.votes("xgboost_canary") if vote["outputs"]]
    assert len(answered) == 200


def sequence(folder: Path) -> Order:
    """A small N-HiTS over 64 bars of v6, as a canary of an agent that has no model of its own."""
    file = folder / "nhits_v20260401_000000_v6.pth"
    file.write_bytes(builders.saved(builders.hidden_nhits_state(hidden=(16, 8), outputs=3)))
    return Order("canary", "nhits", str(file), hashlib.sha256(file.read_bytes()).hexdigest(), "a test")


@pytest.mark.parametrize("restart", [False, True])
def test_the_windows_of_a_canary_are_not_taken_up_again_by_the_next(desk, tmp_path, restart):
    """They go with it from what is stored too: the next one waits for 64 vectors of its own, restarted or not."""
    bars = market(1, 330)
    one = desk(agents=(*AGENTS, "nhits"), allow_unscaled=("nhits",), warmup_bars={"v3": 30, "v6": V6.longest_window})
    one.feed(bars[:40])
    assert [e["kind"] for e in one.order(sequence(tmp_path))] == ["canary_started"]
    one.feed(bars[40:160])
    answered = [vote["outputs"] is not None for vote in one.votes("nhits_canary")]
    assert one.store.state["windows:v6"]
    assert True in answered
    assert [e["kind"] for e in one.order("rollback", "nhits")] == ["rolled_back"]
    assert "windows:v6" not in one.store.state
    one.feed(bars[160:170])
    assert [e["kind"] for e in one.order(sequence(tmp_path))] == ["canary_started"]
    if restart:
        one.feed(bars[170:230])
        one.restart()
        one.feed(bars[230:])
    else:
        one.feed(bars[170:])
    again = [vote["outputs"] is not None for vote in one.votes("nhits_canary")[len(answered) :]]
    assert again.index(True) == answered.index(True)
    assert one.votes("nhits_canary")[len(answered)]["reason"] == "insufficient_history"


@pytest.mark.parametrize("kind", ["canary", "shadow"])
def test_the_very_artifact_that_serves_is_no_trial(desk, versions, kind):
    """It would agree with itself, and be promoted on that."""
    one = desk()
    one.feed(BARS[:HEAD])
    (event,) = one.order(trial(versions, FIRST, kind))
    assert (event["kind"], event["reason"]) == ("order_refused", "same_artifact")
    assert one.worker.pipeline.records["xgboost"].trial is None
