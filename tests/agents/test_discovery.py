"""Which files are artifacts, which is best, and how a file is read."""

from __future__ import annotations

import os
import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from agents.agent import Refused
from agents.discovery import discover, misnamed, read_once
from streams.messages import AGENTS, Reason


def touch(models: Path, *names: str) -> None:
    for name in names:
        (models / name).write_bytes(b"x")


def found(models: Path, agent: str) -> list[str]:
    return [candidate.file.name for candidate in discover(models, agent)]


def test_the_highest_generation_wins_then_the_newest_by_name(tmp_path):
    touch(
        tmp_path,
        "xgboost_v20260101_120000.pkl",
        "xgboost_v20250101_120000_v3.pkl",
        "xgb_v20250301_120000_v3.ubj",
        "xgboost_v20270101_120000_v2.json",
        "xgboost_v20240101_000000_v10.pkl",
    )
    assert found(tmp_path, "xgboost") == [
        "xgboost_v20240101_000000_v10.pkl",
        "xgb_v20250301_120000_v3.ubj",
        "xgboost_v20250101_120000_v3.pkl",
        "xgboost_v20270101_120000_v2.json",
        "xgboost_v20260101_120000.pkl",
    ]


stamps = st.datetimes().map(lambda t: t.strftime("%Y%m%d_%H%M%S").rjust(15, "0"))
names = st.tuples(stamps, st.none() | st.integers(1, 12), st.sampled_from(["pkl", "ubj", "json", "txt", "pth"]))


@settings(max_examples=60, deadline=None)
@given(st.lists(names, min_size=1, max_size=8, unique_by=lambda n: n[:2]), st.randoms(use_true_random=False))
@example([("20260101_120000", None, "pkl"), ("20250101_120000", 2, "pkl")], random.Random(0))
def test_the_order_depends_on_names_alone_never_on_file_times(files, shuffler):
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder)
        written = [f"lgbm_v{t}{'' if g is None else f'_v{g}'}.{s}" for t, g, s in files]
        for name in shuffler.sample(written, len(written)):
            touch(models, name)
            os.utime(models / name, (shuffler.randrange(10**9), shuffler.randrange(10**9)))
        # Two stable sorts, the less important first, instead of one key.
        by_time = sorted(range(len(files)), key=lambda i: files[i][0], reverse=True)
        expected = sorted(by_time, key=lambda i: -(files[i][1] or 0))
        assert found(models, "lightgbm") == [written[i] for i in expected]


def test_the_parts_of_the_name_are_told(tmp_path):
    touch(tmp_path, "patchtst_v20260102_030405_v3.pth")
    (candidate,) = discover(tmp_path, "patchtst")
    assert (candidate.agent, candidate.version, candidate.suffix) == ("patchtst", "v20260102_030405_v3", ".pth")
    assert (candidate.time, candidate.generation) == ("20260102_030405", 3)
    assert candidate.beside("_scaler.pkl") == tmp_path / "patchtst_v20260102_030405_v3_scaler.pkl"


def test_an_agent_sees_only_its_own_prefixes(tmp_path):
    prefixes = ("xgboost", "xgb", "lightgbm", "lgbm", "nhits", "patchtst")
    touch(tmp_path, *(f"{prefix}_v20260101_120000.pkl" for prefix in prefixes))
    assert {agent: len(discover(tmp_path, agent)) for agent in AGENTS} == {
        "xgboost": 2,
        "lightgbm": 2,
        "nhits": 1,
        "patchtst": 1,
    }
    assert not any(misnamed(tmp_path, agent) for agent in AGENTS)


def test_scalers_and_metadata_are_never_models_and_never_misnamed(tmp_path):
    stem = "xgboost_v20260101_120000_v3"
    sidecars = ("_scaler.pkl", "_scaler.json", "_meta.json", "_metadata.json", "_meta.pkl", "_metadata.txt")
    touch(tmp_path, *(stem + ending for ending in sidecars), "xgboost_scaler.pkl", "xgboost_metadata.json")
    assert discover(tmp_path, "xgboost") == misnamed(tmp_path, "xgboost") == []


@pytest.mark.parametrize(
    "name",
    [
        "xgboost.pkl",
        "xgboost_model.pkl",
        "XGBoost_v20260101_120000.pkl",
        "xgb_v20260101.ubj",
        "xgboost_v20261301_120000.pkl",
        "xgboost_v20260101_250000.pkl",
        "xgboost_v20260101_120000_v.pkl",
        "xgboost_v20260101_120000_vx.pkl",
        "xgboost_v20260101_120000_final.pkl",
        "xgboost_v20260101_120000.pkl.pkl",
        "xgboost_v20260101_120000.joblib",
        "xgboost-v20260101_120000.json",
        "xgboost_v20260101_120000 .pkl",
        "xgboost_v٢٠٢٦٠١٠١_120000.pkl",
    ],
)
def test_a_file_that_looks_like_an_artifact_but_does_not_fit_is_reported_never_loaded(tmp_path, name):
    touch(tmp_path, name)
    assert discover(tmp_path, "xgboost") == []
    assert misnamed(tmp_path, "xgboost") == [tmp_path / name]


@pytest.mark.parametrize("name", ["README.md", "xgboost_notes.md", "xgboosted_v20260101_120000.pkl", "bars.json"])
def test_other_files_are_nobodys_business(tmp_path, name):
    touch(tmp_path, name)
    assert discover(tmp_path, "xgboost") == misnamed(tmp_path, "xgboost") == []


def test_a_missing_folder_and_a_file_for_a_folder_hold_nothing(tmp_path):
    touch(tmp_path, "file")
    assert discover(tmp_path / "none", "nhits") == discover(tmp_path / "file", "nhits") == []


def refusal(file: Path, most: int = 100):
    with pytest.raises(Refused) as caught:
        read_once(file, most)
    assert str(file) in caught.value.refusal.detail
    return caught.value.refusal.reason


def test_a_file_is_read_up_to_the_limit_and_refused_one_byte_above(tmp_path):
    file = tmp_path / "model"
    file.write_bytes(b"x" * 100)
    assert read_once(file, 100) == b"x" * 100
    assert refusal(file, 99) is Reason.UNSAFE_ARTIFACT


def test_symbolic_links_are_refused_whatever_they_point_to(tmp_path):
    touch(tmp_path, "model")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    (tmp_path / "dangling").symlink_to(tmp_path / "none")
    assert refusal(tmp_path / "link") is Reason.UNSAFE_ARTIFACT
    assert refusal(tmp_path / "dangling") is Reason.UNSAFE_ARTIFACT


def test_folders_and_pipes_are_refused_without_waiting_for_a_writer(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert refusal(tmp_path / "pipe") is Reason.UNSAFE_ARTIFACT
    assert refusal(tmp_path) is Reason.UNSAFE_ARTIFACT


def test_an_endless_device_is_refused():
    assert refusal(Path("/dev/zero")) is Reason.UNSAFE_ARTIFACT


def test_a_file_that_is_gone_is_refused(tmp_path):
    assert refusal(tmp_path / "none") is Reason.CORRUPT_ARTIFACT


def test_a_file_whose_size_is_not_told_is_still_capped():
    """Files of /proc claim a size of 0 and hold more: the cap counts what is read, not what is claimed."""
    file = Path("/proc/self/status")
    if not file.exists():
        pytest.skip("no /proc here")
    assert refusal(file, 10) is Reason.UNSAFE_ARTIFACT
    assert len(read_once(file, 100_000)) > 10
