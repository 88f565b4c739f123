"""The synthetic market is deterministic, plausible, cheap to import, and has as much to learn as it says."""

import subprocess
import sys

import numpy as np
import pytest

from worker.training.market import generate


def _forward(log_close, horizon=12):
    return log_close[horizon:] - log_close[:-horizon]


def _r2(truth, forecast):
    return 1 - np.sum((truth - forecast) ** 2) / np.sum((truth - truth.mean()) ** 2)


@pytest.fixture(scope="module", params=["noise", "cycle", "planted"])
def market(request):
    return request.param, generate(12, 6_000, seed=3, signal=request.param)


def test_the_same_arguments_give_the_same_bits_and_another_seed_gives_others():
    first, again, other = generate(3, 50, seed=1), generate(3, 50, seed=1), generate(3, 50, seed=2)
    assert first.ohlcv.tobytes() == again.ohlcv.tobytes()
    assert not np.array_equal(first.ohlcv, other.ohlcv)


def test_every_candle_is_one_that_a_market_can_have(market):
    _, made = market
    o, h, low, c, v = np.moveaxis(made.ohlcv, -1, 0)
    assert np.isfinite(made.ohlcv).all()
    assert (low > 0).all()
    assert (v > 0).all()
    assert (h >= np.maximum(o, c)).all()
    assert (low <= np.minimum(o, c)).all()


def test_bars_are_consecutive_minutes_that_end_where_asked():
    made = generate(2, 30, end_ts=1_750_000_059_999)
    assert made.ts[-1] == 1_750_000_020_000
    assert set(np.diff(made.ts)) == {60_000}
    bars = made.bars(10, 20)
    assert len(bars) == 20
    assert list(bars.symbol[:3]) == ["SYN01", "SYN02", "SYN01"]
    assert (np.diff(bars.ts) >= 0).all()
    np.testing.assert_array_equal(bars.ohlcv[3], made.ohlcv[11, 1])


def test_symbols_differ_in_price_and_volatility_and_volume_follows_volatility(market):
    _, made = market
    close, volume = made.ohlcv[..., 3], made.ohlcv[..., 4]
    move = np.abs(np.diff(np.log(close), axis=0))
    assert close[0].max() / close[0].min() > 20
    assert move.mean(axis=0).max() / move.mean(axis=0).min() > 1.5
    correlation = [np.corrcoef(move[:, i], np.log(volume[1:, i]))[0, 1] for i in range(close.shape[1])]
    assert min(correlation) > 0.1


def test_who_sees_the_state_can_forecast_as_much_as_each_mode_promises(market):
    """Expected: by the AR(2) formulas the cycle's forecastable share is 0, about 0.5 and about 0.78."""
    mode, made = market
    truth = _forward(np.log(made.ohlcv[..., 3]))[1:]
    oracle = _r2(truth, made.expected_return()[1:-12])
    low, high = {"noise": (-1e-3, 1e-12), "cycle": (0.42, 0.62), "planted": (0.7, 0.86)}[mode]
    assert low <= oracle <= high


def test_momentum_alone_explains_nothing_of_noise_and_more_than_15_percent_of_the_cycle(market):
    mode, made = market
    log_close = np.log(made.ohlcv[..., 3])
    momentum = (log_close[10:] - log_close[:-10])[:-12]
    explained = np.corrcoef(momentum.ravel(), _forward(log_close)[10:].ravel())[0, 1] ** 2
    assert explained < 0.01 if mode == "noise" else explained > 0.15


def test_returns_of_the_noise_are_uncorrelated():
    """A lag correlation of white noise has standard deviation 1/sqrt(n); five of them are allowed."""
    returns = np.diff(np.log(generate(1, 20_000, seed=9, signal="noise").ohlcv[:, 0, 3]))
    for lag in (1, 5, 12, 26):
        correlation = np.corrcoef(returns[lag:], returns[:-lag])[0, 1]
        assert abs(correlation) < 5 / np.sqrt(len(returns)), lag


def test_it_says_that_it_is_synthetic():
    assert "synthetic" in generate(1, 1).note


def test_an_empty_market_is_refused():
    with pytest.raises(ValueError, match="at least 1 symbol"):
        generate(0, 10)


def test_importing_it_loads_no_heavy_package():
    heavy = "torch numba pandas pyarrow xgboost lightgbm"
    code = f"import sys, worker.training.market as m; print(sorted(set({heavy.split()!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
