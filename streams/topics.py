"""Topic names, and which partition of them a symbol belongs to.

A topic is called as the key on Redis, with dots: `quartet:votes:nhits` is `quartet.votes.nhits`. Every
topic of a namespace has the same number of partitions, so that all of a symbol stays together.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from streams.keys import DEFAULT_NAMESPACE, Keys
from streams.messages import AGENTS, CANARY

_LEGAL = re.compile(r"[A-Za-z0-9._-]{1,249}")
_SEED = 0x9747B28C
_M = 0x5BD1E995
_WORD = 0xFFFFFFFF


def topic_of(key: str) -> str:
    """The topic that stands for a key. Raises `ValueError` for a name that Kafka does not allow."""
    topic = key.replace(":", ".")
    if _LEGAL.fullmatch(topic) is None:
        raise ValueError(
            f"{key!r} cannot be a topic: Kafka allows 1 to 249 characters of A-Z a-z 0-9 . _ -; set another namespace"
        )
    return topic


@dataclass(frozen=True, slots=True)
class Topics:
    """The topics of one namespace. Raises `ValueError` for a namespace that Kafka does not allow."""

    namespace: str = DEFAULT_NAMESPACE

    def __post_init__(self) -> None:
        topic_of(self.votes(max(AGENTS, key=len) + CANARY))

    @property
    def bars(self) -> str:
        return topic_of(Keys(self.namespace).bars)

    @property
    def features(self) -> str:
        return topic_of(Keys(self.namespace).features)

    def votes(self, agent: str) -> str:
        return topic_of(Keys(self.namespace).votes(agent))

    @property
    def signals(self) -> str:
        return topic_of(Keys(self.namespace).signals)

    @property
    def rejected(self) -> str:
        return topic_of(Keys(self.namespace).rejected)

    @property
    def events(self) -> str:
        return topic_of(Keys(self.namespace).events)

    @property
    def control(self) -> str:
        return topic_of(Keys(self.namespace).control)

    def all(self, agents: Sequence[str] = AGENTS) -> tuple[str, ...]:
        """Every topic that travels between programs, the votes of `agents` and of their canaries included."""
        votes = tuple(self.votes(agent + trial) for trial in ("", CANARY) for agent in agents)
        return (self.bars, self.features, *votes, self.signals, self.rejected, self.events, self.control)


def partition_of(symbol: str, partitions: int) -> int:
    """The partition, of `partitions`, in which Kafka's default partitioner puts the key `symbol`."""
    return _hash_of(symbol) % partitions


@lru_cache(maxsize=131_072)
def _hash_of(symbol: str) -> int:
    return murmur2(symbol.encode()) & 0x7FFFFFFF


def murmur2(data: bytes) -> int:
    """MurmurHash2 of 32 bits with the seed of Kafka's `DefaultPartitioner`; 0 to 2^32 - 1."""
    size = len(data)
    whole = size & ~3
    h = _SEED ^ size
    for at in range(0, whole, 4):
        k = int.from_bytes(data[at : at + 4], "little") * _M & _WORD
        h = (h * _M & _WORD) ^ ((k ^ k >> 24) * _M & _WORD)
    if size > whole:
        h = (h ^ int.from_bytes(data[whole:], "little")) * _M & _WORD
    h = (h ^ h >> 13) * _M & _WORD
    return h ^ h >> 15
