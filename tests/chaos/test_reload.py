"""Reloads, orders and canaries of a running worker on a real server: under load, and killed in their midst."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
import redis

from streams.keys import Keys
from streams.messages import AGENTS
from tests.chaos.scene import TREES, Stage, added, market, until
from tests.helpers import LIMIT_S, quartet

NEXT = "v20990101_000000_v3"
SYMBOLS, BARS = 4, 300
ENTRIES = market(SYMBOLS, BARS)
WARM = 29 * SYMBOLS
"""Bars before the first vote."""


@pytest.fixture(scope="session")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another trained xgboost, newer than any that is made today."""
    from worker.training.market import generate
    from worker.training.train import train_agents

    folder = tmp_path_factory.mktemp("newer")
    bars = generate(4, 900, 3, signal="planted").bars()
    train_agents(bars, folder, agents=["xgboost"], seed=9, now=datetime(2099, 1, 1, tzinfo=UTC))
    return folder


@pytest.fixture
def reloading(stage: Callable[..., Stage], models: Path, tmp_path: Path) -> Callable[..., Stage]:
    """A stage with a models folder of its own."""

    def make(url: str, agents: tuple[str, ...] = TREES, **env: str) -> Stage:
        made = stage(url, agents, **{"QUARTET_BATCH_SIZE": "8", "QUARTET_WATCH_S": "0.05", **env})
        made.models = Path(shutil.copytree(models, tmp_path / "models"))
        return made

    return make


def put(newer: Path, models: Path) -> None:
    """The model last, as every tool should."""
    for file in sorted(newer.iterdir(), key=lambda f: f.suffix == ".ubj"):
        shutil.copy(file, models / file.name)


def read(one: Stage, key: str) -> list[dict]:
    with redis.Redis.from_url(one.url) as client:
        return [json.loads(fields[b"data"]) for _, fields in client.xrange(key)]


def events(one: Stage, *kinds: str) -> list[dict]:
    return [event for event in read(one, one.keys.events) if event["kind"] in kinds]


def feed_slowly(one: Stage, first: int, last: int, step: int = 4) -> None:
    for start in range(first, last, step):
        one.feed(ENTRIES[start : start + step], start)
        time.sleep(0.002)


def assert_one_switch(one: Stage, expected: int = len(ENTRIES)) -> None:
    """Every bar once, in order; a vote for each signal; xgboost's version switches once, from the old to the new."""
    outputs = one.outputs()
    bars = [f"{e[b'symbol'].decode()}|1m|{e[b'ts'].decode()}" for e in ENTRIES[:expected]]
    assert [json.loads(data)["bar_id"] for _, data in outputs[":features"]] == bars
    signals = [json.loads(data) for _, data in outputs[":signals"]]
    assert [signal["bar_id"] for signal in signals] == bars[WARM:]
    for agent in one.agents:
        assert [entry_id for entry_id, _ in outputs[f":votes:{agent}"]] == [x for x, _ in outputs[":signals"]]
    versions = [json.loads(data)["version"] for _, data in outputs[":votes:xgboost"]]
    assert versions == [signal["votes"]["xgboost"]["version"] for signal in signals]
    switch = versions.index(NEXT)
    assert set(versions[switch:]) == {NEXT}
    assert switch > 0
    assert len(set(versions)) == 2


def order(one: Stage, *words: str | Path) -> tuple[int, list[dict], str]:
    """`quartet models ...`: exit code, the events that answer, and what it said."""
    done = quartet(
        *("models", words[0], "--wait", str(LIMIT_S), *words[1:], "--redis", one.url),
        *("--namespace", one.namespace, "--models", one.models, "--json"),
        cwd=one.directory,
        env=one.env | {"QUARTET_AGENTS": ",".join(one.agents), "QUARTET_QUORUM": str(min(3, len(one.agents)))},
    )
    return done.returncode, json.loads(done.stdout) if done.stdout else [], done.stderr


def test_a_reload_under_load_loses_and_doubles_nothing(reloading, newer, valkey):
    """All four agents; the folder brings a newer xgboost while bars flow."""
    one = reloading(valkey, AGENTS)
    life = one.start()
    feed_slowly(one, 0, 400)
    until(lambda: one.progress() >= 200, life)
    put(newer, one.models)
    feed_slowly(one, 400, 800)
    until(lambda: events(one, "reload"), life)
    feed_slowly(one, 800, len(ENTRIES))
    until(lambda: one.progress() == len(ENTRIES), life)
    assert life.terminate() == 0
    assert_one_switch(one)
    (event,) = events(one, "reload")
    votes = read(one, one.keys.votes("xgboost"))
    first = next(vote for vote in votes if vote["version"] == NEXT)
    assert event["bar_id"] in ("", first["bar_id"])
    assert event["evidence"]["version"] == NEXT


