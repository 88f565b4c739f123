"""One order to every worker of a group: written to every partition, and answered by each."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streams.codec import from_json
from streams.records import unpack
from streams.topics import Topics
from worker.control import Order
from worker.errors import Unavailable
from worker.sink import KafkaSink, Record, SinkBrokenError, bootstrap_of

POLL_S = 0.2
WRITE_S = 40.0
"""Longer than the sink waits for the answer to a question."""


@dataclass(frozen=True)
class Given:
    """An order that was written: the ID it got in each partition, and the events that answer it there."""

    ids: Mapping[int, str]
    answers: Mapping[int, Sequence[dict[str, Any]]]

    @property
    def shown(self) -> str:
        return ", ".join(f"{partition}/{entry_id}" for partition, entry_id in self.ids.items())

    @property
    def events(self) -> list[dict[str, Any]]:
        """Every answer, partition by partition."""
        return [event for partition in sorted(self.answers) for event in self.answers[partition]]

    @property
    def silent(self) -> list[int]:
        """The partitions that did not answer."""
        return sorted(self.ids.keys() - self.answers.keys())


def give(url: str, namespace: str, order: Order, wait_s: float) -> Given:
    """Write the order to every partition, and wait up to `wait_s` until each has answered.

    Raises `Unavailable` where no broker answers, or where it goes away or says nothing while the order is written.
    """
    topics = Topics(namespace)
    sink = KafkaSink(bootstrap_of(url), (topics.control, topics.events), _not_for_ever)
    sink.open()
    try:
        after = sink.ends(topics.events)
        ends = sink.send([Record(topics.control, p, order.encode()) for p in range(sink.partitions[topics.control])])
        ids = {partition: f"{end - 1}-1" for (_, partition), end in ends.items()}
        return Given(ids, answers(sink, topics.events, after, ids, wait_s))
    except SinkBrokenError as error:
        raise Unavailable(
            f"the broker at {sink.bootstrap} went away while the order was written ({error}): some partitions may have "
            "it; give it again once the broker answers"
        ) from None
    finally:
        sink.close()


def _not_for_ever(waited_s: float) -> None:
    if waited_s > WRITE_S:
        raise Unavailable(
            f"the broker did not answer for {waited_s:.0f} s while the order was written: some partitions may have it; "
            "give it again once the broker answers"
        )


def answers(
    sink: KafkaSink, topic: str, after: list[int], ids: Mapping[int, str], wait_s: float
) -> dict[int, list[dict[str, Any]]]:
    """The events of each partition that name the order's ID there, as soon as every partition has one."""
    deadline = time.monotonic() + wait_s
    found: dict[int, list[dict[str, Any]]] = {}
    while wait_s and len(found) < len(ids) and time.monotonic() < deadline:
        values = sink.tail(topic, after, sink.ends(topic))
        for partition, entry_id in ids.items():
            events = [from_json(one) for value in values[partition] for one in unpack(value)]
            named = [{**e, "partition": partition} for e in events if e["evidence"].get("order") == entry_id]
            if named:
                found[partition] = named
        time.sleep(POLL_S)
    return found
