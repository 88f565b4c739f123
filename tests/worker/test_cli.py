"""The program as a whole: version, exit codes, one line for a failure, shared flags, quiet ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import pytest
import redis
import typer
from typer.testing import CliRunner

from agents.agent import Refused
from streams.contracts import V3
from streams.embedded import EmbeddedError
from streams.messages import Reason
from streams.store import FencedError, RewoundError, StoreUnavailableError
from tests.helpers import LIMIT_S, environment, free_port, quartet, wait_for
from worker import errors
from worker.cli import app as program
from worker.cli.options import SHARED, with_settings
from worker.settings import Settings


def test_the_version_names_the_program_and_the_contract(tmp_path: Path) -> None:
    done = quartet("--version", cwd=tmp_path)
    assert done.stdout == f"quartet {version('quartet-worker')} (features v3 {V3.contract[:12]})\n"
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--nonsense"], "error: No such option: --nonsense; see `quartet --help`"),
        (["confg"], "error: No such command 'confg'. Did you mean 'config'?; see `quartet --help`"),
        (
            ["config", "show", "--http-port", "many"],
            "error: Invalid value for '--http-port': .*see `quartet config show --help`",
        ),
        (["config", "show", "extra"], "error: Got unexpected extra argument.*see `quartet config show --help`"),
        (["config", "show", "--config", "absent"], "error: cannot read settings from absent: .*"),
    ],
)
def test_wrong_usage_is_one_line_on_stderr_and_exit_code_2(tmp_path: Path, arguments: list[str], line: str) -> None:
    done = quartet(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(line.replace("?;", r"\?;") + "\n", done.stderr)


def test_a_command_alone_shows_its_help(tmp_path: Path) -> None:
    done = quartet(cwd=tmp_path)
    assert done.returncode == 2
    assert "Usage: quartet" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.CheckFailed("x"), 1),
        (errors.UsageError("x"), 2),
        (errors.Unavailable("x"), 3),
        (errors.FencedOff("x"), 75),
        (FencedError("x"), 75),
        (StoreUnavailableError("x"), 3),
        (EmbeddedError("x"), 3),
        (redis.ConnectionError("x"), 3),
        (redis.TimeoutError("x"), 3),
        (redis.AuthenticationError("x"), 3),
        (RewoundError("x"), 1),
        (Refused(Reason.NO_ARTIFACT, "x"), 1),
        (ModuleNotFoundError("x", name="pyarrow"), 3),
        (KeyboardInterrupt(), 130),
        (SystemExit(5), 5),
        (typer.Exit(7), 7),
        (typer.Abort(), 130),
    ],
)
def test_each_expected_failure_has_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], error: BaseException, code: int
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(program._Later, "load", lambda self: typer.main.get_command(program._alone(fail)))
    assert program.invoke(["config"]) == code
    out, err = capfd.readouterr()
    assert out == ""
    quiet = isinstance(error, KeyboardInterrupt | SystemExit | typer.Exit | typer.Abort)
    assert err.count("\n") == (0 if quiet else 1)
    assert quiet or err.startswith("error: ")


@pytest.mark.parametrize("error", [ValueError("a defect"), ModuleNotFoundError("x", name="worker.absent")])
def test_a_defect_of_ours_is_not_dressed_up_as_a_failure_of_the_users(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(program._Later, "load", lambda self: typer.main.get_command(program._alone(fail)))
    with pytest.raises(type(error), match=str(error)):
        program.invoke(["config"])


def test_an_integer_that_a_command_returns_is_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, code in ((1, 1), (None, 0), (True, 0)):
        monkeypatch.setattr(
            program._Later, "load", lambda self, v=value: typer.main.get_command(program._alone(lambda: v))
        )
        assert program.invoke(["config"]) == code


@pytest.mark.parametrize(
    "command", ["run", "check", "gate nhits", "record --out recorded.zst", "models mute nhits", "explain --last"]
)
def test_a_server_that_is_not_there_is_named_with_the_remedy_and_exit_code_3(tmp_path: Path, command: str) -> None:
    port = free_port()
    done = quartet(
        *command.split(), "--redis", f"redis://me:hunter2@127.0.0.1:{port}", "--http-port", "0", cwd=tmp_path
    )
    assert (done.returncode, done.stdout) == (3, "")
    assert "hunter2" not in done.stderr
    assert re.fullmatch(
        rf"error: Redis at redis://me:\*\*\*@127.0.0.1:{port} is not reachable: .*refused; "
        r"check --redis and that the server runs\n",
        done.stderr,
    )


def test_a_server_that_does_not_know_the_user_is_named_with_the_remedy(tmp_path: Path, valkey: str) -> None:
    url = valkey.replace("://", "://me:hunter2@", 1)
    done = quartet("check", "--redis", url, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (3, "")
    assert "hunter2" not in done.stderr
    assert re.fullmatch(
        r"error: Redis at \w+://me:\*\*\*@.* refused the login: .*; check the user and password in --redis\n",
        done.stderr,
    )


@pytest.mark.parametrize("cause", [redis.ConnectionError("gone"), redis.TimeoutError("gone")])
def test_a_server_that_goes_away_later_is_told_the_same_way(cause: Exception) -> None:
    error = StoreUnavailableError("gone")
    error.__cause__ = cause
    found = errors.expected(error)
    assert (str(found), found and found.exit_code) == (
        "Redis is not reachable: gone; check --redis and that the server runs",
        3,
    )


def test_ctrl_c_is_quiet_and_exit_code_130(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import sys, time, typer
        from pathlib import Path
        from worker.cli import app
        def wait():
            Path("started").touch()
            time.sleep(600)
        app._Later.load = lambda self: typer.main.get_command(app._alone(wait))
        sys.exit(app.invoke(["config"]))
        """
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    wait_for((tmp_path / "started").exists)
    child.send_signal(signal.SIGINT)
    assert (child.communicate(timeout=LIMIT_S), child.returncode) == ((b"", b""), 130)


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "worker", "config", "show"],
            cwd=tmp_path, env=environment(), stdout=closed, stderr=subprocess.PIPE, timeout=LIMIT_S, check=False,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (141, b"")


