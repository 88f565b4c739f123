"""What a broker refuses, told from what it cannot do just now: a refused record is refused again."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from typing import Any

from aiokafka.errors import (
    ClusterAuthorizationFailedError,
    InvalidTopicError,
    KafkaError,
    MessageSizeTooLargeError,
    RecordListTooLargeError,
    TopicAuthorizationFailedError,
)
from faust.exceptions import FaustError

from worker.errors import CheckFailed
from worker.kafka.application import MAX_REQUEST_BYTES

_LARGER = f"let max.message.bytes of the topic be {MAX_REQUEST_BYTES} or more, or set a smaller batch_size"
_REMEDIES: Mapping[type[KafkaError], str] = {
    MessageSizeTooLargeError: _LARGER,
    RecordListTooLargeError: _LARGER,
    TopicAuthorizationFailedError: "allow this worker to write to it",
    ClusterAuthorizationFailedError: "allow this worker to write to the cluster",
    InvalidTopicError: "set another namespace",
}


async def accepted(topic: str, call: Awaitable[Any]) -> Any:
    """What `call`, a write to `topic`, gives. Raises `CheckFailed` where it was refused for good."""
    try:
        return await call
    except (KafkaError, FaustError) as error:
        cause = error.__cause__ if isinstance(error, FaustError) else error
        for kind, remedy in _REMEDIES.items():
            if isinstance(cause, kind):
                raise CheckFailed(f"the broker refuses a record for topic {topic} ({cause!r}): {remedy}") from error
        raise
