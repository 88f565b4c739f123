"""The state of a partition survives a crash after any record: what readers see, doubles removed, never differs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.codec import StateCorruptError, from_json, to_json
from streams.messages import Entry
from streams.records import join, unpack
from streams.redis import with_baseline
from streams.store import Commit, FencedError, InputLostError, Output, Position, StoreUnavailableError
from worker.kafka import ledger as module
from worker.kafka.ledger import Change, Ledger, Record
from worker.kafka.store import Bounds, PartitionStore

BARS = "t:bars"
CONTROL = "t:control"


class Crash(Exception):
    """The process dies here."""


@dataclass
class Broker:
    """A changelog and topics in memory. `left` records can be written before the writer dies."""

    changelog: list[Record] = field(default_factory=list)
    topics: dict[str, list[bytes]] = field(default_factory=dict)
    left: int = 10**9
    lives: int = 0

    def log(self, records: Sequence[Record]) -> list[int]:
        offsets = []
        for record in records:
            self._spend()
            self.changelog.append(record)
            offsets.append(len(self.changelog) - 1)
        return offsets

    def logged(self, start: int) -> tuple[list[bytes], int]:
        return [key for key, value in self.changelog[start:] if value is not None], len(self.changelog)

    def send(self, outgoing: Sequence[tuple[str, bytes]]) -> Mapping[str, int]:
        for topic, value in outgoing:
            self._spend()
            self.topics.setdefault(topic, []).append(value)
        return {topic: len(self.topics[topic]) for topic, _ in outgoing}

    def _spend(self) -> None:
        if not self.left:
            raise Crash
        self.left -= 1

    def done(self, events: Sequence[Any]) -> None:
        """A committed offset only spares work; here none is ever committed."""

    def end(self, key: str) -> int:
        return 0

    def compacted(self) -> dict[bytes, bytes]:
        """The newest value of each key, as a broker that compacts keeps it."""
        newest: dict[bytes, bytes] = {}
        for key, value in self.changelog:
            newest.pop(key, None)
            if value is not None:
                newest[key] = value
        return newest

    def read(self) -> dict[str, Any]:
        """What readers make of it: the first of each ID; doubles that differ fail."""
        found: dict[str, Any] = {}
        for value in self.topics.get("t.signals", []):
            for one in map(from_json, unpack(value)):
                assert found.setdefault(one["id"], one) == one
        return {name: {k: v for k, v in one.items() if k != "life"} for name, one in found.items()}


def store_over(broker: Broker, records: Sequence[bytes], *, segment_bytes: int = 10_000) -> PartitionStore:
    """The store of the next owner, with every record delivered again."""
    taken_over = Ledger.restore(broker.compacted(), segment_bytes=segment_bytes)
    bounds = {BARS: Bounds(0, len(records)), CONTROL: Bounds(0, 0)}
    store = PartitionStore(taken_over, broker, bounds, len(broker.changelog))
    for offset, value in enumerate(records):
        store.put(BARS, offset, value, 1_000 + offset, offset)
    return store


def count(entries: Sequence[Entry], counts: Mapping[bytes, bytes], life: int) -> tuple[list[bytes], dict[bytes, bytes]]:
    """A stage whose every output depends on all that came before: the how-manieth of its symbol this is.

    It says which life decided it, as one with a newer model would: what was decided once must stay so.
    """
    outputs, changed = [], {}
    for entry in entries:
        symbol = from_json(entry.fields[b"data"])["symbol"].encode()
        n = int(changed.get(symbol, counts.get(symbol, b"0"))) + 1
        changed[symbol] = b"%d" % n
        outputs.append(
            to_json({"id": entry.id, "symbol": symbol.decode(), "n": n, "at": entry.arrived_ms, "life": life})
        )
    return outputs, changed


def live(broker: Broker, records: Sequence[bytes], batch: int) -> None:
    """One life of an owner, to the end of the input or of the process."""
    store = store_over(broker, records, segment_bytes=150)
    broker.lives += 1
    assert store.acquire()
    snapshot = store.load(("counts",))
    position, counts = snapshot.position, dict(snapshot.state["counts"])
    while True:
        read = store.read(position, [BARS], batch)
        position = with_baseline(position, read.facts)
        if not read.entries:
            break
        outputs, changed = count(read.entries, counts, broker.lives)
        position = position.advanced(read.entries, read.entries[-1].id)
        output = Output("t:signals", [entry.id for entry in read.entries], outputs)
        assert store.commit(Commit(position, [output], state={"counts": list(changed.items())}))
        counts |= changed
    assert store.waiting == 0
    store.release()


RECORDS = st.lists(st.lists(st.sampled_from("ABCDEFG"), min_size=1, max_size=5), min_size=1, max_size=12)


@settings(deadline=None, max_examples=60)
@given(RECORDS, st.lists(st.tuples(st.integers(1, 30), st.integers(1, 7)), max_size=8), st.integers(1, 7))
def test_crashes_after_any_records_change_nothing_that_readers_see(
    symbols: list[list[str]], crashes: list[tuple[int, int]], batch: int
) -> None:
    """The expected counts are made without a store, a ledger or a batch."""
    records = [join([to_json({"symbol": s}) for s in some]) for some in symbols]
    broker = Broker()
    for left, size in crashes:
        broker.left = left
        try:
            live(broker, records, size)
        except Crash:
            continue
    broker.left = 10**9
    live(broker, records, batch)
    seen: Counter[str] = Counter()
    expected = {}
    for offset, some in enumerate(symbols):
        for place, symbol in enumerate(some, 1):
            seen[symbol] += 1
            name = f"{offset}-{place}"
            expected[name] = {"id": name, "symbol": symbol, "n": seen[symbol], "at": 1_000 + offset}
    assert broker.read() == expected
    held = Ledger.restore(broker.compacted()).state["counts"]
    assert {s.decode(): int(n) for s, n in held.items()} == seen


def test_every_crash_point_of_one_batch_gives_the_same_outputs() -> None:
    """Each number of records that a life may write, one after another, then a life to the end."""
    records = [join([to_json({"symbol": s}) for s in "ABCA"])] * 3
    whole = Broker()
    live(whole, records, 5)
    written = len(whole.changelog) + sum(map(len, whole.topics.values()))
    for left in range(written):
        broker = Broker(left=left)
        with pytest.raises(Crash):
            live(broker, records, 5)
        broker.left = 10**9
        live(broker, records, 3)
        assert broker.read() == whole.read(), f"after a crash at record {left}"


CHANGES = st.lists(
    st.tuples(st.dictionaries(st.integers(0, 20), st.binary(max_size=40), max_size=6), st.booleans()), max_size=40
)


@settings(deadline=None, max_examples=60)
@given(CHANGES, st.lists(st.integers(0, 39), max_size=3))
def test_the_state_is_that_of_a_plain_dict_whatever_is_cleaned(
    changes: list[tuple[dict[int, bytes], bool]], handovers: list[int]
) -> None:
    expected: dict[bytes, bytes] = {}
    broker = Broker()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SLACK_BYTES", 100)
        ours = Ledger(segment_bytes=90)
        for n, (fields, drop) in enumerate(changes):
            if drop:
                expected.clear()
            named = {b"%d" % name: value for name, value in fields.items()}
            expected |= named
            change = Change(b"%d" % n, ("p",) if drop else (), {("p", k): v for k, v in named.items()})
            note(broker, ours, change)
            if n in handovers:
                ours = Ledger.restore(broker.compacted(), segment_bytes=90)
            assert ours.state.get("p", {}) == expected
    again = Ledger.restore(broker.compacted())
    assert again.state.get("p", {}) == expected
    assert again.seq == len(changes)


def test_the_log_stays_small_however_long_it_is_written() -> None:
    ours, broker = Ledger(), Broker()
    for n in range(3_000):
        fields = {("rows", b"%d" % (n % 50)): bytes(1_000), ("rare", b"%d" % (n // 1_000)): bytes(1_000)}
        note(broker, ours, Change(b"%d" % n, fields=fields, outputs=bytes(5_000)))
    living, logged = ours.sizes
    assert living == pytest.approx(53_000, rel=0.02)
    assert logged <= 2 * living + module.SLACK_BYTES
    kept = broker.compacted()
    assert sum(map(len, kept.values())) < 1.1 * (2 * living + module.SLACK_BYTES)
    assert Ledger.restore(kept).sizes == (living, logged)
    # What lives is the newest part of the log: a broker may as well forget the rest by its age.
    newest = dict(list(kept.items())[-len(Ledger.restore(kept)._log) :])
    assert Ledger.restore(newest).state == ours.state


@settings(deadline=None, max_examples=100)
@given(CHANGES, CHANGES, CHANGES, st.integers(0, 39), st.integers(0, 39))
def test_a_late_commit_of_an_owner_that_was_replaced_destroys_nothing(
    before: list[tuple[dict[int, bytes], bool]],
    late: list[tuple[dict[int, bytes], bool]],
    after: list[tuple[dict[int, bytes], bool]],
    lands: int,
    again: int,
) -> None:
    """Its commit cleans what its successor still needs, and comes at any moment, twice, deletions included."""
    broker = Broker()
    expected: dict[module.Field, bytes] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SLACK_BYTES", 100)
        stale = Ledger("stale", segment_bytes=90)
        for fields, _ in before:
            expected |= note(broker, stale, numbered(fields))
        records = [record for fields, _ in late[:3] for record in stale.append(numbered(fields))]
        rightful = Ledger.restore(broker.compacted(), "rightful", segment_bytes=90)
        patch.setattr(module, "SLACK_BYTES", 3_000)  # it has less to clean
        note(broker, rightful, Change(rightful.position))
        for n, (fields, _) in enumerate(after):
            if n in {lands, again}:
                broker.log(records)
            expected |= note(broker, rightful, numbered(fields))
        broker.log(records)
        last = Ledger.restore(broker.compacted())
    assert last.state.get("p", {}) == {name: value for (_, name), value in expected.items()}
    assert last.seq == rightful.seq


def numbered(fields: Mapping[int, bytes]) -> Change:
    return Change(b"here", fields={("p", b"%d" % name): value for name, value in fields.items()})


def note(broker: Broker, ledger: Ledger, change: Change) -> Mapping[module.Field, bytes]:
    """Write a change as a store does whose writes all come through; its fields."""
    broker.log(ledger.append(change))
    ledger.confirm()
    return change.fields


def test_of_two_owners_that_claim_the_same_epoch_the_first_in_the_changelog_holds_it() -> None:
    broker = written()
    one, two = (Ledger.restore(broker.compacted(), name) for name in ("one", "two"))
    claims = {owner: owner.append(Change(b"c", fields={("p", b"who"): owner.owner.encode()})) for owner in (one, two)}
    broker.log([*claims[two], *claims[one]])
    keys = [claims[two][0][0], claims[one][0][0]]
    assert two.rival(keys) is None
    assert one.rival(keys) == claims[two][0][0]
    assert Ledger.restore(broker.compacted()).state["p"][b"who"] == b"two"
    two.confirm()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SLACK_BYTES", 0)
        for n in range(20):  # its claim is cleaned away, and the other's before it
            note(broker, two, Change(b"%d" % n, fields={("p", b"n"): b"%d" % n}))
            last = Ledger.restore(broker.compacted())
            assert (last.state["p"][b"who"], last.state["p"][b"n"]) == (b"two", b"%d" % n)
    assert not {key for key, _ in claims[one] + claims[two]} & broker.compacted().keys()


def written(changes: int = 6) -> Broker:
    broker, ours = Broker(), Ledger("first")
    for n in range(changes):
        broker.log(ours.append(Change(b"%d" % n, fields={("p", b"%d" % n): b"x"})))
    return broker


@pytest.mark.parametrize("lost", [0, 2, 4])
def test_a_commit_that_is_gone_from_the_middle_is_corrupt_state(lost: int) -> None:
    kept = written().compacted()
    del kept[list(kept)[lost]]
    with pytest.raises(StateCorruptError, match=r"it is missing|does not follow"):
        Ledger.restore(kept)


def test_a_byte_that_changed_is_corrupt_state() -> None:
    kept = written().compacted()
    key = list(kept)[3]
    kept[key] = kept[key][:-1] + bytes((kept[key][-1] ^ 1,))
    with pytest.raises(StateCorruptError, match="checksum"):
        Ledger.restore(kept)


def test_what_an_owner_writes_after_another_took_over_is_void() -> None:
    """Its keys are its own, so that compaction never lets it replace what its successor wrote."""
    broker = written()
    frozen = Ledger.restore(broker.compacted(), "frozen")
    broker.log(frozen.append(Change(b"a", fields={("p", b"0"): b"a"})))
    successor = Ledger.restore(broker.compacted(), "successor")
    broker.log(successor.append(Change(b"b", fields={("p", b"0"): b"b"})))
    for n in range(5):
        broker.log(frozen.append(Change(b"c%d" % n, fields={("p", b"0"): b"c"})))
    after = Ledger.restore(broker.compacted())
    assert after.position == b"b"
    assert after.state["p"][b"0"] == b"b"
    assert after.epoch > successor.epoch > frozen.epoch


def test_two_owners_that_write_at_once_are_noticed_before_an_output_is_sent() -> None:
    broker = Broker()
    record = [to_json({"symbol": "A"})]
    first = store_over(broker, record)
    first.acquire()
    second = store_over(broker, record)
    second.acquire()
    position = with_baseline(Position(), first.read(Position(), [BARS], 9).facts)
    with pytest.raises(FencedError, match="another worker wrote to the changelog"):
        first.commit(Commit(position, [Output("t:signals", ["0-1"], [b'{"id":"0-1"}'])]))
    assert broker.topics == {}


@dataclass
class Doubtful(Broker):
    """Says once that it does not know what became of a write: `first` records of it are there, `late` come later."""

    first: int | None = None
    late: list[Record] = field(default_factory=list)

    def log(self, records: Sequence[Record]) -> list[int]:
        if self.first is not None:
            super().log(records[: self.first])
            self.late, self.first = list(records[self.first :]), None
            raise StoreUnavailableError("no answer")
        return super().log(records)


def one_commit(store: PartitionStore, says: bytes) -> Commit:
    """The commit of the entry 0-1, whose output is `says`."""
    position = with_baseline(Position(), store.read(Position(), [BARS], 9).facts)
    entries = store.read(position, [BARS], 9).entries
    fields = {"counts": [(b"who", says), (b"much", bytes(400))]}
    return Commit(position.advanced(entries, "0-1"), [Output("t:signals", ["0-1"], [says])], state=fields)


def test_after_a_write_without_an_answer_a_successor_is_noticed_before_an_output_is_sent() -> None:
    """And it is the successor that goes on."""
    broker, record = Doubtful(), [to_json({"symbol": "A"})]
    first = store_over(broker, record)
    first.acquire()
    commit, broker.first = one_commit(first, b'{"id":"a"}'), 0
    with pytest.raises(StoreUnavailableError):
        first.commit(commit)
    second = store_over(broker, record)
    second.acquire()
    with pytest.raises(FencedError, match="another worker wrote to the changelog"):
        first.commit(commit)
    broker.changelog += broker.late  # what was on its way comes all the same
    second.commit(one_commit(second, b'{"id":"b"}'))
    assert broker.topics == {"t.signals": [b'{"id":"b"}']}
    assert Ledger.restore(broker.compacted()).state["counts"][b"who"] == b'{"id":"b"}'


@pytest.mark.parametrize("first", [0, 1, 99])
@pytest.mark.parametrize("late", ["never", "before the retry", "in front of it"])
def test_the_only_worker_goes_on_after_a_write_without_an_answer(first: int, late: str) -> None:
    """However much of the write was made, and whether the rest comes later: our own records are no rival's."""
    broker = Doubtful()
    store = store_over(broker, [to_json({"symbol": "A"})], segment_bytes=150)
    store.acquire()
    commit, broker.first = one_commit(store, b'{"id":"a"}'), first
    with pytest.raises(StoreUnavailableError):
        store.commit(commit)
    if late == "before the retry":
        broker.changelog += broker.late
    seen = broker.logged
    if late == "in front of it":
        broker.logged = lambda start: (seen(start), broker.changelog.extend(broker.late), broker.late.clear())[0]  # type: ignore[method-assign]
    assert store.commit(commit)
    store.release()
    assert broker.topics == {"t.signals": [b'{"id":"a"}']}
    last = store_over(broker, [])
    assert last.acquire()
    assert last.was_clean
    assert last.load(("counts",)).state["counts"][b"who"] == b'{"id":"a"}'