def test_with_settings_gives_a_command_every_shared_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    app = typer.Typer()
    seen = []

    @app.command()
    @with_settings
    def command(settings: Settings, until_idle: Annotated[float | None, typer.Option()] = None) -> None:
        seen.append((settings, until_idle))

    flags = "--redis redis://h --namespace n --models m --http-port 0 --state-dir s --until-idle 2.5".split()
    result = CliRunner().invoke(app, flags)
    assert result.exit_code == 0, result.output
    assert seen == [
        (Settings(redis="redis://h", namespace="n", models=Path("m"), http_port=0, state_dir=Path("s")), 2.5)
    ]
    CliRunner().invoke(app, [])
    assert seen[1] == (Settings(), None)


def test_a_flag_of_the_commands_own_stands_in_for_a_shared_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    app = typer.Typer()
    seen = []

    @app.command()
    @with_settings
    def command(settings: Settings, models: Annotated[Path, typer.Option("--models", help="Written to.")]) -> None:
        seen.append((settings.models, models))

    assert CliRunner().invoke(app, ["--models", "out"]).exit_code == 0
    assert seen == [(Path("models"), Path("out"))]


def test_every_shared_flag_but_the_file_is_a_setting() -> None:
    assert set(SHARED) - {"config"} <= set(Settings.model_fields)


def test_a_command_that_loads_kernels_keeps_them_in_the_state_directory(tmp_path: Path) -> None:
    """Never in the package's own, which may be read-only. One small kernel does: all of them take half a minute."""
    script = textwrap.dedent(
        """
        import sys
        from worker.cli.app import invoke
        invoke(["train", "--help"])
        assert "numba" not in sys.modules, "what is imported before the settings are known keeps kernels elsewhere"
        invoke(["models", "list", "--models", ".", "--state-dir", "here"])
        from worker.features import kernel
        kernel._ratio(1.0, 2.0, 0.0)
        """
    )
    env = {k: v for k, v in environment().items() if k != "NUMBA_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=LIMIT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "here" / "numba").rglob("kernel._ratio*.nbc"))
