"""The Faust application: what Faust is told, and where it calls back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any, Protocol

import faust
from aiokafka.errors import KafkaTimeoutError
from faust import Event
from faust.tables import Table
from faust.transport.drivers import aiokafka as driver
from faust.types import TP

from streams.topics import Topics
from worker.kafka.topics import STATE
from worker.settings import Settings

SESSION_S = 12.0
HEARTBEAT_S = 3.0
REBALANCE_S = 30.0
COMMIT_EVERY_S = 1.0
WRITE_TIMEOUT_S = 15.0
FETCH_BYTES = 4_194_304
MAX_REQUEST_BYTES = 1_048_576


class Engine(Protocol):
    """What the application calls."""

    async def prepare(self) -> None:
        """Before the first connection of the group."""
        ...

    async def close(self) -> None:
        """Before the consumer and the producer stop."""
        ...

    async def changelog(self, event: Any) -> None:
        """A record of the changelog, while the state is restored."""
        ...

    async def revoked(self) -> None:
        """Every partition is given up; some come back."""
        ...

    async def assigned(self, partitions: Iterable[TP]) -> None:
        """These are ours, of bars, of orders and of the changelog; they are not read yet."""
        ...

    async def recovered(self) -> None:
        """The partitions are known and their changelogs were read."""
        ...

    async def take(self, event: Any) -> None:
        """One record of bars or orders."""
        ...


class StateTable(Table):  # type: ignore[misc]
    """A table of which only the changelog is used: what is read from it goes to the engine, nothing is kept here."""

    def apply_changelog_batch(self, batch: Iterable[Any]) -> None:
        """The engine was given each event as it came."""


class Producer(driver.Producer):  # type: ignore[misc]
    """Idempotent: a record whose answer is lost with its connection is not written twice.

    Faust asks for that in transactions only. Such a record is tried until the broker has it, so its answer is waited
    for no longer than `WRITE_TIMEOUT_S`; then `KafkaTimeoutError`, and it may still be written.
    """

    def _settings_extra(self) -> Mapping[str, Any]:
        return {"enable_idempotence": True}

    async def on_stop(self) -> None:
        with contextlib.suppress(TimeoutError):  # a broker that is away takes nothing more
            await asyncio.wait_for(super().on_stop(), WRITE_TIMEOUT_S)

    async def send(self, *arguments: Any, **named: Any) -> Any:
        answer = asyncio.ensure_future(_in_time(await super().send(*arguments, **named)))
        answer.add_done_callback(lambda one: one.cancelled() or one.exception())  # of several, one is waited for
        return answer


async def _in_time(pending: Any) -> Any:
    try:
        async with asyncio.timeout(WRITE_TIMEOUT_S):
            return await asyncio.shield(pending)
    except TimeoutError as error:
        raise KafkaTimeoutError(f"no answer to a write within {WRITE_TIMEOUT_S:g} s") from error


class Transport(driver.Transport):  # type: ignore[misc]
    """Faust's, with this producer."""

    Producer = Producer


class Application(faust.App):  # type: ignore[misc]
    """Faust with an engine behind it."""

    engine: Engine

    def _new_transport(self) -> Transport:
        return Transport(self.conf.broker_consumer, self)

    async def on_first_start(self) -> None:
        await self.engine.prepare()
        await super().on_first_start()

    async def on_stop(self) -> None:
        await self.engine.close()
        await super().on_stop()


def make_app(settings: Settings, bootstrap: str, engine: Engine) -> Application:
    """The application of a namespace; its consumer group has the name of the namespace."""
    app = Application(
        settings.namespace,
        broker=[f"kafka://{host}" for host in bootstrap.split(",")],
        store="memory://",
        datadir=str(settings.state_dir / "kafka"),
        Table=StateTable,
        web_enabled=False,
        topic_disable_leader=True,
        topic_allow_declare=False,
        autodiscover=False,
        stream_wait_empty=False,
        table_standby_replicas=0,
        worker_redirect_stdouts=False,
        consumer_auto_offset_reset="earliest",
        consumer_max_fetch_size=FETCH_BYTES,
        broker_session_timeout=SESSION_S,
        broker_heartbeat_interval=HEARTBEAT_S,
        broker_rebalance_timeout=REBALANCE_S,
        broker_commit_interval=COMMIT_EVERY_S,
        producer_acks=-1,
        producer_linger=0,
        producer_max_request_size=MAX_REQUEST_BYTES,
        producer_request_timeout=WRITE_TIMEOUT_S,
    )
    app.engine = engine
    topics = Topics(settings.namespace)
    raw = {"key_type": bytes, "value_type": bytes, "key_serializer": "raw", "value_serializer": "raw"}
    inputs = app.topic(topics.bars, topics.control, allow_empty=True, **raw)
    app.Table(STATE, on_changelog_event=engine.changelog, key_type=bytes, value_type=bytes)
    app.agent(inputs, name="chain")(_consumer(engine))
    app.on_partitions_revoked.connect(_on_revoked(engine), weak=False)
    app.on_partitions_assigned.connect(_on_assigned(engine), weak=False)
    app.on_rebalance_complete.connect(_on_recovered(engine), weak=False)
    return app


def _consumer(engine: Engine) -> Any:
    async def chain(stream: Any) -> AsyncIterator[None]:
        """Records as they come; each is acknowledged once all of it is committed."""
        event: Event
        async for event in stream.noack().events():
            await engine.take(event)
            yield

    return chain


def _on_revoked(engine: Engine) -> Any:
    async def revoked(_app: Any, _partitions: Any, **_: Any) -> None:
        await engine.revoked()

    return revoked


def _on_assigned(engine: Engine) -> Any:
    async def assigned(_app: Any, partitions: Any, **_: Any) -> None:
        await engine.assigned(partitions)

    return assigned


def _on_recovered(engine: Engine) -> Any:
    async def recovered(_app: Any, **_: Any) -> None:
        await engine.recovered()

    return recovered
