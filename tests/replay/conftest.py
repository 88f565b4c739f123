"""One worker's work, recorded once for all tests of replays."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.scene import market
from tests.replay.scene import Scene


@pytest.fixture(scope="session")
def models(four_models: Path) -> Path:
    return four_models


@pytest.fixture
def scene(valkey: str, models: Path, tmp_path: Path, namespace: str) -> Scene:
    return Scene(valkey, namespace, models, tmp_path)


@pytest.fixture(scope="session")
def day(valkey: str, models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Scene, Path]:
    """A scene and its recording: 3 symbols, 260 bars each, with bars that are refused and a gap, by all four agents."""
    scene = Scene(valkey, "recorded-day", models, tmp_path_factory.mktemp("day"))
    bars = market(3, 260)
    bars[100] = {**bars[100], b"high": b"-1"}
    bars[200] = {**bars[200], b"symbol": b"\xff\xfe"}
    bars[300] = {b"data": b'{ "symbol":"AAA", "ts": 1,"open":1}'}
    bars[400] = bars[397]
    del bars[500:503]
    scene.feed(bars)
    scene.work()
    file = scene.directory / "day.jsonl.zst"
    scene.record(file)
    return scene, file
