"""An agent that is silent while a vector waits for it: absent, present again, muted for it and re-admitted."""

from __future__ import annotations

import pytest

from streams.store import StoreUnavailableError
from tests.stages.desk import KEYS, StagesDesk
from tests.worker.orders import SECOND as NEWER
from tests.worker.orders import Desk, market, model_file, train, trial
from worker.control import Order


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("lateness")
    train(made)
    return made


@pytest.fixture
def desk(folder):
    made = StagesDesk(folder / "models")
    yield made
    made.close()


BARS = market(2, 60)
REST = ("features", "xgboost", "consensus")
"""Every stage but the one that is stopped."""


def last(desk: StagesDesk) -> dict:
    return desk.signals()[-1]["votes"]["lightgbm"]


def test_nobody_is_decided_without_before_the_deadline(desk):
    desk.feed(BARS[:80])
    decided = len(desk.signals())
    desk.feed(BARS[80:90], *REST)
    desk.wait(1.9, *REST)
    assert len(desk.signals()) == decided, "lightgbm has until the deadline"
    desk.turn()
    assert len(desk.signals()) == decided + 10
    assert {s["votes"]["lightgbm"]["reason"] for s in desk.signals()} == {None}
    assert desk.value("consensus", "agent_late_votes_total", agent="lightgbm") == 0


def test_an_agent_that_is_silent_is_absent_until_it_votes_again(desk):
    desk.feed(BARS[:80])
    version = last(desk)["version"]
    desk.feed(BARS[80:90], *REST)
    desk.wait(2.0, *REST)
    absent = desk.signals()[-10:]
    for signal in absent:
        vote = signal["votes"]["lightgbm"]
        assert (vote["action"], vote["reason"], vote["state"]) == ("ABSTAIN", "deadline_missed", "active")
        assert (vote["version"], vote["effective_weight"], vote["confidence"]) == (version, 0.0, 0.0)
        assert (signal["loaded"], signal["voting"], signal["status"]) == (2, 1, "below_quorum")
    desk.feed(BARS[90:94], *REST)
    assert last(desk)["reason"] == "deadline_missed", "nobody waits for an agent that is absent"
    assert desk.value("consensus", "agent_abstentions_total", agent="lightgbm", reason="deadline_missed") == 14

    signals = len(desk.signals())
    desk.turn()  # it comes back and votes on what was decided without it
    assert len(desk.signals()) == signals
    assert len(desk.read(KEYS.votes("lightgbm"))) == signals, "its votes are written all the same"
    assert desk.value("consensus", "agent_late_votes_total", agent="lightgbm") == 14
    desk.feed(BARS[94:100], *REST)
    assert len(desk.signals()) == signals, "it is waited for again"
    desk.turn()
    assert last(desk)["reason"] is None
    assert len(desk.signals()) == signals + 6


def test_who_is_absent_survives_a_restart_of_the_consensus(desk):
    desk.feed(BARS[:80])
    desk.feed(BARS[80:82], *REST)
    desk.wait(2.0, *REST)
    desk.start("consensus")
    desk.feed(BARS[82:84], *REST)
    assert last(desk)["reason"] == "deadline_missed"
    assert last(desk)["state"] == "active"
    assert len(desk.signals()) == len(desk.read(KEYS.votes("xgboost")))


@pytest.fixture
def slow(folder):
    """Batches of eight: an agent needs many of them to catch up."""
    made = StagesDesk(folder / "models", batch_size=8)
    yield made
    made.close()


def test_an_agent_that_commits_vectors_without_votes_is_not_late(slow):
    """58 vectors of warm-up are seven batches: the others wait ten seconds for its first vote, the deadline is two."""
    slow.feed(BARS[:70], *REST)
    for _ in range(7):
        slow.stages["lightgbm"]._turn()
        slow.wait(1.5, *REST)
        assert not slow.signals()
    slow.turn()
    assert [s["votes"]["lightgbm"]["reason"] for s in slow.signals()] == [None] * 12


def test_nobody_waits_while_an_agent_catches_up(slow):
    slow.feed(BARS[:70])
    slow.feed(BARS[70:110], *REST)
    slow.wait(2.0, *REST)
    slow.stages["lightgbm"]._turn()
    assert len(slow.read(KEYS.votes("lightgbm"))) == 12 + 8, "it votes again"
    slow.feed(BARS[110:112], *REST)
    assert len(slow.signals()) == 112 - 58
    assert last(slow)["reason"] == "deadline_missed"
    slow.turn("lightgbm")
    slow.feed(BARS[112:114], *REST)
    assert len(slow.signals()) == 112 - 58, "it is back, and waited for"
    slow.turn()
    assert last(slow)["reason"] is None


def test_an_agent_whose_votes_lie_unread_is_not_late(slow):
    """A consensus that reads eight votes every half second has 40 to pass over before the one that it waits for."""
    slow.feed(BARS[:70])
    slow.feed(BARS[70:110], *REST)
    slow.wait(2.0, *REST)
    slow.feed(BARS[110:111], "features", "lightgbm", "xgboost")
    for _ in range(8):
        slow.now_s += 0.5
        slow.stages["consensus"]._turn()
    assert len(slow.signals()) == 111 - 58
    assert last(slow)["reason"] is None


