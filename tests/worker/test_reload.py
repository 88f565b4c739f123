"""Hot reload: loaded beside the running one, swapped between two commits, kept on any failure."""

from __future__ import annotations

import io
import json
import shutil
import threading
from hashlib import sha256
from pathlib import Path

import pytest

from streams.codec import seal
from streams.contracts import V3
from tests.helpers import LIMIT_S
from tests.worker.orders import FIRST, LAZY, SECOND, market, put, trial
from worker.assembly import load_agents, load_options
from worker.logs import make_logger
from worker.reload import Shelf, Watcher
from worker.roster import Artifact, Record
from worker.settings import Settings

BARS = market(2, 200)


def test_an_order_swaps_in_the_newest_between_two_bars(desk, versions, models):
    """The event has the first bar that the new version votes on, and both hashes."""
    one = desk(batch_size=7)
    one.feed(BARS[:100])
    put(versions, SECOND, models)
    one.write(b'{"order":"reload","agent":"xgboost","by":"a test"}')
    while not one.worker.steering.waiting:
        one.worker._orders_at = 0.0
        one.worker._turn()
    wait_for_loads(one)
    one.feed(BARS[100:200])
    assert one.versions() == [FIRST, SECOND]
    (event,) = one.events("reload")
    first = next(vote for vote in one.votes() if vote["version"] == SECOND)
    assert event["bar_id"] == first["bar_id"]
    assert event["agent"] == "xgboost"
    assert event["evidence"]["replaces"]["version"] == FIRST
    assert event["evidence"]["sha256"] == one.worker.pipeline.records["xgboost"].artifact.sha256
    assert len(one.votes()) == len(one.signals()) == 200 - 58
    assert one.registry.get_sample_value(
        "quartet_agent_info", {"agent": "xgboost", "version": SECOND, **info(one.worker.pipeline)}
    )


def wait_for_loads(one):
    for load in one.worker.steering._queue[0].loads or ():
        load.result()


def info(pipeline):
    model = pipeline.voting.stage("xgboost").seat.model
    return {"contract": model.contract, "sha256": model.sha256}


def test_bars_go_on_while_a_model_is_being_loaded(desk, versions, models):
    """The load stands still until it is let go: every bar is answered by the running one meanwhile."""
    one = desk()
    one.feed(BARS[:100])
    put(versions, SECOND, models)
    shelf, held = one.worker.steering.shelf, threading.Event()
    newest = shelf.newest

    def slow(agent):
        assert held.wait(LIMIT_S)
        return newest(agent)

    shelf.newest = slow
    one.write(b'{"order":"reload","agent":"xgboost"}')
    for number, fields in enumerate(BARS[100:200]):
        one.store.streams.add(one.worker.keys.bars, fields, f"{1_750_000_000_100 + number}-0")
    while len(one.signals()) < 200 - 58:
        one.worker._turn()
    assert one.versions() == [FIRST]
    assert one.store.position.inputs[one.worker.keys.control].consumed == 0
    held.set()
    one.turn()
    assert [e["kind"] for e in one.events("reload")] == ["reload"]
    assert one.store.position.inputs[one.worker.keys.control].consumed == 1


def test_a_refused_file_leaves_the_running_one(desk, models):
    one = desk()
    one.feed(BARS[:100])
    (models / "xgboost_v20270101_000000_v3.ubj").write_bytes(b"not a model")
    (event,) = one.order("reload", "xgboost")
    one.feed(BARS[100:120])
    assert (event["kind"], event["reason"]) == ("reload_refused", "corrupt_artifact")
    assert f"{FIRST} serves on" in event["detail"]
    assert one.versions() == [FIRST]


def test_whatever_a_load_raises_leaves_the_running_one(desk):
    """A loader that fails as nobody foresaw: said in the event, and the worker goes on."""
    one = desk()

    def broken(agent):
        raise RuntimeError("out of luck")

    one.worker.steering.shelf.newest = broken
    (event,) = one.order("reload", "xgboost")
    one.feed(BARS[:100])
    assert event["kind"] == "reload_refused"
    assert "out of luck" in event["detail"]
    assert one.versions() == [FIRST]


