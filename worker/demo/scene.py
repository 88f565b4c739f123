"""What a demonstration shows: how much of which market, and where its files lie.

One seed is one market, always generated whole: the stretch that the models learn from is the same
however many symbols and bars are shown, and it ends an hour before the first bar shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from streams.messages import Bar
from worker.training.bars import Bars
from worker.training.market import MINUTE_MS, Market, generate

MOST_SYMBOLS, MOST_BARS = 50, 4_000
FEWEST_BARS = 200
"""100 bars of warm-up and 64 ready vectors of a sequence model's window, and some to vote on."""
LATER_BARS = 1_000
"""Bars of each symbol that are made at a time, once those that a demonstration can ask for are out."""
TRAINING_SYMBOLS, TRAINING_BARS, GAP_BARS = 20, 1_500, 60
_SHOWN_FROM = TRAINING_BARS + GAP_BARS
_TOTAL = _SHOWN_FROM + MOST_BARS + LATER_BARS


@dataclass(frozen=True)
class Scene:
    """One demonstration; `directory` is its own, `models` may be shared by several. `last_ts` ms opens its last bar."""

    directory: Path
    models: Path
    symbols: int = 20
    bars: int = 600
    seed: int = 0
    keep: bool = False
    sabotage: bool = False
    last_ts: int = 0

    @property
    def served(self) -> Path:
        """The folder that the worker serves: with `sabotage` copies, of which some are broken."""
        return self.directory / "sabotage" if self.sabotage else self.models

    @property
    def half(self) -> int:
        """Bars of each symbol that come before the sabotage in mid-run."""
        return self.bars // 2

    @property
    def bars_in(self) -> int:
        """Bars that are published at once."""
        return self.symbols * self.bars


def training_bars(seed: int) -> Bars:
    """The stretch that the models learn from: 20 symbols, 1,500 bars each."""
    market = generate(MOST_SYMBOLS, _TOTAL, seed)
    bars = market.bars(0, TRAINING_BARS)
    return bars.take(np.isin(bars.symbol, market.symbols[:TRAINING_SYMBOLS]))


def rounds(seed: int, symbols: int, bars: int, last_ts: int) -> Iterator[list[Bar]]:
    """The later stretch, one list of `symbols` bars a minute without end; the `bars`-th opens at `last_ts` ms."""
    end_ts = last_ts + (_TOTAL - _SHOWN_FROM - bars) * MINUTE_MS
    market = generate(MOST_SYMBOLS, _TOTAL, seed, end_ts)
    ohlcv = market.ohlcv
    yield from _minutes(market, ohlcv[_SHOWN_FROM:], symbols)
    for stretch in count(1):
        market = generate(MOST_SYMBOLS, LATER_BARS, seed + (stretch << 32), end_ts + stretch * LATER_BARS * MINUTE_MS)
        # It goes on at the prices and the usual volumes that came before.
        close, volume = ohlcv[-1, :, 3], np.median(ohlcv[..., 4], axis=0)
        prices, volumes = close / market.ohlcv[0, :, 0], volume / np.median(market.ohlcv[..., 4], axis=0)
        ohlcv = market.ohlcv * np.stack([*[prices] * 4, volumes], axis=-1)
        yield from _minutes(market, ohlcv, symbols)


def _minutes(market: Market, ohlcv: NDArray[np.float64], symbols: int) -> Iterator[list[Bar]]:
    """The last minutes of `market` with these candles `[T, N, 5]`."""
    for ts, row in zip(market.ts[-len(ohlcv) :].tolist(), ohlcv[:, :symbols].tolist(), strict=True):
        yield [Bar(symbol, ts, "1m", *candle) for symbol, candle in zip(market.symbols, row, strict=False)]
