"""Help, for every command there is: complete, plain when piped, and quick because nothing heavy is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import typer

from tests.helpers import LIMIT_S, environment, quartet
from worker.cli.app import _COMMANDS, _Later

HEAVY = ("torch", "numba", "xgboost", "lightgbm", "numpy", "redis", "pydantic")
SHARED_FLAGS = ("--redis", "--namespace", "--models", "--http-port", "--state-dir", "--config")


def leaves() -> list[tuple[str, ...]]:
    """Every command and subcommand by its words."""
    found: list[tuple[str, ...]] = []
    for name, target, text in _COMMANDS:
        command = _Later(name, target, text).load()
        subcommands = getattr(command, "commands", None)
        found += [(name, sub) for sub in subcommands] if subcommands else [(name,)]
    return found


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], []])
def test_the_overview_and_the_version_import_nothing_heavy(tmp_path: Path, arguments: list[str]) -> None:
    script = (
        "import sys; from worker.cli.app import invoke; invoke(sys.argv[1:]); "
        f"print('HEAVY', sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=LIMIT_S, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_the_overview_lists_every_command_with_its_line(tmp_path: Path) -> None:
    done = quartet("--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    for name, _, text in _COMMANDS:
        assert f" {name} " in done.stdout
        assert text.split(";")[0][:40] in done.stdout


def test_piped_help_has_no_colour(tmp_path: Path) -> None:
    plain = {k: v for k, v in environment().items() if k != "NO_COLOR"}
    done = subprocess.run(
        [sys.executable, "-m", "worker", "--help"],
        cwd=tmp_path,
        env=plain,
        capture_output=True,
        timeout=LIMIT_S,
        check=True,
    )
    assert b"\x1b" not in done.stdout


@pytest.mark.parametrize("words", leaves(), ids=" ".join)
def test_every_command_explains_itself_and_has_the_shared_flags(tmp_path: Path, words: tuple[str, ...]) -> None:
    done = quartet(*words, "--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"Usage: quartet {' '.join(words)}" in done.stdout
    missing = [flag for flag in SHARED_FLAGS if flag not in done.stdout]
    assert missing == []


def test_completion_is_there_once_for_the_program(tmp_path: Path) -> None:
    assert "--show-completion" in quartet("--help", cwd=tmp_path).stdout
    assert "--show-completion" not in quartet("config", "--help", cwd=tmp_path).stdout
    completed = quartet(
        cwd=tmp_path, env={"_QUARTET_COMPLETE": "complete_bash", "COMP_WORDS": "quartet config sh", "COMP_CWORD": "2"}
    )
    assert completed.stdout.split() == ["show"]


def test_a_function_of_one_command_is_not_a_group() -> None:
    command = _Later("x", "worker.cli.config:check", "").load()
    assert command.name == "x"
    assert not hasattr(command, "commands")
    assert isinstance(command, typer.core.TyperCommand)
