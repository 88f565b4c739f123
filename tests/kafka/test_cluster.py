"""The ground under the Kafka tests: partitions as other clients choose them, and a broker that can go away."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiokafka.partitioner
import orjson
import pytest
import structlog
from aiokafka.errors import KafkaTimeoutError
from confluent_kafka import Producer
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.topics import murmur2, partition_of
from tests.helpers import LIMIT_S
from tests.kafka.cluster import Cluster, by_bar_id, produce, read, write
from worker.kafka import application
from worker.kafka.engine import Engine
from worker.kafka.orders import Given, answers
from worker.kafka.readback import keys_since
from worker.processes.base import Options
from worker.settings import Settings
from worker.sink import KafkaSink

SYMBOLS = st.from_regex(r"[A-Za-z0-9._:/-]{1,64}", fullmatch=True)


@settings(deadline=None)
@given(SYMBOLS, st.integers(1, 500))
def test_the_partition_is_that_of_the_clients_own_default_partitioner(symbol: str, partitions: int) -> None:
    key = symbol.encode()
    assert murmur2(key) == aiokafka.partitioner.murmur2(key)
    every = list(range(partitions))
    assert partition_of(symbol, partitions) == aiokafka.partitioner.DefaultPartitioner()(key, every, every)


def test_a_keyed_record_of_another_client_lands_in_the_same_partition(cluster: Cluster, namespace: str) -> None:
    topics = cluster.create(namespace, 7)
    producer = Producer({"bootstrap.servers": cluster.bootstrap, "partitioner": "murmur2"})
    symbols = [f"SYM{i}/USDT" for i in range(60)]
    for symbol in symbols:
        producer.produce(topics.bars, orjson.dumps({"symbol": symbol}), key=symbol)
    assert producer.flush(120) == 0
    found = {one["symbol"]: p for p, objects in enumerate(read(cluster, topics.bars)) for one in objects}
    assert found == {symbol: partition_of(symbol, 7) for symbol in symbols}
    assert set(found.values()) == set(range(7))


def test_what_is_produced_comes_back_in_order_and_without_doubles(cluster: Cluster, namespace: str) -> None:
    topics = cluster.create(namespace, 4)
    bars = [{"symbol": f"S{n}", "ts": 60_000 * t, "close": t + n / 10} for t in range(50) for n in range(9)]
    produce(cluster, topics.bars, bars, 4, pack=16)
    produce(cluster, topics.bars, bars[:20], 4)
    for partition, objects in enumerate(read(cluster, topics.bars)):
        ours = [bar for bar in bars if partition_of(bar["symbol"], 4) == partition]
        again = [bar for bar in bars[:20] if partition_of(bar["symbol"], 4) == partition]
        assert objects == ours + again
    assert list(by_bar_id(cluster, topics.bars).values()) == sorted(bars, key=lambda b: partition_of(b["symbol"], 4))


def test_a_partition_that_does_not_answer_an_order_is_named(cluster: Cluster, namespace: str) -> None:
    """Partition 1 answers this order, 2 another one, 0 none."""
    topics = cluster.create(namespace, 3)
    events = {1: {"kind": "agent_muted", "evidence": {"order": "0-1"}}, 2: {"evidence": {"order": "7-1"}}}
    write(cluster, topics.events, [(partition, orjson.dumps(event)) for partition, event in events.items()])
    sink = KafkaSink(cluster.bootstrap, (topics.events,), lambda _waited_s: None)
    sink.open()
    try:
        ids = dict.fromkeys(range(3), "0-1")
        order = Given(ids, answers(sink, topics.events, [0, 0, 0], ids, 0.01))
    finally:
        sink.close()
    assert order.silent == [0, 2]
    assert order.events == [{**events[1], "partition": 1}]


def test_what_was_written_outlives_a_broker_that_was_away(cluster: Cluster, namespace: str) -> None:
    topics = cluster.create(namespace, 2)
    write(cluster, topics.bars, [(1, b'{"n":1}')])
    cluster.down()
    cluster.up()
    write(cluster, topics.bars, [(1, b'{"n":2}')])
    assert read(cluster, topics.bars) == [[], [{"n": 1}, {"n": 2}]]


def test_a_write_without_an_answer_is_said_and_stands_once_when_it_is_read_back(
    cluster: Cluster, namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Faust's producer as the worker uses it; no answer comes before the loop turns."""
    topic = cluster.create(namespace, 2).bars

    async def lose_an_answer() -> tuple[list[bytes], int]:
        settings = Settings(namespace=namespace, state_dir=tmp_path)
        engine = Engine(settings, cluster.bootstrap, Options(), structlog.get_logger())
        engine.app.finalize()
        producer = engine.app.producer
        await producer.start()
        assert producer._ensure_producer()._txn_manager is not None, "not idempotent"
        sent = [await producer.send(topic, b"k%d" % n, b"v" if n else None, 1, None, None) for n in range(3)]
        assert [(await one).offset for one in sent] == [0, 1, 2]
        with monkeypatch.context() as patch:
            patch.setattr(application, "WRITE_TIMEOUT_S", 0)
            sent = [await producer.send(topic, b"late", b"v", 1, None, None) for _ in range(2)]
            with pytest.raises(KafkaTimeoutError, match="no answer to a write"):
                await sent[0]
        async with asyncio.timeout(LIMIT_S):
            await producer.flush()
        await producer.stop()
        return await keys_since(cluster.bootstrap, topic, 1, 2)

    assert asyncio.run(lose_an_answer()) == ([b"k2", b"late", b"late"], 5)
