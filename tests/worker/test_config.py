"""`quartet config`, run as a user runs it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from tests.helpers import quartet
from worker.quality import QualityLimits
from worker.settings import Settings


def test_show_as_json_is_every_setting_in_force(tmp_path: Path) -> None:
    (tmp_path / "quartet.toml").write_text("quorum = 2\n[weights]\nnhits = 0.5\n")
    done = quartet("config", "show", "--json", "--http-port", "0", cwd=tmp_path, env={"QUARTET_BATCH_SIZE": "64"})
    assert (done.returncode, done.stderr) == (0, "")
    expected = Settings(quorum=2, weights={"nhits": 0.5}, http_port=0, batch_size=64)
    assert json.loads(done.stdout) == expected.describe()


def test_show_says_where_each_value_comes_from(tmp_path: Path) -> None:
    (tmp_path / "quartet.toml").write_text("quorum = 2\nbatch_size = 8\n[weights]\nnhits = 0.5\n")
    env = {"QUARTET_BATCH_SIZE": "64", "QUARTET_WEIGHTS__PATCHTST": "0.1"}
    done = quartet("config", "show", "--http-port", "0", cwd=tmp_path, env=env)
    table = {line.split()[0]: " ".join(line.split()[1:]) for line in done.stdout.splitlines()}
    assert table["http_port"] == "0 (flags)"
    assert table["batch_size"] == "64 (environment)"
    assert table["quorum"] == "2 (quartet.toml)"
    assert table["lease_s"] == "2.0 (default)"
    assert table["weights"].endswith("(environment, quartet.toml)")
    assert set(table) == set(Settings.model_fields)


def test_show_tells_limits_once_and_of_single_agents_what_differs(tmp_path: Path) -> None:
    def quality() -> str:
        done = quartet("config", "show", cwd=tmp_path)
        return next(line for line in done.stdout.splitlines() if line.startswith("quality "))

    limits = " ".join(f"{name}={value}" for name, value in asdict(QualityLimits()).items())
    assert quality().split(maxsplit=1)[1] == f"{limits}  (default)"
    (tmp_path / "quartet.toml").write_text("[quality]\nminimum = 300\n[quality.nhits]\nhold_share = 0.95\n")
    limits = limits.replace("minimum=200", "minimum=300")
    assert quality().split(maxsplit=1)[1] == f"{limits}; nhits: hold_share=0.95  (quartet.toml)"


def test_no_form_of_show_tells_a_password(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("redis://:hunter2@host/0")
    for arguments in (["--json"], []):
        done = quartet("config", "show", *arguments, cwd=tmp_path, env={"QUARTET_REDIS_FILE": str(tmp_path / "secret")})
        assert done.returncode == 0
        assert "redis://:***@host/0" in done.stdout
        assert "hunter2" not in done.stdout + done.stderr


def test_check_passes_valid_settings_and_names_their_sources(tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text("quorum = 2\n")
    done = quartet("config", "check", "--config", "my.toml", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "settings are valid (my.toml)\n", "")
    assert quartet("config", "check", cwd=tmp_path).stdout == "settings are valid (all defaults)\n"


def test_check_names_what_is_wrong_in_one_line_and_exits_2(tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text("quorom = 2\n")
    done = quartet("config", "check", "--config", "my.toml", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown setting quorom (my.toml); did you mean quorum?\n"