def test_the_folder_is_watched_and_a_growing_file_is_waited_for(versions, models):
    """Two looks that agree make a file complete; what was judged is not judged again until it changes."""
    watcher = Watcher(models, {"xgboost": f"xgboost_{FIRST}.ubj"})
    serving = {"xgboost": f"xgboost_{FIRST}.ubj"}
    assert watcher.look(serving) == watcher.look(serving) == []
    whole = (versions / "next" / f"xgboost_{SECOND}.ubj").read_bytes()
    for part in (1000, 2000, len(whole)):
        (models / f"xgboost_{SECOND}.ubj").write_bytes(whole[:part])
        assert watcher.look(serving) == []
    assert watcher.look(serving) == ["xgboost"]
    assert watcher.look(serving) == watcher.look(serving) == []
    (models / f"xgboost_{SECOND}.ubj").write_bytes(whole + b" ")
    assert [watcher.look(serving), watcher.look(serving), watcher.look(serving)] == [[], ["xgboost"], []]


def test_an_older_file_and_a_removed_one_change_nothing(versions, models):
    put(versions, SECOND, models)
    watcher = Watcher(models, {"xgboost": f"xgboost_{SECOND}.ubj"})
    serving = {"xgboost": f"xgboost_{SECOND}.ubj"}
    assert watcher.look(serving) == watcher.look(serving) == []
    for file in models.glob(f"*{SECOND}*"):
        file.unlink()
    assert watcher.look(serving) == watcher.look(serving) == []
    shutil.rmtree(models)
    assert watcher.look(serving) == watcher.look(serving) == []


def test_the_worker_takes_up_what_the_folder_brings(desk, versions, models):
    one = desk(watch_s=0.001)
    one.feed(BARS[:100])
    put(versions, SECOND, models)
    turn_until(one, lambda: one.events("reload"))
    one.feed(BARS[100:120])
    assert one.versions() == [FIRST, SECOND]
    (event,) = one.events("reload")
    assert "order" not in event["evidence"]


def looks(one, n):
    """As many looks at the folder, each finished and taken up."""
    for _ in range(n):
        one.worker._folder_at = 0.0
        one.worker._turn()
        if one.worker.steering._look is not None:
            one.worker.steering._look.result()
    one.worker._turn()


def turn_until(one, condition):
    while not condition():
        one.worker._turn()
        if one.worker.steering._look is not None:
            one.worker.steering._look.result()


def test_a_refused_newest_is_said_once_and_tried_again_when_it_changes(desk, versions, models):
    one = desk(watch_s=0.001)
    file = models / f"xgboost_{SECOND}.ubj"
    file.write_bytes(b"torn")
    turn_until(one, lambda: one.events("reload_refused"))
    looks(one, 6)
    assert len(one.events("reload_refused")) == 1
    put(versions, SECOND, models)
    turn_until(one, lambda: one.events("reload"))
    one.feed(BARS[:100])
    assert one.versions() == [SECOND]


def other_scaler(models):
    """Replace the scaler beside the running model by one that shifts every column by 3 deviations."""
    # The golden vectors would tell a wrong scaler; many artifacts of the field have none.
    meta = models / f"xgboost_{FIRST}_meta.json"
    meta.write_text(json.dumps({k: v for k, v in json.loads(meta.read_text()).items() if k != "golden"}))
    file = models / f"xgboost_{FIRST}_scaler.json"
    scaler = json.loads(file.read_text())
    scaler["mean"] = [mean + 3 * scale for mean, scale in zip(scaler["mean"], scaler["scale"], strict=True)]
    file.write_text(json.dumps(scaler))
    return scaler["mean"][0]


def mean_in_use(one):
    return one.worker.pipeline.voting.stage("xgboost").seat.model.scaler.mean[0]


def test_another_scaler_beside_the_same_model_is_taken_up_with_an_event(desk, models):
    one = desk(watch_s=0.001)
    one.feed(BARS[:100])
    looks(one, 4)
    mean = other_scaler(models)
    turn_until(one, lambda: one.events("reload"))
    (event,) = one.events("reload")
    assert "another scaler" in event["detail"]
    assert event["evidence"]["sha256"] == event["evidence"]["replaces"]["sha256"]
    assert event["evidence"]["digest"] != event["evidence"]["replaces"]["digest"]
    assert mean_in_use(one) == mean
    one.restart()
    assert mean_in_use(one) == mean
    assert len(one.events("reload")) == 1


