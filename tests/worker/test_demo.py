"""The demonstration as a newcomer runs it: a real server, real models, a real worker, and what is left behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis

from streams import embedded
from tests.helpers import LIMIT_S, environment, quartet, wait_for
from worker.training.market import generate
from worker.training.train import train_agents

AGENTS = ("xgboost", "lightgbm", "nhits", "patchtst")
SYMBOLS, BARS = 4, 220
READY = SYMBOLS * (BARS - 99)  # v3 is ready from the 100th bar on
FULL = SYMBOLS * (BARS - 99 - 63)  # a window of 64 is full from the 64th ready vector on


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four small models of a small market; the demo's own take longer to train."""
    folder = tmp_path_factory.mktemp("models")
    train_agents(generate(6, 700, seed=5).bars(), folder, seed=1)
    return folder


@dataclass(frozen=True)
class Finished:
    """A run that came to its end, and what lies on its streams, counted here and not by the demo."""

    state: Path
    svg: Path
    summary: dict[str, Any]
    spoken: str
    lengths: dict[str, int]
    signals: list[dict[str, Any]]
    votes: dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def finished(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    home = tmp_path_factory.mktemp("demo")
    (home / "quartet.toml").write_text("quorum = 2\n")
    done = quartet(
        *("demo", "--json", "--symbols", SYMBOLS, "--bars", BARS, "--http-port", 0, "--models", models),
        *("--svg", home / "demo.svg"),
        cwd=home,
        env={"QUARTET_WARMUP_BARS__V3": "21", "QUARTET_REDIS": "redis://127.0.0.1:1"},
    )
    assert done.returncode == 0, done.stderr
    state = home / ".quartet" / "demo"
    with embedded.start(state) as server, redis.Redis.from_url(server.url) as client:
        keys = [key.decode() for key in client.scan_iter("quartet:*", _type="stream")]
        lengths = {key.removeprefix("quartet:"): client.xlen(key) for key in keys}

        def read(key: str) -> list[dict[str, Any]]:
            return [json.loads(fields[b"data"]) for _, fields in client.xrange(key)]

        signals, votes = read("quartet:signals"), {a: read(f"quartet:votes:{a}") for a in AGENTS}
    return Finished(state, home / "demo.svg", json.loads(done.stdout), done.stderr, lengths, signals, votes)


def test_every_bar_is_answered_and_the_summary_counts_what_the_streams_hold(finished: Finished) -> None:
    assert finished.lengths["bars"] == finished.lengths["features"] == SYMBOLS * BARS
    assert finished.lengths["signals"] == READY
    assert {finished.lengths[f"votes:{a}"] for a in AGENTS} == {READY}
    summary = finished.summary
    assert summary["bars"]["published"] == summary["bars"]["accepted"] == SYMBOLS * BARS
    assert summary["signals"]["total"] == READY
    assert Counter(s["action"] for s in finished.signals) == Counter(summary["signals"]["by_action"])
    assert Counter(s["status"] for s in finished.signals) == Counter(summary["signals"]["by_status"])
    for agent in AGENTS:
        assert Counter(v["action"] for v in finished.votes[agent]) == Counter(summary["agents"][agent]["votes"])


def test_the_last_scrape_says_the_same_as_the_streams(finished: Finished) -> None:
    scrape = (finished.state / "metrics.txt").read_text()

    def metric(name: str, **labels: str) -> int:
        inside = ",".join(f'{k}="{v}"' for k, v in sorted(labels.items()))
        found = re.findall(rf"^{name}\{{{re.escape(inside)}\}} (\S+)$", scrape, re.MULTILINE)
        assert len(found) == 1, (name, labels)
        return int(float(found[0]))

    assert metric("quartet_bars_total", outcome="accepted") == SYMBOLS * BARS
    actions = Counter((s["action"], s["status"]) for s in finished.signals)
    assert all(metric("quartet_signals_total", action=a, status=s) == n for (a, s), n in actions.items())
    for agent in AGENTS:
        for action, n in Counter(v["action"] for v in finished.votes[agent]).items():
            assert metric("quartet_agent_votes_total", agent=agent, action=action) == n
    assert finished.summary["streams_and_metrics_agree"] is True


def test_the_headline_is_that_of_the_last_signals(finished: Finished) -> None:
    last = finished.signals[-1]
    assert finished.summary["headline"] == (
        f"{last['configured']} configured, {last['loaded']} loaded, {last['voting']} voting"
    )
    assert finished.summary["headline"] == "4 configured, 4 loaded, 4 voting"
    assert finished.summary["counts"] == {"configured": 4, "loaded": 4, "voting": 4}


def test_sequence_models_abstain_until_their_window_is_full_and_say_so(finished: Finished) -> None:
    for agent, warming in (("xgboost", 0), ("lightgbm", 0), ("nhits", READY - FULL), ("patchtst", READY - FULL)):
        told = finished.summary["agents"][agent]
        assert told["votes"]["ABSTAIN"] == warming
        assert told["abstentions"] == ({"insufficient_history": warming} if warming else {})
        assert (told["state"], told["reason"]) == ("active", "")


def test_settings_of_the_user_do_not_reach_the_demos_worker(finished: Finished) -> None:
    assert {s["quorum"] for s in finished.signals} == {3}  # the file says 2; warm-up by the variable would be 21 bars


def test_the_market_is_said_to_be_synthetic_and_bars_end_about_now(finished: Finished) -> None:
    assert "Synthetic market: generated by quartet from a seed, not prices of anything." in finished.spoken
    assert finished.summary["synthetic"] is True
    assert finished.lengths.get("rejected", 0) == 0  # none was too early; below: none was old when it was published
    last = finished.signals[-1]["ts"]
    with embedded.start(finished.state) as server, redis.Redis.from_url(server.url) as client:
        published_ms = int(client.xrevrange("quartet:bars", count=1)[0][0].split(b"-")[0])
    assert 60_000 <= published_ms - last < 180_000


def test_piped_output_has_no_colour_and_the_picture_loads_nothing(finished: Finished) -> None:
    assert "\x1b" not in finished.spoken
    text = finished.svg.read_text()
    ET.fromstring(text)
    assert set(re.findall(r"[\w:]+=.?(?=https?:)", text)) == {'xmlns="'}
    assert not re.search(r"url\(.?http|@import|@font-face|<image|<script", text)
    assert "4&#160;configured,&#160;4&#160;loaded,&#160;4&#160;voting" in text


def test_a_refused_artifact_and_a_busy_port_are_said_and_the_demo_goes_on(models: Path, tmp_path: Path) -> None:
    broken = tmp_path / "models"
    shutil.copytree(models, broken)
    (broken / "nhits_v20990101_000000_v3.pth").write_bytes(b"no checkpoint")
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = held.getsockname()[1]
        done = quartet("demo", "--symbols", 2, "--bars", 200, "--models", broken, "--http-port", port, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"Port {port} cannot be used" in done.stdout
    assert "\n4 configured, 3 loaded, 3 voting\n" in done.stdout
    assert re.search(r"^nhits +refused +0 +0 +0 +202 +ABSTAIN 0.00 +corrupt_artifact", done.stdout, re.MULTILINE)
    assert "\nnhits: corrupt_artifact: " in done.stdout


@dataclass(frozen=True)
class Sabotaged:
    """A sabotaged run: what it printed, and what lies on its streams, counted here."""

    summary: dict[str, Any]
    spoken: str
    signals: list[dict[str, Any]]
    events: list[dict[str, Any]]
    votes: dict[str, list[dict[str, Any]]]
    bars: list[str]


@pytest.fixture(scope="module")
def sabotaged(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Sabotaged:
    home = tmp_path_factory.mktemp("sabotage")
    before = {file.name: file.read_bytes() for file in models.iterdir()}
    done = quartet(
        *("demo", "--sabotage", "--json", "--symbols", 4, "--bars", 400, "--http-port", 0, "--models", models),
        cwd=home,
    )
    assert done.returncode == 0, done.stderr
    assert {file.name: file.read_bytes() for file in models.iterdir()} == before, "only copies are sabotaged"
    with embedded.start(home / ".quartet" / "demo") as server, redis.Redis.from_url(server.url) as client:

        def read(key: str) -> list[dict[str, Any]]:
            return [json.loads(fields[b"data"]) for _, fields in client.xrange(key)]

        bars = [f"{f[b'symbol'].decode()}|1m|{f[b'ts'].decode()}" for _, f in client.xrange("quartet:bars")]
        votes = {agent: read(f"quartet:votes:{agent}") for agent in AGENTS}
        return Sabotaged(
            json.loads(done.stdout), done.stderr, read("quartet:signals"), read("quartet:events"), votes, bars
        )


def test_sabotage_ends_with_four_configured_three_loaded_and_two_voting(sabotaged: Sabotaged) -> None:
    assert sabotaged.summary["headline"] == "4 configured, 3 loaded, 2 voting"
    last = sabotaged.signals[-1]
    assert (last["configured"], last["loaded"], last["eligible"], last["voting"]) == (4, 3, 2, 2)
    assert (last["action"], last["status"], last["confidence"]) == ("HOLD", "below_quorum", 0)
    states = {agent: (vote["state"], vote["reason"]) for agent, vote in last["votes"].items()}
    assert states == {
        "xgboost": ("muted", "action_collapse"),
        "lightgbm": ("active", None),
        "nhits": ("active", None),
        "patchtst": ("refused", "feature_mismatch"),
    }
    assert sabotaged.summary["agents"]["xgboost"]["reason"] == "action_collapse"
    assert sabotaged.summary["streams_and_metrics_agree"] is True


def test_the_refused_artifact_never_votes_and_its_refusal_says_what_to_do(sabotaged: Sabotaged) -> None:
    assert {(v["action"], v["reason"]) for v in sabotaged.votes["patchtst"]} == {("ABSTAIN", "feature_mismatch")}
    refused = next(event for event in sabotaged.events if event["kind"] == "agent_refused")
    assert (refused["agent"], refused["reason"]) == ("patchtst", "feature_mismatch")
    assert re.search("expected .*v3.*, found .*rsi_21.*; train again", refused["detail"])


def test_the_collapsed_model_votes_from_the_swap_on_and_is_muted_on_its_two_hundredth_vote(
    sabotaged: Sabotaged,
) -> None:
    swap = next(event for event in sabotaged.events if (event["kind"], event["agent"]) == ("reload", "xgboost"))
    muted = next(event for event in sabotaged.events if event["kind"] == "agent_muted")
    votes, new = sabotaged.votes["xgboost"], swap["evidence"]["version"]
    first = next(n for n, vote in enumerate(votes) if vote["version"] == new)
    assert {vote["version"] for vote in votes[first:]} == {new}
    assert votes[first]["bar_id"] == sabotaged.bars[len(sabotaged.bars) // 2], "the second half begins with the new one"
    window = Counter(vote["action"] for vote in votes[first : first + 200])
    assert window["BUY"] > 140
    where = next(n for n, vote in enumerate(votes) if vote["bar_id"] == muted["bar_id"])
    assert where == first + 199
    assert {vote["state"] for vote in votes[:where]} == {"active"}
    assert {(vote["state"], vote["reason"]) for vote in votes[where:]} == {("muted", "action_collapse")}
    assert (muted["agent"], muted["reason"], muted["evidence"]["votes"]) == ("xgboost", "action_collapse", 200)


def test_from_the_mute_on_every_signal_is_below_quorum_and_the_summary_counts_both_sides(sabotaged: Sabotaged) -> None:
    muted = next(event["bar_id"] for event in sabotaged.events if event["kind"] == "agent_muted")
    where = next(n for n, signal in enumerate(sabotaged.signals) if signal["bar_id"] == muted)
    before, after = sabotaged.signals[:where], sabotaged.signals[where:]
    assert {(s["action"], s["status"], s["voting"]) for s in after} == {("HOLD", "below_quorum", 2)}
    assert {"ok", "hold"} < {s["status"] for s in before}, "three of four are a quorum"
    told = sabotaged.summary["sabotage"]
    assert told["signals_before_the_mute"] == Counter(s["status"] for s in before)
    assert told["signals_from_the_mute_on"] == Counter(s["status"] for s in after)
    turns = [(turn["kind"], turn["agent"], turn["bars"], turn["bar_id"]) for turn in told["turns"]]
    assert turns == [
        ("agent_refused", "patchtst", 0, ""),
        ("reload", "xgboost", len(sabotaged.bars) // 2, ""),
        ("agent_muted", "xgboost", sabotaged.bars.index(muted) + 1, muted),
    ]


def test_killing_the_demos_server_in_mid_run_is_one_line(models: Path, tmp_path: Path) -> None:
    demo = begin("--symbols", 50, "--bars", 1_000, "--models", models, cwd=tmp_path)
    state = tmp_path / ".quartet" / "demo"
    assert demo.stdout is not None
    try:
        until = next((line for line in demo.stdout if "signals" in line), None)
        assert until is not None, demo.communicate()
        os.kill(json.loads((state / "valkey" / "server.json").read_text())["pid"], signal.SIGKILL)
    finally:
        _, err = demo.communicate(timeout=LIMIT_S)
    assert demo.returncode == 3
    assert err.count("\n") == 1, err
    assert err.startswith("error: the demo's server went away: ")
    assert "valkey.log" in err


def test_a_worker_that_cannot_start_is_one_line_with_the_end_of_its_log(tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    for agent in AGENTS:
        (models / f"{agent}_v20990101_000000_v3.{'pth' if agent in AGENTS[2:] else 'json'}").write_bytes(b"nothing")
    done = quartet("demo", "--models", models, "--http-port", 0, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: the worker ended with exit code 1; .quartet/demo/worker.log ends: ")
    assert "no agent can vote" in done.stderr


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--redis", "redis://:secret@h"], "error: --redis redis://:***@h: the demo brings a server of its own"),
        (["--bars", "199"], "error: Invalid value for '--bars'"),
        (["--symbols", "0"], "error: Invalid value for '--symbols'"),
        (["--seed", "-1"], "error: Invalid value for '--seed'"),
        (["--sabotage", "--symbols", "1", "--bars", "300"], "error: --sabotage with 1 symbols and 300 bars: 150 votes"),
    ],
)
def test_wrong_flags_are_one_line_and_exit_code_2(tmp_path: Path, flags: list[str], says: str) -> None:
    done = quartet("demo", *flags, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(says)
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / ".quartet").exists()


def test_ctrl_c_while_it_keeps_going_is_quiet_and_leaves_no_process(models: Path, tmp_path: Path) -> None:
    demo = begin("--keep", "--symbols", 2, "--bars", 200, "--models", models, cwd=tmp_path)
    state = tmp_path / ".quartet" / "demo"
    try:
        wait_for(lambda: (state / "metrics.txt").exists() or demo.poll() is not None, limit_s=3 * LIMIT_S)
        assert demo.poll() is None
        second = quartet("demo", "--models", models, cwd=tmp_path)
        assert (second.returncode, second.stderr.count("\n")) == (3, 1)
        assert "another demo runs in .quartet/demo" in second.stderr
        server = json.loads((state / "valkey" / "server.json").read_text())["pid"]
        children = [*children_of(demo.pid), server]
        assert len(children) >= 3
    finally:
        demo.send_signal(signal.SIGINT)
        out, err = demo.communicate(timeout=LIMIT_S)
    assert (demo.returncode, err) == (130, "")
    assert "4 configured, 4 loaded, 4 voting" in out
    wait_for(lambda: not any(alive(pid) for pid in children))


def test_ctrl_c_in_mid_training_leaves_no_process_and_no_half_artifact(tmp_path: Path) -> None:
    demo = begin(cwd=tmp_path)
    models = tmp_path / ".quartet" / "demo" / "models" / "seed-0"
    try:
        wait_for(lambda: (models.exists() and any(models.iterdir())) or demo.poll() is not None, limit_s=3 * LIMIT_S)
        assert demo.poll() is None
        children = children_of(demo.pid)
        assert children
    finally:
        demo.send_signal(signal.SIGINT)
        _, err = demo.communicate(timeout=LIMIT_S)
    assert (demo.returncode, err) == (130, "")
    wait_for(lambda: not any(alive(pid) for pid in children))
    listed = json.loads(quartet("models", "list", "--json", "--models", models, cwd=tmp_path).stdout)
    assert {one["state"] for one in listed} <= {"active"}


def test_only_the_missing_agent_is_trained(models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    shutil.copytree(models, folder)
    for file in folder.glob("xgboost_*"):
        file.unlink()
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    done = quartet("demo", "--symbols", 1, "--bars", 200, "--http-port", 0, "--models", folder, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Training xgboost on an earlier stretch of that market, once" in done.stdout
    assert "  xgboost trained\n" in done.stdout
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert "\n4 configured, 4 loaded, 4 voting\n" in done.stdout


def begin(*flags: str | int | Path, cwd: Path) -> subprocess.Popen[str]:
    """The demo in the background, with a free port."""
    return subprocess.Popen(
        [sys.executable, "-m", "worker", "demo", "--http-port", "0", *map(str, flags)],
        cwd=cwd, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def children_of(pid: int) -> list[int]:
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    """Whether the process runs; one that ended and was not yet collected does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
