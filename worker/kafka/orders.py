"""One order to every worker of a group: written to every partition, and answered by each."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from streams.codec import from_json
from streams.records import unpack
from streams.topics import Topics
from worker.control import Order
from worker.sink import KafkaSink, Record, bootstrap_of

POLL_S = 0.2


def give(url: str, namespace: str, order: Order, wait_s: float) -> tuple[str, list[dict[str, Any]]]:
    """Write the order; the IDs it got, and the events that answer it within `wait_s`, one or more a partition.

    Raises `Unavailable` where no broker answers, `SinkBrokenError` where it goes away meanwhile.
    """
    topics = Topics(namespace)
    sink = KafkaSink(bootstrap_of(url), (topics.control, topics.events), lambda _waited: None)
    sink.open()
    try:
        after = sink.ends(topics.events)
        ends = sink.send([Record(topics.control, p, order.encode()) for p in range(sink.partitions[topics.control])])
        ids = {partition: f"{end - 1}-1" for (_, partition), end in ends.items()}
        found = _answers(sink, topics.events, after, ids, wait_s)
    finally:
        sink.close()
    return ", ".join(f"{partition}/{entry_id}" for partition, entry_id in ids.items()), found


def _answers(
    sink: KafkaSink, topic: str, after: list[int], ids: Mapping[int, str], wait_s: float
) -> list[dict[str, Any]]:
    """The events of each partition that name the order's ID there, as soon as every partition has one."""
    deadline = time.monotonic() + wait_s
    found: dict[int, list[dict[str, Any]]] = {}
    while wait_s and len(found) < len(ids) and time.monotonic() < deadline:
        values = sink.tail(topic, after, sink.ends(topic))
        for partition, entry_id in ids.items():
            events = [from_json(one) for value in values[partition] for one in unpack(value)]
            answers = [{**e, "partition": partition} for e in events if e["evidence"].get("order") == entry_id]
            if answers:
                found[partition] = answers
        time.sleep(POLL_S)
    return [event for partition in sorted(found) for event in found[partition]]
