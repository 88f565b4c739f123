"""The fenced commit on real servers: everything or nothing, once, by the owner alone."""

from __future__ import annotations

import contextlib
import random
import subprocess
from collections.abc import Callable

import pytest
import redis
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from streams.keys import Keys
from streams.messages import Entry
from streams.redis import RedisStore, check_server, connect, with_baseline
from streams.store import (
    Commit,
    Committed,
    FencedError,
    InputPosition,
    Output,
    Position,
    RewoundError,
    Snapshot,
    StoreMisuseError,
    StoreUnavailableError,
)
from tests.chaos.proxy import FAULTS, proxy
from tests.helpers import LIMIT_S, answers, free_port, wait_for

PARTS = ("one", "two")


def store_of(url: str, namespace: str, **options: float) -> RedisStore:
    """The owner of a namespace, with what was committed loaded."""
    store = RedisStore(connect(url, timeout_s=LIMIT_S), Keys(namespace), **options)
    assert store.acquire()
    store.load(PARTS)
    return store


def position_at(number: int) -> Position:
    return Position({"in": InputPosition(f"{number}-0", number)}, f"{number}-0")


def batch(namespace: str, number: int) -> Commit:
    """A commit of every kind of write; `number` moves the position."""
    keys = Keys(namespace)
    name = b"%d" % number
    return Commit(
        position_at(number),
        outputs=[
            Output(keys.signals, [f"{number}-0", f"{number}-1"], [b"a" + name, b"b" + name]),
            Output(keys.features, [f"{number}-0"], [b"f" + name]),
        ],
        appends={keys.events: [[b"data", name]], keys.rejected: [[b"reason", b"x", b"in:a", name]]},
        state={"one": [(b"last", name), (name, name)]},
    )


def everything(url: str, namespace: str) -> dict[bytes, object]:
    """All that a namespace holds on the server, its lease and owner aside."""
    with redis.Redis.from_url(url) as client:
        found: dict[bytes, object] = {}
        for key in client.keys(f"{namespace}:*"):
            kind = client.type(key)
            if b":owner:" in key:
                found[key] = client.hget(key, "position")
            elif kind == b"stream":
                found[key] = client.xrange(key)
            elif kind == b"hash":
                found[key] = client.hgetall(key)
        return found


def test_a_read_says_how_far_other_stages_are(server, namespace):
    store = store_of(server, namespace)
    reader = RedisStore(connect(server, timeout_s=LIMIT_S), Keys(namespace), "consensus")
    assert reader.acquire()
    for number in (1, 2):
        store.commit(batch(namespace, number))
    read = reader.read_each(Position(), [Keys(namespace).signals], 9, ["chain", "agent:nhits"])
    assert read.committed == {"chain": Committed(2, position_at(2)), "agent:nhits": Committed()}
    assert [entry.id for entry in read.entries] == ["1-0", "1-1", "2-0", "2-1"]


def test_a_commit_writes_streams_state_and_position_and_a_load_reads_them_back(server, namespace):
    store = store_of(server, namespace)
    store.commit(batch(namespace, 5))
    found = RedisStore(connect(server), Keys(namespace)).load(PARTS)
    assert found == Snapshot(position_at(5), {"one": {b"last": b"5", b"5": b"5"}, "two": {}})
    keys = Keys(namespace)
    signals = [(b"5-0", {b"data": b"a5"}), (b"5-1", {b"data": b"b5"})]
    assert store.client.xrange(keys.signals) == signals
    assert [fields for _, fields in store.client.xrange(keys.rejected)] == [{b"reason": b"x", b"in:a": b"5"}]


def test_an_instance_that_was_replaced_writes_nothing(server, namespace):
    old = store_of(server, namespace)
    old.commit(batch(namespace, 1))
    old.client.delete(Keys(namespace).lease("chain"))
    new = store_of(server, namespace)
    before = everything(server, namespace)
    for attempt in (
        lambda: old.commit(batch(namespace, 2)),
        lambda: old.load(PARTS),
        lambda: old.read(position_at(1), ["in"], 1),
        lambda: old.mark(Entry("in", "2-0", {})),
    ):
        with pytest.raises(FencedError, match="took over"):
            attempt()
    assert everything(server, namespace) == before
    new.commit(batch(namespace, 2))


