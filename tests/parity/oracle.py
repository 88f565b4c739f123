"""Every column a second time: whole-history numpy over explicit windows, pandas for the averages.

Written from the contract's formulas, with nothing of the kernel in it. `windowed` needs only the
last 50 bars before a value; `recursive` needs the whole history.
"""

import numpy as np
import pandas as pd
from numpy.lib.stride_tricks import sliding_window_view


def _pad(values, length):
    return np.concatenate([np.full(length - len(values), np.nan), values])


def _over(x, n, function):
    """`function` of the windows `[N-n+1, n]` of x, NaN before the first whole one (NaN counts as not there)."""
    if len(x) < n:
        return np.full(len(x), np.nan)
    return _pad(function(sliding_window_view(x, n)), len(x))


def _mean(x, n):
    return _over(x, n, lambda w: w.mean(axis=1))


def _back(x, n):
    return np.concatenate([np.full(min(n, len(x)), np.nan), x[:-n]])


def _divide(a, b, neutral):
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(b == 0, np.where(np.isnan(a), np.nan, neutral), a / b)


def _flag(condition, *needs):
    return np.where(np.isnan(sum(needs)), np.nan, condition.astype(float)) if needs else condition.astype(float)


def _deviation(c, n):
    def two_passes(w):
        d = w - w[:, -1:]
        return np.sqrt(((d - d.mean(axis=1, keepdims=True)) ** 2).sum(axis=1) / (n - 1))

    return _over(c, n, two_passes)


def _rsi(c, n=14):
    change = np.diff(c, prepend=np.nan)
    up = _mean(np.where(np.isnan(change), np.nan, np.maximum(change, 0)), n)
    down = _mean(np.where(np.isnan(change), np.nan, np.maximum(-change, 0)), n)
    rsi = 100 - 100 / (1 + _divide(up, down, np.inf))
    return np.where((up == 0) & (down == 0), 50.0, rsi)


def _volume(v):
    return {
        "volume_ratio": _divide(v, _mean(v, 20), 1),
        "volume_ma_ratio": _divide(v, _mean(v, 10), 1),
        "volume_change": np.where(_back(v, 1) == 0, 0, _divide(v, _back(v, 1), np.nan) - 1),
        "volume_sma": _mean(v, 20),
    }


def _candles(o, h, lo, c):
    body = np.abs(c - o) / c
    upper = (h - np.maximum(c, o)) / c
    lower = (np.minimum(c, o) - lo) / c
    last = _back(c, 1)
    return {
        "high_low_range": (h - lo) / c,
        "body_size": body,
        "upper_wick": upper,
        "lower_wick": lower,
        "is_doji": _flag(body < 0.001),
        "is_hammer": _flag((lower > 2 * body) & (upper < body)),
        "is_engulfing": _flag(body > 1.5 * _back(body, 1), _back(body, 1)),
        "gap_up": _flag(o > last * 1.002, last),
        "gap_down": _flag(o < last * 0.998, last),
        "relative_spread": (h - lo) / ((h + lo) / 2),
    }


def _bands(c):
    sd, middle = _deviation(c, 20), _mean(c, 20)
    centre = _over(c, 20, lambda w: (w - w[:, -1:]).mean(axis=1))
    return {
        "volatility_20": sd / c,
        "bb_position": _divide(2 * sd - centre, 4 * sd, 0.5),
        "sma_20": middle,
        "sma_50": _mean(c, 50),
        "bb_upper": middle + 2 * sd,
        "bb_lower": middle - 2 * sd,
        "bb_width": 4 * sd / middle,
    }


def _stochastic(h, lo, c):
    lowest = _over(lo, 14, lambda w: w.min(axis=1))
    highest = _over(h, 14, lambda w: w.max(axis=1))
    k = _divide(100 * (c - lowest), highest - lowest, 50)
    return {"stoch_k": k, "stoch_d": _mean(k, 3)}


