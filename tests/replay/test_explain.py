"""One signal is explained: who voted what, who was left out and why, and all of it recomputed."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from streams.keys import Keys
from streams.messages import Reason, Status
from streams.recording import Recorded, Recording
from streams.redis import connect
from tests.chaos.scene import feed, market
from tests.replay.scene import Scene, edited, rewrite
from worker.errors import CheckFailed, UsageError
from worker.explain import MEANINGS, REMEDIES, RecordedPlace, ServerPlace, explain

Day = tuple[Scene, Path]


def on_server(scene: Scene) -> ServerPlace:
    return ServerPlace(connect(scene.url), Keys(scene.namespace), (f"{scene.namespace}:bars",))


def test_the_last_signal_is_recomputed_from_the_bars_to_the_decision(day: Day) -> None:
    scene, file = day
    found = explain(on_server(scene), scene.settings(), None)
    checks = {check.what: check for check in found.checks}
    assert set(checks) == {"consensus", "features", "xgboost", "lightgbm", "nhits", "patchtst"}
    assert {check.same for check in found.checks} == {True}
    assert found.same
    signals = [i for i in Recording(file) if isinstance(i, Recorded) and i.stream == "signals"]
    assert found.id == signals[-1].id
    assert dict(found.signal) == json.loads(signals[-1].fields[b"data"])


def test_a_recording_explains_the_same_as_the_server(day: Day) -> None:
    scene, file = day
    last = explain(on_server(scene), scene.settings(), None).signal["bar_id"]
    earlier = f"{last.rpartition('|')[0]}|{int(last.rpartition('|')[2]) - 60_000 * 40}"
    one = explain(on_server(scene), scene.settings(), earlier)
    other = explain(RecordedPlace(file), scene.settings(), earlier)
    assert one.signal["bar_id"] == earlier
    assert one.as_json() == other.as_json()


def test_the_commands_read_the_keys_that_the_worker_read_unless_others_are_named(scene: Scene, tmp_path: Path) -> None:
    key = f"{scene.namespace}x:candles"
    scene.further |= {"bars": (f"{scene.namespace}x:c*",)}
    feed(scene.url, key, market(1, 60))
    scene.work()
    told = json.loads(scene.quartet("explain", "--last", "--json"))
    assert {check["what"]: check["same"] for check in told["recomputed"]}["features"] is True
    file, other = tmp_path / "day.jsonl.zst", tmp_path / "other.jsonl.zst"
    summary = json.loads(scene.quartet("record", "--out", file, "--until-idle", "0.1", "--json"))
    assert summary["entries"]["bars"] == 60
    assert {i.key for i in Recording(file) if i.stream == "bars"} == {key}
    named = json.loads(
        scene.quartet("record", "--out", other, "--until-idle", "0.1", "--json", "--bars", f"{scene.namespace}:bars")
    )
    assert "bars" not in named["entries"]


def test_a_bar_refused_by_the_clock_of_then_and_other_settings_here_change_nothing(
    scene: Scene, tmp_path: Path
) -> None:
    """A bar three years ahead was refused as `future`: taken in now, it would make every later bar an old one."""
    bars = market(1, 90)
    ahead_ms = (time.time_ns() // 60_000_000_000 + 3 * 365 * 1440) * 60_000
    bars.insert(60, {**bars[60], b"ts": str(ahead_ms).encode()})
    scene.feed(bars)
    scene.work()
    file = tmp_path / "day.jsonl.zst"
    scene.record(file)
    for place in (on_server(scene), RecordedPlace(file)):
        found = explain(place, scene.settings(intervals=("5m",), warmup_bars={"v3": 60}), None)
        assert {check.same for check in found.checks} == {True}
        assert {check.what: check.detail for check in found.checks}[
            "features"
        ] == "computed again from 90 bars of the series"


def test_a_model_of_the_same_version_with_other_bytes_is_not_taken_for_the_one_that_voted(
    day: Day, models: Path, tmp_path: Path
) -> None:
    scene, file = day
    other = tmp_path / "models"
    shutil.copytree(models, other)
    model = next(other.glob("lightgbm_v*.txt"))
    model.write_bytes(model.read_bytes() + b"\n")
    found = explain(RecordedPlace(file), scene.settings(models=other), None)
    assert {check.what: check.same for check in found.checks}["lightgbm"] is None


def test_who_was_left_out_is_told_in_words_with_what_to_do(scene: Scene, models: Path, tmp_path: Path) -> None:
    fewer = tmp_path / "models"
    shutil.copytree(models, fewer, ignore=shutil.ignore_patterns("xgboost*"))
    scene.feed(market(1, 60))
    scene.work(models=fewer)
    found = explain(on_server(scene), scene.settings(models=fewer), None)
    assert set(found.left_out) == {"xgboost", "nhits", "patchtst"}
    assert found.left_out["xgboost"].startswith("refused, no_artifact: it has no model: `quartet train`")
    assert "wait for more bars" in found.left_out["nhits"]
    assert found.signal["status"] == "below_quorum"


def test_a_decision_that_its_votes_do_not_give_is_found(day: Day, tmp_path: Path) -> None:
    scene, file = day

    def change(item: object) -> list[object]:
        if isinstance(item, Recorded) and item.stream == "signals":
            return [edited(item, lambda signal: signal.update(confidence=0.123456))]
        return [item]

    found = explain(RecordedPlace(rewrite(file, tmp_path / "x.jsonl.zst", change)), scene.settings(), None)  # type: ignore[arg-type]
    consensus = found.checks[0]
    assert (consensus.what, consensus.same) == ("consensus", False)
    assert "confidence recorded 0.123456, recomputed" in consensus.detail
    assert not found.same


def test_trimmed_bars_are_said_and_not_passed_over(scene: Scene) -> None:
    scene.feed(market(1, 50))
    scene.work()
    place = on_server(scene)
    place.client.xtrim(f"{scene.namespace}:bars", maxlen=10, approximate=False)
    check = explain(place, scene.settings(), None).checks[-1]
    assert (check.what, check.same) == ("features", None)
    assert "40 entries of the input are gone" in check.detail


def test_a_bar_without_a_signal_and_a_name_that_is_none_are_told_apart(day: Day) -> None:
    scene, _ = day
    with pytest.raises(CheckFailed, match="no signal of bar SYN01"):
        explain(on_server(scene), scene.settings(), "SYN01|1m|1")
    with pytest.raises(UsageError, match="expected a bar as"):
        explain(on_server(scene), scene.settings(), "SYN01")


def test_every_reason_and_status_has_its_words() -> None:
    assert set(REMEDIES) == {str(reason) for reason in Reason}
    assert set(MEANINGS) == {str(status) for status in Status}


def test_the_command_prints_the_table_and_the_json(day: Day) -> None:
    scene, file = day
    shown = scene.quartet("explain", "--last", "--recording", file)
    assert "4 configured, 4 loaded" in shown
    assert shown.count("recomputed: ") == 6
    assert "DIFFERENT" not in shown
    told = json.loads(scene.quartet("explain", "--last", "--json"))
    assert told["same"] is True
    assert set(told["outputs"]) == {"xgboost", "lightgbm", "nhits", "patchtst"}