def test_an_epoch_given_out_twice_by_a_server_that_forgot_one_still_fences(server, namespace):
    """After a failover the new owner may have the old one's number."""
    old = store_of(server, namespace)
    old.client.delete(Keys(namespace).lease("chain"))
    old.client.hincrby(Keys(namespace).owner("chain"), "epoch", -1)
    new = store_of(server, namespace)
    assert new.epoch == old.epoch
    with pytest.raises(FencedError):
        old.commit(batch(namespace, 1))
    new.commit(batch(namespace, 1))


def test_a_commit_from_another_position_is_refused(server, namespace):
    """The server went back: what it holds now is not what this batch was computed from."""
    store = store_of(server, namespace)
    store.commit(batch(namespace, 1))
    owner = Keys(namespace).owner("chain")
    first = store.client.hget(owner, "position")
    store.commit(batch(namespace, 2))
    store.client.hset(owner, "position", first)
    before = everything(server, namespace)
    with pytest.raises(RewoundError, match="latest writes"):
        store.commit(batch(namespace, 3))
    with pytest.raises(RewoundError):
        store.read(position_at(2), ["in"], 1)
    assert everything(server, namespace) == before


def test_only_one_of_two_is_owner_and_a_release_lets_the_other_in(server, namespace):
    first = store_of(server, namespace)
    second = RedisStore(connect(server), Keys(namespace))
    assert not second.acquire()
    first.release()
    assert second.acquire()
    assert second.was_clean
    assert not first.renew()
    first.release()  # too late, and without effect
    assert second.renew()


def test_an_end_without_a_release_is_not_clean(server, namespace):
    store = store_of(server, namespace)
    store.client.delete(Keys(namespace).lease("chain"))
    assert not store_of(server, namespace).was_clean


KINDS: dict[str, Callable[[str], Commit]] = {
    "batch": lambda namespace: batch(namespace, 2),
    "events at the same position": lambda namespace: Commit(
        position_at(1), appends={Keys(namespace).events: [[b"data", b"recovered"]]}
    ),
    "state rewritten at the same position": lambda namespace: Commit(
        position_at(1),
        appends={Keys(namespace).events: [[b"data", b"rebuilt"]]},
        state={"one": [(b"new", b"1")]},
        drops=PARTS,
    ),
    "input lost": lambda namespace: Commit(
        Position({"in": InputPosition("1-0", 99)}, "1-0"), appends={Keys(namespace).events: [[b"data", b"gap"]]}
    ),
}


def test_a_commit_says_whether_this_very_try_wrote_it(server, namespace):
    with proxy(server) as between:
        store = store_of(between.url, namespace)
        assert store.commit(batch(namespace, 1)) is True
        between.fault = "cut"
        with pytest.raises(StoreUnavailableError) as lost:
            store.commit(batch(namespace, 7))
        assert lost.value.reason == "unavailable"
        assert store.commit(batch(namespace, 7)) is False, "the first try was applied, its reply was lost"


def impatient(store: RedisStore, url: str) -> RedisStore:
    """The same instance over a client that waits 0.3 s for an answer; it is connected."""
    store.client = connect(url, timeout_s=0.3)
    insist(store.client.ping)
    return store