def test_after_an_outage_everybody_has_the_whole_deadline_again(desk, monkeypatch):
    desk.feed(BARS[:80])
    desk.feed(BARS[80:82], *REST)
    desk.wait(1.75, *REST)
    store, away = desk.stores["consensus"], [StoreUnavailableError("away")]
    read_each = store.read_each

    def unsteady(*given):
        if away:
            raise away.pop()
        return read_each(*given)

    monkeypatch.setattr(store, "read_each", unsteady)
    desk.wait(1.75, *REST)
    assert not away
    assert len(desk.signals()) == 80 - 58
    desk.wait(0.5, *REST)
    assert last(desk)["reason"] == "deadline_missed"


def test_an_agent_that_never_voted_is_not_loaded(desk):
    desk.feed(BARS[:70], *REST)
    desk.wait(2.0, *REST)
    signal = desk.signals()[-1]
    assert (signal["configured"], signal["loaded"], signal["eligible"]) == (2, 1, 1)
    vote = signal["votes"]["lightgbm"]
    assert (vote["state"], vote["reason"], vote["version"], vote["weight"]) == ("loading", "deadline_missed", None, 0.3)


def test_missed_deadlines_mute_and_a_clean_window_readmits(folder):
    """The limit is 5 % of at least 20; 500 votes in time bring the agent back."""
    desk = StagesDesk(folder / "models", quality={"minimum": 20})
    try:
        bars = market(4, 220)
        desk.feed(bars[:200])
        desk.feed(bars[200:208], *REST)
        desk.wait(2.0, *REST)
        (muted,) = desk.events("agent_muted")
        assert (muted["agent"], muted["reason"]) == ("lightgbm", "deadline_missed")
        assert muted["evidence"]["violations"] == ["deadline_missed"]
        desk.turn()
        desk.feed(bars[208:240])
        vote = last(desk)
        assert (vote["state"], vote["reason"], vote["effective_weight"]) == ("muted", "deadline_missed", 0.0)
        assert vote["action"] != "ABSTAIN", "a muted agent is heard"
        assert desk.read(KEYS.votes("lightgbm"))[-1]["state"] == "active", "its own stage has nothing against it"
        assert desk.value("consensus", "agent_state", agent="lightgbm", state="muted") == 1
        desk.feed(bars[240:])
        (readmitted,) = desk.events("agent_readmitted")
        assert (readmitted["agent"], readmitted["reason"]) == ("lightgbm", "deadline_missed")
        assert last(desk)["state"] == "active"
        assert desk.value("consensus", "agent_state", agent="lightgbm", state="muted") is None
    finally:
        desk.close()


def test_an_operator_forgives_missed_deadlines(folder):
    desk = StagesDesk(folder / "models", quality={"minimum": 20})
    try:
        bars = market(4, 80)
        desk.feed(bars[:200])
        desk.feed(bars[200:208], *REST)
        desk.wait(2.0, *REST)
        desk.turn()
        (answer,) = desk.order(Order("unmute", "lightgbm", by="a test"))
        assert (answer["kind"], answer["agent"]) == ("agent_readmitted", "lightgbm")
        told = [e["evidence"].get("stage") for e in desk.events("agent_readmitted")]
        assert sorted(told, key=str) == [None, "consensus"], "its own process answers, the consensus says what it did"
        desk.feed(bars[208:220])
        assert last(desk)["state"] == "active"
    finally:
        desk.close()


def test_orders_reach_their_agent_alone_and_what_is_none_is_rejected_once(desk):
    desk.feed(BARS[:80])
    (event,) = desk.order(Order("mute", "xgboost", by="a test"))
    assert (event["kind"], event["agent"]) == ("agent_muted", "xgboost")
    desk.streams.add(KEYS.control, {b"data": b"{}"})
    desk.turn()
    (rejected,) = desk.streams.after(KEYS.rejected, "0-0")
    assert rejected[1][b"stage"] == b"control"
    desk.feed(BARS[80:84])
    assert desk.signals()[-1]["votes"]["xgboost"]["state"] == "muted"
    (event,) = desk.order(Order("unmute", "xgboost", by="a test"))
    assert event["kind"] == "agent_readmitted"
    for name, store in desk.stores.items():
        if name != "features":
            assert store.position.inputs[KEYS.control].consumed == 3, f"{name} left an order unread"


def test_a_canary_votes_and_is_promoted_as_in_the_chain(folder):
    """The same orders at the same bars, chained and in stages: the same bytes, the canary's too."""
    bars = market(2, 320)
    chained = Desk(folder / "models", quality={"minimum": 20})
    split = StagesDesk(folder / "models", quality={"minimum": 20})
    try:
        for each in (chained, split):
            each.feed(bars[:100])
            each.order(trial(folder, NEWER))
            each.feed(bars[100:560])
            each.order(Order("promote", "xgboost", by="a test"))
            each.feed(bars[560:])
        assert model_file(folder, NEWER).exists()
        assert [e["kind"] for e in split.events("canary_started", "promoted")] == ["canary_started", "promoted"]
        assert split.signals()[-1]["votes"]["xgboost"]["version"] == NEWER
        assert any("xgboost_canary" in signal["votes"] for signal in split.signals())
        assert split.outputs() == chained.outputs()
    finally:
        chained.close()
        split.close()