def test_an_entry_that_kills_is_counted_over_lives_and_not_within_one() -> None:
    broker = Broker()
    entry = Entry(BARS, "7-1", {})
    for life in range(1, 4):
        store = store_over(broker, [])
        store.acquire()
        assert store.was_clean is (life == 1)
        assert [store.mark(entry), store.mark(entry)] == [life, life]
    store = store_over(broker, [])
    store.acquire()
    assert store.mark(Entry(BARS, "8-1", {})) == 1
    store.release()
    after = store_over(broker, [])
    after.acquire()
    assert after.was_clean


def test_input_that_is_gone_is_said_with_its_count() -> None:
    broker = Broker()
    records = [to_json({"symbol": "A"})] * 5
    live(broker, records, 5)

    def taken_over(first: int, end: int) -> PartitionStore:
        bounds = {BARS: Bounds(first, end), CONTROL: Bounds(0, 0)}
        return PartitionStore(Ledger.restore(broker.compacted()), broker, bounds, len(broker.changelog))

    position = taken_over(0, 5).load(()).position
    assert position.inputs[BARS].id == "4-1"
    assert taken_over(5, 5).read(position, [BARS], 1).entries == []
    with pytest.raises(InputLostError, match="3 records were deleted before they were read to their end") as lost:
        taken_over(8, 9).read(position, [BARS], 1)
    assert (lost.value.lost, lost.value.resume.id.partition("-")[0]) == (3, "7")
    with pytest.raises(InputLostError, match="recreated or rewound"):
        taken_over(0, 2).read(position, [BARS], 1)


