"""The bank: readiness, hot reload of sets, and a stored state that continues bit for bit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.contracts import V2, V3, V6, union
from tests.parity.markets import random_walk
from worker.features.bank import FeatureBank, StateCorruptError

ALL = (V3, V2, V6)
SERIES = np.zeros(1, np.int64)


def feed(bank, bars, row=0, restart_at=None, storage=None, size=7):
    """Bars of one series in batches of `size`; stores the changes. Gives values and readiness."""
    values, ready = [], []
    for start in range(0, len(bars), size):
        part = bars[start : start + size]
        rows = np.full(len(part), row, np.int64)
        restart = None if restart_at is None else np.arange(start, start + len(part)) == restart_at
        v, r = bank.update(rows, part, restart)
        values.append(v)
        ready.append(r)
        if storage is not None:
            storage.update(bank.changes(rows))
    return np.concatenate(values), np.concatenate(ready)


def test_names_are_the_union_of_the_sets_in_order():
    assert FeatureBank(ALL).names == union(ALL)
    assert FeatureBank().names == V3.features
    assert FeatureBank((V6, V2)).sets == (V6, V2)


def test_a_set_is_ready_from_its_warm_up_bar_on():
    _, ready = feed(FeatureBank(ALL), random_walk(1, 300))
    assert [int(r.argmax()) + 1 for r in ready.T] == [100, 100, 250]
    assert ready[249:].all()


def test_warm_up_can_be_set_down_to_the_longest_window_and_then_nothing_is_undefined():
    warmup = {s.name: s.longest_window for s in ALL}
    bank = FeatureBank(ALL, warmup)
    values, ready = feed(bank, random_walk(2, 80))
    for k, feature_set in enumerate(ALL):
        columns = [bank.names.index(name) for name in feature_set.features]
        assert int(ready[:, k].argmax()) + 1 == feature_set.longest_window
        assert not np.isnan(values[ready[:, k]][:, columns]).any()


@pytest.mark.parametrize("feature_set", ALL, ids=lambda s: s.name)
def test_a_warm_up_shorter_than_the_longest_window_is_refused(feature_set):
    short = feature_set.longest_window - 1
    with pytest.raises(ValueError, match=f"{feature_set.name}: {short} bars .* at least {feature_set.longest_window}"):
        FeatureBank((feature_set,), {feature_set.name: short})


def test_series_have_their_own_readiness_and_a_restart_warms_up_again():
    bank = FeatureBank((V3,))
    bars = random_walk(3, 260)
    _, ready = feed(bank, bars, row=5, restart_at=120)
    assert np.flatnonzero(ready[:, 0]).tolist() == [*range(99, 120), *range(219, 260)]
    _, other = feed(bank, bars[:50], row=2)
    assert not other.any()


def test_an_empty_batch_is_no_bar():
    values, ready = FeatureBank(ALL).update(np.zeros(0, np.int64), np.zeros((0, 5)))
    assert values.shape == (0, len(union(ALL)))
    assert ready.shape == (0, 3)


@pytest.mark.parametrize(
    ("rows", "shape"), [([0, 1], (1, 5)), ([0], (1, 4)), ([-1], (1, 5))], ids=["lengths", "width", "negative"]
)
def test_a_malformed_batch_is_refused(rows, shape):
    with pytest.raises(ValueError, match=r"expected|numbered from 0"):
        FeatureBank().update(np.array(rows, np.int64), np.ones(shape))


def test_arrays_that_are_read_only_or_strided_are_taken_and_left_alone():
    bars = random_walk(4, 60)
    strided = np.asfortranarray(bars)
    strided.flags.writeable = False
    expected = FeatureBank(ALL).update(np.zeros(60, np.int64), bars)[0]
    found = FeatureBank(ALL).update(np.zeros(60, np.int64), strided)[0]
    assert found.tobytes() == expected.tobytes()


# Hot reload


def test_an_added_extended_group_starts_then_and_the_others_are_untouched():
    bars = random_walk(5, 700)
    bank = FeatureBank((V3,))
    before, _ = feed(bank, bars[:333])
    bank.set_sets(ALL)
    after, ready = feed(bank, bars[333:])
    untouched, _ = feed(FeatureBank((V3,)), bars)
    fresh, fresh_ready = feed(FeatureBank(ALL), bars[333:])
    extended = slice(len(V3) + 3, None)
    own = [i for i, name in enumerate(bank.names) if name not in {"returns", "price_range", "ema_50_dist"}][extended]
    assert np.concatenate([before, after[:, : len(V3)]]).tobytes() == untouched.tobytes()
    assert after[:, own].tobytes() == fresh[:, own].tobytes()
    assert ready[:, :2].all()
    assert np.array_equal(ready[:, 2], fresh_ready[:, 2])


def test_a_removed_group_is_forgotten_and_warms_up_again_when_it_returns():
    bars = random_walk(6, 900)
    bank = FeatureBank(ALL)
    feed(bank, bars[:300])
    bank.set_sets((V3, V2))
    feed(bank, bars[300:301])
    bank.set_sets(ALL)
    _, ready = feed(bank, bars[301:])
    assert ready[:, :2].all()
    assert int(ready[:, 2].argmax()) + 1 == V6.warmup_bars


def test_changing_the_core_sets_leaves_the_extended_group_alone():
    bars = random_walk(7, 400)
    bank = FeatureBank((V3, V6))
    feed(bank, bars[:300])
    bank.set_sets((V2, V6))
    values, ready = feed(bank, bars[300:])
    whole, _ = feed(FeatureBank((V2, V6)), bars)
    assert values.tobytes() == whole[300:].tobytes()
    assert ready.all()


# Stored state


def memory_of(storage, sets):
    """The bytes of state and rings that a stored state leads to."""
    bank = FeatureBank(sets)
    bank.restore(storage)
    return bank._store.state.tobytes(), bank._store.ring.tobytes()


@settings(max_examples=40, deadline=None)
@given(
    cut=st.integers(0, 200),
    restart_at=st.none() | st.integers(0, 260),
    sets=st.sampled_from([(V3,), (V2,), (V6,), ALL]),
    size=st.integers(1, 90),
)
def test_a_restored_bank_continues_bit_for_bit(cut, restart_at, sets, size):
    bars = random_walk(8, 260)
    storage, expected_storage = {}, {}
    expected, expected_ready = feed(FeatureBank(sets), bars, 3, restart_at, expected_storage, size=1)
    first, _ = feed(FeatureBank(sets), bars[:cut], 3, restart_at, storage, size) if cut else (expected[:0], None)
    later = None if restart_at is None else restart_at - cut
    bank = FeatureBank(sets)
    bank.restore(storage)
    second, ready = feed(bank, bars[cut:], 3, later, storage, size)
    assert np.concatenate([first, second]).tobytes() == expected.tobytes()
    assert np.array_equal(ready, expected_ready[cut:])
    assert memory_of(storage, sets) == memory_of(expected_storage, sets)


def test_what_is_stored_grows_with_new_bars_and_never_holds_the_whole_window():
    bank = FeatureBank()
    feed(bank, random_walk(9, 100), row=4)
    assert [name for name, _ in bank.changes(np.array([4]))] == [b"4", b"4:35"]
    rows = np.array([4, 9, 4, 4])
    bank.update(rows, random_walk(9, 4))
    assert [name for name, _ in bank.changes(rows)] == [b"4", b"9", b"4:36", b"4:37", b"4:38", b"9:0"]
    assert sum(len(blob) for _, blob in bank.changes(np.array([4]))) < 400
    rows = np.zeros(1000, np.int64)
    bank.update(rows, random_walk(9, 1000))
    assert len(bank.changes(rows)) == 65


def test_a_thousand_series_come_back_each_with_its_own_state():
    rows = np.arange(1000)
    bars = random_walk(10, 70)
    bank, storage = FeatureBank(), {}
    for i in range(70):
        bank.update(rows, bars[i] * (1 + rows[:, None] / 1000))
        storage.update(bank.changes(rows))
    assert len(storage) == 65_000
    restored = FeatureBank()
    restored.restore(storage)
    following = np.tile(bars[0], (1000, 1))
    assert restored.update(rows, following)[0].tobytes() == bank.update(rows, following)[0].tobytes()


def test_ring_rows_of_an_earlier_life_in_storage_are_never_read():
    bars = random_walk(11, 400)
    bank, storage = FeatureBank(ALL), {}
    feed(bank, bars[:200], storage=storage)
    feed(bank, bars[200:210], restart_at=0, storage=storage)
    assert len(storage) == 65
    restored = FeatureBank(ALL)
    restored.restore(storage)
    values, _ = feed(restored, bars[210:])
    assert values.tobytes() == feed(FeatureBank(ALL), bars[200:])[0][10:].tobytes()


def test_the_extended_group_starts_when_a_state_without_it_is_restored():
    bars = random_walk(12, 700)
    storage = {}
    feed(FeatureBank((V3,)), bars[:333], storage=storage)
    restored = FeatureBank(ALL)
    restored.restore(storage)
    reloaded = FeatureBank((V3,))
    feed(reloaded, bars[:333])
    reloaded.set_sets(ALL)
    found, ready = feed(restored, bars[333:])
    expected, expected_ready = feed(reloaded, bars[333:])
    assert found.tobytes() == expected.tobytes()
    assert np.array_equal(ready, expected_ready)
    assert int(ready[:, 2].argmax()) + 1 == V6.warmup_bars


def test_a_stored_group_that_missed_bars_is_not_taken_up_again():
    """Stored with v6, run without it for a while, then with it: its sums would have a hole."""
    bars = random_walk(19, 700)
    storage = {}
    feed(FeatureBank(ALL), bars[:300], storage=storage)
    bank = FeatureBank((V3,))
    bank.restore(storage)
    feed(bank, bars[300:350], storage=storage)
    bank.set_sets(ALL)
    _, ready = feed(bank, bars[350:])
    assert int(ready[:, 2].argmax()) + 1 == V6.warmup_bars
    restarted = FeatureBank(ALL)
    restarted.restore(storage)
    _, ready = feed(restarted, bars[350:])
    assert int(ready[:, 2].argmax()) + 1 == V6.warmup_bars


@pytest.mark.parametrize("crash", [False, True])
def test_a_removed_group_stays_forgotten_for_series_without_new_bars(crash):
    """A restart between the removal and the return of the group must change nothing."""
    bars = random_walk(13, 600)
    bank, storage = FeatureBank(ALL), {}
    feed(bank, bars[:300], row=0, storage=storage)
    feed(bank, bars[:300], row=1, storage=storage)
    bank.set_sets((V3,))
    feed(bank, bars[300:301], row=0, storage=storage)
    if crash:
        bank = FeatureBank(ALL)
        bank.restore(storage)
    else:
        bank.set_sets(ALL)
    _, ready = feed(bank, bars[300:], row=1)
    assert int(ready[:, 2].argmax()) + 1 == V6.warmup_bars


def stored():
    storage = {}
    feed(FeatureBank(), random_walk(14, 100), storage=storage)
    return storage


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_is_refused_by_name_and_the_bank_keeps_what_it_had(data):
    storage = stored()
    field = data.draw(st.sampled_from(sorted(storage)))
    at = data.draw(st.integers(0, 8 * len(storage[field]) - 1))
    blob = bytearray(storage[field])
    blob[at // 8] ^= 1 << at % 8
    bank, twin = FeatureBank(), FeatureBank()
    for b in (bank, twin):
        feed(b, random_walk(15, 30))
    with pytest.raises(StateCorruptError, match="rebuild") as refused:
        bank.restore({**storage, field: bytes(blob)})
    assert refused.value.field == field
    following = random_walk(16, 30)
    assert feed(bank, following)[0].tobytes() == feed(twin, following)[0].tobytes()


def test_blobs_that_are_cut_swapped_missing_or_of_another_version_are_refused():
    storage = stored()
    other_version = storage[b"0"][:4] + (99).to_bytes(4, "little") + storage[b"0"][8:]
    wrong = {
        "bytes found": {b"0": storage[b"0"][:-1]},
        "version 99 found": {b"0": other_version},
        "version 99 found, ": {b"0": other_version + b"longer"},
        "CRC-32": {b"0:5": storage[b"0:6"]},
    }
    for message, change in wrong.items():
        with pytest.raises(StateCorruptError, match=message):
            FeatureBank().restore({**storage, **change})
    with pytest.raises(StateCorruptError, match="63 items of its ring found, 64 expected"):
        FeatureBank().restore({k: v for k, v in storage.items() if k != b"0:9"})
    with pytest.raises(StateCorruptError, match="items of its ring are there"):
        FeatureBank().restore({k: v for k, v in storage.items() if k != b"0"})


def test_an_item_of_an_earlier_life_is_no_replacement_for_a_missing_one():
    bars = random_walk(17, 200)
    bank, storage = FeatureBank(), {}
    feed(bank, bars[:100], storage=storage)
    old = storage[b"0:3"]
    feed(bank, bars[:100], restart_at=0, storage=storage)
    with pytest.raises(StateCorruptError, match="63 items"):
        FeatureBank().restore({**storage, b"0:3": old})


def test_nothing_stored_restores_to_nothing():
    bank = FeatureBank()
    feed(bank, random_walk(18, 150))
    bank.restore({})
    _, ready = feed(bank, random_walk(18, 150))
    assert int(ready[:, 0].argmax()) + 1 == V3.warmup_bars
