"""A guard that is taken out must turn the suite red: each mutation of a copy fails the test that watches it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers import LIMIT_S, ROOT, environment


@dataclass(frozen=True)
class Guard:
    """`before` in `file` becomes `after`; then `test` must fail."""

    name: str
    file: str
    before: str
    after: str
    test: str


COMMIT = "tests/streams/test_commit.py"
GUARDS = [
    Guard(
        "epoch",
        "streams/commit.lua",
        "stored[1] ~= ARGV[1] or stored[3] ~= ARGV[5] or ",
        "",
        f"{COMMIT}::test_an_instance_that_was_replaced_writes_nothing[valkey]",
    ),
    Guard(
        "instance",
        "streams/commit.lua",
        "stored[3] ~= ARGV[5] or ",
        "",
        f"{COMMIT}::test_an_epoch_given_out_twice_by_a_server_that_forgot_one_still_fences[valkey]",
    ),
    Guard(
        "position",
        "streams/commit.lua",
        " or (stored[2] or '') ~= ARGV[2]",
        "",
        f"{COMMIT}::test_a_commit_from_another_position_is_refused[valkey]",
    ),
    Guard(
        "number of the commit",
        "streams/redis.py",
        "self._commits + 1, commit",
        "1, commit",
        f"{COMMIT}::test_a_commit_whose_reply_is_lost_is_neither_doubled_nor_lost"
        "[valkey-cut-events at the same position]",
    ),
    Guard(
        "last ID of an output",
        "streams/commit.lua",
        "not id_less(last_id(key), output[3][1])",
        "false",
        f"{COMMIT}::test_an_output_that_is_ahead_is_named_and_nothing_is_written[valkey]",
    ),
    Guard(
        "memory before the script",
        "streams/commit.lua",
        "#!lua\n",
        "\n",
        f"{COMMIT}::test_a_server_out_of_memory_writes_nothing_and_goes_on_later[valkey]",
    ),
    Guard(
        "trimmed input",
        "streams/store.py",
        "if lost > 0:",
        "if False:",
        "tests/streams/test_store_machine.py::"
        "test_an_input_that_was_trimmed_past_the_position_is_lost_to_the_entry[valkey]",
    ),
    Guard(
        "CRC of sealed state",
        "streams/codec.py",
        'zlib.crc32(data[5:]).to_bytes(4, "little") != data[1:5]',
        "False",
        "tests/worker/test_intake.py::test_a_flipped_bit_anywhere_in_the_stored_series_is_found",
    ),
    Guard(
        "CRC of packed state",
        "worker/features/packing.py",
        'records["crc"] != computed',
        'records["crc"] < 0',
        "tests/worker/test_bank.py::test_a_flipped_bit_is_refused_by_name_and_the_bank_keeps_what_it_had",
    ),
    Guard(
        "quorum",
        "worker/consensus.py",
        "agreeing < quorum",
        "agreeing < 0",
        "tests/worker/test_consensus.py::test_the_heavier_side_wins_only_with_the_quorum",
    ),
    Guard(
        "contract of an artifact",
        "agents/matching.py",
        "if found != feature_set.contract:",
        "if False:",
        "tests/agents/test_artifacts_checks.py",
    ),
    Guard(
        "refusal of the inert reader",
        "agents/unpickle.py",
        "Reason.UNSAFE_ARTIFACT",
        "Reason.CORRUPT_ARTIFACT",
        "tests/agents/test_unpickle.py::test_an_extension_code_that_this_process_knows_is_refused",
    ),
]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program and its tests, to be spoilt."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("streams", "agents", "worker", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.name)
def test_without_this_guard_a_test_fails(copy: Path, guard: Guard) -> None:
    file = copy / guard.file
    whole = file.read_text()
    assert whole.count(guard.before) == 1, f"{guard.file} has changed: the guard is no longer spelt so"
    file.write_text(whole.replace(guard.before, guard.after))
    try:
        found = _run(copy, guard.test)
    finally:
        file.write_text(whole)
    assert found.returncode == 1, found.stdout[-3000:]
    assert " failed" in found.stdout


def test_the_copy_passes_as_it_is(copy: Path) -> None:
    """Else any failure would count as a guard that is watched."""
    names = {guard.test for guard in GUARDS if guard.file.startswith(("streams", "worker"))}
    found = _run(copy, *sorted(names))
    assert found.returncode == 0, found.stdout[-3000:]


def _run(copy: Path, *tests: str) -> subprocess.CompletedProcess[str]:
    env = environment({"NUMBA_CACHE_DIR": os.environ["NUMBA_CACHE_DIR"], "PYTHONPATH": str(copy)})
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    return subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, timeout=3 * LIMIT_S, check=False)