def insist(call: Callable[[], object]) -> int:
    """Call as the worker does, until the server answers; how often that took."""
    for tries in range(1, 20):
        with contextlib.suppress(StoreUnavailableError, redis.TimeoutError):
            call()
            return tries
    pytest.fail("the server never answered")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_commit_whose_reply_is_lost_is_neither_doubled_nor_lost(server, namespace, kind, fault):
    commit = KINDS[kind](namespace)
    twin = f"{namespace}y"
    with proxy(server) as between:
        faulty = store_of(between.url, namespace)
        faulty.commit(batch(namespace, 1))
        impatient(faulty, between.url)
        between.fault = fault
        assert insist(lambda: faulty.commit(commit)) >= 2
        assert between.lost == 1
        insist(lambda: faulty.commit(batch(namespace, 7)))
    calm = store_of(server, twin)
    for each in (batch(twin, 1), KINDS[kind](twin), batch(twin, 7)):
        calm.commit(each)
    assert _without_times(everything(server, namespace), namespace) == _without_times(everything(server, twin), twin)


def _without_times(found: dict[bytes, object], namespace: str) -> dict[bytes, object]:
    """Events and rejects have IDs of the server's clock."""
    plain = {key.removeprefix(namespace.encode()): value for key, value in found.items()}
    for key in (b":events", b":rejected"):
        plain[key] = [fields for _, fields in plain[key]]
    return plain


@pytest.mark.parametrize("fault", FAULTS)
def test_owning_and_marking_bear_a_lost_reply(server, namespace, fault):
    store_of(server, namespace).release()
    with proxy(server) as between:
        store = impatient(RedisStore(connect(between.url), Keys(namespace)), between.url)
        between.fault = fault
        insist(store.acquire)
        assert store.was_clean, "the second call must not take its own first one for a crash"
        entry = Entry("in", "1-0", {})
        between.fault = fault
        marks: list[int] = []
        for _ in range(2):
            insist(lambda: marks.append(store.mark(entry)))
        assert marks == [1, 1], "one life notes one death at most, however often it calls"
        between.fault = fault
        insist(store.release)
    assert store_of(server, namespace).was_clean


class Counting(RedisStore):
    """Notes how many entries each look brought, used or not."""

    def read_each(self, position, keys, count, stages=()):
        batch = super().read_each(position, keys, count, stages)
        self.brought = [*getattr(self, "brought", []), len(batch.entries)]
        return batch


def drained(store, keys, position, count):
    """Read to the end; the batches, and the position after them."""
    batches = []
    while (batch := store.read(position, keys, count)).entries:
        position = with_baseline(position, batch.facts).advanced(batch.entries, "0-0")
        batches.append([(entry.id, entry.key) for entry in batch.entries])
    return batches, position


def test_many_keys_are_read_in_the_order_of_their_ids_and_little_is_asked_for_in_vain(server, namespace):
    """100 keys of 1 to 20 entries, their IDs mixed up by a seed, then many on one key. The oracle sorts them all."""
    rng, count = random.Random(5), 16
    keys = [f"{namespace}:{number}" for number in range(100)]
    owners = [key for key in keys for _ in range(rng.randrange(1, 21))]
    rng.shuffle(owners)
    expected = [(f"{number}-0", key) for number, key in enumerate(owners, 1)]
    store = Counting(connect(server), Keys(namespace))
    pipe = store.client.pipeline(transaction=False)
    for entry_id, key in expected:
        pipe.xadd(key, {"a": "b"}, id=entry_id)
    pipe.execute()
    batches, position = drained(store, keys, Position(), count)
    assert [entry for batch in batches for entry in batch] == expected
    assert max(map(len, batches)) == count
    assert max(store.brought) <= 2 * len(keys)
    for number in range(160):
        store.client.xadd(keys[7], {"a": "b"}, id=f"{5_000 + number}-0")
    batches, _ = drained(store, keys, position, count)
    assert [len(batch) for batch in batches] == [2, *[count] * 9, 14], (
        "a key that is alone is soon read in whole batches"
    )


def test_marks_count_the_lives_that_ended_on_one_entry(server, namespace):
    lives = []
    for _ in range(3):
        store = store_of(server, namespace)
        lives.append(store.mark(Entry("in", "1-0", {})))
        store.client.delete(Keys(namespace).lease("chain"))
    assert lives == [1, 2, 3]
    assert store_of(server, namespace).mark(Entry("in", "1-1", {})) == 1


