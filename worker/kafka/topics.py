"""What has to be on the broker before a worker joins: every topic, with equally many partitions."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaError

from streams.topics import Topics
from worker.errors import CheckFailed, Unavailable

ANSWER_S = 10.0
STATE = "state"
"""The name of the table; its changelog is `<namespace>-state-changelog`."""

_COMPACTED = {"cleanup.policy": "compact", "segment.bytes": "16777216", "min.cleanable.dirty.ratio": "0.1"}


def changelog_of(namespace: str) -> str:
    """The topic that keeps the state, as Faust calls it."""
    return f"{namespace}-{STATE}-changelog"


async def check_topics(bootstrap: str, namespace: str, agents: Sequence[str]) -> int:
    """How many partitions the topics of `namespace` have, after making those that are missing.

    Raises `Unavailable` where no broker answers, `CheckFailed` where the topic of bars is not there or a topic
    has another number of partitions.
    """
    topics, changelog = Topics(namespace), changelog_of(namespace)
    wanted = [*topics.all(agents), changelog]
    found = await _partitions(bootstrap, wanted)
    if not found.get(topics.bars):
        raise CheckFailed(
            f"topic {topics.bars} is not on {bootstrap}: create it with as many partitions as workers may ever share "
            f"it, as `kafka-topics.sh --bootstrap-server {bootstrap} --create --topic {topics.bars} --partitions 8`"
        )
    partitions = found[topics.bars]
    missing = [name for name in wanted if not found.get(name)]
    if missing:
        await _create(bootstrap, missing, partitions, changelog)
        found = await _partitions(bootstrap, wanted)
    other = {name: found.get(name, 0) for name in wanted if found.get(name) != partitions}
    if other:
        shown = ", ".join(f"{name} has {n}" for name, n in other.items())
        raise CheckFailed(
            f"every topic of {namespace} must have as many partitions as {topics.bars}, {partitions}; {shown}: delete "
            "what is empty so that it is made again, or use another --namespace"
        )
    return partitions


async def _partitions(bootstrap: str, names: Sequence[str]) -> dict[str, int]:
    """The number of partitions of each topic that exists."""
    admin: Any = AIOKafkaAdminClient(bootstrap_servers=bootstrap, request_timeout_ms=round(ANSWER_S * 1000))
    try:
        async with asyncio.timeout(ANSWER_S):
            await admin.start()
            known = set(await admin.list_topics())
            told = await admin.describe_topics([name for name in names if name in known])
        return {one["topic"]: len(one["partitions"]) for one in told}
    except (KafkaError, OSError, TimeoutError) as error:
        raise Unavailable(
            f"no Kafka broker answers at {bootstrap} ({type(error).__name__}: {error}); check --broker and that the "
            "broker runs"
        ) from error
    finally:
        await admin.close()


async def _create(bootstrap: str, names: Sequence[str], partitions: int, changelog: str) -> None:
    admin: Any = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    configs: Mapping[str, Mapping[str, str]] = {changelog: _COMPACTED}
    try:
        await admin.start()
        new = [NewTopic(name, partitions, -1, topic_configs=dict(configs.get(name, {}))) for name in names]
        await admin.create_topics(new)
    except (KafkaError, OSError) as error:
        raise CheckFailed(
            f"the topics {', '.join(names)} are missing and cannot be created ({type(error).__name__}: {error}): "
            f"create them with {partitions} partitions each, {changelog} with cleanup.policy=compact"
        ) from error
    finally:
        await admin.close()
