"""Rows to learn from: the live features, labels that are true and never cross gaps, parts that never overlap."""

import numpy as np
import pandas as pd
import pytest

from streams.contracts import V3
from streams.messages import HORIZON
from worker.errors import UsageError
from worker.features.bank import FeatureBank
from worker.training.bars import Bars
from worker.training.dataset import WINDOW, make_samples, split
from worker.training.labels import find_runs
from worker.training.market import generate

MINUTE = 60_000


@pytest.fixture(scope="module")
def market():
    return generate(5, 700, seed=4)


@pytest.fixture(scope="module")
def samples(market):
    return make_samples(market.bars())


def _series(closes, times, symbol="A", interval="1m"):
    close = np.asarray(closes, float)
    ohlcv = np.stack([close, close, close, close, np.ones_like(close)], axis=1)
    return Bars(np.full(len(close), symbol), np.asarray(times, np.int64), np.full(len(close), interval), ohlcv)


def test_features_are_what_the_bank_gives_one_bar_a_call(market, samples):
    """The live way: one call for each minute, all symbols in it."""
    bank = FeatureBank((V3,))
    live = [bank.update(np.arange(5), market.ohlcv[t])[0] for t in range(300)]
    trained = samples.features.reshape(5, 700, -1)[:, :300]
    np.testing.assert_array_equal(trained, np.stack(live, axis=1))


def test_rows_are_ready_from_the_hundredth_bar_and_windows_from_the_163rd(samples):
    assert list(np.flatnonzero(samples.ready[:700])[:1]) == [99]
    assert list(np.flatnonzero(samples.windowed[:700])[:1]) == [99 + WINDOW - 1]


def test_labels_are_the_returns_that_pandas_computes(market, samples):
    close = pd.DataFrame(market.ohlcv[..., 3])
    for step in (1, 5, HORIZON):
        expected = (close.shift(-step) / close - 1).where(close.shift(-HORIZON).notna())
        found = samples.paths[:, step - 1].reshape(5, 700).T
        np.testing.assert_allclose(found, expected.to_numpy(), rtol=0, atol=0)


def test_labels_and_windows_never_cross_a_gap():
    """Brute force over every row: its label exists exactly where the next 12 minutes all do."""
    times = np.delete(np.arange(500), [180, 181, 333]) * MINUTE + 28_333_334 * MINUTE
    closes = 100 + np.sin(np.arange(len(times)))
    found = make_samples(_series(closes, times))
    present = set(times.tolist())
    for i, ts in enumerate(times.tolist()):
        whole = all(ts + k * MINUTE in present for k in range(HORIZON + 1))
        assert found.labelled[i] == whole == bool(np.isfinite(found.paths[i]).all())
        if whole:
            ahead = times.tolist().index(ts + HORIZON * MINUTE)
            assert found.paths[i, -1] == closes[ahead] / closes[i] - 1
            assert found.end_ts[i] == times[ahead]
        window = all(ts - k * MINUTE in present for k in range(WINDOW))
        assert found.windowed[i] == (window and i - (WINDOW - 1) >= 99)


def test_labels_never_reach_into_another_series():
    times = np.arange(300) * MINUTE + 28_333_334 * MINUTE
    one, other = _series(np.full(300, 10.0), times, "A"), _series(np.full(300, 99.0), times, "B")
    both = Bars(*(np.concatenate([a, b]) for a, b in zip(vars(one).values(), vars(other).values(), strict=True)))
    found = make_samples(both)
    assert np.nanmax(np.abs(found.paths)) == 0
    assert found.labelled.sum() == 2 * (300 - HORIZON)


def test_the_same_symbol_at_another_interval_is_another_series():
    minutes = _series(np.full(60, 10.0), np.arange(60) * MINUTE + 1_700_000_040_000, interval="1m")
    fives = _series(np.full(60, 20.0), np.arange(60) * 5 * MINUTE + 1_700_000_100_000, interval="5m")
    both = Bars(*(np.concatenate([a, b]) for a, b in zip(vars(minutes).values(), vars(fives).values(), strict=True)))
    assert make_samples(both).series.max() == 1


