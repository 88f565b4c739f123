"""The same bars give the same bits, however they are cut into batches and whatever is between them."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.contracts import V2, V3, V6
from tests.parity.markets import market, random_walk
from worker.features.bank import FeatureBank

SETS = (V3, V2, V6)


def alone(bars):
    """One series, one bar a call: the reference for everything below."""
    bank = FeatureBank(SETS)
    row = np.zeros(1, np.int64)
    return np.concatenate([bank.update(row, bars[i : i + 1])[0] for i in range(len(bars))])


@pytest.mark.parametrize("size", [1, 7, 256, 5031])
def test_a_batch_of_any_size_gives_the_bits_of_one_bar_a_call(size):
    bars = market("sp500")
    bank = FeatureBank(SETS)
    parts = [bank.update(np.zeros(len(p), np.int64), p)[0] for p in np.split(bars, range(size, len(bars), size))]
    assert np.concatenate(parts).tobytes() == alone(bars).tobytes()


def test_core_columns_have_the_same_bits_with_and_without_the_extended_group():
    bars = market("sp500")
    rows = np.zeros(len(bars), np.int64)
    plain = FeatureBank((V3,)).update(rows, bars)[0]
    with_v6 = FeatureBank(SETS).update(rows, bars)[0]
    assert plain.tobytes() == np.ascontiguousarray(with_v6[:, : len(V3)]).tobytes()


@settings(max_examples=60, deadline=None)
@given(
    order=st.lists(st.integers(0, 4), min_size=1, max_size=300),
    cuts=st.lists(st.integers(0, 300), max_size=12),
    seed=st.integers(0, 2**16),
)
def test_interleaved_series_do_not_touch_each_other(order, cuts, seed):
    rows = np.array(order, np.int64)
    bars = random_walk(seed, len(rows))
    bank = FeatureBank(SETS)
    bounds = [0, *sorted(min(c, len(rows)) for c in cuts), len(rows)]
    parts = [bank.update(rows[a:b], bars[a:b])[0] for a, b in pairwise(bounds)]
    values = np.concatenate(parts)
    for row in set(order):
        own = rows == row
        assert values[own].tobytes() == alone(bars[own]).tobytes()


@settings(max_examples=40, deadline=None)
@given(lives=st.lists(st.integers(1, 130), min_size=1, max_size=6), size=st.integers(1, 100))
def test_a_restarted_series_is_a_new_one(lives, size):
    """Whatever the earlier lives left in the ring, and wherever in a batch the restart falls."""
    bars = random_walk(sum(lives), sum(lives))
    starts = np.cumsum([0, *lives[:-1]])
    restart = np.isin(np.arange(len(bars)), starts)
    bank = FeatureBank(SETS)
    cuts = range(size, len(bars), size)
    parts = zip(np.split(bars, cuts), np.split(restart, cuts), strict=True)
    values = np.concatenate([bank.update(np.zeros(len(b), np.int64), b, r)[0] for b, r in parts])
    expected = np.concatenate([alone(life) for life in np.split(bars, starts[1:])])
    assert values.tobytes() == expected.tobytes()
