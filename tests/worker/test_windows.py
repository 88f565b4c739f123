"""Windows of vectors: against a plain list a series, through restarts, storage and changed capacity."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.codec import StateCorruptError
from worker.features.windows import SequenceWindows

WIDTH = 3


def vectors_of(n, seed=0):
    vectors = np.random.default_rng(seed).normal(size=(n, WIDTH))
    vectors[::7, 1] = np.nan  # of the warm-up: kept as they came
    return vectors


def push(windows, rows, vectors, length, restart=None, storage=None, ready=None):
    rows = np.array(rows, np.int64)
    found, held = windows.push(rows, vectors, length, restart, ready)
    if storage is not None:
        storage.update(windows.changes(rows))
    return found, held >= length


operations = st.lists(st.tuples(st.integers(0, 3), st.booleans() | st.just(False)), min_size=1, max_size=60)


@settings(max_examples=60, deadline=None)
@given(batches=st.lists(operations, min_size=1, max_size=5), length=st.integers(1, 8), stop=st.booleans())
def test_windows_are_the_last_vectors_of_each_series_oldest_first(batches, length, stop):
    windows, storage, history = SequenceWindows(WIDTH, capacity=8), {}, {row: [] for row in range(4)}
    for i, batch in enumerate(batches):
        rows, restart = [row for row, _ in batch], np.array([again for _, again in batch])
        vectors = vectors_of(len(batch), seed=i)
        found, full = push(windows, rows, vectors, length, restart, storage)
        for j, (row, again) in enumerate(batch):
            history[row] = [*([] if again else history[row]), vectors[j]]
            assert full[j] == (len(history[row]) >= length)
            if full[j]:
                assert np.array_equal(found[j], np.array(history[row][-length:]), equal_nan=True)
        if stop:
            windows = SequenceWindows(WIDTH, capacity=8)
            windows.restore(storage)
    for row, held in enumerate(windows.counts[:4]):
        assert held == min(len(history[row]), 8)


def test_one_vector_a_call_gives_the_bits_of_many_a_call():
    rows, vectors = np.arange(200) % 3, vectors_of(200)
    found, full = push(SequenceWindows(WIDTH), rows, vectors, 16)
    single = SequenceWindows(WIDTH)
    for i in range(200):
        window, is_full = push(single, rows[i : i + 1], vectors[i : i + 1], 16)
        assert is_full[0] == full[i]
        if full[i]:
            assert window[0].tobytes() == found[i].tobytes()


@pytest.mark.parametrize(("first", "then"), [(8, 8), (8, 20), (20, 8), (8, 5), (64, 100)])
def test_the_capacity_may_change_between_runs(first, then):
    """A longer ring fills up with new vectors; a shorter one keeps the newest; twice over."""
    vectors = vectors_of(400)
    windows, storage, at, held = SequenceWindows(WIDTH, first), {}, 0, 0
    for capacity, pushes in ((first, 150), (then, 9), (then, 11), (first, 30), (then, 120)):
        if at:
            windows = SequenceWindows(WIDTH, capacity)
            windows.restore(storage)
        held = min(held, capacity)
        for _ in range(pushes):
            found, full = push(windows, [2], vectors[at : at + 1], capacity, storage=storage)
            at, held = at + 1, min(held + 1, capacity)
            assert windows.counts[2] == held
            assert full[0] == (held == capacity)
            if full[0]:
                assert np.array_equal(found[0], vectors[at - capacity : at], equal_nan=True)


def test_one_blob_a_series_and_one_a_new_vector_are_stored():
    windows = SequenceWindows(WIDTH, capacity=4)
    rows = [1, 0, 1]
    windows.push(np.array(rows), vectors_of(3), 2)
    assert [name for name, _ in windows.changes(np.array(rows))] == [b"0", b"1", b"0:0", b"1:0", b"1:1"]


def test_a_corrupt_or_missing_vector_is_refused():
    windows, storage = SequenceWindows(WIDTH, capacity=4), {}
    push(windows, [0] * 9, vectors_of(9), 4, storage=storage)
    blob = bytearray(storage[b"0:2"])
    blob[-1] ^= 1
    with pytest.raises(StateCorruptError, match=r"0:2.*CRC-32.*rebuild"):
        SequenceWindows(WIDTH, 4).restore({**storage, b"0:2": bytes(blob)})
    with pytest.raises(StateCorruptError, match="3 items of its ring found, 4 expected"):
        SequenceWindows(WIDTH, 4).restore({k: v for k, v in storage.items() if k != b"0:2"})
    with pytest.raises(StateCorruptError, match="bytes found"):
        SequenceWindows(WIDTH + 1, 4).restore(storage)


def test_a_vector_of_an_earlier_life_is_no_replacement_for_a_missing_one():
    windows, storage = SequenceWindows(WIDTH, capacity=4), {}
    push(windows, [0] * 4, vectors_of(4), 4, storage=storage)
    old = storage[b"0:2"]
    push(windows, [0] * 4, vectors_of(4, seed=1), 4, np.array([True, False, False, False]), storage=storage)
    with pytest.raises(StateCorruptError, match="3 items"):
        SequenceWindows(WIDTH, 4).restore({**storage, b"0:2": old})


def test_malformed_pushes_are_refused():
    windows = SequenceWindows(WIDTH, capacity=4)
    with pytest.raises(ValueError, match="window of 5 vectors: 1 to 4"):
        windows.push(np.array([0]), vectors_of(1), 5)
    with pytest.raises(ValueError, match=r"expected \[N\], \[N, 3\]"):
        windows.push(np.array([0]), np.zeros((1, 2)), 2)
    with pytest.raises(ValueError, match="numbered from 0"):
        windows.push(np.array([-1]), vectors_of(1), 2)


def test_a_vector_that_is_not_ready_is_not_kept_but_its_restart_counts():
    windows, vectors = SequenceWindows(WIDTH, capacity=4), vectors_of(6)
    ready = np.array([True, True, True, False, False, True])
    restart = np.array([False, False, False, True, False, False])
    found, held = windows.push(np.zeros(6, np.int64), vectors, 2, restart, ready)
    assert held.tolist() == [1, 2, 3, 0, 0, 1]
    assert np.array_equal(found[2], vectors[1:3], equal_nan=True)
    assert np.array_equal(found[5, -1], vectors[5], equal_nan=True)


def test_a_ring_that_is_widened_keeps_what_it_holds_also_across_a_restart():
    vectors, rows = vectors_of(60), np.arange(60) % 3
    windows, storage = SequenceWindows(WIDTH, capacity=8), {}
    push(windows, rows[:40], vectors[:40], 8, storage=storage)
    windows.widen(12)
    push(windows, rows[40:50], vectors[40:50], 12, storage=storage)
    again = SequenceWindows(WIDTH, capacity=12)
    again.restore(storage)
    for one in (windows, again):
        found, full = push(one, rows[50:], vectors[50:], 11)
        for i in range(3, 10):
            assert full[i] == (i >= 1)
            assert np.array_equal(found[i], vectors[rows == rows[50 + i]][: (50 + i) // 3 + 1][-11:], equal_nan=True)