def _trend(h, lo, c):
    last = _back(c, 1)
    true_range = np.maximum(h - lo, np.maximum(np.abs(h - last), np.abs(lo - last)))
    up, down = h - _back(h, 1), _back(lo, 1) - lo
    plus = np.where(np.isnan(up), np.nan, np.where((up > down) & (up > 0), up, 0))
    minus = np.where(np.isnan(up), np.nan, np.where((down > up) & (down > 0), down, 0))
    atr = _mean(true_range, 14)
    plus_di, minus_di = (_divide(100 * _mean(dm, 14), atr, 0) for dm in (plus, minus))
    dx = _divide(100 * np.abs(plus_di - minus_di), plus_di + minus_di, 0)
    return {"atr": atr, "atr_pct": atr / c, "plus_di": plus_di, "minus_di": minus_di, "adx": _mean(dx, 14)}


def windowed(bars):
    """The columns of finite memory."""
    o, h, lo, c, v = bars.T
    momentum = {n: c / _back(c, n) - 1 for n in (1, 5, 10, 20)}
    return {
        "open": o,
        "high": h,
        "low": lo,
        "close": c,
        "volume": v,
        "price_change": momentum[1],
        "momentum_5": momentum[5],
        "momentum_10": momentum[10],
        "momentum_20": momentum[20],
        "acceleration": momentum[10] - _back(momentum[10], 1),
        "roc": 100 * momentum[10],
        "log_returns": np.log(c) - np.log(_back(c, 1)),
        "rsi_14": _rsi(c),
        **_volume(v),
        **_candles(o, h, lo, c),
        **_bands(c),
        **_stochastic(h, lo, c),
        **_trend(h, lo, c),
    }


def _ema(x, n):
    return pd.Series(x).ewm(span=n, adjust=False).mean().to_numpy()


def recursive(bars):
    """The columns that remember everything: exponential averages and running sums."""
    c, v = bars[:, 3], bars[:, 4]
    ema = {n: _ema(c, n) for n in (9, 10, 12, 20, 21, 26, 50, 200)}
    macd = ema[12] - ema[26]
    signal = _ema(macd, 9)
    obv = np.cumsum(np.sign(np.diff(c, prepend=c[0])) * v, dtype=np.longdouble).astype(float)
    change = np.concatenate([[0.0], c[1:] / c[:-1] - 1])
    return {
        **{f"ema_{n}": ema[n] for n in (9, 10, 20, 21, 50, 200)},
        **{f"ema_{n}_dist": (c - ema[n]) / c for n in (9, 21, 50, 200)},
        "ema_10_20_cross": _flag(ema[10] > ema[20]),
        "ema_10_50_cross": _flag(ema[10] > ema[50]),
        "macd": macd,
        "macd_signal": signal,
        "macd_hist": macd - signal,
        "obv": obv,
        "obv_ema": _ema(obv, 20),
        "vpt": np.cumsum(v * change, dtype=np.longdouble).astype(float),
    }


PRICES = "open high low close macd macd_signal macd_hist sma_20 sma_50 bb_upper bb_lower atr".split() + [
    f"ema_{n}" for n in (9, 10, 20, 21, 50, 200)
]


def scale(column, bars):
    """What a difference is small against: prices for prices, what was summed for sums, 1 for ratios."""
    if column in PRICES:
        return bars[:, 3]
    if column in ("volume", "volume_sma"):
        return np.maximum.accumulate(bars[:, 4])
    if column in ("obv", "obv_ema", "vpt"):
        reached = recursive(bars)["vpt" if column == "vpt" else "obv"]
        return np.maximum(np.maximum.accumulate(np.abs(reached)), bars[:, 4])
    return np.ones(len(bars))


def same_direction(column, bars):
    """Where a cross is decided by more than rounding; everywhere for other columns."""
    if not column.endswith("_cross"):
        return np.ones(len(bars), bool)
    fast, slow = (_ema(bars[:, 3], int(n)) for n in column.split("_")[1:3])
    return np.abs(fast - slow) > 1e-12 * bars[:, 3]