def test_kills_in_mid_reload_leave_one_switch(reloading, newer, valkey):
    """Killed while the order waits for its model, again and again, and when it has taken effect too."""
    one, rng = reloading(valkey), random.Random(31)
    life = one.start()
    feed_slowly(one, 0, 400)
    until(lambda: one.progress() >= 300, life)
    put(newer, one.models)
    one.env["QUARTET_WATCH_S"] = "0"
    assert life.kill() == -signal.SIGKILL
    with redis.Redis.from_url(one.url) as client:
        client.xadd(one.keys.control, {"data": b'{"order":"reload","agent":"xgboost"}'})
    fed, pending, done = 400, 0, 0
    while done < 2 and fed < len(ENTRIES):
        life = one.start()
        before = one.progress()
        one.feed(ENTRIES[fed : fed + 24], fed)
        fed += 24
        if pending >= 2:  # the first two are killed while they start, which no machine is too fast for
            until(lambda before=before: one.progress() > before, life)
        time.sleep(0.04 * 1.3**pending + rng.random() * 0.04)  # in the end long enough for any machine
        life.kill()
        if events(one, "reload"):
            done += 1
        else:
            pending += 1
    assert pending >= 2, "killed only after it proves little"
    assert done == 2, "the order never took effect"
    one.feed(ENTRIES[fed:], fed)
    one.finish()
    assert_one_switch(one)
    assert len(events(one, "reload")) == 1
    assert events(one, "reload")[0]["evidence"]["order"]


def test_a_refused_file_keeps_the_running_one_and_a_signal_tries_again(reloading, newer, valkey):
    """A torn file is refused once; made whole it is taken, here on SIGHUP, long before the next look."""
    one = reloading(valkey)
    life = one.start()
    feed_slowly(one, 0, 200)
    torn = one.models / f"xgboost_{NEXT}.ubj"
    begun = one.directory / "begun"
    begun.write_bytes((newer / torn.name).read_bytes()[:1000])
    begun.rename(torn)  # seen once, not empty at first
    until(lambda: events(one, "reload_refused"), life)
    (event,) = events(one, "reload_refused")
    assert (event["agent"], event["reason"]) == ("xgboost", "corrupt_artifact")
    assert life.terminate() == 0
    life = one.start(QUARTET_WATCH_S="0")
    feed_slowly(one, 200, 400)
    until(lambda: one.progress() == 400, life)
    put(newer, one.models)
    os.kill(life.pid, signal.SIGHUP)
    until(lambda: any(e["agent"] == "xgboost" for e in events(one, "reload")), life)
    feed_slowly(one, 400, len(ENTRIES))
    until(lambda: one.progress() == len(ENTRIES), life)
    assert life.terminate() == 0
    assert_one_switch(one)


def test_the_commands_steer_a_running_worker(reloading, newer, valkey):
    """Canary, its weight, promotion refused and granted, mute, unmute, rollback; exit codes 0 and 1."""
    one = reloading(valkey, QUARTET_WATCH_S="0")
    life = one.start()
    feed_slowly(one, 0, 200)
    until(lambda: one.progress() == 200, life)
    code, (event,), said = order(one, "canary", "xgboost", newer / f"xgboost_{NEXT}.ubj")
    assert (code, event["kind"], said) == (0, "canary_started", "")
    feed_slowly(one, 200, 300)
    until(lambda: one.progress() == 300, life)
    for signal_ in read(one, one.keys.signals)[-100:]:
        weights = {agent: vote["effective_weight"] for agent, vote in signal_["votes"].items()}
        assert weights == pytest.approx({"xgboost": 0.45, "lightgbm": 0.45, "xgboost_canary": 0.10})
    code, (event,), _ = order(one, "promote", "xgboost")
    assert (code, event["kind"], event["reason"]) == (1, "order_refused", "insufficient")
    assert order(one, "mute", "lightgbm")[0] == 0
    feed_slowly(one, 300, 320)
    assert order(one, "unmute", "lightgbm")[0] == 0
    assert order(one, "unmute", "lightgbm")[0] == 1
    feed_slowly(one, 320, 400)
    until(lambda: one.progress() == 400, life)
    assert life.kill() == -signal.SIGKILL
    life = one.start(QUARTET_WATCH_S="0")
    feed_slowly(one, 400, 420)
    until(lambda: one.progress() == 420, life)
    code, (event,), said = order(one, "promote", "xgboost")
    assert (code, event["kind"], said) == (0, "promoted", "")
    feed_slowly(one, 420, 600)
    until(lambda: one.progress() == 600, life)
    assert_one_switch(one, 600)
    assert len(read(one, one.keys.votes("xgboost_canary"))) == 220
    assert order(one, "rollback", "xgboost")[1][0]["evidence"]["replaces"]["version"] == NEXT
    assert life.terminate() == 0


def test_an_order_to_nobody_exits_3_and_waits_for_a_worker(reloading, valkey):
    one = reloading(valkey)
    one.feed(ENTRIES[:200])
    one.finish()
    code, answered, said = order(one, "mute", "xgboost", "--wait", "0.3")
    assert (code, answered) == (3, [])
    assert "no worker" in said
    one.finish("--until-idle", "1")
    assert [e["agent"] for e in events(one, "agent_muted")] == ["xgboost"]


def test_a_file_that_is_no_artifact_of_the_agent_is_wrong_usage(reloading, newer, valkey):
    """Nothing is written to the stream of orders."""
    one = reloading(valkey)
    assert order(one, "canary", "lightgbm", newer / f"xgboost_{NEXT}.ubj")[0] == 2
    assert order(one, "canary", "xgboost", newer / "absent_v20260101_000000.ubj")[0] == 2
    assert order(one, "mute", "oracle")[0] == 2
    assert added(one.url, Keys(one.namespace).control) == 0


def test_no_running_embedded_server_exits_3(tmp_path):
    done = quartet("models", "reload", "--state-dir", tmp_path / "state", cwd=tmp_path)
    assert done.returncode == 3
    assert "no embedded server runs" in done.stderr