def test_another_scaler_that_came_while_nobody_watched_is_a_reload_at_the_start(desk, models):
    one = desk()
    one.feed(BARS[:100])
    mean = other_scaler(models)
    one.restart()
    (event,) = one.events("reload")
    assert "another scaler" in event["detail"]
    assert event["evidence"]["replaces"]["version"] == FIRST
    assert mean_in_use(one) == mean
    assert one.worker.pipeline.safeguard.quality("xgboost").attempts == 0


def test_another_scaler_beside_a_pinned_model_is_refused_at_the_start(desk, versions, models):
    one = desk()
    one.feed(BARS[:100])
    one.order(trial(versions, SECOND))
    one.order("rollback", "xgboost")
    other_scaler(models)
    one.restart()
    refused = one.events("agent_refused")[-1]
    assert (refused["agent"], refused["reason"]) == ("xgboost", "no_artifact")
    assert "put them back" in refused["detail"]
    assert "models reload xgboost" in refused["detail"]


def test_state_without_digests_is_read():
    """As an earlier version wrote it: three texts an artifact."""
    plain = ["x.ubj", FIRST, "0" * 64]
    record = Record.unpack("xgboost", seal([plain, False, False, None, None]))
    assert record.artifact.is_same(Artifact(*plain, digest="1" * 64))


def test_what_serves_after_a_restart_is_what_the_state_names(desk, versions, models):
    """A newer file that came while nobody watched is a reload like any other, not a silent swap."""
    one = desk()
    one.feed(BARS[:100])
    put(versions, SECOND, models)
    one.restart()
    one.feed(BARS[100:120])
    assert one.versions() == [FIRST]
    one.order("reload", "xgboost")
    one.restart()
    one.feed(BARS[120:140])
    assert one.versions() == [FIRST, SECOND]


def test_an_artifact_that_is_gone_is_replaced_by_the_newest_and_the_event_says_so(desk, versions, models):
    one = desk()
    one.feed(BARS[:100])
    put(versions, SECOND, models)
    for file in models.glob(f"xgboost_{FIRST}*"):
        file.unlink()
    one.restart()
    one.restart()
    assert one.worker.pipeline.safeguard.quality("xgboost").attempts == 0
    one.feed(BARS[100:120])
    (event,) = one.events("reload")
    assert event["evidence"]["version"] == SECOND
    assert event["evidence"]["replaces"]["version"] == FIRST
    assert one.versions() == [FIRST, SECOND]


def test_a_pinned_artifact_that_is_gone_is_refused_not_replaced(desk, versions, models):
    """Pinned by a rollback of a reload: the newer file stays out, watched or not, until it is asked for."""
    one = desk(watch_s=0.001)
    one.feed(BARS[:100])
    put(versions, SECOND, models)
    turn_until(one, lambda: one.events("reload"))
    assert [e["evidence"]["version"] for e in one.order("rollback", "xgboost")] == [FIRST]
    looks(one, 6)
    assert [e["kind"] for e in one.order("reload", "")] == ["reload", "reload_skipped"]
    one.restart()
    one.feed(BARS[100:120])
    assert set(one.versions()) == {FIRST}
    for file in models.glob(f"xgboost_{FIRST}*"):
        file.unlink()
    one.restart()
    one.feed(BARS[120:140])
    refused = one.events("agent_refused")[-1]
    assert (refused["agent"], refused["reason"]) == ("xgboost", "no_artifact")
    assert "models reload xgboost" in refused["detail"]
    assert one.votes()[-1]["reason"] == "no_artifact"
    assert [e["evidence"]["version"] for e in one.order("reload", "xgboost")] == [SECOND]
    one.feed(BARS[140:160])
    assert one.votes()[-1]["version"] == SECOND


def test_a_newer_file_of_a_pinned_agent_is_said_once_to_wait(desk, versions, models):
    one = desk(watch_s=0.001)
    one.feed(BARS[:100])
    put(versions, SECOND, models)
    turn_until(one, lambda: one.events("reload"))
    one.order("rollback", "xgboost")
    looks(one, 4)
    assert one.events("reload_skipped") == [], "the order's own answer has said that the newer file waits"
    put(versions, LAZY, models)
    turn_until(one, lambda: one.events("reload_skipped"))
    looks(one, 4)
    (models / f"xgboost_{FIRST}_meta.json").touch()
    looks(one, 4)
    (event,) = one.events("reload_skipped")
    assert (event["agent"], event["reason"], event["evidence"]["file"]) == ("xgboost", "pinned", f"xgboost_{LAZY}.ubj")
    assert "models reload xgboost" in event["detail"]
    one.feed(BARS[100:120])
    assert one.versions() == [FIRST]


