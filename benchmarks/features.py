"""What the features of one bar cost: the kernel at several batch sizes against pandas over 200 bars.

    python -m benchmarks.features [--json] [--seconds 0.5]

Microseconds a bar are medians of several rounds and depend on the machine; the ratios, taken in the
same run, depend on it less.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import pandas as pd

from benchmarks.machine import microseconds
from streams.contracts import V3, V6, FeatureSet
from worker.features.bank import FeatureBank

WINDOW = 200
SERIES = 256


def walk(n: int) -> np.ndarray:
    """Seeded bars `[n, 5]`."""
    rng = np.random.default_rng(7)
    close = 100 * np.exp(np.cumsum(rng.normal(0, 0.01, n)))
    opened = np.concatenate([close[:1], close[:-1]])
    high, low = np.maximum(opened, close) * 1.002, np.minimum(opened, close) * 0.998
    return np.stack([opened, high, low, close, rng.gamma(2, 1000, n)], axis=1)


def with_pandas(frame: pd.DataFrame) -> dict[str, float]:
    """v3 of the last bar the usual way: every indicator over the whole window, then its last value."""
    c, v = frame["close"], frame["volume"]
    change = c.diff()
    rise, fall = change.clip(lower=0).rolling(14).mean(), (-change.clip(upper=0)).rolling(14).mean()
    ema = {n: c.ewm(span=n, adjust=False).mean() for n in (10, 12, 20, 26, 50)}
    macd = ema[12] - ema[26]
    signal = macd.ewm(span=9, adjust=False).mean()
    middle, sd = c.rolling(20).mean(), c.rolling(20).std()
    columns = {
        **{name: frame[name] for name in ("open", "high", "low", "close", "volume")},
        "price_change": c.pct_change(),
        "rsi_14": 100 - 100 / (1 + rise / fall),
        "macd": macd,
        "volume_ratio": v / v.rolling(20).mean(),
        "momentum_10": c.pct_change(10),
        "high_low_range": (frame["high"] - frame["low"]) / c,
        "volume_change": v.pct_change(),
        "volume_ma_ratio": v / v.rolling(10).mean(),
        "ema_10": ema[10],
        "ema_20": ema[20],
        "ema_50": ema[50],
        "ema_10_20_cross": (ema[10] > ema[20]).astype(float),
        "ema_10_50_cross": (ema[10] > ema[50]).astype(float),
        "volatility_20": sd / c,
        "macd_signal": signal,
        "macd_hist": macd - signal,
        "bb_position": (c - (middle - 2 * sd)) / (4 * sd),
        "momentum_20": c.pct_change(20),
    }
    return {name: float(column.iloc[-1]) for name, column in columns.items()}


def kernel(sets: tuple[FeatureSet, ...], batch: int, seconds: float, *, store: bool) -> float:
    """Microseconds a bar of warm series; `store` packs what a commit would write, too."""
    bank = FeatureBank(sets)
    bars = walk(WINDOW)
    everyone = np.arange(SERIES)
    for bar in bars:
        bank.update(everyone, np.tile(bar, (SERIES, 1)))
    rows, batch_bars = everyone[:batch], np.ascontiguousarray(np.resize(bars, (batch, 5)))

    def once() -> None:
        bank.update(rows, batch_bars)
        if store:
            bank.changes(rows)

    return microseconds(once, seconds) / batch


def check_pandas_agrees(frame: pd.DataFrame) -> None:
    """Both sides of a ratio must compute the same thing."""
    values, _ = FeatureBank((V3,)).update(np.zeros(len(frame), np.int64), frame.to_numpy())
    expected = with_pandas(frame)
    np.testing.assert_allclose(values[-1], [expected[name] for name in V3.features], rtol=1e-9, atol=1e-9)


def measure(seconds: float) -> dict[str, object]:
    frame = pd.DataFrame(walk(WINDOW), columns=["open", "high", "low", "close", "volume"])
    check_pandas_agrees(frame)
    pandas_us = microseconds(lambda: with_pandas(frame), seconds)
    rows = []
    for label, sets in (("v3", (V3,)), ("v3+v6", (V3, V6))):
        for batch in (1, 64, 256):
            us = kernel(sets, batch, seconds, store=False)
            stored = kernel(sets, batch, seconds, store=True)
            rows.append(
                {"sets": label, "batch": batch, "us": us, "us_with_state": stored, "pandas_over_kernel": pandas_us / us}
            )
    return {"pandas_v3_us": pandas_us, "window": WINDOW, "kernel": rows}


def show(result: dict) -> None:
    print(f"pandas, v3 over {result['window']} bars: {result['pandas_v3_us']:.0f} us a bar\n")
    print(f"{'sets':<7}{'batch':>6}{'us a bar':>10}{'with state to store':>21}{'pandas / kernel':>17}")
    for row in result["kernel"]:
        print(
            f"{row['sets']:<7}{row['batch']:>6}{row['us']:>10.2f}{row['us_with_state']:>21.2f}"
            f"{row['pandas_over_kernel']:>17,.0f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--seconds", type=float, default=0.5, help="time spent on each number")
    arguments = parser.parse_args()
    result = measure(arguments.seconds)
    if arguments.json:
        print(json.dumps(result))
    else:
        show(result)


if __name__ == "__main__":
    main()