def test_a_mark_that_was_taken_back_is_not_counted_and_only_the_owner_takes_it_back(server, namespace):
    entry = Entry("in", "1-0", {})
    fenced = store_of(server, namespace)
    assert fenced.mark(entry) == 1
    fenced.release()
    now = store_of(server, namespace)
    assert now.mark(entry) == 2
    fenced.unmark()
    assert now.mark(entry) == 2
    now.unmark()
    now.release()
    assert store_of(server, namespace).mark(entry) == 1


@pytest.mark.parametrize(
    "spoilt", ["signals", "features", "events", "rejected", "state"], ids=lambda name: f"{name} is a text"
)
def test_a_key_of_another_type_is_named_and_nothing_is_written(server, namespace, spoilt):
    store = store_of(server, namespace)
    keys = Keys(namespace)
    key = keys.state("one") if spoilt == "state" else getattr(keys, spoilt)
    store.client.set(key, "mine")
    before = everything(server, namespace)
    with pytest.raises(StoreMisuseError, match=key):
        store.commit(batch(namespace, 1))
    assert everything(server, namespace) == before
    store.client.delete(key)
    store.commit(batch(namespace, 1))


def test_state_of_another_type_is_named_when_it_is_loaded(server, namespace):
    store = store_of(server, namespace)
    store.client.set(store.keys.state("one"), "mine")
    with pytest.raises(StoreMisuseError, match="holds something else"):
        store.load(PARTS)


def test_an_output_that_is_ahead_is_named_and_nothing_is_written(server, namespace):
    store = store_of(server, namespace)
    store.client.xadd(store.keys.signals, {"data": "x"}, id="9-0")
    before = everything(server, namespace)
    with pytest.raises(StoreMisuseError, match="ends at 9-0, past the next output 5-0"):
        store.commit(batch(namespace, 5))
    assert everything(server, namespace) == before


def test_a_stream_of_events_that_has_run_out_of_ids_is_found_before_anything_is_written(server, namespace):
    store = store_of(server, namespace)
    store.client.xadd(store.keys.events, {"data": "x"}, id=f"{2**64 - 1}-{2**64 - 1}")
    before = everything(server, namespace)
    with pytest.raises(StoreMisuseError, match="events"):
        store.commit(batch(namespace, 1))
    assert everything(server, namespace) == before


def test_twenty_thousand_fields_of_state_go_in_one_commit(server, namespace):
    store = store_of(server, namespace)
    fields = [(b"%d" % n, b"v%d" % n) for n in range(20_000)]
    store.commit(Commit(position_at(1), state={"one": fields}))
    assert store.load(PARTS).state["one"] == dict(fields)


def test_a_reject_with_as_many_fields_as_fit_into_4_kb_goes_through(server, namespace):
    """A Lua call takes under 8,000 values; the names of one entry are all different."""
    names = [b"%x" % n for n in range(2_000)]
    row = [part for name in names for part in (b"in:" + name, b"")]
    store = store_of(server, namespace)
    store.commit(Commit(position_at(1), appends={store.keys.rejected: [row]}))
    assert len(store.client.xrange(store.keys.rejected)[0][1]) == 2_000


def test_a_server_out_of_memory_writes_nothing_and_goes_on_later(server, namespace):
    store = store_of(server, namespace)
    store.commit(batch(namespace, 1))
    before = everything(server, namespace)
    dropping = Commit(position_at(2), outputs=batch(namespace, 2).outputs, drops=["one"])
    store.client.config_set("maxmemory", 1)
    try:
        for each in (batch(namespace, 2), dropping):
            with pytest.raises(StoreUnavailableError) as refused:
                store.commit(each)
            assert refused.value.reason == "out_of_memory"
        assert everything(server, namespace) == before
    finally:
        store.client.config_set("maxmemory", 0)
    store.commit(dropping)
    assert store.load(PARTS) == Snapshot(position_at(2), {"one": {}, "two": {}})


