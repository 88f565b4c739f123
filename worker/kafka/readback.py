"""What came to a partition since an offset, read by a consumer of its own, outside the group."""

from __future__ import annotations

import asyncio
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaTimeoutError

ANSWER_S = 15.0
_POLL_MS = 200


async def keys_since(bootstrap: str, topic: str, partition: int, start: int) -> tuple[list[bytes], int]:
    """The keys of the records with a value from offset `start` to the end, in their order, and that end.

    Raises `KafkaError` where the broker does not tell within `ANSWER_S`.
    """
    at, keys = TopicPartition(topic, partition), []
    consumer: Any = AIOKafkaConsumer(bootstrap_servers=bootstrap, auto_offset_reset="earliest")
    try:
        async with asyncio.timeout(ANSWER_S):
            await consumer.start()
            consumer.assign([at])
            end: int = (await consumer.end_offsets([at]))[at]
            consumer.seek(at, start)
            while await consumer.position(at) < end:
                found = (await consumer.getmany(at, timeout_ms=_POLL_MS)).get(at, [])
                keys += [one.key for one in found if one.value is not None and one.offset < end]
    except TimeoutError as error:
        raise KafkaTimeoutError(f"{topic} {partition} could not be read back within {ANSWER_S:g} s") from error
    finally:
        await consumer.stop()
    return keys, end