def test_a_record_that_is_gone_in_the_middle_of_its_reading_is_lost_too() -> None:
    broker, records = Broker(), [join([to_json({"symbol": "A"})] * 5)] * 3
    store = store_over(broker, records)
    store.acquire()
    position = with_baseline(Position(), store.read(Position(), [BARS], 9).facts)

    def go_on(store: PartitionStore, position: Position, count: int) -> Position:
        entries = store.read(position, [BARS], count).entries
        position = position.advanced(entries, entries[-1].id)
        store.commit(Commit(position))
        return position

    def lost(first: int) -> int:
        bounds = {BARS: Bounds(first, 3), CONTROL: Bounds(0, 0)}
        after = PartitionStore(Ledger.restore(broker.compacted()), broker, bounds, len(broker.changelog))
        try:
            after.read(after.load(()).position, [BARS], 9)
        except InputLostError as error:
            return error.lost
        return 0

    position = go_on(store, position, 3)
    assert [lost(first) for first in range(4)] == [0, 1, 2, 3]
    store.commit(Commit(position))  # of the orders alone, say
    successor = store_over(broker, records)
    successor.acquire()
    assert lost(1) == 1
    position = go_on(successor, position, 2)
    assert [lost(first) for first in range(4)] == [0, 0, 1, 2]
    go_on(successor, position, 6)
    assert [lost(first) for first in range(4)] == [0, 0, 0, 1]


