"""A recording is computed again and found the same; whatever was changed in it is found and named."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from streams.recording import Item, Recorded, Recording, Writer, read_header
from streams.redis import connect
from streams.store import id_tuple
from tests.chaos.scene import feed, market
from tests.replay.scene import Scene, edited, rewrite
from worker.control import Order
from worker.errors import CheckFailed
from worker.pipeline import Pipeline, Result, Underway
from worker.replay.chain import AHEAD
from worker.replay.verify import TURN_S, Verdict

Day = tuple[Scene, Path]
VOTES = ("votes:xgboost", "votes:lightgbm", "votes:nhits", "votes:patchtst")


@pytest.fixture(scope="module")
def plain(day: Day) -> Verdict:
    scene, file = day
    return scene.verify(file)


def test_what_a_worker_did_is_computed_again_to_the_bit(plain: Verdict) -> None:
    assert plain.ok
    assert plain.comparison.tolerance == 0.0
    assert plain.other_build == []
    # 780 bars, less 3 that were refused, 1 doubled and 3 left out.
    assert plain.bars == 773
    compared = plain.comparison.compared
    assert compared["features"] == 773
    # Networks vote, or say why not, from the 30th bar of a symbol on.
    assert {compared[stream] for stream in (*VOTES, "signals")} == {773 - 3 * 29}


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_the_result_does_not_depend_on_the_batches(day: Day, plain: Verdict, batch_size: int) -> None:
    scene, file = day
    again = scene.verify(file, batch_size=batch_size)
    assert again.ok
    assert again.comparison.compared == plain.comparison.compared


@pytest.mark.parametrize(("batch_size", "restart_every"), [(64, 1), (37, 3)])
def test_the_result_does_not_depend_on_restarts(day: Day, plain: Verdict, batch_size: int, restart_every: int) -> None:
    scene, file = day
    again = scene.verify(file, batch_size=batch_size, restart_every=restart_every)
    assert again.ok
    assert again.comparison.compared == plain.comparison.compared


def _nth(stream: str, n: int, edit: Callable[[dict[str, Any]], object]) -> Callable[[Item], list[Item]]:
    """Edit the n-th entry of a stream, from 0, and leave all else."""
    seen = 0

    def change(item: Item) -> list[Item]:
        nonlocal seen
        if not isinstance(item, Recorded) or item.stream != stream:
            return [item]
        seen += 1
        return [edited(item, edit) if seen == n + 1 else item]

    return change


def test_a_changed_confidence_is_named_with_its_bar_and_agent_and_both_values(day: Day, tmp_path: Path) -> None:
    scene, file = day
    kept: dict[str, Any] = {}

    def edit(vote: dict[str, Any]) -> None:
        kept.update(vote)
        vote["confidence"] = vote["confidence"] / 2 + 0.1

    found = scene.verify(rewrite(file, tmp_path / "changed.jsonl.zst", _nth("votes:nhits", 400, edit)))
    first = found.comparison.first
    assert not found.ok
    assert found.comparison.differences == 1
    assert first is not None
    assert (first.bar_id, first.stream, first.agent, first.field) == (
        kept["bar_id"],
        "votes:nhits",
        "nhits",
        "confidence",
    )
    assert first.recorded == kept["confidence"] / 2 + 0.1
    assert first.recomputed == kept["confidence"]


def test_a_changed_feature_is_named(day: Day, tmp_path: Path) -> None:
    scene, file = day
    kept: dict[str, Any] = {}

    def edit(vector: dict[str, Any]) -> None:
        kept.update(vector, values=dict(vector["values"]))
        vector["values"]["rsi_14"] += 1e-9

    found = scene.verify(rewrite(file, tmp_path / "changed.jsonl.zst", _nth("features", 300, edit)))
    first = found.comparison.first
    assert first is not None
    assert (first.bar_id, first.stream, first.feature) == (kept["bar_id"], "features", "rsi_14")
    assert first.recomputed == kept["values"]["rsi_14"]
    assert found.comparison.differing == {"features": 1} or found.comparison.differing["features"] == 1


def test_a_changed_action_of_a_signal_is_named(day: Day, tmp_path: Path) -> None:
    scene, file = day

    def edit(signal: dict[str, Any]) -> None:
        signal["action"] = "BUY" if signal["action"] != "BUY" else "SELL"
        signal["votes"]["xgboost"]["effective_weight"] = 0.5

    found = scene.verify(rewrite(file, tmp_path / "changed.jsonl.zst", _nth("signals", 500, edit)))
    first = found.comparison.first
    assert first is not None
    assert (first.stream, first.field, first.agent) == ("signals", "action", "")
    assert found.comparison.differences == 2


def test_the_first_difference_is_the_first_by_bar(day: Day, tmp_path: Path) -> None:
    scene, file = day
    later = _nth("features", 600, lambda x: x["values"].update(close=1.0))
    earlier = _nth("votes:patchtst", 10, lambda x: x.update(action="SELL", confidence=1.0))
    changed = rewrite(file, tmp_path / "changed.jsonl.zst", lambda item: earlier(later(item)[0]))
    found = scene.verify(changed).comparison
    assert found.first is not None
    assert (found.first.stream, found.first.agent) == ("votes:patchtst", "patchtst")
    assert set(found.firsts) == {"votes:patchtst", "features"}


def test_entries_that_are_missing_or_too_many_are_named_and_the_rest_still_fits(day: Day, tmp_path: Path) -> None:
    scene, file = day
    seen: dict[str, int] = {}

    def change(item: Item) -> list[Item]:
        seen[item.stream] = seen.get(item.stream, 0) + 1
        if (item.stream, seen[item.stream]) == ("votes:xgboost", 50):
            return []
        return [item, item] if (item.stream, seen[item.stream]) == ("signals", 70) else [item]

    found = scene.verify(rewrite(file, tmp_path / "changed.jsonl.zst", change)).comparison
    assert {name: n for name, n in found.differing.items() if n} == {"votes:xgboost": 1, "signals": 1}
    assert found.first is not None
    assert (found.first.stream, found.first.field, found.first.recorded) == ("votes:xgboost", "entry", "(absent)")


def _last_of(stream: str) -> Callable[[Item, int], bool]:
    return lambda item, nth: item.stream == stream and nth > 300


@pytest.mark.parametrize(
    ("stream", "gone"),
    [
        ("votes:nhits", _last_of("votes:nhits")),
        ("signals", _last_of("signals")),
        ("features", _last_of("features")),
        ("signals", lambda item, _: item.stream == "signals"),
    ],
)
def test_an_end_that_one_stream_alone_lacks_is_a_difference(
    day: Day, tmp_path: Path, stream: str, gone: Callable[[Item, int], bool]
) -> None:
    scene, file = day
    seen: dict[str, int] = {}

    def change(item: Item) -> list[Item]:
        seen[item.stream] = seen.get(item.stream, 0) + 1
        return [] if gone(item, seen[item.stream]) else [item]

    found = scene.verify(rewrite(file, tmp_path / "changed.jsonl.zst", change))
    assert not found.ok
    assert not found.same
    assert set(found.comparison.firsts) == {stream}
    assert found.comparison.first is not None
    assert found.comparison.first.recorded == "(absent)"
    total = (
        found.comparison.compared["votes:xgboost" if stream == "signals" else "signals"]
        if stream != "features"
        else 773
    )
    assert (
        found.comparison.differing[stream] == total - found.comparison.compared[stream] == found.comparison.differences
    )


def test_an_end_that_all_streams_lack_alike_is_no_difference(day: Day, tmp_path: Path) -> None:
    """The worker was still at work when the recorder ended: the outputs of the last bars are not there yet."""
    scene, file = day
    ids = [item.id for item in Recording(file) if item.stream == "features"]
    last = id_tuple(ids[400])
    outputs = {"features", *VOTES, "signals"}

    def change(item: Item) -> list[Item]:
        return [] if item.stream in outputs and id_tuple(item.id) > last else [item]

    found = scene.verify(rewrite(file, tmp_path / "shorter.jsonl.zst", change))
    assert found.ok
    assert found.comparison.compared["features"] == 401
    assert found.comparison.unrecorded["features"] == 773 - 401


def test_a_recording_without_any_output_is_not_verified_and_the_command_says_so(day: Day, tmp_path: Path) -> None:
    scene, file = day
    bare = rewrite(
        file, tmp_path / "bare.jsonl.zst", lambda item: [item] if item.stream in ("bars", "events", "rejected") else []
    )
    assert not scene.verify(bare).ok
    told = scene.quartet("replay", bare, "--verify", code=1)
    assert "NOT VERIFIED: nothing was compared" in told


def test_a_model_that_is_not_at_hand_is_named_and_the_rest_is_verified(day: Day, models: Path, tmp_path: Path) -> None:
    scene, file = day
    fewer = tmp_path / "models"
    shutil.copytree(models, fewer, ignore=shutil.ignore_patterns("nhits*"))
    found = scene.verify(file, models=fewer)
    assert [agent for agent, _ in found.missing] == ["nhits"]
    assert not found.ok
    assert found.same
    assert found.comparison.compared["votes:patchtst"] == found.comparison.compared["signals"] > 0
    assert "votes:nhits" not in found.comparison.compared


def test_consensus_over_votes_taken_over_is_still_verified(day: Day, models: Path, tmp_path: Path) -> None:
    scene, file = day
    fewer = tmp_path / "models"
    shutil.copytree(models, fewer, ignore=shutil.ignore_patterns("nhits*", "patchtst*"))
    changed = _nth("votes:nhits", 500, lambda vote: vote.update(action="BUY", confidence=0.9999))
    found = scene.verify(rewrite(file, tmp_path / "changed.jsonl.zst", changed), models=fewer)
    assert found.comparison.first is not None
    assert (found.comparison.first.stream, found.comparison.first.agent) == ("signals", "nhits") or (
        found.comparison.first.stream == "signals"
    )


def test_a_file_of_the_same_version_with_other_bytes_is_not_taken(day: Day, models: Path, tmp_path: Path) -> None:
    scene, file = day
    other = tmp_path / "models"
    shutil.copytree(models, other)
    model = next(other.glob("lightgbm_v*.txt"))
    model.write_bytes(model.read_bytes() + b"\n")
    found = scene.verify(file, models=other)
    ((agent, version), why), *_ = found.missing.items()
    assert (agent, len(found.missing)) == ("lightgbm", 1)
    assert version in why


def _other_scaler(models: Path, to: Path) -> Path:
    """The same models, but for another scaler beside the file of LightGBM; its name."""
    shutil.copytree(models, to)
    scaler = next(to.glob("lightgbm_v*_scaler.json"))
    document = json.loads(scaler.read_bytes())
    document["mean"] = [mean + 0.5 for mean in document["mean"]]
    scaler.write_text(json.dumps(document))
    return next(to.glob("lightgbm_v*.txt"))


def test_another_scaler_beside_the_same_model_file_is_not_what_voted(day: Day, models: Path, tmp_path: Path) -> None:
    scene, file = day
    model = _other_scaler(models, tmp_path / "models")
    found = scene.verify(file, models=model.parent)
    assert found.same
    assert not found.ok
    ((agent, _), why), *others = found.missing.items()
    assert (agent, others) == ("lightgbm", [])
    assert why.startswith(f"the scaler or the metadata beside {model.name} are not those of then")
    assert "votes:lightgbm" not in found.comparison.compared
    # The true one may lie there under any other name.
    for part in models.glob("lightgbm_v*"):
        shutil.copy(part, model.parent / part.name.replace("lightgbm_v20", "lightgbm_v19"))
    assert scene.verify(file, models=model.parent).ok


def test_a_start_that_names_no_digest_has_it_from_the_events_before_it(day: Day, models: Path, tmp_path: Path) -> None:
    """As recorded before starts named one."""
    scene, file = day

    def drop(event: dict[str, Any]) -> None:
        for named in (event["evidence"].get("agents") or {}).values():
            named.pop("digest")

    def change(item: Item) -> list[Item]:
        started = isinstance(item, Recorded) and item.stream == "events" and b'"started"' in item.fields[b"data"]
        return [edited(item, drop) if started else item]

    older = rewrite(file, tmp_path / "older.jsonl.zst", change)
    assert scene.verify(older).ok
    found = scene.verify(older, models=_other_scaler(models, tmp_path / "models").parent)
    assert [agent for agent, _ in found.missing] == ["lightgbm"]


def test_a_recording_of_another_build_is_compared_within_a_hundred_thousandth(day: Day, tmp_path: Path) -> None:
    scene, file = day

    def other(item: Item) -> list[Item]:
        started = isinstance(item, Recorded) and item.stream == "events" and b'"started"' in item.fields[b"data"]
        if started:
            return [edited(item, lambda event: event["evidence"]["build"].update(numpy="1.0"))]
        return _nudge(item)

    def _nudge(item: Item) -> list[Item]:
        if item.stream == "features":
            return [edited(item, lambda x: x["values"].update(close=x["values"]["close"] * (1 + 5e-6)))]
        return [item]

    found = scene.verify(rewrite(file, tmp_path / "other.jsonl.zst", other))
    assert found.ok
    assert found.comparison.tolerance == 1e-5
    assert any(line.startswith("numpy 1.0, here") for line in found.other_build)


def test_a_recording_that_begins_later_is_refused_with_the_reason(scene: Scene, tmp_path: Path) -> None:
    scene.feed(market(1, 50))
    scene.work()
    file = tmp_path / "late.jsonl.zst"
    scene.record(file, from_now=True)
    with pytest.raises(CheckFailed, match="begins 50 bars after the start"):
        scene.verify(file)


def test_a_restart_with_other_settings_and_another_model_is_followed(
    scene: Scene, models: Path, tmp_path: Path
) -> None:
    """The worker of the second half has other weights, another quorum and a newer model of one agent."""
    bars = market(2, 240, seed=5)
    scene.feed(bars[:300])
    scene.work()
    newer = tmp_path / "newer"
    shutil.copytree(models, newer)
    for path in sorted(newer.glob("xgboost_v*")):
        path.rename(path.with_name(path.name.replace("xgboost_v20", "xgboost_v30")))
    scene.feed(bars[300:], first=300)
    scene.work(models=newer, quorum=2, weights={"nhits": 0.9})
    file = tmp_path / "two.jsonl.zst"
    scene.record(file)
    shutil.copytree(models, newer, dirs_exist_ok=True)
    found = scene.verify(file, models=newer)
    assert found.ok, found.comparison.firsts
    assert found.comparison.compared["signals"] == 480 - 2 * 29


def test_two_keys_that_were_fed_in_turns_are_verified_in_any_batches(scene: Scene, tmp_path: Path) -> None:
    """Each key holds more than one read of the recorder gives, and the worker took from both in turns."""
    keys = (f"{scene.namespace}x:a", f"{scene.namespace}x:b")
    scene.further |= {"bars": keys}
    bars = market(2, 650)
    of_symbol = [[bar for bar in bars if bar[b"symbol"] == name] for name in sorted({bar[b"symbol"] for bar in bars})]
    for first in range(0, 650, 130):
        for key, own in zip(keys, of_symbol, strict=True):
            feed(scene.url, key, own[first : first + 130], first)
    scene.work()
    file = tmp_path / "keys.jsonl.zst"
    scene.record(file)
    for batch_size, restart_every in ((256, None), (33, 2)):
        found = scene.verify(file, batch_size=batch_size, restart_every=restart_every)
        assert found.ok, found.comparison.firsts
        assert found.comparison.compared["features"] == 1300


def _of_symbols(bars: int) -> list[list[dict[bytes, bytes]]]:
    made = market(2, bars)
    return [[bar for bar in made if bar[b"symbol"] == name] for name in sorted({bar[b"symbol"] for bar in made})]


def test_a_key_that_came_late_with_early_ids_is_refused_and_never_called_different(
    scene: Scene, tmp_path: Path
) -> None:
    keys = (f"{scene.namespace}x:a", f"{scene.namespace}x:b")
    scene.further |= {"bars": keys}
    for key, own in zip(keys, _of_symbols(60), strict=True):
        feed(scene.url, key, own)
        scene.work()
    file = tmp_path / "late.jsonl.zst"
    scene.record(file)
    for batch_size in (256, 7):
        with pytest.raises(CheckFailed, match=r"took SYN01\|1m\|\d+ before SYN02\|1m\|\d+, though"):
            scene.verify(file, batch_size=batch_size)


def test_a_key_that_grew_while_another_was_read_is_refused_in_any_batches(scene: Scene, tmp_path: Path) -> None:
    """The first batches are of one key alone; what was found out later about others does not come too late."""
    keys = (f"{scene.namespace}x:a", f"{scene.namespace}x:b")
    scene.further |= {"bars": keys}
    one, other = _of_symbols(60)
    feed(scene.url, keys[0], one[:30])
    feed(scene.url, keys[1], other, first=100)
    scene.work()
    feed(scene.url, keys[0], one[30:], first=30)
    scene.work()
    file = tmp_path / "late.jsonl.zst"
    scene.record(file)
    for batch_size in (256, 7, 2):
        with pytest.raises(CheckFailed, match=r"took SYN02\|1m\|\d+ before SYN01\|1m\|\d+, though"):
            scene.verify(file, batch_size=batch_size)


def test_what_a_killed_recorder_left_is_verified_without_its_unfinished_frame(day: Day, tmp_path: Path) -> None:
    scene, file = day
    parts = [tmp_path / f"{name}.jsonl.zst" for name in ("whole", "cut")]
    with Writer(parts[0]) as writer:
        writer.header({name: value for name, value in read_header(file).items() if name != "recording"})
        for place, item in enumerate(Recording(file)):
            writer.add(item)
            if place % 1000 == 999:
                writer.flush()
    whole = parts[0].read_bytes()
    parts[1].write_bytes(whole[:-200])
    found = scene.verify(parts[1])
    assert found.same
    assert 0 < found.bars < scene.verify(parts[0]).bars
    assert [note for note in found.notes if "unfinished frame" in note]


@pytest.mark.parametrize("batch_size", [7, 256])
def test_the_next_batch_is_begun_before_one_is_compared(
    day: Day, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene, file = day
    underway: list[int] = [0]
    began, finished = Pipeline.begin, Pipeline.finish

    def begin(pipeline: Pipeline, *given: Any, **named: Any) -> Underway:
        underway.append(underway[-1] + 1)
        return began(pipeline, *given, **named)

    def finish(pipeline: Pipeline, *given: Any) -> Result:
        underway.append(underway[-1] - 1)
        return finished(pipeline, *given)

    monkeypatch.setattr(Pipeline, "begin", begin)
    monkeypatch.setattr(Pipeline, "finish", finish)
    assert scene.verify(file, batch_size=batch_size).ok
    assert max(underway) == AHEAD
    assert scene.verify(file, batch_size=batch_size, restart_every=1).ok
    assert underway[-1] == 0


def test_an_error_while_models_compute_leaves_no_thread_and_the_usual_turns(
    day: Day, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene, file = day
    before, turns = {thread.name for thread in threading.enumerate()}, sys.getswitchinterval()

    def fail(*given: Any, **named: Any) -> None:
        assert sys.getswitchinterval() == pytest.approx(TURN_S)
        raise OSError("the disk is gone")

    monkeypatch.setattr("worker.replay.verify.compare_batch", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        scene.verify(file, batch_size=7)
    assert {thread.name for thread in threading.enumerate()} <= before
    assert sys.getswitchinterval() == turns


def test_of_several_keys_too_an_absent_vector_and_one_too_many_are_differences(scene: Scene, tmp_path: Path) -> None:
    keys = (f"{scene.namespace}x:a", f"{scene.namespace}x:b")
    scene.further |= {"bars": keys}
    for key, own in zip(keys, _of_symbols(60), strict=True):
        feed(scene.url, key, own)
    scene.work()
    file = tmp_path / "keys.jsonl.zst"
    scene.record(file)
    seen = 0

    def change(item: Item) -> list[Item]:
        nonlocal seen
        seen += item.stream == "features"
        return {31: [], 62: [item, item]}.get(seen, [item]) if item.stream == "features" else [item]

    found = scene.verify(rewrite(file, tmp_path / "changed.jsonl.zst", change)).comparison
    assert {name: n for name, n in found.differing.items() if n} == {"features": 2}


def test_orders_canaries_and_promotions_are_replayed_where_they_took_effect(
    scene: Scene, models: Path, tmp_path: Path
) -> None:
    """Muted and unmuted by an operator, a canary begun, promoted and rolled back, over five runs of the worker."""
    bars = market(2, 320, seed=7)
    folder = tmp_path / "models"
    shutil.copytree(models, folder)
    for path in sorted(folder.glob("lightgbm_v*")):
        shutil.copy(path, path.with_name(path.name.replace("lightgbm_v20", "lightgbm_v19")))
    canary = next(folder.glob("lightgbm_v19*.txt"))
    canary.write_bytes(canary.read_bytes() + b"\n")  # other bytes, so another artifact
    scene.further |= {"models": folder, "batch_size": 16}
    orders = (
        Order("mute", agent="xgboost", by="test"),
        Order("canary", agent="lightgbm", file=canary.name, sha256=sha256(canary.read_bytes()).hexdigest(), by="test"),
        Order("unmute", agent="xgboost", by="test"),
        Order("promote", agent="lightgbm", by="test"),
        Order("rollback", agent="lightgbm", by="test"),
    )
    share = len(bars) // (len(orders) + 1)
    scene.feed(bars[:share])
    scene.work()
    for number, order in enumerate(orders, 1):
        with connect(scene.url) as client:
            client.xadd(f"{scene.namespace}:control", {"data": order.encode()})
        scene.feed(bars[number * share : (number + 1) * share], first=number * share)
        scene.work()
    file = tmp_path / "orders.jsonl.zst"
    scene.record(file)
    kinds = {e["kind"] for e in _events(file)}
    assert {"agent_muted", "agent_readmitted", "canary_started"} <= kinds
    for batch_size, restart_every in ((256, None), (5, None), (32, 2)):
        found = scene.verify(file, models=folder, batch_size=batch_size, restart_every=restart_every)
        assert found.ok, found.comparison.firsts
        assert found.comparison.compared["votes:lightgbm_canary"] > 50


def _events(file: Path) -> list[dict[str, Any]]:
    return [json.loads(i.fields[b"data"]) for i in Recording(file) if isinstance(i, Recorded) and i.stream == "events"]


def test_the_command_says_what_differs_and_exits_1(day: Day, tmp_path: Path) -> None:
    scene, file = day
    assert "VERIFIED: features, votes and signals are the same, to the bit." in scene.quartet(
        "replay", file, "--verify"
    )
    changed = _nth("votes:xgboost", 600, lambda vote: vote.update(confidence=0.5))
    told = scene.quartet("replay", rewrite(file, tmp_path / "changed.jsonl.zst", changed), "--verify", code=1)
    assert "DIFFERENT: 1 values in 1 entries." in told
    assert "agent xgboost, confidence: recorded 0.5, recomputed 0." in told
