"""The Kafka engine: Faust brings records and partitions, the workers of the partitions do the rest."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any

from aiokafka.errors import KafkaError
from faust.exceptions import FaustError
from faust.types import TP
from prometheus_client import CollectorRegistry
from structlog.typing import FilteringBoundLogger

from streams.codec import StateCorruptError
from streams.keys import Keys
from streams.store import FencedError, Position, StoreUnavailableError
from streams.topics import Topics
from worker.assembly import load_agents, load_options, use_one_thread_a_model
from worker.http import Condition, HttpServer, Probes
from worker.kafka.application import HEARTBEAT_S, SESSION_S, Application, make_app
from worker.kafka.health import Health
from worker.kafka.ledger import Ledger, Record
from worker.kafka.levels import Levels
from worker.kafka.outgoing import Outgoing
from worker.kafka.partition import Partition, Shared, explained, statuses
from worker.kafka.readback import keys_since
from worker.kafka.refusals import accepted
from worker.kafka.sequence import Sequencer, Verdict
from worker.kafka.shelf import SharedShelf
from worker.kafka.store import Bounds, PartitionStore, offset_of
from worker.kafka.topics import changelog_of, check_topics
from worker.kafka.watchdog import Watchdog
from worker.metrics import Metrics
from worker.notify import Notifier
from worker.processes.base import Options
from worker.settings import Settings

TICK_S = 0.1
FROZEN_S = SESSION_S - HEARTBEAT_S
"""A process that stood still for so long may be out of the group: its last heartbeat may be one interval older."""
MOST_WAITING = 4096
"""Entries of one partition that wait for its worker; the stream is read on below that."""
PAUSE_S = 0.005
LOOK_AGAIN_S = 1.0
ANSWER_S = 10.0
CLOSING_S = 10.0


class Engine:
    """One worker process of the group: `make_app` calls its coroutines, `run` is the whole of `quartet run`."""

    def __init__(
        self,
        settings: Settings,
        bootstrap: str,
        options: Options,
        log: FilteringBoundLogger,
    ) -> None:
        self.settings = settings
        self.options = options
        self.log = log
        self.failure: BaseException | None = None
        self.partitions: dict[int, Partition] = {}
        self.app: Application = make_app(settings, bootstrap, self)
        self._bootstrap = bootstrap
        self._topics = Topics(settings.namespace)
        self._changelog = changelog_of(settings.namespace)
        keys = Keys(settings.namespace)
        self._keys = {self._topics.bars: keys.bars, self._topics.control: keys.control}
        self._books: dict[int, dict[bytes, bytes]] = defaultdict(dict)
        self._logged_ends: dict[int, int] = {}
        self._bounds: dict[TP, Bounds] = {}
        self._sequencer = Sequencer({})
        self._untouched: dict[TP, int] = {}
        self._begun: set[int] = set()
        self._is_assigned = False
        self._looked_at = 0.0
        self._ended = asyncio.Event()
        self._runs = False
        self._crash: asyncio.Future[None] | None = None
        self._ticked = time.monotonic()
        self._fenced = ""
        self._recovering_since: float | None = None
        self._watchdog = Watchdog(self._stalled_s, log)
        self._notifier = Notifier.from_environment()
        self.health = Health(settings.agents)
        self._registry = CollectorRegistry()
        self._metrics = Metrics(self._registry, settings.agents)
        self._metrics.declare_kafka()
        self._shared = Shared(
            settings,
            SharedShelf(settings.models, load_options(settings)),
            Levels(self._metrics, settings.agents),
            log,
        )
        self._http: HttpServer | None = None
        self._ticker: asyncio.Task[None] | None = None
        self._looker: asyncio.Task[None] | None = None
        self._joins = False

    # ------------------------------------------------------------------ the process

    async def run(self) -> None:
        """Serve until stopped, idle or failed. Raises what ended it."""
        self._runs = True
        starting = asyncio.ensure_future(self._start())
        try:
            ended = asyncio.ensure_future(self._ended.wait())
            await asyncio.wait({starting, ended}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
            await self._ended.wait()
        finally:
            starting.cancel()
            await self.close()
            await _at_most(self.app.stop())
            self._shut()
        if self.failure is not None:
            raise self.failure

    async def _start(self) -> None:
        self.app.finalize()
        await self.app.start()

    async def prepare(self) -> None:
        """Topics, models and the port, before this process asks for partitions."""
        self._ticker, self._looker = asyncio.ensure_future(self._tick()), asyncio.ensure_future(self._look())
        # Faust keeps a folder there, and makes that one alone.
        (self.settings.state_dir / "kafka").mkdir(parents=True, exist_ok=True)
        number = await check_topics(self._bootstrap, self.settings.namespace, self.settings.agents)
        self.log.info("broker", url=f"kafka://{self._bootstrap}", namespace=self.settings.namespace, partitions=number)
        probes = Probes(self._registry, self.health.last_beat, self.health.readiness)
        self._http = HttpServer(probes, self.settings.http_host, self.settings.http_port)
        self.log.info("metrics and health", url=self._http.url)
        use_one_thread_a_model()
        await asyncio.to_thread(load_agents, self.settings, {}, self._shared.shelf, self.log)
        self._ticked = self._recovering_since = time.monotonic()
        self._joins = True
        self._watchdog.start()

    async def close(self) -> None:
        """Let every partition finish its batch, and tell the group how far they are."""
        self._notifier.stopping()
        self._ended.set()
        if self._looker is not None:
            self._looker.cancel()
        await self._give_up()
        if not self._runs:
            self._shut()

    def _shut(self) -> None:
        self._watchdog.stop()
        if self._ticker is not None:
            self._ticker.cancel()
        if self._http is not None:
            self._http.close()

    def _fail(self, error: BaseException) -> None:
        """The first failure ends the process; from any thread."""
        self.app.loop.call_soon_threadsafe(self._end, error)

    def _end(self, error: BaseException | None) -> None:
        if error is not None and self.failure is None:
            self.failure = error
            if not self._runs:  # Faust's own command does: its worker ends with the application
                self._crash = asyncio.ensure_future(self.app.crash(error))
        self._ended.set()

    async def _tick(self) -> None:
        """The loop turns: notice a freeze, a stop, a crash. Waits for nobody: what ticks is what is alive."""
        while True:
            self._note_freeze()
            self._ticked = time.monotonic()
            self.health.beat()
            self._notifier.alive()
            if self.options.stop.is_set() and not self._ended.is_set():
                self.log.info("stopping: the batches in hand are committed")
                self._ended.set()
            if self.options.reload.is_set():
                self.options.reload.clear()
                for partition in self.partitions.values():
                    partition.reload()
            if self.app.crash_reason is not None:
                self._end(self.app.crash_reason)
            await asyncio.sleep(TICK_S)

    async def _look(self) -> None:
        """Ask the broker what only it knows: whether all is read, and whether Faust passed something over."""
        while not self._ended.is_set():
            try:
                async with asyncio.timeout(ANSWER_S):
                    if await self._is_idle():
                        self._ended.set()
                    if self._untouched and self._recovering_since is None:
                        await self._go_back()
            except (KafkaError, FaustError, TimeoutError) as error:
                self.log.warning("the broker does not say how far the input goes; asking again", detail=repr(error))
                await asyncio.sleep(LOOK_AGAIN_S)
            except Exception as error:  # noqa: BLE001  a task's errors are lost otherwise
                self._end(error)
            await asyncio.sleep(TICK_S)

    async def _is_idle(self) -> bool:
        """Whether every partition has waited in vain for long enough, and nothing is on its way to one."""
        limit_s = self.options.until_idle_s
        if limit_s is None or self._recovering_since is not None or not self.partitions:
            return False
        if any(partition.store.idle_s < limit_s for partition in self.partitions.values()):
            return False
        inputs = [tp for tp in self.app.consumer.assignment() if tp.topic in self._keys]
        ends = await self.app.consumer.highwaters(*inputs)
        at = {tp: await self.app.consumer.position(tp) for tp in inputs}
        if any((at[tp] or 0) > expected for tp, expected in self._untouched.items()):
            return False  # see `_go_back`
        return all(at[tp] is not None and at[tp] >= ends[tp] for tp in inputs)

    def _stalled_s(self) -> tuple[str, float]:
        """What has stood still the longest, and for how long: the loop, the recovery or a commit.

        Raises `FencedError` where that was the whole process.
        """
        self.guard()
        now = time.monotonic()
        times = [("the event loop", now - self._ticked)]
        if self._recovering_since is not None:
            times.append(("recovery", now - self._recovering_since))
        times += [(f"a commit of partition {n}", p.stalled_s()) for n, p in list(self.partitions.items())]
        return max(times, key=lambda pair: pair[1])

    # ------------------------------------------------------------------ partitions come and go

    async def changelog(self, event: Any) -> None:
        """Keep what the changelog says until the partition is taken over; a late fetch may bring our own rows."""
        if self._recovering_since is None:
            return
        message = event.message
        book = self._books[message.partition]
        key = message.key or b"a record without a key"  # none of ours: the ledger refuses it
        if message.value is None:
            book.pop(key, None)
        else:
            book[key] = message.value
        self._logged_ends[message.partition] = message.offset + 1
        self._recovering_since = time.monotonic()

    async def revoked(self) -> None:
        """Finish every batch before the group goes on; what comes back is read from the changelog again."""
        self._metrics.rebalances()
        self._is_assigned = False
        self._recovering_since = time.monotonic()
        self.health.group = Condition(ok=False, detail="the group is rebalancing")
        await self._give_up()
        self._books.clear()
        self._logged_ends.clear()
        self.app.tables.recovery.active_offsets.clear()

    async def _give_up(self) -> None:
        partitions, self.partitions = self.partitions, {}
        self.health.own({})
        for partition in partitions.values():
            partition.stop()
        for number, partition in partitions.items():
            await asyncio.to_thread(partition.join)
            self._shared.levels.forget(number)
            if not partition.accepts_gap:
                self._begun.add(number)
        if partitions:
            await _at_most(self.app.consumer.commit())
            line = f"partitions given up: {_shown(partitions)}"
            self.log.info(line)

    async def assigned(self, partitions: Iterable[TP]) -> None:
        """Ask where the partitions begin and end while nothing is fetched: an answer would wait behind a fetch."""
        tps = list(partitions)
        first, end = await self.app.consumer.earliest_offsets(*tps), await self.app.consumer.highwaters(*tps)
        self._bounds = {tp: Bounds(first[tp] or 0, end[tp] or 0) for tp in tps}
        self._is_assigned = True

    async def recovered(self) -> None:
        """Start the worker of every partition that is ours now."""
        await self._give_up()
        if not self._is_assigned:
            return  # revoked while the changelogs were read: the next assignment is recovered too
        numbers = sorted(tp.partition for tp in self.app.consumer.assignment() if tp.topic == self._topics.bars)
        self._sequencer = Sequencer({})
        try:
            self.partitions = {number: self._take_over(number) for number in numbers}
        except Exception as error:  # noqa: BLE001  a signal's errors are lost otherwise
            self._end(error)
            return
        self._books.clear()
        self._untouched, self._looked_at = dict(self._sequencer.next), time.monotonic()
        self.health.own(statuses(self.partitions))
        self.health.group = Condition(ok=True)
        self._recovering_since = None
        for partition in self.partitions.values():
            partition.start()
        line = f"partitions taken over: {_shown(numbers)}"
        self.log.info(line)
        self._notifier.ready(f"serving {self.settings.namespace}")

    def _take_over(self, number: int) -> Partition:
        bounds = {key: self._bounds[TP(topic, number)] for topic, key in self._keys.items()}
        try:
            ledger = Ledger.restore(self._books.pop(number, {}))
            position = Position.decode(ledger.position)
        except StateCorruptError as error:
            raise explained(number, error, self.settings.namespace) from error
        for topic, key in self._keys.items():
            self._sequencer.next[TP(topic, number)] = max(bounds[key].first, offset_of(position, key))
        logged_end = self._logged_ends.get(number, self._bounds[TP(self._changelog, number)].end)
        store = PartitionStore(ledger, _Link(self, number), bounds, logged_end)
        options = Options(now_ms=self.options.now_ms, accept_gap=self.options.accept_gap and number not in self._begun)
        return Partition(number, store, self._shared, options, self._fail)

    # ------------------------------------------------------------------ records

    async def take(self, event: Any) -> None:
        """Hand one record to its partition; wait where that one is far behind."""
        message = event.message
        partition = self.partitions.get(message.partition)
        if partition is None or message.generation_id != self.app.consumer_generation_id:
            return  # it comes again to whoever owns it now
        if not await self._is_next(message.tp, message.offset):
            return
        store = partition.store
        store.put(self._keys[message.topic], message.offset, message.value, round(message.timestamp * 1000), event)
        while store.waiting > MOST_WAITING and self.partitions.get(message.partition) is partition:  # noqa: ASYNC110  a thread drains it
            await asyncio.sleep(PAUSE_S)

    async def _is_next(self, tp: TP, offset: int) -> bool:
        """Whether a record is the one to go on with; a gap is read again."""
        verdict = self._sequencer.judge(tp, offset)
        if verdict is Verdict.READ_AGAIN:
            await self.app.consumer.seek(tp, self._sequencer.next[tp])
        return verdict is Verdict.TAKE

    async def _go_back(self) -> None:
        """Where nothing has come since the partition was taken over, read from where its state ends."""
        if time.monotonic() - self._looked_at < LOOK_AGAIN_S:
            return
        self._looked_at = time.monotonic()
        for tp, expected in list(self._untouched.items()):
            if self._sequencer.next.get(tp) != expected:
                self._untouched.pop(tp, None)
            elif (await self.app.consumer.position(tp) or 0) > expected:
                await self.app.consumer.seek(tp, expected)

    # ------------------------------------------------------------------ writing, for the threads

    def _note_freeze(self) -> None:
        """Fence this process off for good where it stood still; from any thread."""
        silent_s = time.monotonic() - self._ticked
        if not self._joins or self._fenced or silent_s <= FROZEN_S:
            return
        self._fenced = (
            f"this process stood still for {silent_s:.0f} s, the group's session is {SESSION_S:g} s: its partitions "
            "may be another worker's; nothing was written since"
        )
        self._fail(FencedError(self._fenced))

    def guard(self) -> None:
        """Raise `FencedError` where this process may have lost its partitions while it stood still."""
        self._note_freeze()
        if self._fenced:
            raise FencedError(self._fenced)

    async def write(self, number: int, records: Sequence[tuple[str, bytes | None, bytes | None]]) -> list[int]:
        """Write topic, key and value of each record into one partition; their offsets. Raises `CheckFailed`."""
        self.guard()
        producer = self.app.producer
        pending = [
            (topic, await accepted(topic, producer.send(topic, key, value, number, None, None)))
            for topic, key, value in records
        ]
        return [(await accepted(topic, one)).offset for topic, one in pending]

    async def logged(self, number: int, start: int) -> tuple[list[bytes], int]:
        """What came to a partition of the changelog since an offset; see `Link.logged`."""
        return await keys_since(self._bootstrap, self._changelog, number, start)

    def on_loop(self, coroutine: Callable[[], Any]) -> Any:
        """Run a coroutine on the loop, from another thread. Raises `StoreUnavailableError` where Kafka fails."""
        try:
            return asyncio.run_coroutine_threadsafe(coroutine(), self.app.loop).result()
        except (KafkaError, FaustError) as error:
            raise StoreUnavailableError(f"Kafka: {error!r}") from error

    def known_end(self, tp: TP) -> int:
        """The offset after the last record of an input, as of the last fetch."""
        return self.app.monitor.tp_end_offsets.get(tp) or 0

    def acknowledge(self, events: Sequence[Any]) -> None:
        for event in events:
            event.ack()


async def _at_most(call: Awaitable[Any]) -> None:
    """Await `call`, but not for long: a broker that is away must not keep a process that is told to end."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(call, CLOSING_S)


