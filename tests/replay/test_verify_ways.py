"""What can happen to a worker besides bars: each is recorded from a real run and computed again to the bit."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from streams.formats import FormatReader
from streams.recording import Recorded, Recording
from streams.redis import connect
from tests.chaos.scene import FIRST_MS, market
from tests.helpers import wait_for
from tests.replay.scene import Scene
from worker.control import Order
from worker.logs import make_logger
from worker.replay.verify import Verdict
from worker.service import Options
from worker.serving import serve
from worker.training.market import generate

HOUR_MS = 3_600_000


def recorded(scene: Scene, file: Path, **given: Any) -> Verdict:
    """Record and verify: in large batches, and in small ones with restarts in between."""
    scene.record(file)
    verdicts = [
        scene.verify(file, batch_size=batch_size, restart_every=restart_every, **given)
        for batch_size, restart_every in ((256, None), (23, 4))
    ]
    for verdict in verdicts:
        assert verdict.ok, (verdict.comparison.firsts, verdict.leftover, verdict.missing)
    assert verdicts[0].comparison.compared == verdicts[1].comparison.compared
    return verdicts[0]


def of(file: Path, stream: str) -> list[dict[str, Any]]:
    """The messages of one stream of a recording."""
    return [json.loads(i.fields[b"data"]) for i in Recording(file) if isinstance(i, Recorded) and i.stream == stream]


def copy_as(folder: Path, agent: str, year: str) -> Path:
    """The model of an agent once more as a version of another year, with other bytes; its file."""
    for path in sorted(folder.glob(f"{agent}_v20*")):
        shutil.copy(path, path.with_name(path.name.replace("_v20", f"_v{year}")))
    model = next(
        path for path in folder.glob(f"{agent}_v{year}*") if "_scaler" not in path.stem and "_meta" not in path.stem
    )
    if model.suffix == ".txt":
        model.write_bytes(model.read_bytes() + b"\n")
    return model


ANSWERS = {"canary_started", "shadow_started", "promoted", "rolled_back", "order_refused"}


def obey(scene: Scene, order: Order) -> None:
    """Let a worker carry out an order before the next bar comes: loading takes as long as it takes."""
    with connect(scene.url) as client:

        def answers() -> int:
            events = client.xrange(f"{scene.namespace}:events")
            return sum(json.loads(fields[b"data"])["kind"] in ANSWERS for _, fields in events)

        def is_answered() -> bool:
            scene.work()
            return answers() > before

        before = answers()
        client.xadd(f"{scene.namespace}:control", {"data": order.encode()})
        wait_for(is_answered)


def test_a_promotion_a_shadow_and_the_way_back_to_the_version_before(
    scene: Scene, models: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "models"
    shutil.copytree(models, folder)
    scene.further |= {"models": folder, "batch_size": 16, "quality": {"minimum": 40}}
    canary, shadow = copy_as(folder, "lightgbm", "19"), copy_as(folder, "nhits", "19")

    def trial(kind: str, agent: str, file: Path) -> Order:
        return Order(kind, agent, file=file.name, sha256=sha256(file.read_bytes()).hexdigest(), by="test")

    bars = market(2, 400, seed=7)
    shares = {
        100: trial("canary", "lightgbm", canary),
        380: Order("promote", "lightgbm", by="test"),
        460: trial("shadow", "nhits", shadow),
        560: Order("rollback", "lightgbm", by="test"),
        660: Order("rollback", "nhits", by="test"),
    }
    begun = 0
    for place, order in shares.items():
        scene.feed(bars[begun:place], first=begun)
        scene.work()
        obey(scene, order)
        begun = place
    scene.feed(bars[begun:], first=begun)
    scene.work()
    file = tmp_path / "trials.jsonl.zst"
    found = recorded(scene, file, models=folder)
    # The safeguard may end the shadow before the order does.
    assert {(e["kind"], e["agent"]) for e in of(file, "events")} >= {
        ("promoted", "lightgbm"),
        ("shadow_started", "nhits_canary"),
        ("rolled_back", "lightgbm"),
        ("rolled_back", "nhits_canary"),
    }
    versions = Counter(vote["version"] for vote in of(file, "votes:lightgbm"))
    assert len(versions) == 2
    assert found.comparison.compared["votes:nhits_canary"] >= 40


def test_an_entry_that_ended_the_worker_three_times(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars = market(2, 120)
    bars[150] = {**bars[150], b"symbol": b"DEADLY"}
    scene.feed(bars)
    read = FormatReader.__call__

    def die(reader: FormatReader, entry: Any) -> Any:
        if entry.fields.get(b"symbol") == b"DEADLY":
            raise SystemError("the worker ends here")
        return read(reader, entry)

    with monkeypatch.context() as patched:
        patched.setattr(FormatReader, "__call__", die)
        for _ in range(4):
            with pytest.raises(SystemError):
                scene.work()
        scene.work()
    file = tmp_path / "poison.jsonl.zst"
    found = recorded(scene, file)
    rejects = [i.fields[b"reason"] for i in Recording(file) if isinstance(i, Recorded) and i.stream == "rejected"]
    assert rejects == [b"poison"]
    assert found.bars == 239
    assert found.comparison.compared["features"] == 239


def test_a_feed_that_is_unhealthy_and_bars_that_came_too_late(scene: Scene, tmp_path: Path) -> None:
    """Every fifth bar is refused for a while; then come hourly bars, of which the last three are fresh."""
    bars = market(2, 350)
    for place in range(100, 300, 5):
        bars[place] = {**bars[place], b"low": b"-1"}
    scene.feed(bars)
    scene.work()
    now_ms = time.time_ns() // 1_000_000
    made = generate(1, 120, 5, signal="planted")
    last = now_ms // HOUR_MS * HOUR_MS - HOUR_MS
    names = (b"open", b"high", b"low", b"close", b"volume")
    hourly = [
        {
            **dict(zip(names, (repr(float(x)).encode() for x in row[0]), strict=True)),
            b"symbol": b"HOURLY",
            b"interval": b"1h",
            b"ts": str(last - (119 - place) * HOUR_MS).encode(),
        }
        for place, row in enumerate(made.ohlcv)
    ]
    scene.feed(hourly, first=len(bars))
    scene.work(max_bar_age_intervals=3)
    file = tmp_path / "bad.jsonl.zst"
    recorded(scene, file)
    statuses = Counter(signal["status"] for signal in of(file, "signals"))
    assert statuses["withheld"] > 50
    # 120 hourly bars, 29 of them warm-up: too late but for the last three or, on the hour, four.
    assert 86 <= statuses["stale"] <= 89
    assert of(file, "signals")[-1]["status"] != "stale"


def test_a_gap_that_was_accepted_is_left_out_where_the_recorder_had_read_it(scene: Scene, tmp_path: Path) -> None:
    """The recorder reads all bars; the worker is away while some of them are trimmed, and goes on without them."""
    file = tmp_path / "gap.jsonl.zst"
    bars = market(2, 300)
    scene.feed(bars[:200])
    scene.work()
    scene.feed(bars[200:400], first=200)
    scene.record(file)
    with connect(scene.url) as client:
        client.xtrim(f"{scene.namespace}:bars", minid=f"{FIRST_MS + 350}-0", approximate=False)
    scene.feed(bars[400:], first=400)
    serve(scene.settings(), Options(until_idle_s=0.1, accept_gap=True), make_logger("error"))
    found = recorded(scene, file)
    (gap,) = (e["evidence"] for e in of(file, "events") if e["reason"] == "lost")
    assert gap["lost"] == 150
    assert found.bars == found.comparison.compared["features"] == 450
