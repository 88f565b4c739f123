"""`quartet bridge` between a real Valkey and a broker: every bar once, whatever dies on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import pytest
import redis
from prometheus_client import CollectorRegistry

from streams.formats import FormatReader
from streams.inputs import Inputs
from streams.keys import Keys
from streams.redis import RedisStore, connect
from streams.store import Commit, InputLostError
from streams.topics import Topics
from tests.chaos.scene import Fields, feed, market
from tests.chaos.servers import Server
from tests.helpers import environment, free_port, quartet, wait_for
from tests.kafka.cluster import Cluster, mock_cluster, read
from worker.bridge import Bridge, BridgeOptions
from worker.carriage import STAGE
from worker.errors import CheckFailed
from worker.lease import LeaseKeeper
from worker.logs import make_logger
from worker.metrics import BridgeMetrics
from worker.outages import BridgeStatus
from worker.sink import KafkaSink

PARTITIONS = 4
LEASE_S = 0.4
CARRIED = 'quartet_bridge_bars_total{outcome="carried"} 20.0'


class Dead(BaseException):
    """As a kill -9 between two calls: nothing after it runs."""


class DyingStore(RedisStore):
    """A store whose process ends before the given commit."""

    dies_at = 10**9
    commits = 0

    def commit(self, commit: Commit) -> bool:
        self.commits += 1
        if self.commits >= self.dies_at:
            raise Dead
        return super().commit(commit)


class Here:
    """A bridge in a thread of this process, over real servers."""

    def __init__(self, url: str, cluster: Cluster, namespace: str, **options: Any) -> None:
        self.options = BridgeOptions(**options)
        self.status = BridgeStatus()
        self.registry = CollectorRegistry()
        self.store = DyingStore(connect(url), Keys(namespace), STAGE, lease_s=LEASE_S)
        self.bridge = Bridge(
            self.store,
            Topics(namespace),
            lambda topics, waiting: KafkaSink(cluster.bootstrap, topics, waiting),
            Inputs((Keys(namespace).bars,), namespace),
            FormatReader,
            metrics=BridgeMetrics(self.registry),
            status=self.status,
            log=make_logger("error"),
            options=self.options,
        )
        twin = self.store.with_client(connect(url))
        self.lease = LeaseKeeper(twin.renew, lambda: self.status.heartbeat, LEASE_S / 4)

    def run(self) -> None:
        self.bridge.run(self.lease)

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self.run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.options.stop.set()
        self._thread.join(120)
        assert not self._thread.is_alive()

    def count(self, outcome: str) -> float:
        return self.registry.get_sample_value("quartet_bridge_bars_total", {"outcome": outcome}) or 0.0


def carried(cluster: Cluster, namespace: str) -> dict[str, list[tuple[str, str]]]:
    """Time and close of every bar in the topic by symbol, in order, doubles included."""
    found = defaultdict(list)
    for objects in read(cluster, Topics(namespace).bars):
        for bar in objects:
            found[bar["symbol"]].append((bar["ts"], bar["close"]))
    return dict(found)


def fed(entries: Sequence[Fields]) -> dict[str, list[tuple[str, str]]]:
    found = defaultdict(list)
    for entry in entries:
        found[entry[b"symbol"].decode()].append((entry[b"ts"].decode(), entry[b"close"].decode()))
    return dict(found)


def bars_in(cluster: Cluster, namespace: str) -> int:
    return sum(map(len, read(cluster, Topics(namespace).bars)))


@pytest.fixture
def topics(cluster: Cluster, namespace: str) -> Topics:
    return cluster.create(namespace, PARTITIONS)


@pytest.fixture
def program(
    valkey: str, cluster: Cluster, topics: Topics, tmp_path: Path
) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start `quartet bridge` as a process of its own; what a failed test leaves behind is killed."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "worker", "bridge", "--from", valkey, "--to", cluster.url, "--http-port", "0"]
        with (tmp_path / f"bridge-{len(started)}.log").open("wb") as log:
            child = subprocess.Popen(
                [*command, "--namespace", topics.namespace, *arguments],
                cwd=tmp_path, env=environment({"QUARTET_LEASE_S": str(LEASE_S)}), stdout=log, stderr=log,
            )  # fmt: skip
        started.append(child)
        return child

    yield start
    for number, child in enumerate(started):
        if child.poll() is None:
            child.kill()
            child.wait()
        print((tmp_path / f"bridge-{number}.log").read_text())


def test_kill_9_in_mid_run_loses_nothing_doubles_nothing_and_keeps_the_order(valkey, cluster, topics, program) -> None:
    entries = market(10, 900)
    key = Keys(topics.namespace).bars
    for number in range(3):
        feed(valkey, key, entries[3_000 * number : 3_000 * number + 1], 3_000 * number)
        before = bars_in(cluster, topics.namespace)
        child = program()
        wait_for(lambda before=before: bars_in(cluster, topics.namespace) > before)
        feed(valkey, key, entries[3_000 * number + 1 : 3_000 * (number + 1)], 3_000 * number + 1)
        wait_for(lambda before=before: bars_in(cluster, topics.namespace) > before + 1)
        child.kill()
        assert child.wait() == -signal.SIGKILL
    assert program("--until-idle", "0.1").wait(120) == 0
    assert carried(cluster, topics.namespace) == fed(entries)


@pytest.mark.parametrize("dies_at", [1, 2, 4])
def test_a_death_between_the_acknowledgement_and_the_commit_doubles_nothing(
    valkey, cluster, topics, monkeypatch, dies_at
) -> None:
    """The commit at the start is the first; the batches are made small, so that there are several."""
    monkeypatch.setattr("worker.bridge.READ_A_PARTITION", 16)
    entries = market(5, 60)
    feed(valkey, Keys(topics.namespace).bars, entries)
    dying = Here(valkey, cluster, topics.namespace, until_idle_s=0.0)
    dying.store.dies_at = dies_at
    with pytest.raises(Dead):
        dying.run()
    assert bars_in(cluster, topics.namespace) == 64 * (dies_at - 1)
    Here(valkey, cluster, topics.namespace, until_idle_s=0.0).run()
    assert carried(cluster, topics.namespace) == fed(entries)


def test_what_travels_together_is_packed_together_and_nothing_waits(valkey, cluster, topics) -> None:
    from tests.kafka.cluster import read_records

    entries = market(40, 20)
    feed(valkey, Keys(topics.namespace).bars, entries)
    Here(valkey, cluster, topics.namespace, until_idle_s=0.0).run()
    records = [len(values) for values in read_records(cluster, topics.bars)]
    bars = [len(objects) for objects in read(cluster, topics.bars)]
    assert sum(bars) == 800
    assert records == [-(-n // 256) for n in bars]


def test_a_broker_that_is_away_is_waited_for(valkey, cluster, topics) -> None:
    entries = market(5, 40)
    key = Keys(topics.namespace).bars
    with Here(valkey, cluster, topics.namespace) as here:
        feed(valkey, key, entries[:100])
        wait_for(lambda: here.count("carried") == 100)
        cluster.down()
        try:
            feed(valkey, key, entries[100:], 100)
            wait_for(lambda: not here.status.readiness().ready)
            assert here.status.conditions["broker"].detail
        finally:
            cluster.up()
        wait_for(lambda: here.count("carried") == 200)
        assert here.status.readiness().ready
    assert carried(cluster, topics.namespace) == fed(entries)


def test_a_server_that_dies_and_comes_back_is_waited_for(cluster, topics, tmp_path) -> None:
    entries = market(5, 40)
    key = Keys(topics.namespace).bars
    with (
        Server("valkey", tmp_path / "aof", fsync="always") as server,
        Here(server.url, cluster, topics.namespace) as here,
    ):
        feed(server.url, key, entries[:100])
        wait_for(lambda: here.count("carried") == 100)
        server.kill()
        wait_for(lambda: not here.status.conditions["server"].ok)
        server.start()
        feed(server.url, key, entries[100:], 100)
        wait_for(lambda: here.count("carried") == 200)
    assert carried(cluster, topics.namespace) == fed(entries)


def test_a_second_bridge_stands_by_and_takes_over_from_one_that_sleeps(valkey, cluster, topics, program) -> None:
    entries = market(4, 60)
    key = Keys(topics.namespace).bars
    first = program()
    feed(valkey, key, entries[:120])
    wait_for(lambda: bars_in(cluster, topics.namespace) == 120)
    os.kill(first.pid, signal.SIGSTOP)
    second = program()
    feed(valkey, key, entries[120:], 120)
    wait_for(lambda: bars_in(cluster, topics.namespace) == 240)
    os.kill(first.pid, signal.SIGCONT)
    assert first.wait(120) == 75
    second.terminate()
    assert second.wait(120) == 0
    assert carried(cluster, topics.namespace) == fed(entries)


def test_every_entry_is_carried_refused_or_counted_and_refusals_say_why(valkey, cluster, topics) -> None:
    good = market(3, 10)
    others = [{b"data": b"{"}, {b"hello": b"world"}, {**good[-1], b"closed": b"false"}]
    feed(valkey, Keys(topics.namespace).bars, [*good[:20], *others, *good[20:]])
    here = Here(valkey, cluster, topics.namespace, until_idle_s=0.0)
    here.run()
    counts = {outcome: here.count(outcome) for outcome in ("carried", "rejected", "unclosed", "lost")}
    assert counts == {"carried": 30, "rejected": 2, "unclosed": 1, "lost": 0}
    assert carried(cluster, topics.namespace) == fed(good)
    rejects = [one for objects in read(cluster, topics.rejected) for one in objects]
    assert [(r["reason"], r["stage"], r["source_key"]) for r in rejects] == [
        ("type", "bridge", Keys(topics.namespace).bars),
        ("missing_field", "bridge", Keys(topics.namespace).bars),
    ]
    assert (rejects[0]["in:data"], rejects[1]["in:hello"]) == ("{", "world")


def test_trimmed_input_is_refused_and_counted_where_that_is_accepted(valkey, cluster, topics) -> None:
    entries = market(3, 40)
    key = Keys(topics.namespace).bars
    feed(valkey, key, entries[:60])
    Here(valkey, cluster, topics.namespace, until_idle_s=0.0).run()
    feed(valkey, key, entries[60:], 60)
    with redis.Redis.from_url(valkey) as client:
        client.xtrim(key, maxlen=40, approximate=False)
    with pytest.raises(InputLostError, match="20 entries were trimmed"):
        Here(valkey, cluster, topics.namespace, until_idle_s=0.0).run()
    accepting = Here(valkey, cluster, topics.namespace, until_idle_s=0.0, accept_gap=True)
    accepting.run()
    assert (accepting.count("lost"), accepting.count("carried")) == (20, 40)
    assert carried(cluster, topics.namespace) == fed([*entries[:60], *entries[80:]])


def test_the_gap_that_is_accepted_is_that_of_the_start(valkey, cluster, topics, program, tmp_path) -> None:
    entries = market(3, 40)
    key = Keys(topics.namespace).bars
    feed(valkey, key, entries[:60])
    assert program("--until-idle", "0").wait(120) == 0
    feed(valkey, key, entries[60:80], 60)
    with redis.Redis.from_url(valkey) as client:
        client.xtrim(key, maxlen=5, approximate=False)
        life = program("--accept-gap")
        wait_for(lambda: bars_in(cluster, topics.namespace) == 65)
        with client.pipeline() as at_once:
            for fields in entries[80:100]:
                at_once.xadd(key, fields)
            at_once.xtrim(key, maxlen=5, approximate=False)
            at_once.execute()
    assert life.wait(120) == 1
    assert "15 entries were trimmed before they were read" in (tmp_path / "bridge-1.log").read_text().splitlines()[-1]
    assert carried(cluster, topics.namespace) == fed([*entries[:60], *entries[75:80]])


def test_topics_that_are_not_those_of_before_are_refused_until_it_is_told_to_begin_anew(
    valkey, cluster, topics
) -> None:
    entries = market(3, 20)
    feed(valkey, Keys(topics.namespace).bars, entries)
    Here(valkey, cluster, topics.namespace, until_idle_s=0.0).run()
    with mock_cluster() as other:
        other.create(topics.namespace, PARTITIONS)
        with pytest.raises(CheckFailed, match="ends at 0, it was written up to"):
            Here(valkey, other, topics.namespace).run()
        Here(valkey, other, topics.namespace, until_idle_s=0.0, from_start=True).run()
        assert carried(other, topics.namespace) == fed(entries)
    with mock_cluster() as wider:
        wider.create(topics.namespace, PARTITIONS + 1)
        with pytest.raises(CheckFailed, match="it has 5 partitions, 4 were written to"):
            Here(valkey, wider, topics.namespace).run()


def test_metrics_and_health_are_served(valkey, cluster, topics, tmp_path) -> None:
    feed(valkey, Keys(topics.namespace).bars, market(2, 10))
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "worker",
        "bridge",
        "--from",
        valkey,
        "--to",
        cluster.url,
        "--http-port",
        str(port),
    ]
    with subprocess.Popen(
        [*command, "--namespace", topics.namespace], cwd=tmp_path, env=environment(), stderr=subprocess.DEVNULL
    ) as child:
        try:
            wait_for(lambda: child.poll() is not None or CARRIED in _get(port, "/metrics"))
            metrics = _get(port, "/metrics")
            ready = _get(port, "/readyz")
        finally:
            child.terminate()
    assert CARRIED in metrics
    assert 'quartet_stream_lag{stream="bars"} 0.0' in metrics
    assert '"ready":true' in ready.replace(" ", "")
    assert child.returncode == 0


def _get(port: int, path: str) -> str:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=60) as answer:
            return str(answer.read().decode())
    except OSError:
        return ""


@pytest.mark.parametrize(
    ("to", "code", "words"),
    [
        ("127.0.0.1:9092", 2, "expected kafka://HOST:PORT"),
        ("kafka://127.0.0.1", 2, "expected kafka://HOST:PORT"),
        ("kafka://127.0.0.1:1", 3, "no Kafka broker answers at 127.0.0.1:1"),
    ],
)
def test_an_address_that_is_wrong_or_empty_is_said_in_one_line(valkey, tmp_path, to, code, words) -> None:
    done = quartet("bridge", "--redis", valkey, "--to", to, "--http-port", "0", cwd=tmp_path)
    assert done.returncode == code
    assert words in done.stderr.splitlines()[-1]


def test_a_topic_that_is_not_there_is_named_with_how_to_make_it(valkey, cluster, tmp_path) -> None:
    done = quartet(
        "bridge", "--from", valkey, "--to", cluster.url, "--namespace", "nowhere", "--http-port", "0", cwd=tmp_path
    )
    assert done.returncode == 3
    assert "topic nowhere.bars is not there" in done.stderr
    assert "kafka-topics.sh" in done.stderr
