"""Which bars belong together, and what happened after each: the labels.

A run is a stretch of one symbol and interval without a missing bar. Labels and windows never reach
over the end of a run. Weekends of hourly and daily bars are not missing (`missing_bars`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from streams.validation import interval_ms, missing_bars
from worker.training.bars import Bars


@dataclass(frozen=True)
class Runs:
    """Bars in the order of `Bars.sorted()`, `[N]` each.

    `series` numbers symbol and interval from 0; `position` counts bars since the run began, from 0;
    `restart` is true where live features would warm up anew.
    """

    series: NDArray[np.int64]
    position: NDArray[np.int64]
    restart: NDArray[np.bool_]


def find_runs(bars: Bars, max_gap_bars: int) -> Runs:
    """The runs of sorted `bars`; features restart after more than `max_gap_bars` missing ones."""
    first = _first_of_series(bars)
    missing = np.where(first, 0, _missing(bars, first))
    begins = np.flatnonzero(first | (missing > 0))
    position = np.arange(len(bars)) - np.repeat(begins, np.diff(np.append(begins, len(bars))))
    return Runs(np.cumsum(first) - 1, position, first | (missing > max_gap_bars))


def path_labels(close: NDArray[np.float64], runs: Runs, horizon: int) -> NDArray[np.float64]:
    """`[N, horizon]`: C[t+k]/C[t] - 1 for k of 1 to `horizon`, NaN where the run ends before that."""
    paths = np.full((len(close), horizon), np.nan)
    at = np.flatnonzero(has_future(runs, horizon))
    for k in range(1, horizon + 1):
        paths[at, k - 1] = close[at + k] / close[at] - 1
    return paths


def has_future(runs: Runs, horizon: int) -> NDArray[np.bool_]:
    """`[N]`: whether the next `horizon` bars follow in the same run."""
    n = len(runs.position)
    ahead = np.minimum(np.arange(n) + horizon, n - 1)
    # Another series begins at 0, so that its position is too small.
    return np.asarray(runs.position[ahead] == runs.position + horizon, np.bool_)


def _first_of_series(bars: Bars) -> NDArray[np.bool_]:
    change = (bars.symbol[1:] != bars.symbol[:-1]) | (bars.interval[1:] != bars.interval[:-1])
    return np.concatenate([np.ones(1, np.bool_), change])


def _missing(bars: Bars, first: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Bars absent before each one; the rows of `first` are to be ignored."""
    names, which = np.unique(bars.interval, return_inverse=True)
    step = np.array([interval_ms(str(name)) for name in names])[which]
    delta = np.diff(bars.ts, prepend=bars.ts[:1])
    missing = np.zeros(len(bars), np.int64)
    for i in np.flatnonzero((delta != step) & ~first):
        missing[i] = missing_bars(int(bars.ts[i - 1]), int(bars.ts[i]), int(step[i]))
    return missing
