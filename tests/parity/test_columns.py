"""Every feature, bar by bar, against formulas written a second time and against other libraries."""

from functools import cache

import numpy as np
import pytest
import talib
from talipp.indicators import EMA, OBV, SMA
from talipp.ohlcv import OHLCV

from streams.contracts import DEFINITIONS, V2, V3, V6, union
from tests.parity import oracle
from tests.parity.markets import MARKETS, market, random_walk, ticks
from worker.features.bank import FeatureBank
from worker.features.kernel import COLUMNS

SETS = (V3, V2, V6)


def computed(bars, chunk=10_000, last=None):
    """Name to values of the kernel; only the last `last` bars are kept."""
    bank = FeatureBank(SETS)
    kept = []
    for start in range(0, len(bars), chunk):
        part = bars[start : start + chunk]
        values, _ = bank.update(np.zeros(len(part), np.int64), part)
        if last is None or start + chunk >= len(bars) - last:
            kept.append(values)
    values = np.concatenate(kept)
    return dict(zip(bank.names, (values if last is None else values[-last:]).T, strict=True))


@cache
def both(name):
    bars = market(name)
    return bars, computed(bars), oracle.windowed(bars) | oracle.recursive(bars)


def assert_close(name, found, expected, scale):
    assert np.array_equal(np.isnan(found), np.isnan(expected)), f"{name}: defined at other bars"
    bound = 1e-9 * np.maximum(np.abs(expected), scale)
    wrong = np.flatnonzero(np.abs(found - expected) > bound)
    assert wrong.size == 0, f"{name} at bar {wrong[0]}: {found[wrong[0]]!r} found, {expected[wrong[0]]!r} expected"


def test_the_oracle_has_every_column():
    bars = market("flat")
    assert set(oracle.windowed(bars) | oracle.recursive(bars)) == set(COLUMNS)


@pytest.mark.parametrize("market_name", MARKETS)
@pytest.mark.parametrize("name", union(SETS))
def test_a_feature_equals_its_formula_over_explicit_windows(name, market_name):
    bars, found, expected = both(market_name)
    column = DEFINITIONS[name].column
    decided = oracle.same_direction(column, bars)
    scale = oracle.scale(column, bars)
    assert_close(name, found[name][decided], expected[column][decided], scale[decided])


def test_the_markets_reach_every_flag_and_every_neutral_value():
    """Else the comparison above would prove nothing of them."""
    found = {name: np.concatenate([both(m)[1][name] for m in MARKETS]) for name in union(SETS)}
    for flag in "is_doji is_hammer is_engulfing gap_up gap_down ema_10_20_cross ema_10_50_cross".split():
        assert {0.0, 1.0} <= set(found[flag]), flag
    for name, neutral in [(n, DEFINITIONS[n].neutral) for n in union(SETS) if DEFINITIONS[n].neutral is not None]:
        assert neutral in found[name], name
    assert 100.0 in found["rsi_14"]


def test_a_flat_window_is_exactly_flat():
    values = both("flat")[1]
    for name, exact in {
        "volatility_20": 0.0,
        "bb_position": 0.5,
        "rsi_14": 50.0,
        "stoch_k": 50.0,
        "stoch_d": 50.0,
        "bb_width": 0.0,
        "adx": 0.0,
        "plus_di": 0.0,
        "volume_ratio": 1.0,
        "volume_ma_ratio": 1.0,
        "volume_change": 0.0,
        "macd": 0.0,
        "sma_20": 7.3,
        "sma_50": 7.3,
    }.items():
        defined = values[name][~np.isnan(values[name])]
        assert defined.size > 200, name
        assert (defined == exact).all(), name


def test_aliases_have_exactly_the_value_of_their_column():
    found = both("sp500")[1]
    for name in union(SETS):
        twins = [other for other in union(SETS) if DEFINITIONS[other].column == DEFINITIONS[name].column]
        for other in twins:
            assert np.array_equal(found[name], found[other], equal_nan=True), (name, other)


FIRST_DEFINED = {
    2: "price_change volume_change returns log_returns is_engulfing gap_up gap_down",
    6: "momentum_5",
    10: "volume_ma_ratio",
    11: "momentum_10 momentum roc",
    12: "acceleration",
    14: "stoch_k",
    15: "rsi_14 rsi atr atr_pct plus_di minus_di",
    16: "stoch_d",
    20: "volume_ratio volatility_20 volatility bb_position sma_20 bb_middle bb_upper bb_lower bb_width volume_sma",
    21: "momentum_20",
    28: "adx",
    50: "sma_50",
}