def _shown(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(numbers))) or "none"


class _Link:
    """One partition's way to the loop."""

    def __init__(self, engine: Engine, number: int) -> None:
        self._engine = engine
        self._number = number
        self._inputs = {key: TP(topic, number) for topic, key in engine._keys.items()}  # noqa: SLF001
        self._changelog = engine._changelog  # noqa: SLF001

    def log(self, records: Sequence[Record]) -> list[int]:
        rows = [(self._changelog, key, value) for key, value in records]
        offsets: list[int] = self._engine.on_loop(lambda: self._engine.write(self._number, rows))
        return offsets

    def logged(self, start: int) -> tuple[list[bytes], int]:
        found: tuple[list[bytes], int] = self._engine.on_loop(lambda: self._engine.logged(self._number, start))
        return found

    def send(self, outgoing: Sequence[Outgoing]) -> Mapping[str, int]:
        rows = [(topic, None, value) for topic, value in outgoing]
        offsets = self._engine.on_loop(lambda: self._engine.write(self._number, rows))
        return {topic: offset + 1 for (topic, _, _), offset in zip(rows, offsets, strict=True)}

    def done(self, events: Sequence[Any]) -> None:
        self._engine.app.loop.call_soon_threadsafe(self._engine.acknowledge, list(events))

    def end(self, key: str) -> int:
        return self._engine.known_end(self._inputs[key])
