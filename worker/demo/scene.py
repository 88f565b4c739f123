"""What a demonstration shows: how much of which market, and where its files lie.

One seed is one market, always generated whole: the stretch that the models learn from is the same
however many symbols and bars are shown, and it ends an hour before the first bar shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from streams.messages import Bar
from worker.training.bars import Bars
from worker.training.market import MINUTE_MS, generate

MOST_SYMBOLS, MOST_BARS = 50, 4_000
FEWEST_BARS = 200
"""100 bars of warm-up and 64 ready vectors of a sequence model's window, and some to vote on."""
KEPT_BARS = 1_000
"""Bars of each symbol that `--keep` can still publish after those that were asked for."""
TRAINING_SYMBOLS, TRAINING_BARS, GAP_BARS = 20, 1_500, 60
_SHOWN_FROM = TRAINING_BARS + GAP_BARS
_TOTAL = _SHOWN_FROM + MOST_BARS + KEPT_BARS


@dataclass(frozen=True)
class Scene:
    """One demonstration; `directory` is its own, `models` may be shared by several."""

    directory: Path
    models: Path
    symbols: int = 20
    bars: int = 600
    seed: int = 0
    keep: bool = False

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
    """The later stretch, one list of `symbols` bars a minute; the `bars`-th of them opens at `last_ts` ms."""
    end_ts = last_ts + (_TOTAL - _SHOWN_FROM - bars) * MINUTE_MS
    market = generate(MOST_SYMBOLS, _TOTAL, seed, end_ts)
    for ts, row in zip(market.ts[_SHOWN_FROM:].tolist(), market.ohlcv[_SHOWN_FROM:, :symbols].tolist(), strict=True):
        yield [Bar(symbol, ts, "1m", *ohlcv) for symbol, ohlcv in zip(market.symbols, row, strict=False)]
