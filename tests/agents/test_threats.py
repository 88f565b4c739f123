"""The threat model through the front door: whole folders, as `quartet models list` loads them."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from agents import manifest
from agents.agent import Refused
from agents.artifacts import LoadOptions, discover, inspect, load
from agents.discovery import read_once
from streams.messages import Reason
from tests.agents import legacy

ROOT = Path(__file__).parents[2]
STEM = "xgboost_v20240102_030405"


@pytest.fixture
def models(tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / f"{STEM}.pkl").write_bytes(legacy.pack(legacy.xgboosts()["classifier"], "zlib"))
    (folder / f"{STEM}_scaler.pkl").write_bytes(legacy.pack(legacy.scalers()["standard"], "zlib"))
    return folder


class Payload:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def only_row(models):
    (row,) = inspect(models, LoadOptions())
    return row


def test_the_fixture_loads(models):
    assert only_row(models)["state"] == "active"


@pytest.mark.parametrize("container", legacy.CONTAINERS)
@pytest.mark.parametrize("file", [f"{STEM}.pkl", f"{STEM}_scaler.pkl"])
def test_a_payload_in_model_or_scaler_is_refused_and_does_not_run(file, container, models, tmp_path):
    canary = tmp_path / "canary"
    (models / file).write_bytes(legacy.pack(Payload(canary), container))
    row = only_row(models)
    assert (row["state"], row["reason"]) == ("refused", "unsafe_artifact")
    assert "system" in row["detail"]
    assert not canary.exists()


def test_the_payload_of_these_tests_does_run_where_it_is_let(tmp_path):
    """Without this, a payload that never works would make every test of it pass."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("file", [f"{STEM}.pkl", f"{STEM}_scaler.pkl"])
def test_a_symbolic_link_is_refused(file, models, tmp_path):
    (models / file).rename(tmp_path / "elsewhere")
    (models / file).symlink_to(tmp_path / "elsewhere")
    row = only_row(models)
    assert (row["state"], row["reason"]) == ("refused", "unsafe_artifact")
    assert "symbolic link" in row["detail"]


def test_the_bytes_that_were_hashed_are_the_bytes_that_are_parsed(models, monkeypatch):
    """Whoever swaps the file after it was read changes nothing: it is not opened again."""
    (candidate,) = discover(models, "xgboost")
    expected = load(candidate, LoadOptions())
    other = legacy.pack(legacy.xgboosts()["forest"], "zlib")

    def read_then_swap(file, limit):
        data = read_once(file, limit)
        if file == candidate.file:
            file.write_bytes(other)
        return data

    monkeypatch.setattr(manifest, "read_once", read_then_swap)
    found = load(candidate, LoadOptions())
    assert candidate.file.read_bytes() == other
    assert found.sha256 == expected.sha256
    assert found.predict(legacy.ROWS).tobytes() == expected.predict(legacy.ROWS).tobytes()


def test_a_file_over_the_limit_is_refused_unread(models):
    (candidate,) = discover(models, "xgboost")
    with pytest.raises(Refused) as refused:
        load(candidate, LoadOptions(max_bytes=100))
    assert refused.value.refusal.reason is Reason.UNSAFE_ARTIFACT


CHILD = """
import random, sys, numpy as np
from agents import lgbm, xgb
from agents.agent import Refused
suffix, family = sys.argv[1], {".txt": lgbm}.get(sys.argv[1], xgb)
good = sys.stdin.buffer.read()
loaded = refused = 0
for seed in range(400):
    chance, data = random.Random(seed), bytearray(good)
    for _ in range(chance.choice([1, 1, 2, 4])):
        at = chance.randrange(max(1, len(data)))
        what = chance.random()
        if what < 0.5: data[at:at + 1] = bytes([chance.choice([chance.randrange(256), *b"0123456789-. "])])
        elif what < 0.7: del data[at:at + chance.randrange(1, 20)]
        elif what < 0.8: del data[at:]
        else: data[at:at] = bytes(chance.choice(b"0123456789-") for _ in range(chance.randrange(1, 8)))
    try:
        built = family.build(family.parse(bytes(data), suffix), {})
        built.network(np.ones((3, built.width), np.float32))
        loaded += 1
    except Refused:
        refused += 1
print(loaded, refused)
"""


@pytest.mark.parametrize("suffix", [".ubj", ".json", ".txt"])
def test_garbled_models_do_not_end_the_process(suffix):
    """The libraries alone abort or fault on many of these; a child process shows it if ours do."""
    if suffix == ".txt":
        model = legacy.lightgbms()["regressor"].booster_.model_to_string(num_iteration=3)
        data = model[: model.index("parameters:")].encode()
    else:
        data = bytes(legacy.xgboosts()["regressor"].get_booster()[:3].save_raw(suffix[1:]))
    run = [sys.executable, "-W", "ignore", "-c", CHILD, suffix]
    done = subprocess.run(run, input=data, capture_output=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    loaded, refused = map(int, done.stdout.split())
    assert loaded + refused == 400
    assert loaded
    assert refused > 100
