"""A broker for tests, topics in it, and bars in and objects out of them.

The broker is librdkafka's mock cluster in a process of its own, or the one that `QUARTET_TEST_KAFKA` names
(`HOST:PORT`; topics are then made there and stay).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from streams import records
from streams.topics import Topics, partition_of

TIMEOUT_S = 120.0
REAL = "QUARTET_TEST_KAFKA"


@dataclass(frozen=True)
class Cluster:
    """A broker at `bootstrap`, `host:port`. `process` is the mock's; None for a real broker."""

    bootstrap: str
    process: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        return f"kafka://{self.bootstrap}"

    def create(self, namespace: str, partitions: int = 4, more: Sequence[str] = ()) -> Topics:
        """Every topic of `namespace` and those named in `more`, with `partitions` each."""
        topics = Topics(namespace)
        for name in (*topics.all(), *more):
            self.create_topic(name, partitions)
        return topics

    def create_topic(self, name: str, partitions: int) -> None:
        if self.process is not None:
            self._tell(f"topic {name} {partitions}")
            return
        admin = AdminClient({"bootstrap.servers": self.bootstrap})
        admin.create_topics([NewTopic(name, partitions, 1)])[name].result(TIMEOUT_S)

    def down(self) -> None:
        """Drop every connection and refuse new ones, until `up`. What was written stays."""
        self._tell("down")

    def up(self) -> None:
        self._tell("up")

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Answer nothing and close nothing for as long as this block lasts."""
        if self.process is None:
            pytest.skip("a real broker is not stopped by a test")
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def _tell(self, order: str) -> None:
        if self.process is None:
            pytest.skip("a real broker is neither stopped nor started by a test")
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(order + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().strip()
        assert answer == "ok", f"{order}: {answer or 'the mock cluster has ended'}"


@contextmanager
def mock_cluster() -> Iterator[Cluster]:
    """librdkafka's mock cluster; it ends with this block, or with this process however that ends."""
    command = [sys.executable, str(Path(__file__).with_name("mock.py"))]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        bootstrap = process.stdout.readline().strip()
        assert bootstrap, "the mock cluster did not start; its error is above"
        yield Cluster(bootstrap, process)
    finally:
        process.kill()
        process.wait()


@contextmanager
def any_cluster() -> Iterator[Cluster]:
    """The broker that `QUARTET_TEST_KAFKA` names, else a mock cluster."""
    named = os.environ.get(REAL)
    if named:
        yield Cluster(named)
    else:
        with mock_cluster() as cluster:
            yield cluster


def produce(cluster: Cluster, topic: str, bars: Iterable[Mapping[str, Any]], partitions: int, pack: int = 1) -> None:
    """Write `bars` in order, each to the partition of its symbol, up to `pack` of one partition in a record."""
    by_partition: dict[int, list[bytes]] = defaultdict(list)
    for bar in bars:
        by_partition[partition_of(str(bar["symbol"]), partitions)].append(orjson.dumps(bar))
    values = {p: records.pack(objects, pack) for p, objects in by_partition.items()}
    write(cluster, topic, ((p, value) for p, all_of_it in values.items() for value in all_of_it))


def write(cluster: Cluster, topic: str, values: Iterable[tuple[int, bytes]]) -> None:
    """Write record values as they are, each to the partition that it is paired with."""
    producer = Producer({"bootstrap.servers": cluster.bootstrap, "acks": "all", "linger.ms": 2})
    failed: list[str] = []
    for partition, value in values:
        producer.produce(topic, value, partition=partition, callback=lambda e, _: failed.append(str(e)) if e else None)
        producer.poll(0)
    assert producer.flush(TIMEOUT_S) == 0
    assert not failed, failed[:3]


def read_records(cluster: Cluster, topic: str) -> list[list[bytes]]:
    """The values in each partition of `topic`, from its first record to its present end."""
    reader = Consumer(
        {"bootstrap.servers": cluster.bootstrap, "group.id": "tests", "enable.auto.commit": False}
        | {"auto.offset.reset": "earliest", "fetch.wait.max.ms": 5}
    )
    try:
        places = [TopicPartition(topic, p) for p in reader.list_topics(topic, TIMEOUT_S).topics[topic].partitions]
        bounds = [reader.get_watermark_offsets(place, TIMEOUT_S) for place in places]
        behind = {place.partition: end for place, (first, end) in zip(places, bounds, strict=True) if first < end}
        values: list[list[bytes]] = [[] for _ in places]
        reader.assign([TopicPartition(topic, p, bounds[p][0]) for p in behind])
        while behind:
            message = reader.poll(TIMEOUT_S)
            assert message is not None, f"{topic}: nothing more came, though these ends are not reached: {behind}"
            assert message.error() is None, message.error()
            partition, offset = message.partition(), message.offset()
            if offset < behind.get(partition, 0):
                values[partition].append(message.value())
            if offset + 1 >= behind.get(partition, offset + 2):
                del behind[partition]
        return values
    finally:
        reader.close()


def read(cluster: Cluster, topic: str) -> list[list[Any]]:
    """The decoded objects in each partition of `topic`, records unpacked, in order."""
    return [
        [orjson.loads(one) for value in values for one in records.unpack(value)]
        for values in read_records(cluster, topic)
    ]


def by_bar_id(cluster: Cluster, topic: str) -> dict[str, Any]:
    """The objects of `topic` by `bar_id`, doubles removed; doubles that differ fail the test."""
    found: dict[str, Any] = {}
    for one in (one for objects in read(cluster, topic) for one in objects):
        name = one.get("bar_id") or f"{one['symbol']}|{one.get('interval', '1m')}|{one['ts']}"
        assert found.setdefault(name, one) == one, f"{name} stands twice in {topic}, and differs"
    return found
