"""The program with stages: their probes and metrics, and the commands that look at a namespace or steer it."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request

import pytest

from tests.chaos.scene import TREES, market, until
from tests.helpers import quartet, wait_for
from tests.stages.scene import PATIENT, names
from worker.cli.app import invoke
from worker.top import Samples

BARS = 80


@pytest.fixture(autouse=True)
def _same_settings(monkeypatch):
    """Commands are given the settings of the stages."""
    monkeypatch.setenv("QUARTET_AGENTS", ",".join(TREES))
    monkeypatch.setenv("QUARTET_QUORUM", "2")


@pytest.fixture(scope="module")
def running(workers, models, valkey, tmp_path_factory):
    """Four stages of two agents, all of whose bars are decided; and where each answers."""
    from tests.chaos.scene import Stage as Scene

    folder = tmp_path_factory.mktemp("program")
    scene = Scene(workers, valkey, f"program{folder.name}", models, folder, TREES)
    scene.feed(market(3, BARS))
    lives = {name: scene.start("--stage", name, **PATIENT) for name in names(TREES)}
    consensus = lives["consensus"]
    until(lambda: len(scene.outputs()[":signals"]) == 3 * (BARS - 29), consensus)
    yield scene, {name: port_of(life) for name, life in lives.items()}
    for life in lives.values():
        assert life.terminate() == 0, life.text


def port_of(life) -> int:
    return int(re.search(r'"url":\s*"http://127\.0\.0\.1:(\d+)"', life.text).group(1))


def get(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def run(capsys, scene, *arguments: str, code: int = 0) -> str:
    flags = ["--redis", scene.url, "--namespace", scene.namespace, "--models", str(scene.models)]
    capsys.readouterr()
    assert invoke([*arguments, *flags, "--state-dir", str(scene.directory)]) == code
    return capsys.readouterr().out


def test_each_stage_says_what_it_needs_and_how_it_stands(running):
    _, ports = running
    bodies = {name: json.loads(get(port, "/readyz")[1]) for name, port in ports.items()}
    conditions = {name: set(body["conditions"]) for name, body in bodies.items()}
    assert conditions["features"] == {"redis", "owner", "fresh_bar", "feed"}
    assert conditions["agent:xgboost"] == {"redis", "owner", "agent"}
    assert conditions["consensus"] == {"redis", "owner", "warm_up", "fresh_bar", "quorum", "feed"}
    assert get(ports["agent:xgboost"], "/readyz")[0] == 200
    assert bodies["agent:xgboost"]["agents"]["xgboost"]["state"] == "active"
    assert {a: facts["state"] for a, facts in bodies["consensus"]["agents"].items()} == dict.fromkeys(TREES, "active")
    counts = bodies["consensus"]["counts"]
    assert [counts[kind] for kind in ("configured", "loaded", "eligible", "voting")] == [2, 2, 2, 2]
    assert all(get(port, "/healthz")[0] == 200 for port in ports.values())


def test_every_number_is_exported_by_the_process_whose_it_is(running):
    _, ports = running
    found = {name: Samples(get(port, "/metrics")[1]) for name, port in ports.items()}
    bars, ready = 3 * BARS, 3 * (BARS - 29)
    assert found["features"].one("quartet_bars_total", outcome="accepted") == bars
    assert found["consensus"].one("quartet_bars_total", outcome="accepted") == 0
    votes = found["agent:lightgbm"].by("quartet_agent_votes_total", "agent", "action")
    assert sum(votes.values()) == ready
    assert {name.split()[0] for name in votes} == {"lightgbm"}
    signals = found["consensus"].by("quartet_signals_total", "action", "status")
    assert sum(signals.values()) == ready
    assert found["consensus"].one("quartet_ensemble_agents", kind="voting") == 2
    assert found["consensus"].one("quartet_agent_state", agent="xgboost", state="active") is None

    def lags() -> dict[str, float]:
        return Samples(get(ports["consensus"], "/metrics")[1]).by("quartet_stream_lag", "stream")

    wait_for(lambda: lags().get("votes:xgboost") == 0)
    assert set(lags()) == {"features", "votes:xgboost", "votes:lightgbm"}


def test_top_shows_the_stages_as_one_worker(running, capsys):
    scene, ports = running
    first, *others = ports.values()
    further = [word for port in others for word in ("--port", str(port))]
    shown = json.loads(run(capsys, scene, "top", "--json", "--http-port", str(first), *further))
    assert {row["agent"]: row["state"] for row in shown["agents"]} == dict.fromkeys(TREES, "active")
    assert all(row["effective_weight"] and row["top_action_ratio"] for row in shown["agents"])
    assert shown["counts"]["voting"] == 2
    assert shown["bars"] == {"accepted": 3 * BARS}
    assert sum(shown["signals"].values()) == 3 * (BARS - 29)


def test_the_page_knows_the_symbols(running):
    _, ports = running
    status, body = get(ports["consensus"], "/api/symbols")
    assert status == 200
    assert json.loads(body)["total"] == 3
    assert get(ports["features"], "/")[1].startswith("quartet"), "only the consensus has the page"


def test_the_commands_of_one_process_do_the_same_with_several(running, capsys):
    scene, _ = running
    assert json.loads(run(capsys, scene, "gate", "xgboost", "--json", code=1))["verdict"] in ("INSUFFICIENT", "FAIL")
    checked = json.loads(run(capsys, scene, "check", "--json", code=1))
    assert checked["streams"][0]["waiting"] == 0, "the feature stage has read everything"
    answers = json.loads(run(capsys, scene, "models", "reload", "--json", "--wait", "100"))
    assert {(event["kind"], event["agent"]) for event in answers} == {("reload", agent) for agent in TREES}
    (muted,) = json.loads(run(capsys, scene, "models", "mute", "lightgbm", "--json", "--wait", "100"))
    assert muted["kind"] == "agent_muted"
    (unmuted,) = json.loads(run(capsys, scene, "models", "unmute", "lightgbm", "--json", "--wait", "100"))
    assert unmuted["kind"] == "agent_readmitted"


def test_an_unknown_stage_is_wrong_usage_and_names_the_choices(tmp_path):
    done = quartet("run", "--stage", "agent:nobody", "--models", tmp_path, cwd=tmp_path)
    assert done.returncode == 2
    assert "features, agent:xgboost, agent:lightgbm, agent:nhits, agent:patchtst, consensus" in done.stderr