def test_a_swap_empties_the_safeguards_window_and_keeps_an_operators_mute(desk, versions, models):
    one = desk()
    one.feed(BARS[:200])
    one.order("mute", "xgboost")
    put(versions, SECOND, models)
    one.order("reload", "xgboost")
    safeguard = one.worker.pipeline.safeguard
    assert (safeguard.quality("xgboost").attempts, safeguard.quality("lightgbm").attempts) == (0, 142)
    one.feed(BARS[200:220])
    assert {(v["state"], v["reason"]) for v in one.votes()[-20:]} == {("muted", "operator")}


def test_a_refused_newer_file_is_told_at_the_start_and_not_again_by_the_watch(desk, models):
    one = desk(watch_s=0.001)
    one.feed(BARS[:100])
    newer = models / "xgboost_v20270101_000000_v3.ubj"
    newer.write_bytes(b"not a model")
    one.restart()
    event = one.events("agent_loaded")[-2]
    assert (event["agent"], event["evidence"]["version"]) == ("xgboost", FIRST)
    assert f"the newer {newer.name} was refused: corrupt_artifact" in event["detail"]
    assert event["evidence"]["newer_refused"]["file"] == str(newer)
    looks(one, 6)
    assert one.events("reload_refused") == []
    one.feed(BARS[100:110])
    assert one.versions() == [FIRST]


@pytest.mark.parametrize("restart", [False, True])
def test_an_older_artifact_in_the_place_of_one_that_is_gone_is_told_as_such(restart, desk, versions, models):
    put(versions, SECOND, models)
    one = desk()
    one.feed(BARS[:100])
    for file in models.glob(f"xgboost_{SECOND}*"):
        file.unlink()
    if restart:
        one.restart()
    else:
        one.order("reload", "xgboost")
    (event,) = one.events("reload")
    assert f"{FIRST} serves, older than {SECOND}, which served: that file is not in" in event["detail"]


def test_a_refusal_at_the_start_names_its_file(desk, models):
    file = models / "xgboost_v20270101_000000_v3.ubj"
    file.write_bytes(b"not a model")
    one = desk()
    (event,) = one.events("agent_refused")
    told = {"file": str(file), "version": "v20270101_000000_v3", "sha256": sha256(b"not a model").hexdigest()}
    assert event["evidence"] == told
    assert one.worker.status.readiness().agents["xgboost"]["file"] == file.name
    assert one.worker.status.readiness().agents["lightgbm"]["file"].startswith("lightgbm_v")


def test_a_record_survives_packing():
    record = Record(active=True, pinned=True)
    assert Record.unpack("xgboost", record.pack()) == record


def test_the_shelf_keeps_only_what_the_state_names(desk, versions, models):
    one = desk()
    put(versions, SECOND, models)
    one.order("reload", "xgboost")
    put(versions, LAZY, models)
    one.order("reload", "xgboost")
    held = {Path(x.model.file).name for x in one.worker.steering.shelf._held.values()}
    assert held == {f"xgboost_{SECOND}.ubj", f"xgboost_{LAZY}.ubj"} | {f"lightgbm_{FIRST}.txt"}


def test_the_start_says_what_it_knows_of_each_agent(models, tmp_path):
    """One line an agent, from the file itself: generation, dimensions, parameters, scaler, contract, probe."""
    log = io.StringIO()
    given = Settings(models=models, agents=("xgboost", "lightgbm", "nhits"), quorum=2)
    load_agents(given, {}, Shelf(models, load_options(given)), make_logger(stream=log, as_json=True))
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    assert [(line["event"], line["agent"]) for line in lines] == [
        ("agent loaded", "xgboost"),
        ("agent loaded", "lightgbm"),
        ("agent refused", "nhits"),
    ]
    first = lines[0]
    assert (first["file"], first["generation"], first["architecture"]) == (
        f"xgboost_{FIRST}.ubj", 3, "xgboost-regressor"
    )  # fmt: skip
    assert (first["input_shape"], first["outputs"], first["scaler"]) == ([23], 1, f"xgboost_{FIRST}_scaler.json")
    assert (first["contract"], first["probe"]) == (V3.contract[:12], "passed")
    assert first["parameters"] > 0
    assert lines[1]["trees"] > 0
    assert lines[2]["reason"] == "no_artifact"