def test_a_value_is_defined_from_the_first_bar_that_its_formula_allows():
    first = {name: bar for bar, names in FIRST_DEFINED.items() for name in names.split()}
    for name, values in both("walk")[1].items():
        undefined = np.isnan(values)
        assert undefined.sum() == first.get(name, 1) - 1, name
        assert not undefined[first.get(name, 1) - 1 :].any(), name


@pytest.mark.parametrize("feature_set", SETS, ids=lambda s: s.name)
def test_the_longest_window_of_a_set_is_the_bar_from_which_all_of_it_is_defined(feature_set):
    found = both("walk")[1]
    values = np.stack([found[name] for name in feature_set.features], axis=1)
    defined = ~np.isnan(values).any(axis=1)
    assert defined.argmax() + 1 == feature_set.longest_window


def assert_still_right(bars, last):
    found = computed(bars, last=last)
    windows = oracle.windowed(bars[-last - 60 :])
    whole = oracle.recursive(bars)
    for name in union(SETS):
        column = DEFINITIONS[name].column
        expected = (windows | whole)[column][-last:]
        decided = oracle.same_direction(column, bars)[-last:]
        assert_close(name, found[name][decided], expected[decided], oracle.scale(column, bars)[-last:][decided])


def test_nothing_drifts_over_a_million_bars():
    assert_still_right(random_walk(11, 1_000_000, volatility=0.001), last=3000)


def test_nothing_drifts_at_a_high_price_with_small_steps():
    """Price 60,000, step 0.01: here a rolling deviation that subtracts what leaves is off by 1e-4."""
    assert_still_right(ticks(12, 200_000), last=200_000 - 100)


def talib_columns(bars):
    _, h, lo, c, v = bars.T.copy()
    stoch_k, stoch_d = talib.STOCHF(h, lo, c, fastk_period=14, fastd_period=3)
    return {
        "roc": talib.ROC(c, 10),
        "momentum_10": talib.ROCP(c, 10),
        "momentum_20": talib.ROCP(c, 20),
        "sma_20": talib.SMA(c, 20),
        "sma_50": talib.SMA(c, 50),
        "volume_sma": talib.SMA(v, 20),
        "volatility_20": talib.STDDEV(c, 20) * np.sqrt(20 / 19) / c,
        "stoch_k": stoch_k,
        "stoch_d": stoch_d,
        "ema_9": talib.EMA(c, 9),
        "ema_10": talib.EMA(c, 10),
        "ema_20": talib.EMA(c, 20),
        "ema_50": talib.EMA(c, 50),
        "macd": talib.EMA(c, 12) - talib.EMA(c, 26),
        "bb_upper": c + 2 * talib.STDDEV(c, 20) * np.sqrt(20 / 19) + (talib.SMA(c, 20) - c),
    }


@pytest.mark.parametrize("market_name", ["sp500", "nasdaq"])
def test_features_equal_those_of_ta_lib_where_the_definitions_agree(market_name):
    """TA-Lib seeds averages with an SMA and keeps running sums: after 1,000 bars, to 1e-7."""
    bars, found, _ = both(market_name)
    for name, expected in talib_columns(bars).items():
        bound = 1e-7 * np.maximum(np.abs(expected), oracle.scale(name, bars))
        assert (np.abs(found[name] - expected)[1000:] <= bound[1000:]).all(), name


def test_macd_and_its_signal_equal_those_of_ta_lib():
    bars, found, _ = both("sp500")
    expected = talib.MACD(bars[:, 3].copy(), 12, 26, 9)
    for name, values in zip(("macd", "macd_signal", "macd_hist"), expected, strict=True):
        assert np.allclose(found[name][1000:], values[1000:], rtol=0, atol=1e-7 * bars[:, 3].max()), name


def test_averages_and_obv_equal_those_of_talipp():
    bars, found, _ = both("sp500")
    close = bars[:, 3].tolist()
    assert np.allclose(found["sma_20"][19:], np.array(SMA(20, close)[19:], float), rtol=1e-9, atol=0)
    assert np.allclose(found["ema_21"][1500:], np.array(EMA(21, close)[1500:], float), rtol=1e-9, atol=0)
    obv = np.array(OBV([OHLCV(*bar) for bar in bars.tolist()])[:], float)
    assert np.allclose(np.diff(found["obv"]), np.diff(obv), rtol=1e-9, atol=0)
