"""A model that always says BUY, on a real server: muted at once, and out of every count wherever it is told."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis

from agents import manifest
from streams.keys import Keys
from streams.messages import Reason
from streams.recording import Recorded, Writer
from tests.helpers import LIMIT_S, answers, environment, free_port, wait_for
from worker.cli.app import invoke
from worker.top import Samples
from worker.training.bars import Bars
from worker.training.market import generate
from worker.training.train import train_agents

SYMBOLS, BARS, WARMUP = 4, 130, 50
VOTES = SYMBOLS * (BARS - WARMUP + 1)
MUTED_AT = 199
FIRST_MS = 1_750_000_000_000


def rising(bars: Bars) -> Bars:
    """The same market on a rise of 2 % a bar: every return that a model sees is far above 0."""
    minutes = (bars.ts - bars.ts.min()) / 60_000
    factor = np.stack([np.exp(0.02 * minutes)] * 4 + [np.ones(len(bars))], axis=1)
    return Bars(bars.symbol, bars.ts, bars.interval, bars.ohlcv * factor)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """xgboost knows nothing but rises and has no threshold to speak of; lightgbm is an honest model."""
    folder = tmp_path_factory.mktemp("models")
    train_agents(rising(generate(4, 700, 1).bars()), folder, agents=["xgboost"])
    train_agents(generate(4, 700, 2).bars(), folder, agents=["lightgbm"])
    (meta,) = folder.glob("xgboost*_meta.json")
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"threshold": 1e-12}))
    (folder / manifest.NAME).unlink(missing_ok=True)
    return folder


@dataclass
class Live:
    """A worker that has answered every bar and goes on running."""

    url: str
    directory: Path
    models: Path
    port: int
    env: dict[str, str]

    @property
    def keys(self) -> Keys:
        return Keys("mute")

    def stream(self, key: str) -> list[dict[str, Any]]:
        with redis.Redis.from_url(self.url) as client:
            return [json.loads(fields[b"data"]) for _, fields in client.xrange(key)]

    def get(self, path: str) -> str:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}")
        try:
            with urllib.request.urlopen(request, timeout=LIMIT_S) as answer:
                return answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.read().decode()

    @property
    def flags(self) -> list[str]:
        shared = ["--redis", self.url, "--namespace", "mute", "--models", str(self.models)]
        return [*shared, "--http-port", str(self.port), "--state-dir", str(self.directory)]


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


Call = Callable[..., Done]


@pytest.fixture
def call(live: Live, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command of the program, with the settings of the worker."""
    for name, value in live.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(live.directory)

    def run(*arguments: str) -> Done:
        code = invoke([*arguments, *live.flags])
        return Done(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def live(valkey: str, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    directory = tmp_path_factory.mktemp("live")
    never = {"action_share": 1, "hold_share": 1, "confidence_stddev": 0, "confidence_range": 0}
    env = {
        "QUARTET_AGENTS": "xgboost,lightgbm",
        "QUARTET_QUORUM": "1",
        "QUARTET_WARMUP_BARS__V3": str(WARMUP),
        "QUARTET_BATCH_SIZE": "64",
        # The honest model is small and may well be dull: only the collapsed one is on trial here.
        **{f"QUARTET_QUALITY__LIGHTGBM__{name.upper()}": str(value) for name, value in never.items()},
    }
    live = Live(valkey, directory, models, free_port(), env)
    market = generate(SYMBOLS, BARS, 3)
    with redis.Redis.from_url(valkey) as client:
        pipe = client.pipeline(transaction=False)
        bars = ((t, i) for t in range(BARS) for i in range(SYMBOLS))
        for number, (t, i) in enumerate(bars):
            o, h, lo, c, v = map(float, market.ohlcv[t, i])
            fields = {"symbol": market.symbols[i], "ts": int(market.ts[t]), "open": o, "high": h, "low": lo, "close": c}
            pipe.xadd(live.keys.bars, fields | {"volume": v}, id=f"{FIRST_MS + number}-0")
        pipe.execute()
        with (directory / "log").open("wb") as log:
            child = subprocess.Popen(
                [sys.executable, "-m", "worker", "run", *live.flags],
                cwd=directory, env=environment(env), stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        try:
            wait_for(lambda: child.poll() is not None or client.xlen(live.keys.signals) == VOTES)
            assert child.poll() is None, (directory / "log").read_text()
            wait_for(lambda: Samples(live.get("/metrics")).one("quartet_agent_degenerate") is not None)
            yield live
        finally:
            child.terminate()
            child.wait(LIMIT_S)


def test_the_vote_that_shows_it_is_the_first_that_is_muted(live: Live) -> None:
    votes = live.stream(live.keys.votes("xgboost"))
    assert len(votes) == VOTES
    assert {vote["action"] for vote in votes} == {"BUY"}
    assert all(vote["outputs"] is not None and vote["weight"] == 0.3 for vote in votes)
    assert [vote["state"] for vote in votes] == ["active"] * MUTED_AT + ["muted"] * (VOTES - MUTED_AT)
    assert [vote["reason"] for vote in votes[MUTED_AT:]] == ["action_collapse"] * (VOTES - MUTED_AT)
    (event,) = [event for event in live.stream(live.keys.events) if event["kind"] == "agent_muted"]
    assert (event["agent"], event["bar_id"]) == ("xgboost", votes[MUTED_AT]["bar_id"])
    assert event["evidence"]["action_collapse"] == 1.0


def test_in_the_signals_it_counts_to_nothing_from_that_bar_on(live: Live) -> None:
    signals = live.stream(live.keys.signals)
    before, after = signals[:MUTED_AT], signals[MUTED_AT:]
    assert {(s["configured"], s["loaded"], s["eligible"], s["voting"]) for s in before} == {(2, 2, 2, 2)}
    assert {(s["configured"], s["loaded"], s["eligible"], s["voting"]) for s in after} == {(2, 2, 1, 1)}
    for signal in after:
        muted, other = signal["votes"]["xgboost"], signal["votes"]["lightgbm"]
        assert (muted["state"], muted["effective_weight"], muted["weight"]) == ("muted", 0.0, 0.3)
        assert other["effective_weight"] == 1.0
        assert signal["agreeing"] == 1
        assert signal["action"] == other["action"]


def test_metrics_say_the_same(live: Live) -> None:
    found = Samples(live.get("/metrics"))
    kinds = {
        kind: found.one("quartet_ensemble_agents", kind=kind) for kind in "configured loaded eligible voting".split()
    }
    assert kinds == {"configured": 2, "loaded": 2, "eligible": 1, "voting": 1}
    assert found.one("quartet_agent_state", agent="xgboost", state="muted") == 1
    assert found.one("quartet_agent_state", agent="xgboost", state="active") == 0
    assert found.one("quartet_agent_weight", agent="xgboost", kind="effective") == 0
    assert found.one("quartet_agent_weight", agent="lightgbm", kind="effective") == 1
    assert found.one("quartet_agent_degenerate", agent="xgboost", criterion=str(Reason.ACTION_COLLAPSE)) == 1
    assert found.one("quartet_agent_top_action_ratio", agent="xgboost") == 1
    assert found.one("quartet_agent_votes_total", agent="xgboost", action="BUY") == VOTES


def test_readyz_says_the_same(live: Live) -> None:
    body = json.loads(live.get("/readyz"))
    assert (body["agents"]["xgboost"]["state"], body["agents"]["xgboost"]["reason"]) == ("muted", "action_collapse")
    assert body["counts"] == {"configured": 2, "loaded": 2, "eligible": 1, "voting": 1, "agreeing": 1}


def test_the_scoreboard_is_that_of_the_votes_and_the_closes_of_the_streams(live: Live, call: Call) -> None:
    """Computed here from what the streams hold, by symbol: twelve bars of the same symbol later."""
    wait_for(lambda: (Samples(live.get("/metrics")).one("quartet_agent_scored_votes", agent="xgboost") or 0) >= 276)
    features = live.stream(live.keys.features)
    hits = []
    votes = {vote["bar_id"]: vote for vote in live.stream(live.keys.votes("xgboost"))}
    for symbol in {f["symbol"] for f in features}:
        own = [f for f in features if f["symbol"] == symbol]
        for now, later in zip(own, own[12:], strict=False):
            if now["bar_id"] in votes:
                hits.append(later["values"]["close"] / now["values"]["close"] - 1)
    found = Samples(live.get("/metrics"))
    assert found.one("quartet_agent_scored_votes", agent="xgboost") == len(hits)
    assert found.one("quartet_agent_hit_ratio", agent="xgboost") == pytest.approx(np.mean([r > 0 for r in hits]))
    assert found.one("quartet_agent_signed_return_mean", agent="xgboost") == pytest.approx(np.mean(hits))
    gate = json.loads(call("gate", "xgboost", "--json").stdout)["scoreboard"]
    assert gate["hit_ratio"] == pytest.approx(np.mean([r > 0 for r in hits]))
    assert (gate["scored"], gate["brier_score"]) == (
        len(hits),
        pytest.approx(found.one("quartet_agent_brier_score", agent="xgboost")),
    )


def test_the_gate_fails_the_one_and_passes_the_other(live: Live, call: Call) -> None:
    failed = call("gate", "xgboost", "--json")
    verdict = json.loads(failed.stdout)
    assert (failed.returncode, verdict["verdict"], verdict["votes"]) == (1, "FAIL", VOTES)
    assert verdict["muted_at"] == live.stream(live.keys.votes("xgboost"))[MUTED_AT]["bar_id"]
    worst = {c["criterion"]: c for c in verdict["criteria"]}["action_collapse"]
    assert (worst["value"], worst["limit"], worst["violated"]) == (1.0, 0.7, True)
    passed = call("gate", "lightgbm")
    assert (passed.returncode, passed.stdout.split()[0]) == (0, "PASS"), passed.stdout + passed.stderr
    few = call("gate", "xgboost", "--last", "150")
    assert (few.returncode, few.stdout.split()[0]) == (1, "INSUFFICIENT")
    assert "at least 200 votes are needed" in few.stdout


def test_the_gate_judges_between_two_entries(live: Live, call: Call) -> None:
    with redis.Redis.from_url(live.url) as client:
        ids = [entry_id.decode() for entry_id, _ in client.xrange(live.keys.votes("xgboost"))]
    verdict = json.loads(call("gate", "xgboost", "--json", "--from", ids[10], "--to", ids[229]).stdout)
    votes = live.stream(live.keys.votes("xgboost"))
    assert (verdict["votes"], verdict["first"], verdict["last"]) == (220, votes[10]["bar_id"], votes[229]["bar_id"])
    assert verdict["muted_at"] == votes[209]["bar_id"]
    wrong = call("gate", "xgboost", "--from", "yesterday")
    assert (wrong.returncode, "is no entry ID" in wrong.stderr) == (2, True)


def test_a_recording_gets_the_verdict_of_the_server(live: Live, call: Call, tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl.zst"
    with redis.Redis.from_url(live.url) as client, Writer(path) as writer:
        writer.header({"id": "1", "part": 1, "namespace": "mute"})
        for stream in ("features", "votes:xgboost"):
            key = f"mute:{stream}"
            for entry_id, fields in client.xrange(key):
                writer.add(Recorded(stream, key, entry_id.decode(), fields))
    recorded = call("gate", "xgboost", "--json", "--recording", str(path))
    assert recorded.returncode == 1, recorded.stderr
    assert json.loads(recorded.stdout) == json.loads(call("gate", "xgboost", "--json").stdout)


def test_top_shows_the_same_truth(live: Live, call: Call) -> None:
    shown = json.loads(call("top", "--json").stdout)
    assert shown["counts"] == {"configured": 2, "loaded": 2, "eligible": 1, "voting": 1, "agreeing": 1}
    xgboost, lightgbm = shown["agents"]
    assert (xgboost["agent"], xgboost["state"], xgboost["reason"]) == ("xgboost", "muted", "action_collapse")
    assert (xgboost["action"], xgboost["effective_weight"], xgboost["top_action_ratio"]) == ("BUY", 0.0, 1.0)
    assert (lightgbm["state"], lightgbm["effective_weight"]) == ("active", 1.0)
    assert shown["bars"] == {"accepted": SYMBOLS * BARS}
    assert sum(shown["signals"].values()) == VOTES
    assert shown["last_signal"]["bar_id"] == live.stream(live.keys.signals)[-1]["bar_id"]
    assert len(shown["drift"]) == 3
    frame = call("top")
    assert frame.returncode == 0
    assert frame.stdout.startswith("2 configured · 2 loaded · 1 eligible · 1 voting")
    assert "muted action_collapse" in frame.stdout
    assert "100% <= 70%" in frame.stdout
    assert "\x1b" not in frame.stdout


def test_without_a_worker_or_a_server_the_exit_code_is_3(
    live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert invoke(["top", "--http-port", str(free_port())]) == 3
    assert "no worker answers" in capsys.readouterr().err
    assert invoke(["gate", "nhits", "--state-dir", str(tmp_path)]) == 3
    assert "no embedded server runs" in capsys.readouterr().err
    assert invoke(["gate", "catboost"]) == 2
    assert answers(live.url)