def test_records_that_hold_no_bar_are_let_go_in_their_turn() -> None:
    class Noting(Broker):
        def done(self, events: Sequence[Any]) -> None:
            told.extend(events)

    told: list[Any] = []
    store = store_over(Noting(), [b"", b"[]", to_json({"symbol": "A"}), b"", to_json({"symbol": "B"})])
    store.acquire()
    assert told == [0, 1]
    read = store.read(Position(), [BARS], 1)
    position = with_baseline(Position(), read.facts).advanced(read.entries, "2-1")
    store.commit(Commit(position))
    assert told == [0, 1, 2, 3]
    assert store.waiting == 1


def test_flat_fields_become_an_object_whatever_their_bytes_are() -> None:
    broker = Broker()
    store = store_over(broker, [])
    store.acquire()
    row = [b"reason", b"type", b"source_key", b"t:bars", b"in:close", b"\xff1"]
    store.commit(Commit(Position(), appends={"t:rejected": [row], "t:events": [[b"data", b'{"kind":"gap"}']]}))
    assert broker.topics["t.events"] == [b'{"kind":"gap"}']
    [rejected] = map(from_json, broker.topics["t.rejected"])
    assert rejected == {"reason": "type", "source_key": "t.bars", "in:close": "\\xff1"}


def test_what_a_ledger_keeps_is_plain_msgpack_behind_a_checksum() -> None:
    """The layout of a record, so that a change of it is a decision: version, CRC-32, then the values."""
    [(key, value)] = Ledger("me").append(Change(b"here", fields={("p", b"f"): b"v"}, outputs=b"o"))
    assert key == b"1.me-1-0"
    seq, epoch, owner, place, n, piece = msgpack.unpackb(value[5:])
    assert (seq, epoch, owner, place, n) == (1, 1, "me", 0, 1)
    assert msgpack.unpackb(piece[5:]) == [1, b"", b"here", [], [["p", b"f", b"v"]], b"o"]
