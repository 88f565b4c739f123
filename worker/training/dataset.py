"""From bars to what is learnt from: features, labels, windows, and three parts in time.

The features come from `FeatureBank`, the kernel that also runs live. Parts are cut at the same
times for all symbols and never shuffled; a row is in a part only if its label ends inside it, so
between two parts lie as many bars as the horizon has.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from streams.contracts import V3, FeatureSet
from streams.messages import HORIZON
from worker.errors import UsageError
from worker.features.bank import FeatureBank
from worker.training.bars import Bars
from worker.training.labels import find_runs, has_future, path_labels

WINDOW = 64
"""Bars that a network sees."""
SHARES = (0.70, 0.15, 0.15)
"""Of the time: training, validation, test."""
LEAST_ROWS = 200
"""Rows of the smallest part: below this no figure means anything."""


@dataclass(frozen=True)
class Samples:
    """Rows in order of series and time. NaN in `features` `[N, C]` and `paths` `[N, H]` is "not defined".

    `ready` `[N]`: the feature set is warm; `windowed` `[N]`: so are the `WINDOW` bars up to this
    one, without a gap; `labelled` `[N]`: the label is known. `end_ts` `[N]` is the time of the bar
    that decides the label (ms, its open time).
    """

    feature_set: FeatureSet
    series: NDArray[np.int64]
    ts: NDArray[np.int64]
    end_ts: NDArray[np.int64]
    features: NDArray[np.float64]
    paths: NDArray[np.float64]
    ready: NDArray[np.bool_]
    windowed: NDArray[np.bool_]
    labelled: NDArray[np.bool_]

    def rows(self, at: NDArray[np.int64]) -> NDArray[np.float64]:
        """Features `[B, C]` of the rows `at`."""
        return np.asarray(self.features[at], np.float64)

    def windows(self, at: NDArray[np.int64]) -> NDArray[np.float64]:
        """Windows `[B, L, C]` that end with the rows `at`, which must be `windowed`."""
        return np.asarray(self.features[at[:, None] + np.arange(1 - WINDOW, 1)], np.float64)


@dataclass(frozen=True)
class Parts:
    """Row numbers of `Samples` in each part, and the times `cuts` (ms) at which validation and test begin."""

    training: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]
    cuts: tuple[int, int]


def make_samples(
    bars: Bars, *, feature_set: FeatureSet = V3, warmup_bars: int | None = None, max_gap_bars: int = 100
) -> Samples:
    """Features and labels of `bars` in any order; `warmup_bars` is the set's own unless given."""
    bars = bars.sorted()
    runs = find_runs(bars, max_gap_bars)
    bank = FeatureBank((feature_set,), {} if warmup_bars is None else {feature_set.name: warmup_bars})
    features, ready = bank.update(runs.series, bars.ohlcv, runs.restart)
    warm = ready[:, 0]
    began = np.arange(len(bars)) - (WINDOW - 1)
    end = np.minimum(np.arange(len(bars)) + HORIZON, len(bars) - 1)
    return Samples(
        feature_set=feature_set,
        series=runs.series,
        ts=bars.ts,
        end_ts=bars.ts[end],
        features=features,
        paths=path_labels(bars.ohlcv[:, 3], runs, HORIZON),
        ready=warm,
        windowed=(runs.position >= WINDOW - 1) & warm[np.maximum(began, 0)],
        labelled=has_future(runs, HORIZON),
    )


def split(samples: Samples, *, windowed: bool) -> Parts:
    """Cut the labelled rows in time; only rows with a full window if `windowed`.

    The cuts depend on the ready rows alone, so they are the same for every agent. Raises
    `UsageError` where a part has fewer than `LEAST_ROWS` rows.
    """
    usable = samples.labelled & samples.ready
    times = np.unique(samples.ts[usable])
    if len(times) < 3:
        raise _too_little(samples, f"{len(times)} times with features and a label")
    cuts = tuple(int(times[int(len(times) * share)]) for share in np.cumsum(SHARES)[:2])
    rows = np.flatnonzero(usable & samples.windowed if windowed else usable)
    edges = (np.iinfo(np.int64).min, *cuts, np.iinfo(np.int64).max)
    training, validation, test = (
        rows[(samples.ts[rows] >= first) & (samples.end_ts[rows] < last)] for first, last in pairwise(edges)
    )
    least = min(len(training), len(validation), len(test))
    if least < LEAST_ROWS:
        counts = f"{len(training)} training, {len(validation)} validation and {len(test)} test rows"
        raise _too_little(samples, counts)
    return Parts(training, validation, test, (cuts[0], cuts[1]))


def _too_little(samples: Samples, found: str) -> UsageError:
    return UsageError(
        f"too few bars to train on: {len(samples.ts)} bars of {len(np.unique(samples.series))} series give {found}, "
        f"at least {LEAST_ROWS} rows are needed in each part; a series without gaps loses its warm-up, "
        f"{WINDOW} bars of window and three times {HORIZON} bars of horizon: give longer history"
    )
