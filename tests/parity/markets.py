"""Bars to compute features on: `[N, 5]` open, high, low, close, volume."""

from functools import cache

import arch.data.nasdaq
import arch.data.sp500
import numpy as np


def _real(frame):
    return frame[["Open", "High", "Low", "Close", "Volume"]].to_numpy(np.float64)


def random_walk(seed, n, volatility=0.01, rough=True):
    """A seeded walk; `rough` adds gaps, jumps, flat stretches (also of whole bars) and zero volume."""
    rng = np.random.default_rng(seed)
    steps = rng.normal(0, volatility, n)
    if rough:
        steps[rng.random(n) < 0.01] *= 15
        for start in rng.integers(0, max(n - 60, 1), n // 300 + 1):
            steps[start : start + rng.integers(5, 60)] = 0
    close = 100 * np.exp(np.cumsum(steps - steps.mean()))
    before = np.concatenate([[close[0]], close[:-1]])
    opened = before * np.where(rng.random(n) < 0.1, 1 + rng.normal(0, 0.004, n), 1)
    opened = np.where(steps == 0, close, opened)
    reach = np.where(steps == 0, 0, np.abs(rng.normal(0, volatility / 2, (2, n))))
    high = np.maximum(opened, close) * (1 + reach[0])
    low = np.minimum(opened, close) / (1 + reach[1])
    volume = rng.gamma(2, 1000, n)
    if rough:
        volume[rng.random(n) < 0.05] = 0
        volume[: n // 10] = np.where(np.arange(n // 10) % 50 < 25, 0, volume[: n // 10])
    return np.stack([opened, high, low, close, volume], axis=1)


def ticks(seed, n, price=60_000.0, step=0.01):
    """A walk of `step` at a high price: where one-pass and subtract-and-revert deviations drift."""
    rng = np.random.default_rng(seed)
    close = np.round(price + step * np.cumsum(rng.integers(-1, 2, n)), 2)
    opened = np.concatenate([[price], close[:-1]])
    high = np.round(np.maximum(opened, close) + step * rng.integers(0, 3, n), 2)
    low = np.round(np.minimum(opened, close) - step * rng.integers(0, 3, n), 2)
    return np.stack([opened, high, low, close, rng.integers(0, 1000, n).astype(np.float64)], axis=1)


@cache
def market(name):
    return {
        "sp500": lambda: _real(arch.data.sp500.load()),
        "nasdaq": lambda: _real(arch.data.nasdaq.load()),
        "walk": lambda: random_walk(1, 3000),
        "flat": lambda: np.tile([7.3, 7.3, 7.3, 7.3, 0.0], (300, 1)),
        "flat then walk": lambda: np.concatenate([np.tile([100.0, 100, 100, 100, 5], (120, 1)), random_walk(2, 400)]),
        "ticks": lambda: ticks(3, 3000),
        "cheap": lambda: random_walk(4, 1500) * [1e-8, 1e-8, 1e-8, 1e-8, 1e12],
    }[name]()


MARKETS = ("sp500", "nasdaq", "walk", "flat", "flat then walk", "ticks", "cheap")
