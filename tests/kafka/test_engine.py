"""The whole chain over Kafka: three workers, five partitions, kills, and the same signals as one process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import orjson

from agents.discovery import candidate_of
from streams.messages import AGENTS, CANARY
from tests.chaos.scene import TREES, until
from tests.helpers import environment, wait_for
from tests.kafka.cluster import read, write
from tests.kafka.scene import PARTITIONS, Group, alone, assert_same, market
from worker.control import Order
from worker.errors import FENCED, UNAVAILABLE
from worker.kafka.orders import give
from worker.kafka.topics import changelog_of
from worker.ordering import order_for
from worker.training.market import generate
from worker.training.train import train_agents

GroupOf = Callable[..., Group]


def test_the_chain_says_the_same_as_one_process(group: GroupOf, models: Path) -> None:
    """Each record packed differently; one worker, then another one over what it left."""
    bars = market(12, 60)
    workers = group(models)
    workers.feed(bars[:300], pack=1)
    workers.finish()
    workers.feed(bars[300:], pack=256)
    assert "ensemble ready: 2 configured, 2 loaded, 2 eligible" in workers.finish()
    assert_same(workers.said(), alone(models, bars, TREES))
    assert workers.count(workers.topics.signals) == 12 * 31
    assert {event["reason"] for event in workers.events("recovery")} == {"clean"}


def test_all_four_agents_say_the_same_as_in_one_process(group: GroupOf, all_models: Path) -> None:
    bars = market(5, 110)
    workers = group(all_models, agents=AGENTS, partitions=2)
    workers.feed(bars, pack=50)
    workers.finish()
    said = workers.said()
    assert_same(said, alone(all_models, bars))
    assert {vote["action"] for vote in said["votes.nhits"].values()} > {"ABSTAIN"}


def test_a_worker_that_is_killed_and_one_that_joins_change_nothing(group: GroupOf, models: Path) -> None:
    """100 symbols on five partitions; two workers, one killed in mid-run, a third added."""
    bars = market(100, 45)
    workers = group(models)
    lives = [workers.serve()]
    lives.append(workers.start())
    workers.keep(lives, lambda: "partitions taken over" in lives[1].text)
    workers.feed(bars[:2000])
    workers.keep(lives, lambda: workers.count(workers.topics.features) > 200)
    assert lives[0].signal(signal.SIGKILL) == -signal.SIGKILL
    lives[0] = workers.start()
    workers.feed(bars[2000:])
    workers.keep(lives, lambda: workers.count(workers.topics.features) >= len(bars))
    for life in lives:
        assert life.terminate() == 0, life.text
    workers.finish()
    assert_same(workers.said(), alone(models, bars, TREES))


def test_killed_in_mid_work_again_and_again(group: GroupOf, models: Path) -> None:
    """One worker at a time; what it was about to say is said again or for the first time, never otherwise."""
    bars = market(20, 60)
    workers = group(models, partitions=2)
    workers.feed(bars, pack=8)
    hit = 0
    for _ in range(3):
        before = workers.count(workers.topics.features)
        life = workers.start(QUARTET_BATCH_SIZE="1")
        until(lambda before=before: workers.count(workers.topics.features) > before or before == len(bars), life)
        assert life.kill() == -signal.SIGKILL
        hit += workers.count(workers.topics.features) < len(bars)
    assert hit, "every kill came too late"
    workers.finish()
    assert_same(workers.said(), alone(models, bars, TREES))
    assert "crash" in {event["reason"] for event in workers.events("recovery")}


def test_an_entry_that_kills_the_worker_is_left_out_at_the_fourth_try(group: GroupOf, models: Path) -> None:
    bars = market(3, 40)
    deadly = {**bars[0], "symbol": "DEADLY"}
    workers = group(models, partitions=1)
    workers.feed([*bars[:60], deadly, *bars[60:]], pack=4)
    for _ in range(4):  # the first one dies without a mark
        life = workers.start(CHAOS_DEADLY_SYMBOL="DEADLY")
        assert life.wait() == -signal.SIGKILL, life.text
    workers.finish(CHAOS_DEADLY_SYMBOL="DEADLY")
    [[rejected]] = read(workers.cluster, workers.topics.rejected)
    assert (rejected["reason"], rejected["source_key"]) == ("poison", workers.topics.bars)
    assert orjson.loads(rejected["in:data"])["symbol"] == "DEADLY"
    assert_same(workers.said(), alone(models, bars, TREES))


def test_what_is_no_bar_is_rejected_and_what_is_read_is_told(group: GroupOf, models: Path, tmp_path: Path) -> None:
    """Readiness, metrics and the sum of outcomes over all partitions; orders, and the votes of a canary."""
    made = market(10, 32)
    bars, later = made[:310], made[310:]
    workers = group(models)
    workers.feed(bars)
    write(workers.cluster, workers.topics.bars, [(0, b"{"), (1, b'[{"symbol":"A"}]'), (2, b""), (3, b"\xff")])
    life = workers.serve()
    until(lambda: workers.count(workers.topics.features) == len(bars), life)
    url = next(line for line in map(orjson.loads, life.text.splitlines()) if "url" in line and "http" in line["url"])
    wait_for(lambda: outcomes(url["url"])["rejected"] == 3)
    told = outcomes(url["url"])
    assert (told["accepted"], told["lost"]) == (len(bars), 0)
    wait_for(lambda: 'quartet_stream_lag{stream="bars"} 0.0' in page(url["url"]))
    metrics = page(url["url"])
    assert 'quartet_agent_state{agent="xgboost",state="active"} 1.0' in metrics
    assert 'quartet_ensemble_agents{kind="voting"} 2.0' in metrics
    assert "quartet_kafka_rebalances_total " in metrics
    readiness = orjson.loads(urllib.request.urlopen(f"{url['url']}/readyz", timeout=60).read())
    assert readiness["counts"]["voting"] == 2
    conditions = readiness["conditions"]
    assert set(conditions) >= {"kafka", "owner", "quorum", "warm_up", "fresh_bar", "feed"}
    assert conditions["owner"]["detail"] == f"partitions {', '.join(map(str, range(PARTITIONS)))}"
    muted = give(workers.cluster.url, workers.namespace, Order("mute", "xgboost", by="test"), 120.0)
    assert [(one["partition"], one["kind"], one["agent"]) for one in muted.events] == [
        (partition, "agent_muted", "xgboost") for partition in range(PARTITIONS)
    ]
    assert muted.shown == ", ".join(f"{partition}/0-1" for partition in range(PARTITIONS))
    wait_for(lambda: 'quartet_agent_state{agent="xgboost",state="muted"} 1.0' in page(url["url"]))
    train_agents(generate(4, 600, 3, signal="planted").bars(), tmp_path / "next", agents=["lightgbm"], seed=9)
    (file,) = (file for file in (tmp_path / "next").iterdir() if candidate_of(file, "lightgbm"))
    begun = give(workers.cluster.url, workers.namespace, order_for("canary", "lightgbm", file, models), 120.0)
    assert [one["kind"] for one in begun.events] == ["canary_started"] * PARTITIONS, begun
    workers.feed(later)
    until(lambda: workers.count(workers.topics.votes(f"lightgbm{CANARY}")) == len(later), life)
    assert life.terminate() == 0, life.text


def page(url: str) -> str:
    return str(urllib.request.urlopen(f"{url}/metrics", timeout=60).read().decode())


def outcomes(url: str) -> dict[str, float]:
    bars = [line for line in page(url).splitlines() if line.startswith("quartet_bars_total{")]
    return {line.partition('"')[2].partition('"')[0]: float(line.rpartition(" ")[2]) for line in bars}


def test_a_worker_that_was_frozen_for_longer_than_its_session_writes_nothing_more(group: GroupOf, models: Path) -> None:
    bars = market(20, 50)
    workers = group(models, partitions=2)
    frozen = workers.serve()
    workers.feed(bars[:500])
    until(lambda: workers.count(workers.topics.features) == 500, frozen)
    os.kill(frozen.pid, signal.SIGSTOP)
    workers.feed(bars[500:])
    time.sleep(3.9)  # less than the session of 4 s, but not when the last heartbeat was half a second older
    assert frozen.signal(signal.SIGCONT) == FENCED, frozen.text
    assert "stood still" in frozen.text
    assert workers.count(workers.topics.features) == 500
    workers.finish()
    assert_same(workers.said(), alone(models, bars, TREES))


def test_a_worker_that_cannot_commit_ends_by_itself(group: GroupOf, models: Path) -> None:
    """The broker answers nothing any more while bars wait to be committed."""
    bars = market(20, 50)
    workers = group(models, partitions=1)
    workers.feed(bars)
    life = workers.start(CHAOS_STALLED_S="3", QUARTET_BATCH_SIZE="1")
    until(lambda: workers.count(workers.topics.features) > 0, life)
    with workers.cluster.frozen():
        code = life.wait()
    assert code == UNAVAILABLE, life.text
    assert "has stood still for" in life.text.splitlines()[-1]
    assert workers.count(workers.topics.features) < len(bars)
    workers.finish()
    assert_same(workers.said(), alone(models, bars, TREES))


def test_fausts_own_command_runs_the_same_worker(group: GroupOf, models: Path, tmp_path: Path) -> None:
    """And ends where that one fails, as it does over a changelog in which something else was written."""
    bars = market(4, 40)
    workers = group(models, partitions=2)
    workers.feed(bars)
    settings = {
        "QUARTET_BROKER": workers.cluster.url,
        "QUARTET_NAMESPACE": workers.namespace,
        "QUARTET_MODELS": str(models),
        "QUARTET_STATE_DIR": str(tmp_path),
        "QUARTET_HTTP_PORT": "0",
        "QUARTET_AGENTS": ",".join(TREES),
        "QUARTET_QUORUM": "2",
        "QUARTET_WARMUP_BARS__V3": "30",
        "NUMBA_CACHE_DIR": os.environ["NUMBA_CACHE_DIR"],
    }
    log = tmp_path / "faust.log"
    with log.open("wb") as out:
        command = [sys.executable, "-m", "faust", "-A", "worker.kafka", "worker", "-l", "info"]
        worker = subprocess.Popen(command, cwd=tmp_path, env=environment(settings), stdout=out, stderr=out)
        try:
            wait_for(lambda: worker.poll() is not None or workers.count(workers.topics.features) == len(bars))
            assert worker.poll() is None, log.read_text()
            worker.terminate()
            assert worker.wait(120) == 0, log.read_text()
            write(workers.cluster, changelog_of(workers.namespace), [(1, b"no state of ours")])
            worker = subprocess.Popen(command, cwd=tmp_path, env=environment(settings), stdout=out, stderr=out)
            assert worker.wait(120) == 1, log.read_text()
            assert f"delete the topic {changelog_of(workers.namespace)}" in log.read_text()
        finally:
            worker.kill()
    assert_same(workers.said(), alone(models, bars, TREES))
