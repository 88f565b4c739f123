"""The store in memory and the one on a server do the same, and both do what a pure oracle says."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from streams.keys import Keys
from streams.memory import MemoryStore, MemoryStreams
from streams.redis import RedisStore, connect, with_baseline
from streams.store import Commit, InputLostError, Output, Position, StoreMisuseError

INPUTS = ("a", "b")
PARTS = ("one", "two")
_numbers = itertools.count()


@dataclass
class Oracle:
    """What was ever added to each input, how much of it is gone, and what was committed."""

    added: dict[str, list[str]] = field(default_factory=lambda: {name: [] for name in INPUTS})
    gone: dict[str, int] = field(default_factory=lambda: dict.fromkeys(INPUTS, 0))
    consumed: dict[str, int] = field(default_factory=dict)
    outputs: list[tuple[str, bytes]] = field(default_factory=list)
    appended: int = 0
    state: dict[str, dict[bytes, bytes]] = field(default_factory=dict)

    def lost(self, name: str) -> int:
        return self.gone[name] - self.consumed.get(name, self.gone[name])

    def next(self, count: int) -> list[tuple[str, str]]:
        """The next entries, by their IDs; both inputs share one clock, so no two IDs are equal."""
        waiting = [
            (name, entry_id)
            for name in INPUTS
            for entry_id in self.added[name][max(self.gone[name], self.consumed.get(name, 0)) :]
        ]
        return sorted(waiting, key=lambda pair: int(pair[1].partition("-")[0]))[:count]


class Stores(RuleBasedStateMachine):
    """Both stores are driven by the same rules; every answer is compared."""

    url = ""

    @initialize()
    def open(self) -> None:
        self.namespace = f"m{os.getpid()}x{next(_numbers)}"
        self.keys = Keys(self.namespace)
        self.client = connect(self.url)
        self.redis = RedisStore(self.client, self.keys)
        assert self.redis.acquire()
        self.streams = MemoryStreams()
        self.memory = MemoryStore(self.streams)
        self.oracle = Oracle()
        self.position = Position()
        self.clock = 0
        self.redis.load(PARTS)

    def teardown(self) -> None:
        if hasattr(self, "client"):
            self.client.delete(*self.client.keys(f"{self.namespace}:*"))
            self.client.close()

    def key(self, name: str) -> str:
        return f"{self.namespace}:{name}"

    @property
    def input_keys(self) -> list[str]:
        return [self.key(name) for name in INPUTS]

    @rule(name=st.sampled_from(INPUTS), count=st.integers(1, 5))
    def feed(self, name: str, count: int) -> None:
        for _ in range(count):
            self.clock += 1
            entry_id = f"{self.clock}-0"
            self.oracle.added[name].append(entry_id)
            self.client.xadd(self.key(name), {"n": self.clock}, id=entry_id)
            self.streams.add(self.key(name), {b"n": b"%d" % self.clock}, entry_id)

    @precondition(lambda self: hasattr(self, "oracle"))
    @rule(name=st.sampled_from(INPUTS), keep=st.integers(0, 6))
    def trim(self, name: str, keep: int) -> None:
        total = len(self.oracle.added[name])
        if total:
            self.client.xtrim(self.key(name), maxlen=keep, approximate=False)
            self.streams.trim(self.key(name), keep)
            self.oracle.gone[name] = max(self.oracle.gone[name], total - keep)

    @rule(count=st.integers(1, 8), fail=st.booleans(), drop=st.booleans())
    def read_and_commit(self, count: int, fail: bool, drop: bool) -> None:
        try:
            batch = self.redis.read(self.position, self.input_keys, count)
        except InputLostError as error:
            self.accept(error, count)
            return
        assert batch == self.memory.read(self.position, self.input_keys, count)
        assert all(self.oracle.lost(name) <= 0 for name in INPUTS)
        expected = self.oracle.next(count)
        assert [(entry.key, entry.id) for entry in batch.entries] == [(self.key(n), i) for n, i in expected]
        if not expected:
            return
        based = with_baseline(self.position, batch.facts)
        self.commit(based.advanced(batch.entries, f"{self.clock}-0"), expected, fail=fail, drop=drop)

    def commit(self, position: Position, entries: list[tuple[str, str]], *, fail: bool, drop: bool) -> None:
        new = [
            (f"{self.clock}-{place}", b"x") for place in range(len(self.oracle.outputs), len(self.oracle.outputs) + 2)
        ]
        ids = ["0-1", "0-2"] if fail and self.oracle.outputs else [entry_id for entry_id, _ in new]
        commit = Commit(
            position,
            [Output(self.keys.signals, ids, [b"x", b"x"])],
            {self.keys.events: [[b"data", b"e"]]},
            {"one": [(entry_id.encode(), name.encode()) for name, entry_id in entries]},
            ["one"] if drop else [],
        )
        if ids[0] == "0-1":
            for store in (self.redis, self.memory):
                with pytest.raises(StoreMisuseError, match="past the next output 0-1"):
                    store.commit(commit)
            return
        for store in (self.redis, self.memory):
            store.commit(commit)
        self.position = position
        self.oracle.outputs += new
        self.oracle.appended += 1
        if drop:
            self.oracle.state.pop("one", None)
        self.oracle.state.setdefault("one", {}).update({i.encode(): n.encode() for n, i in entries})
        for name in INPUTS:
            if self.oracle.added[name]:
                taken = sum(entry == name for entry, _ in entries)
                start = self.oracle.consumed.get(name, self.oracle.gone[name])
                self.oracle.consumed[name] = start + taken

    def accept(self, error: InputLostError, count: int) -> None:
        """The loss is exact; after it the input goes on behind the gap."""
        with pytest.raises(InputLostError) as other:
            self.memory.read(self.position, self.input_keys, count)
        assert str(error) == str(other.value)
        name = error.key.rpartition(":")[2]
        assert error.lost == self.oracle.lost(name) > 0
        position = replace(self.position, inputs={**self.position.inputs, error.key: error.resume})
        for store in (self.redis, self.memory):
            store.commit(Commit(position))
        self.position = position
        self.oracle.consumed[name] = self.oracle.gone[name]

    @rule()
    def restart(self) -> None:
        """Another instance of each takes over, and finds position and state."""
        self.redis.release()
        self.redis = RedisStore(self.client, self.keys)
        assert self.redis.acquire()
        snapshot = self.redis.load(PARTS)
        assert snapshot == self.memory.load(PARTS)
        assert snapshot.position == self.position
        assert snapshot.state == {part: self.oracle.state.get(part, {}) for part in PARTS}

    @precondition(lambda self: hasattr(self, "oracle"))
    @invariant()
    def outputs_are_what_was_committed(self) -> None:
        expected = [(entry_id, {b"data": data}) for entry_id, data in self.oracle.outputs]
        assert [(i.decode(), fields) for i, fields in self.client.xrange(self.keys.signals)] == expected
        assert self.streams.streams.get(self.keys.signals, []) == expected
        lengths = {self.keys.events: self.oracle.appended}
        assert self.redis.lengths([self.keys.events]) == self.memory.lengths([self.keys.events]) == lengths


def test_both_stores_do_what_the_oracle_says(valkey):
    machine = type("StoresOnValkey", (Stores,), {"url": valkey})
    machine.TestCase.settings = settings(
        max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
    )
    case = machine.TestCase("runTest")
    case.runTest()


def _read_three(streams: MemoryStreams) -> Position:
    store = MemoryStore(streams)
    batch = store.read(Position(), ["in"], 3)
    return with_baseline(Position(), batch.facts).advanced(batch.entries, "0-1")


def _lost(server: str, key: str, position: Position, streams: MemoryStreams) -> InputLostError:
    with pytest.raises(InputLostError) as found:
        RedisStore(connect(server), Keys("x")).read(position, [key], 10)
    with pytest.raises(InputLostError) as other:
        MemoryStore(streams).read(position, [key], 10)
    assert str(found.value) == str(other.value)
    assert found.value.resume == other.value.resume
    return found.value


class Both:
    """The same input on a server and in memory."""

    def __init__(self, server: str, key: str) -> None:
        self.key, self.client, self.streams, self.server = key, connect(server), MemoryStreams(), server

    def add(self, *ids: int) -> None:
        for number in ids:
            self.client.xadd(self.key, {"n": number}, id=f"{number}-0")
            self.streams.add(self.key, {b"n": b"%d" % number}, f"{number}-0")

    def delete(self) -> None:
        self.client.delete(self.key)
        self.streams.delete(self.key)

    def trim(self, keep: int) -> None:
        self.client.xtrim(self.key, maxlen=keep, approximate=False)
        self.streams.trim(self.key, keep)

    def position(self, count: int) -> Position:
        batch = MemoryStore(self.streams).read(Position(), [self.key], count)
        return with_baseline(Position(), batch.facts).advanced(batch.entries, "0-1")

    def lost(self, position: Position) -> InputLostError:
        return _lost(self.server, self.key, position, self.streams)


@pytest.fixture
def both(server, namespace):
    return Both(server, f"{namespace}:in")


def test_an_input_that_was_trimmed_past_the_position_is_lost_to_the_entry(both):
    both.add(*range(1, 11))
    position = both.position(3)
    both.trim(2)
    assert both.lost(position).lost == 5


def test_what_was_trimmed_before_the_first_read_is_nobodys_loss(both):
    both.add(*range(1, 11))
    both.trim(4)
    position = both.position(2)
    assert [e.id for e in RedisStore(both.client, Keys("x")).read(position, [both.key], 10).entries] == ["9-0", "10-0"]
    both.trim(1)
    assert both.lost(position).lost == 1


def test_an_input_that_was_deleted_or_made_anew_is_found(both):
    both.add(*range(1, 11))
    position = both.position(10)
    both.delete()
    assert "recreated" in str(both.lost(position))
    both.add(11, 12)
    assert "now only 2" in str(both.lost(position))
    both.add(*range(13, 30))
    assert "first ID 11-0 is after the position 10-0" in str(both.lost(position))


def test_an_input_that_went_back_is_found(both):
    both.add(*range(101, 111))
    position = both.position(10)
    both.delete()
    both.add(*range(1, 21))
    found = both.lost(position)
    assert "rewound: its last ID 20-0 is before the position 110-0" in str(found)
    assert "--accept-gap" in str(found)
