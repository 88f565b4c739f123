"""The Kafka side of the bridge: records out and acknowledged, and the end of a topic read back.

aiokafka lives on an event loop in a thread of its own; what is called here waits for it. The producer is
idempotent and asks for the acknowledgement of every replica: a connection that breaks, or a broker that is
away, is waited out, and what was sent twice meanwhile stands in the topic once.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import threading
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from streams.records import MAX_BYTES
from worker.errors import CheckFailed, Unavailable

try:
    from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
    from aiokafka.errors import KafkaError, MessageSizeTooLargeError
except ModuleNotFoundError:
    raise Unavailable("Kafka needs the module aiokafka: install it with pip install 'quartet-worker[kafka]'") from None

POLL_S = 0.1
CALL_LIMIT_S = 30.0
CLOSING_S = 2.0
ENVELOPE_BYTES = 100_000


class SinkBrokenError(Exception):
    """The producer is of no further use; what became of its records is to be read from the topic."""


@dataclass(frozen=True, slots=True)
class Record:
    """One record value and where it goes."""

    topic: str
    partition: int
    value: bytes


def bootstrap_of(broker: str) -> str:
    """`HOST:PORT,...` of the setting `broker`, whose form the settings judge."""
    return broker.removeprefix("kafka://")


class KafkaSink:
    """A producer for some topics of one cluster. Needs `open` before anything else, again after `SinkBrokenError`.

    `waiting` is called again and again while an answer is awaited, with the seconds waited so far; what it raises
    ends the wait.
    """

    def __init__(self, bootstrap: str, topics: Sequence[str], waiting: Callable[[float], None]) -> None:
        logging.getLogger("aiokafka").addHandler(logging.NullHandler())  # what matters is told by the loop, as one line
        self.bootstrap = bootstrap
        self.topics = tuple(topics)
        self.partitions: dict[str, int] = {}
        self._waiting = waiting
        self._producer: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def open(self) -> None:
        """Connect and look at the topics. Raises `Unavailable`."""
        self.close()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=_turn, args=(self._loop,), name="kafka", daemon=True).start()
        try:
            self._call(self._open(), CALL_LIMIT_S)
        except (KafkaError, OSError, TimeoutError) as error:
            raise Unavailable(
                f"no Kafka broker answers at {self.bootstrap} ({_text(error)}); check the address and that it runs"
            ) from None

    def ends(self, topic: str) -> list[int]:
        """The offset that the next record of each partition will get. Raises `Unavailable`."""
        return self._asking(self._ends(topic))  # type: ignore[no-any-return]

    def tail(self, topic: str, offsets: Sequence[int], ends: Sequence[int]) -> list[list[bytes]]:
        """The record values of each partition from `offsets` up to `ends`. Raises `Unavailable`."""
        return self._asking(self._tail(topic, offsets, ends))  # type: ignore[no-any-return]

    def send(self, records: Sequence[Record]) -> dict[tuple[str, int], int]:
        """Write `records`, in order within a partition; the offset after the last one of each partition.

        Waits while no broker answers. Raises `SinkBrokenError`, or `CheckFailed` where the broker refuses a record.
        """
        try:
            return self._call(self._send(records))  # type: ignore[no-any-return]
        except MessageSizeTooLargeError as error:
            raise CheckFailed(
                f"the broker at {self.bootstrap} refuses records of {MAX_BYTES} bytes ({_text(error)}): let "
                "max.message.bytes of the topics be its default of 1 MiB, or more"
            ) from None
        except (KafkaError, OSError) as error:
            raise SinkBrokenError(_text(error)) from error

    def close(self) -> None:
        """End every connection; what is not acknowledged by then is not written afterwards."""
        loop, self._loop = self._loop, None
        if loop is not None:
            with contextlib.suppress(concurrent.futures.TimeoutError):
                asyncio.run_coroutine_threadsafe(self._end(), loop).result(2 * CLOSING_S)
            loop.call_soon_threadsafe(loop.stop)

    # ------------------------------------------------------------------ on the loop

    async def _open(self) -> None:
        async with self._reader() as reader:
            known = await reader.topics()
        for topic in self.topics:
            if topic not in known:
                raise Unavailable(
                    f"topic {topic} is not there at {self.bootstrap}; make it, with the partitions that you want and "
                    "as many in every topic of the namespace: kafka-topics.sh --bootstrap-server "
                    f"{self.bootstrap} --create --topic {topic} --partitions 12"
                )
        self._producer = AIOKafkaProducer(
            bootstrap_servers=self.bootstrap,
            acks="all",
            enable_idempotence=True,
            max_request_size=MAX_BYTES + ENVELOPE_BYTES,
            max_batch_size=MAX_BYTES,
        )
        await self._producer.start()
        self.partitions = {topic: len(await self._producer.partitions_for(topic)) for topic in self.topics}

    @contextlib.asynccontextmanager
    async def _reader(self) -> Any:
        reader = AIOKafkaConsumer(
            bootstrap_servers=self.bootstrap, enable_auto_commit=False, auto_offset_reset="earliest"
        )
        try:
            await reader.start()
            yield reader
        finally:
            await reader.stop()

    async def _ends(self, topic: str) -> list[int]:
        places = [TopicPartition(topic, partition) for partition in range(self.partitions[topic])]
        async with self._reader() as reader:
            found = await reader.end_offsets(places)
        return [found[place] for place in places]

    async def _tail(self, topic: str, offsets: Sequence[int], ends: Sequence[int]) -> list[list[bytes]]:
        values: list[list[bytes]] = [[] for _ in offsets]
        behind = {TopicPartition(topic, p): end for p, end in enumerate(ends) if offsets[p] < end}
        if not behind:
            return values
        async with self._reader() as reader:
            reader.assign(list(behind))
            for place in behind:
                reader.seek(place, offsets[place.partition])
            while behind:
                for place, messages in (await reader.getmany(timeout_ms=200)).items():
                    ours = (m.value for m in messages if m.offset < ends[place.partition])
                    values[place.partition] += [value for value in ours if value is not None]
                behind = {place: end for place, end in behind.items() if await reader.position(place) < end}
                reader.pause(*(place for place in reader.assignment() if place not in behind))
        return values

    async def _send(self, records: Sequence[Record]) -> dict[tuple[str, int], int]:
        futures = [await self._producer.send(r.topic, r.value, partition=r.partition) for r in records]
        await asyncio.wait(futures)  # all of them, also where one fails
        done = [future.result() for future in futures]
        return {(meta.topic, meta.partition): meta.offset + 1 for meta in done}

    async def _end(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            with contextlib.suppress(TimeoutError, KafkaError, OSError):
                await asyncio.wait_for(producer.stop(), CLOSING_S)
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    # ------------------------------------------------------------------ from outside

    def _asking(self, question: Coroutine[Any, Any, Any]) -> Any:
        try:
            return self._call(question, CALL_LIMIT_S)
        except (KafkaError, OSError, TimeoutError) as error:
            raise Unavailable(f"the Kafka broker at {self.bootstrap} does not answer: {_text(error)}") from None

    def _call(self, question: Coroutine[Any, Any, Any], limit_s: float | None = None) -> Any:
        """The answer of the loop; `waiting` is told meanwhile."""
        if self._loop is None:
            raise RuntimeError("open comes first")
        future = asyncio.run_coroutine_threadsafe(asyncio.wait_for(question, limit_s), self._loop)
        waited = 0.0
        while True:
            try:
                return future.result(POLL_S)
            except concurrent.futures.TimeoutError:
                if future.done():
                    raise
                waited += POLL_S
                try:
                    self._waiting(waited)
                except BaseException:
                    future.cancel()
                    raise


def _turn(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


def _text(error: BaseException) -> str:
    return str(error) or type(error).__name__
