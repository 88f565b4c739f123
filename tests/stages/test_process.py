"""What else happens to a stage: a poisoned vector, vectors that are gone, a feature set that nobody computes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from streams.codec import StateCorruptError
from streams.contracts import FEATURE_SETS
from streams.memory import MemoryStore
from streams.store import InputLostError, StoreMisuseError
from tests.stages.desk import KEYS, StagesDesk
from tests.worker import small
from tests.worker.orders import FIRST, SECOND, market, put, train
from worker.control import Order

BARS = market(2, 60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("process")
    train(made)
    return made


@pytest.fixture
def desk(folder):
    made = StagesDesk(folder / "models")
    yield made
    made.close()


class Deadly(MemoryStore):
    """As the server has it after three deaths on one entry."""

    deadly = ""

    deaths = 3
    marked = ""

    def mark(self, entry):
        self.marked = entry.id
        return 1 + self.deaths if entry.id == self.deadly else 1

    def unmark(self):
        self.marked = ""


def after_deaths(desk: StagesDesk, name: str, entry_id: str) -> None:
    store, old = Deadly(desk.streams, desk.stores[name].stage), desk.stores[name]
    store.position, store.state, store.was_clean, store.deadly = old.position, old.state, False, entry_id
    desk.stores[name] = store
    desk.start(name)


@pytest.mark.parametrize("name", ["xgboost", "consensus"])
def test_a_vector_that_ends_the_process_three_times_is_left_out(desk, name):
    """The agent abstains on it, as every ready vector has a vote; the consensus gives no signal. Both say so."""
    desk.feed(BARS[:90])
    deadly = "1750000000090-0"
    after_deaths(desk, name, deadly)
    desk.feed(BARS[90:100])
    ((_, reject),) = desk.streams.after(KEYS.rejected, "0-0")
    assert (reject[b"reason"], reject[b"source_id"]) == (b"poison", deadly.encode())
    assert reject[b"stage"] == (b"agent:xgboost" if name == "xgboost" else b"consensus")
    votes = dict(desk.streams.after(KEYS.votes("xgboost"), "0-0"))
    signals = dict(desk.streams.after(KEYS.signals, "0-0"))
    assert (b'"insufficient_history"' in votes[deadly][b"data"]) == (name == "xgboost")
    assert (deadly in signals) == (name == "xgboost")
    assert len(signals) == 100 - 2 * 29 - (name == "consensus")


def test_a_vector_that_kills_while_it_is_decoded_is_marked_before_and_left_out(desk):
    """Here it is one that cannot be decoded at all."""
    desk.feed(BARS[:90])
    deadly = "1750000000090-0"
    desk.feed(BARS[90:100], "features", "xgboost", "lightgbm")
    good = desk.streams.streams[KEYS.features]
    bad = [(i, {b"data": b"{"} if i == deadly else fields) for i, fields in good]
    desk.streams.streams[KEYS.features] = bad
    after_deaths(desk, "consensus", deadly)
    store = desk.stores["consensus"]
    store.deaths = 2
    with pytest.raises(StoreMisuseError, match="no feature vector"):
        desk.turn("consensus")
    assert store.marked == deadly
    store.deaths = 3
    desk.turn("consensus")
    signals = dict(desk.streams.after(KEYS.signals, "0-0"))
    assert deadly not in signals
    assert len(signals) == 100 - 58 - 1


def test_a_consensus_that_waits_for_a_vote_has_marked_nothing(desk):
    """What ends it there is not the vector."""
    desk.feed(BARS[:90])
    desk.feed(BARS[90:92], "features", "xgboost")
    after_deaths(desk, "consensus", "")
    desk.turn("consensus")
    assert len(desk.signals()) == 90 - 58
    assert desk.stores["consensus"].marked == ""
    desk.turn()
    assert desk.stores["consensus"].marked == "1750000000091-0"


def test_vectors_that_are_gone_stop_an_agent_until_that_is_accepted(desk):
    desk.feed(BARS[:90])
    desk.feed(BARS[90:100], "features")
    desk.streams.trim(KEYS.features, 4)
    with pytest.raises(InputLostError, match="--accept-gap"):
        desk.turn("xgboost")
    desk.stages["xgboost"].options.accept_gap = True
    desk.stages["lightgbm"].options.accept_gap = True
    desk.stages["consensus"].options.accept_gap = True
    desk.turn()
    assert [e["evidence"]["lost"] for e in desk.events("gap")] == [6, 6, 6]
    assert len(desk.signals()) == 90 - 58 + 4


@pytest.mark.parametrize(
    ("name", "key", "other"), [("features", KEYS.bars, "xgboost"), ("xgboost", KEYS.features, "features")]
)
def test_a_run_until_idle_does_not_end_between_what_is_gone_and_what_follows_it(desk, name, key, other):
    desk.feed(BARS[:90])
    desk.feed(BARS[90:100], other)
    desk.streams.trim(key, 4)
    stage = desk.stages[name]
    stage.options.accept_gap, stage.options.until_idle_s = True, 0.0
    stage._turn()
    assert not stage._done()
    assert [e["evidence"]["lost"] for e in desk.events("gap") if e["reason"] == "lost"] == [6]


def test_orders_that_are_gone_stop_nobody_and_are_told_of_by_each_who_reads_them(desk):
    desk.feed(BARS[:90])
    desk.order(Order("mute", "xgboost", by="a test"))
    for _ in range(2):
        desk.streams.add(KEYS.control, {b"data": Order("unmute", "xgboost", by="a test").encode()})
    desk.streams.trim(KEYS.control, 0)
    desk.feed(BARS[90:100])
    details = [e["detail"] for e in desk.events("gap") if e["reason"] == "lost"]
    told = f"2 orders are gone from {KEYS.control} before they were read: order again what is missing"
    assert details == [told] * 3, "two agents and the consensus"
    assert len(desk.signals()) == 100 - 58


def test_a_hot_reload_reaches_one_agent_and_no_other(desk, folder, tmp_path):
    import shutil

    models = tmp_path / "models"
    shutil.copytree(folder / "models", models)
    split = StagesDesk(models)
    try:
        split.feed(BARS[:80])
        put(folder, SECOND, models)
        (event,) = split.order(Order("reload", "xgboost", by="a test"))
        assert (event["kind"], event["evidence"]["version"]) == ("reload", SECOND)
        split.feed(BARS[80:90])
        votes = split.signals()[-1]["votes"]
        assert (votes["xgboost"]["version"], votes["lightgbm"]["version"]) == (SECOND, FIRST)
        split.start("xgboost")
        split.feed(BARS[90:100])
        assert split.signals()[-1]["votes"]["xgboost"]["version"] == SECOND, "the record says what serves"
    finally:
        split.close()


def test_an_agent_whose_set_is_not_computed_abstains_and_names_the_remedy(desk):
    desk.feed(BARS[:80])
    process = desk.stages["xgboost"]
    other = replace(small.model("xgboost"), feature_set="v6", features=FEATURE_SETS["v6"].features, contract="")
    process.group.install("xgboost", other, pinned=False)
    desk.feed(BARS[80:90])
    vote = desk.read(KEYS.votes("xgboost"))[-1]
    assert (vote["action"], vote["reason"]) == ("ABSTAIN", "insufficient_history")
    facts = process.status.readiness().agents["xgboost"]
    assert facts["reason"] == "insufficient_history"
    assert "has no v6" in facts["detail"]
    assert "feature_sets" in facts["detail"]


@pytest.mark.parametrize(("name", "part"), [("features", "features"), ("xgboost", "series"), ("consensus", "lateness")])
def test_a_stage_whose_state_is_damaged_stops_and_is_rebuilt_from_its_input(folder, desk, name, part):
    """It goes on with the bytes of a run without damage."""
    calm = StagesDesk(folder / "models")
    try:
        for each in (calm, desk):
            each.feed(BARS[:90])
        state = desk.stores[name].state[part]
        field = next(iter(state))
        state[field] = state[field][:-1] + bytes([state[field][-1] ^ 1])
        with pytest.raises(StateCorruptError, match="--rebuild"):
            desk.start(name)
        desk.start(name, rebuild=True)
        (recovery,) = desk.events("recovery")
        assert recovery["reason"] == "rebuild"
        for each in (calm, desk):
            each.feed(BARS[90:])
        assert desk.outputs() == calm.outputs()
    finally:
        calm.close()