def test_a_server_that_became_read_only_is_unavailable_not_an_end(server, namespace):
    store = store_of(server, namespace)
    store.commit(batch(namespace, 1))
    store.client.replicaof("127.0.0.1", free_port())
    try:
        with pytest.raises(StoreUnavailableError) as refused:
            store.commit(batch(namespace, 2))
        assert refused.value.reason == "read_only"
    finally:
        store.client.replicaof("NO", "ONE")
    store.commit(batch(namespace, 2))


def test_scripts_that_a_server_forgot_are_loaded_again(server, namespace):
    store = store_of(server, namespace)
    store.commit(batch(namespace, 1))
    store.client.script_flush()
    store.commit(batch(namespace, 2))
    assert store.load(PARTS).position == position_at(2)


def test_a_server_that_may_drop_keys_is_refused(server):
    client = connect(server)
    client.config_set("maxmemory-policy", "allkeys-lru")
    try:
        with pytest.raises(StoreMisuseError, match="noeviction"):
            check_server(client)
    finally:
        client.config_set("maxmemory-policy", "noeviction")
    assert check_server(client)


def test_a_server_that_is_not_there_is_unavailable():
    with pytest.raises(StoreUnavailableError):
        check_server(connect(f"redis://127.0.0.1:{free_port()}/0"))


def test_a_client_never_sends_a_write_twice_by_itself(server, namespace):
    with proxy(server) as between:
        client = connect(between.url)
        client.ping()
        between.fault = "cut"
        with pytest.raises(redis.ConnectionError):
            client.incr(f"{namespace}:n")
        assert client.get(f"{namespace}:n") == b"1"


NUMBERS = st.one_of(
    st.integers(0, 2**64 - 1), st.sampled_from([0, 9, 10, 2**53, 2**53 + 1, 2**63, 2**64 - 2]), st.integers(0, 20)
)
PAIRS = st.tuples(NUMBERS, NUMBERS)


def text(pair: tuple[int, int]) -> str:
    return f"{pair[0]}-{pair[1]}"


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(last=PAIRS.filter(any), following=PAIRS.filter(any))
@example(last=(2**53, 0), following=(2**53 + 1, 0))  # the same double
@example(last=(9, 0), following=(10, 0))  # text would order them the other way
@example(last=(5, 9), following=(5, 10))
def test_ids_compare_as_pairs_of_integers_of_any_size(valkey, namespace, last, following):
    """The oracle is Python's order of tuples."""
    store = store_of(valkey, namespace)
    key = f"{namespace}:ids"
    store.client.delete(key)
    store.client.xadd(key, {"data": ""}, id=text(last))
    commit = Commit(Position(), [Output(key, [text(following)], [b""])])
    if following > last:
        store.commit(commit)
        assert store.client.xlen(key) == 2
    else:
        with pytest.raises(StoreMisuseError):
            store.commit(commit)
        assert store.client.xlen(key) == 1
    store.release()


def test_a_restarted_server_is_met_again_with_its_scripts_gone(tmp_path, needs, namespace):
    """A redis-server with an append-only file, killed and started again under a store that lives on."""
    port = free_port()
    arguments = [needs("redis-server"), "--port", str(port), "--bind", "127.0.0.1", "--appendonly", "yes"]
    arguments += ["--save", "", "--appendfsync", "always", "--dir", str(tmp_path)]
    url = f"redis://127.0.0.1:{port}/0"

    def serve() -> subprocess.Popen[bytes]:
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
        wait_for(lambda: answers(url))
        return process

    process = serve()
    try:
        store = store_of(url, namespace)
        store.commit(batch(namespace, 1))
        process.kill()
        process.wait()
        with pytest.raises(StoreUnavailableError):
            store.commit(batch(namespace, 2))
        process = serve()
        store.commit(batch(namespace, 2))
        assert store.load(PARTS).position == position_at(2)
    finally:
        process.kill()
        process.wait()
