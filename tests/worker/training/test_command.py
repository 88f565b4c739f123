"""`quartet train` as a user meets it: exit codes, one line for each mistake, a table, JSON."""

import csv
import json

import pytest

from worker.cli.app import invoke
from worker.training.market import generate


@pytest.fixture(scope="module")
def bars(tmp_path_factory):
    path = tmp_path_factory.mktemp("bars") / "bars.csv"
    made = generate(4, 700, seed=4).bars()
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow("symbol ts open high low close volume".split())
        for symbol, ts, row in zip(made.symbol, made.ts, made.ohlcv, strict=True):
            writer.writerow([symbol, ts, *map(repr, map(float, row))])
    return path


def test_it_trains_one_agent_and_prints_a_row_for_it(bars, tmp_path, capsys):
    assert invoke(["train", "--bars", str(bars), "--agent", "lightgbm", "--models", str(tmp_path / "m")]) == 0
    out = capsys.readouterr().out
    assert "R2" in out
    assert "lightgbm_v" in out
    assert len(list((tmp_path / "m").iterdir())) == 3


def test_json_tells_the_same_for_programs(bars, tmp_path, capsys):
    arguments = ["train", "--bars", str(bars), "--agent", "xgboost,lightgbm", "--models", str(tmp_path), "--json"]
    assert invoke(arguments) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["agent"] for row in rows] == ["xgboost", "lightgbm"]
    assert all(0.4 <= row["hold_share_training"] <= 0.5 for row in rows)


def _fails(arguments, capsys):
    assert invoke(["train", *arguments]) == 2
    line = capsys.readouterr().err.strip()
    assert line.count("\n") == 0
    return line


def test_a_missing_file_is_one_line(tmp_path, capsys):
    line = _fails(["--bars", str(tmp_path / "none.csv"), "--models", str(tmp_path)], capsys)
    assert "none.csv: no such file" in line


def test_an_unknown_agent_is_one_line(bars, tmp_path, capsys):
    line = _fails(["--bars", str(bars), "--agent", "catboost", "--models", str(tmp_path)], capsys)
    assert "unknown agent catboost" in line


def test_too_little_data_is_one_line_and_leaves_no_artifact(tmp_path, capsys):
    path = tmp_path / "bars.csv"
    path.write_text("symbol,ts,open,high,low,close,volume\nA,1700000040000,1,1,1,1,1\n")
    line = _fails(["--bars", str(path), "--models", str(tmp_path / "m")], capsys)
    assert "too few bars to train on: 1 bars of 1 series" in line
    assert list((tmp_path / "m").iterdir()) == []


def test_a_bad_row_is_one_line(tmp_path, capsys):
    path = tmp_path / "bars.csv"
    path.write_text("symbol,ts,open,high,low,close,volume\nA,1700000040000,1,1,1,-1,1\n")
    assert "line 2: price_sign" in _fails(["--bars", str(path), "--models", str(tmp_path)], capsys)
