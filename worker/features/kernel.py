"""The compiled incremental kernel: one bar in, every column out. It is the definition of each feature.

Training, replay and live all run this code. Windows are recomputed from a ring of the last 64 bars,
never by adding the new and subtracting the old, so nothing drifts. No fastmath, no threads and no
library reductions: bars give the same bits one a call and many a call. Formulas are those of
`streams.contracts` (its notation: C, H, L, O, V; X[k] is k bars back); in the code `t` is the index
of the bar since the (re)start of its series, so that X[k] is there from `t >= k` on.

Columns come in two groups. Core (`v3`, `v2`) is always computed; extended (what `v6` adds) only when
asked for, over its own bar count, as if history began where the group was switched on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numba import njit
from numpy.typing import NDArray

DEPTH = 64
"""Bars in the ring of a series: a power of two above the longest window (50)."""

CORE_COLUMNS = tuple(
    "open high low close volume price_change rsi_14 macd volume_ratio momentum_10 high_low_range "
    "volume_change volume_ma_ratio ema_10 ema_20 ema_50 ema_10_20_cross ema_10_50_cross "
    "volatility_20 macd_signal macd_hist bb_position momentum_20".split()
)
EXTENDED_COLUMNS = tuple(
    "log_returns body_size upper_wick lower_wick is_doji is_hammer is_engulfing gap_up gap_down "
    "stoch_k stoch_d roc ema_9 ema_9_dist ema_21 ema_21_dist ema_50_dist ema_200 ema_200_dist "
    "sma_20 sma_50 adx plus_di minus_di bb_upper bb_lower bb_width atr atr_pct volume_sma obv "
    "obv_ema vpt momentum_5 acceleration relative_spread".split()
)
COLUMNS = CORE_COLUMNS + EXTENDED_COLUMNS


def _floats(names: str) -> list[tuple[str, str]]:
    return [(name, "<f8") for name in names.split()]


BAR_RECORD = np.dtype(_floats("open high low close volume"))
"""One input row."""

COLUMN_RECORD = np.dtype(_floats(" ".join(COLUMNS)))
"""One output row, every field a column."""

RING_RECORD = np.dtype(_floats("close volume high low true_range plus_dm minus_dm dx stoch_k"))
"""One bar in the ring; what follows `volume` is written by the extended group only."""

STATE_RECORD = np.dtype(
    [
        ("life", "<i8"),  # restarts so far: tells rows of the ring from those of an earlier life
        ("count", "<i8"),  # bars since the start
        ("extended", "<i8"),  # bars since the start of the extended group
        *_floats("ema_10 ema_12 ema_20 ema_26 ema_50 macd_signal ema_9 ema_21 ema_200 obv obv_ema vpt body_size"),
    ]
)
"""What a series remembers besides its ring."""

_MASK = DEPTH - 1
_F = TypeVar("_F", bound=Callable[..., Any])


def compiled(function: _F) -> _F:
    """Compile in strict IEEE arithmetic (division by 0 gives inf or NaN), cached on disk."""
    return njit(cache=True, error_model="numpy")(function)  # type: ignore[no-any-return]


@compiled
def _ema(previous: float, x: float, n: int, t: int) -> float:
    return x if t == 0 else previous + 2.0 / (n + 1.0) * (x - previous)


@compiled
def _mean_offset(window: Any, t: int, n: int) -> float:
    """SMA_n(C) - C, summed over C[k] - C."""
    close = window[t & _MASK].close
    total = 0.0
    for k in range(n):
        total += window[(t - k) & _MASK].close - close
    return total / n


@compiled
def _deviation(window: Any, t: int, n: int, mean_offset: float) -> float:
    """SD_n(C): the second pass, over C[k] - C."""
    close = window[t & _MASK].close
    total = 0.0
    for k in range(n):
        d = window[(t - k) & _MASK].close - close - mean_offset
        total += d * d
    return float(np.sqrt(total / (n - 1.0)))


@compiled
def _mean_volume(window: Any, t: int, n: int) -> float:
    total = 0.0
    for k in range(n):
        total += window[(t - k) & _MASK].volume
    return total / n


@compiled
def _ratio(numerator: float, denominator: float, neutral: float) -> float:
    return neutral if denominator == 0.0 else numerator / denominator


@compiled
def _momentum(window: Any, t: int, n: int) -> float:
    return float(window[t & _MASK].close / window[(t - n) & _MASK].close - 1.0)


@compiled
def _rsi(window: Any, t: int, n: int) -> float:
    rises = 0.0
    falls = 0.0
    for k in range(n):
        change = window[(t - k) & _MASK].close - window[(t - k - 1) & _MASK].close
        if change > 0.0:
            rises += change
        else:
            falls -= change
    if falls == 0.0:
        return 50.0 if rises == 0.0 else 100.0
    return 100.0 - 100.0 / (1.0 + rises / n / (falls / n))


@compiled
def _core_averages(t: int, s: Any, f: Any) -> None:
    c = f.close
    s.ema_10 = _ema(s.ema_10, c, 10, t)
    s.ema_12 = _ema(s.ema_12, c, 12, t)
    s.ema_20 = _ema(s.ema_20, c, 20, t)
    s.ema_26 = _ema(s.ema_26, c, 26, t)
    s.ema_50 = _ema(s.ema_50, c, 50, t)
    macd = s.ema_12 - s.ema_26
    s.macd_signal = _ema(s.macd_signal, macd, 9, t)
    f.ema_10 = s.ema_10
    f.ema_20 = s.ema_20
    f.ema_50 = s.ema_50
    f.ema_10_20_cross = 1.0 if s.ema_10 > s.ema_20 else 0.0
    f.ema_10_50_cross = 1.0 if s.ema_10 > s.ema_50 else 0.0
    f.macd = macd
    f.macd_signal = s.macd_signal
    f.macd_hist = macd - s.macd_signal


@compiled
def _core_windows(t: int, window: Any, f: Any) -> None:
    if t >= 1:
        f.price_change = _momentum(window, t, 1)
        previous_volume = window[(t - 1) & _MASK].volume
        f.volume_change = 0.0 if previous_volume == 0.0 else f.volume / previous_volume - 1.0
    if t >= 9:
        f.volume_ma_ratio = _ratio(f.volume, _mean_volume(window, t, 10), 1.0)
    if t >= 10:
        f.momentum_10 = _momentum(window, t, 10)
    if t >= 14:
        f.rsi_14 = _rsi(window, t, 14)
    if t >= 19:
        f.volume_ratio = _ratio(f.volume, _mean_volume(window, t, 20), 1.0)
        offset = _mean_offset(window, t, 20)
        sd = _deviation(window, t, 20, offset)
        f.volatility_20 = sd / f.close
        f.bb_position = _ratio(2.0 * sd - offset, 4.0 * sd, 0.5)
    if t >= 20:
        f.momentum_20 = _momentum(window, t, 20)


@compiled
def _record(bar: Any, item: Any) -> None:
    """Put a bar into its slot, nothing left of what was there: equal histories are equal bytes."""
    item.close = bar.close
    item.volume = bar.volume
    item.high = 0.0
    item.low = 0.0
    item.true_range = 0.0
    item.plus_dm = 0.0
    item.minus_dm = 0.0
    item.dx = 0.0
    item.stoch_k = 0.0


@compiled
def _core(bar: Any, s: Any, window: Any, f: Any) -> None:
    t = s.count
    s.count = t + 1
    _record(bar, window[t & _MASK])
    f.open = bar.open
    f.high = bar.high
    f.low = bar.low
    f.close = bar.close
    f.volume = bar.volume
    f.high_low_range = (bar.high - bar.low) / bar.close
    _core_averages(t, s, f)
    _core_windows(t, window, f)


@compiled
def _candle(t: int, s: Any, f: Any) -> None:
    body = abs(f.close - f.open) / f.close
    f.body_size = body
    f.upper_wick = (f.high - max(f.close, f.open)) / f.close
    f.lower_wick = (min(f.close, f.open) - f.low) / f.close
    f.is_doji = 1.0 if body < 0.001 else 0.0
    f.is_hammer = 1.0 if f.lower_wick > 2.0 * body and f.upper_wick < body else 0.0
    if t >= 1:
        f.is_engulfing = 1.0 if body > 1.5 * s.body_size else 0.0
    s.body_size = body
    f.relative_spread = (f.high - f.low) / ((f.high + f.low) / 2.0)


@compiled
def _extended_averages(t: int, s: Any, f: Any) -> None:
    c = f.close
    s.ema_9 = _ema(s.ema_9, c, 9, t)
    s.ema_21 = _ema(s.ema_21, c, 21, t)
    s.ema_200 = _ema(s.ema_200, c, 200, t)
    f.ema_9 = s.ema_9
    f.ema_21 = s.ema_21
    f.ema_200 = s.ema_200
    f.ema_9_dist = (c - s.ema_9) / c
    f.ema_21_dist = (c - s.ema_21) / c
    f.ema_50_dist = (c - s.ema_50) / c
    f.ema_200_dist = (c - s.ema_200) / c


@compiled
def _volume_flow(t: int, previous: float, s: Any, f: Any) -> None:
    """obv, its average and vpt: running sums whose origin is the first bar of the group."""
    if t == 0:
        s.obv = 0.0
        s.vpt = 0.0
    else:
        if f.close > previous:
            s.obv += f.volume
        elif f.close < previous:
            s.obv -= f.volume
        s.vpt += f.volume * (f.close / previous - 1.0)
    s.obv_ema = _ema(s.obv_ema, s.obv, 20, t)
    f.obv = s.obv
    f.obv_ema = s.obv_ema
    f.vpt = s.vpt


@compiled
def _stochastic(t: int, now: int, window: Any, f: Any) -> None:
    if t < 13:
        return
    high = -np.inf
    low = np.inf
    for k in range(14):
        bar = window[(now - k) & _MASK]
        high = max(high, bar.high)
        low = min(low, bar.low)
    stoch_k = _ratio(100.0 * (f.close - low), high - low, 50.0)
    window[now & _MASK].stoch_k = stoch_k
    f.stoch_k = stoch_k
    if t >= 15:
        total = 0.0
        for k in range(3):
            total += window[(now - k) & _MASK].stoch_k
        f.stoch_d = total / 3.0


@compiled
def _movement(now: int, window: Any) -> None:
    """True range and directional movement of this bar, into the ring."""
    before = window[(now - 1) & _MASK]
    bar = window[now & _MASK]
    bar.true_range = max(bar.high - bar.low, abs(bar.high - before.close), abs(bar.low - before.close))
    up = bar.high - before.high
    down = before.low - bar.low
    bar.plus_dm = up if up > down and up > 0.0 else 0.0
    bar.minus_dm = down if down > up and down > 0.0 else 0.0


@compiled
def _trend(t: int, now: int, window: Any, f: Any) -> None:
    if t < 14:
        return
    true_range = 0.0
    plus = 0.0
    minus = 0.0
    for k in range(14):
        bar = window[(now - k) & _MASK]
        true_range += bar.true_range
        plus += bar.plus_dm
        minus += bar.minus_dm
    f.atr = true_range / 14.0
    f.atr_pct = f.atr / f.close
    f.plus_di = _ratio(100.0 * (plus / 14.0), f.atr, 0.0)
    f.minus_di = _ratio(100.0 * (minus / 14.0), f.atr, 0.0)
    dx = _ratio(100.0 * abs(f.plus_di - f.minus_di), f.plus_di + f.minus_di, 0.0)
    window[now & _MASK].dx = dx
    if t >= 27:
        total = 0.0
        for k in range(14):
            total += window[(now - k) & _MASK].dx
        f.adx = total / 14.0


@compiled
def _extended_windows(t: int, now: int, window: Any, f: Any) -> None:
    if t >= 1:
        previous = window[(now - 1) & _MASK].close
        f.log_returns = np.log(f.close / previous)
        f.gap_up = 1.0 if f.open > previous * (1.0 + 0.002) else 0.0
        f.gap_down = 1.0 if f.open < previous * (1.0 - 0.002) else 0.0
    if t >= 5:
        f.momentum_5 = _momentum(window, now, 5)
    if t >= 10:
        f.roc = 100.0 * _momentum(window, now, 10)
    if t >= 11:
        f.acceleration = _momentum(window, now, 10) - _momentum(window, now - 1, 10)
    if t >= 19:
        offset = _mean_offset(window, now, 20)
        sd = _deviation(window, now, 20, offset)
        f.sma_20 = f.close + offset
        f.bb_upper = f.sma_20 + 2.0 * sd
        f.bb_lower = f.sma_20 - 2.0 * sd
        f.bb_width = 4.0 * sd / f.sma_20
        f.volume_sma = _mean_volume(window, now, 20)
    if t >= 49:
        f.sma_50 = f.close + _mean_offset(window, now, 50)


@compiled
def _extended(s: Any, window: Any, f: Any) -> None:
    """After `_core`: `now` is the bar's index in the ring, `t` its index in this group's life."""
    now = s.count - 1
    t = s.extended
    s.extended = t + 1
    window[now & _MASK].high = f.high
    window[now & _MASK].low = f.low
    if t >= 1:
        _movement(now, window)
    _candle(t, s, f)
    _extended_averages(t, s, f)
    _volume_flow(t, window[(now - 1) & _MASK].close, s, f)
    _extended_windows(t, now, window, f)
    _stochastic(t, now, window, f)
    _trend(t, now, window, f)


@compiled
def advance(
    rows: NDArray[np.int64],
    bars: NDArray[Any],
    restart: NDArray[np.bool_],
    extended: bool,
    state: NDArray[Any],
    ring: NDArray[Any],
    out: NDArray[Any],
    counts: NDArray[np.int64],
) -> None:
    """Take bars `[N]` in order; write columns to `out` and bar counts (core, extended) to `counts`.

    rows `[N]` index `state` `[R]` of STATE_RECORD and `ring` `[R, 64]` of RING_RECORD; bars are
    `[N]` of BAR_RECORD; restart `[N]` forgets the series before its bar; out `[N]` of COLUMN_RECORD
    must come filled with NaN, which stays where a value is not yet defined; counts is `[N, 2]`.
    """
    for i in range(rows.size):
        s = state[rows[i]]
        window = ring[rows[i]]
        if restart[i]:
            s.life += 1
            s.count = 0
            s.extended = 0
        _core(bars[i], s, window, out[i])
        if extended:
            _extended(s, window, out[i])
        counts[i, 0] = s.count
        counts[i, 1] = s.extended
