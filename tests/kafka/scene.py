"""Workers of one group to start, kill and compare: what they say must be what one process in memory says."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from confluent_kafka import Consumer, TopicPartition

from streams.messages import AGENTS
from streams.records import unpack
from streams.topics import Topics
from tests.chaos.scene import Forge, Life
from tests.chaos.scene import market as entries
from tests.helpers import LIMIT_S, wait_for
from tests.kafka.cluster import TIMEOUT_S, Cluster, by_bar_id, produce, read
from worker.errors import FENCED, UNAVAILABLE
from worker.kafka.topics import changelog_of
from worker.testing import in_memory

PARTITIONS = 5
WARMUP = 30
Bars = Sequence[Mapping[str, Any]]
Said = dict[str, dict[str, Any]]


def market(symbols: int, bars: int, seed: int = 11) -> list[dict[str, str]]:
    """Bars of a generated market, minute by minute."""
    return [
        {name.decode(): value.decode() for name, value in fields.items()} for fields in entries(symbols, bars, seed)
    ]


def alone(models: Path, bars: Bars, agents: Sequence[str] = AGENTS) -> Said:
    """What one process in memory makes of the same bars: features, votes and signals by `bar_id`."""
    settings = {"agents": agents, "quorum": min(3, len(agents)), "warmup_bars": {"v3": WARMUP}}
    with in_memory(models, **settings) as quartet:
        quartet.run(bars)
        said = {"features": quartet.features, "signals": quartet.signals}
        said |= {f"votes.{agent}": quartet.votes(agent) for agent in agents}
    assert said["signals"]
    return {name: {one["bar_id"]: one for one in messages} for name, messages in said.items()}


class Counter:
    """Reads a topic on, as far as it goes when it is asked."""

    def __init__(self, cluster: Cluster, topic: str, partitions: int) -> None:
        self.reader = Consumer({"bootstrap.servers": cluster.bootstrap, "group.id": "count", "fetch.wait.max.ms": 5})
        self.read = {TopicPartition(topic, p): 0 for p in range(partitions)}
        self.objects = 0
        self.reader.assign([TopicPartition(place.topic, place.partition, 0) for place in self.read])

    def count(self) -> int:
        ends = {place: self.reader.get_watermark_offsets(place, TIMEOUT_S)[1] for place in self.read}
        while any(self.read[place] < end for place, end in ends.items()):
            for message in self.reader.consume(100, 0.05):
                assert message.error() is None, message.error()
                self.read[TopicPartition(message.topic(), message.partition())] = message.offset() + 1
                self.objects += len(unpack(message.value()))
        return self.objects


@dataclass
class Group:
    """The workers of one namespace."""

    forge: Forge
    cluster: Cluster
    namespace: str
    models: Path
    directory: Path
    agents: Sequence[str] = AGENTS
    partitions: int = PARTITIONS
    lives: list[Life] = field(default_factory=list)
    _counters: dict[str, Counter] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.topics = Topics(self.namespace)
        self.cluster.create(self.namespace, self.partitions, more=[changelog_of(self.namespace)])

    def start(self, *arguments: str, **env: str) -> Life:
        """Start `quartet run`, as the chaos tests do."""
        log = self.directory / f"{self.namespace}-{len(self.lives)}.log"
        settings = {
            "QUARTET_WARMUP_BARS__V3": str(WARMUP),
            "QUARTET_AGENTS": ",".join(self.agents),
            "QUARTET_QUORUM": str(min(3, len(self.agents))),
            "CHAOS_LEADER_WAITS_S": "1",
            "CHAOS_SESSION_S": "4",
            "CHAOS_STALLED_S": "30",
        }
        flags = ["--broker", self.cluster.url, "--namespace", self.namespace, "--models", str(self.models)]
        flags += ["--http-port", "0", "--state-dir", str(self.directory / "state")]
        order = {"arguments": [*flags, *arguments], "env": {**settings, **env}, "log": str(log)}
        self.lives.append(Life(self.forge, self.forge.ask(do="start", **order), log))
        return self.lives[-1]

    def serve(self, *arguments: str, **env: str) -> Life:
        """Start a worker and wait until it has taken partitions over."""
        lives = [self.start(*arguments, **env)]
        self.keep(lives, lambda: "partitions taken over" in lives[0].text, *arguments, **env)
        return lives[0]

    def keep(self, lives: list[Life], condition: Callable[[], bool], *arguments: str, **env: str) -> None:
        """Wait for `condition`; as a service manager does, start again what has ended because it stood still.

        librdkafka's mock cluster now and then loses a member while a group changes, and it is left without an answer.
        """

        def holds() -> bool:
            for place, life in enumerate(lives):
                if not life.alive():
                    assert life.wait() in (UNAVAILABLE, FENCED), life.text
                    lives[place] = self.start(*arguments, **env)
            return condition()

        wait_for(holds, 3 * LIMIT_S)

    def finish(self, **env: str) -> str:
        """Run one worker until the input is used up; its log."""
        for _ in range(3):
            life = self.start("--until-idle", "0.5", **env)
            code = life.wait()
            if code not in (UNAVAILABLE, FENCED):  # see `keep`
                break
        assert code == 0, life.text
        return life.text

    def feed(self, bars: Bars, pack: int = 16) -> None:
        produce(self.cluster, self.topics.bars, bars, self.partitions, pack)

    def said(self) -> Said:
        """What readers make of the topics, doubles removed."""
        names = ["features", "signals", *(f"votes.{agent}" for agent in self.agents)]
        return {name: by_bar_id(self.cluster, f"{self.namespace}.{name}") for name in names}

    def count(self, topic: str) -> int:
        """Objects in a topic at this moment; each call reads what is new."""
        counter = self._counters.setdefault(topic, Counter(self.cluster, topic, self.partitions))
        return counter.count()

    def events(self, kind: str = "") -> list[dict[str, Any]]:
        """Every event of `kind`, or all."""
        found = [one for objects in read(self.cluster, self.topics.events) for one in objects]
        return [one for one in found if kind in ("", one["kind"])]

    def end(self) -> None:
        """Kill what a test that failed has left running."""
        for counter in self._counters.values():
            counter.reader.close()
        for life in self.lives:
            if life.alive():
                life.signal(signal.SIGKILL)


def assert_same(found: Said, expected: Said) -> None:
    """None missing, none more, none different."""
    for name, messages in expected.items():
        assert messages.keys() - found[name].keys() == set(), f"{name}: missing"
        assert found[name].keys() - messages.keys() == set(), f"{name}: more"
        different = [bar_id for bar_id, one in messages.items() if found[name][bar_id] != one]
        assert not different, f"{name}: {found[name][different[0]]} is not {messages[different[0]]}"