def test_features_warm_up_anew_only_after_more_missing_bars_than_live_allows():
    times = np.concatenate([np.arange(200), 300 + np.arange(200), 601 + np.arange(200)]) * MINUTE + 28_333_334 * MINUTE
    runs = find_runs(_series(np.full(600, 5.0), times), max_gap_bars=100)
    assert list(np.flatnonzero(runs.restart)) == [0, 400]
    assert list(np.flatnonzero(runs.position == 0)) == [0, 200, 400]


def test_a_weekend_between_daily_bars_is_no_gap():
    days = [d for d in range(60) if pd.Timestamp("2024-01-01") + pd.Timedelta(days=d) < pd.Timestamp("2024-03-01")]
    dates = [pd.Timestamp("2024-01-01", tz="UTC") + pd.Timedelta(days=d) for d in days]
    times = [int(d.timestamp() * 1000) for d in dates if d.weekday() < 5]
    runs = find_runs(_series(np.full(len(times), 5.0), times, interval="1d"), max_gap_bars=100)
    assert (np.diff(runs.position) == 1).all()


@pytest.mark.parametrize("windowed", [False, True])
def test_parts_are_in_order_of_time_with_the_horizon_between_them(samples, windowed):
    parts = split(samples, windowed=windowed)
    for earlier, later in ((parts.training, parts.validation), (parts.validation, parts.test)):
        last_decided = samples.end_ts[earlier].max()
        assert last_decided < samples.ts[later].min()
        assert samples.ts[later].min() - samples.ts[earlier].max() > HORIZON * MINUTE
    usable = samples.labelled & samples.ready & (samples.windowed | (not windowed))
    assert usable[np.concatenate([parts.training, parts.validation, parts.test])].all()


def test_every_symbol_is_cut_at_the_same_times_and_every_agent_too(samples):
    trees, networks = split(samples, windowed=False), split(samples, windowed=True)
    assert trees.cuts == networks.cuts
    for part in (trees.validation, trees.test):
        starts = {int(samples.ts[part][samples.series[part] == s].min()) for s in range(5)}
        assert len(starts) == 1


def test_the_parts_have_about_the_shares_of_time_that_are_documented(samples):
    parts = split(samples, windowed=False)
    times = np.unique(samples.ts[samples.ready & samples.labelled])
    assert np.searchsorted(times, parts.cuts[0]) / len(times) == pytest.approx(0.70, abs=0.01)
    assert np.searchsorted(times, parts.cuts[1]) / len(times) == pytest.approx(0.85, abs=0.01)


def test_bars_after_t_change_no_feature_at_t_and_no_label_decided_by_t(market, samples):
    cut = 400
    changed = market.ohlcv.copy()
    changed[cut:] *= np.random.default_rng(8).uniform(0.5, 2, (300, 5, 1))
    bars = market.bars()
    other = make_samples(Bars(bars.symbol, bars.ts, bars.interval, changed.reshape(-1, 5)))
    before = samples.ts < market.ts[cut]
    np.testing.assert_array_equal(samples.features[before], other.features[before])
    decided = samples.labelled & (samples.end_ts < market.ts[cut])
    np.testing.assert_array_equal(samples.paths[decided], other.paths[decided])
    assert not np.array_equal(samples.paths[~decided], other.paths[~decided], equal_nan=True)


def test_too_little_data_says_what_was_found_and_what_is_needed():
    with pytest.raises(UsageError, match=r"too few bars to train on: 400 bars of 2 series give .* at least 200 rows"):
        split(make_samples(generate(2, 200).bars()), windowed=True)


def test_less_than_the_warm_up_is_too_little_data_too():
    with pytest.raises(UsageError, match="too few bars to train on: 50 bars of 1 series"):
        split(make_samples(generate(1, 50).bars()), windowed=False)
