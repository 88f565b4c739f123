"""The features of all series: their state, updates in batches, what to store and how to restore it.

A series is a row, a small integer that the caller assigns; the bank knows no symbols.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streams.codec import StateCorruptError
from streams.contracts import DEFINITIONS, V3, FeatureSet, union
from worker.features.kernel import (
    BAR_RECORD,
    COLUMN_RECORD,
    COLUMNS,
    CORE_COLUMNS,
    DEPTH,
    RING_RECORD,
    STATE_RECORD,
    advance,
)
from worker.features.packing import SeriesStore

__all__ = ["FeatureBank", "StateCorruptError"]


class FeatureBank:
    """Incremental features of any number of series.

    `sets` are the feature sets in use; `warmup_bars` overrides a set's own by its name. Raises
    ValueError where a warm-up is shorter than the set's longest window. The first bank of a process
    compiles the kernel (seconds) or loads it from numba's cache (`NUMBA_CACHE_DIR`).
    """

    def __init__(self, sets: Sequence[FeatureSet] = (V3,), warmup_bars: Mapping[str, int] | None = None) -> None:
        self._warmup_bars = dict(warmup_bars or {})
        self._store = SeriesStore(STATE_RECORD, RING_RECORD, DEPTH)
        self._stale: set[int] = set()
        self._extended = False
        self.set_sets(sets)
        # Compile, or load from the cache, now rather than at the first bar.
        self.update(np.zeros(0, np.int64), np.zeros((0, 5)))

    def set_sets(self, sets: Sequence[FeatureSet]) -> None:
        """Change the sets in use between two updates; what both have is untouched.

        Where a set brings the extended group, that group starts its own warm-up; where none needs
        it any more, it is forgotten.
        """
        warmup = [_warmup_bars(s, self._warmup_bars.get(s.name, s.warmup_bars)) for s in sets]
        self.sets = tuple(sets)
        self.names = union(self.sets)
        self._columns = np.array([COLUMNS.index(DEFINITIONS[name].column) for name in self.names], np.intp)
        groups = [_is_extended(s) for s in self.sets]
        self._groups = np.array(groups, np.intp)
        self._warmup = np.array(warmup, np.int64)
        if self._extended and not any(groups):
            self._forget_extended()
        self._extended = any(groups)

    def update(
        self, rows: NDArray[np.int64], ohlcv: NDArray[np.float64], restart: NDArray[np.bool_] | None = None
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Take bars in order; give their features `[N, F]` (columns as `names`) and readiness `[N, S]`.

        rows `[N]` are series numbers >= 0 and may repeat; ohlcv is `[N, 5]`: open, high, low, close
        (> 0), volume (>= 0). `restart[i]` forgets the series before bar i. NaN is "not yet defined".
        """
        rows = np.require(rows, np.int64, ["C", "W"])
        ohlcv = np.require(ohlcv, np.float64, ["C", "W"])
        restart = np.zeros(len(rows), np.bool_) if restart is None else np.require(restart, np.bool_, ["C", "W"])
        _check_batch(rows, ohlcv, restart)
        out = np.full((len(rows), len(COLUMNS)), np.nan)
        counts = np.empty((len(rows), 2), np.int64)
        self._store.reserve(int(rows.max(initial=-1)) + 1)
        records = out.view(COLUMN_RECORD)[:, 0]
        bars = ohlcv.view(BAR_RECORD)[:, 0]
        advance(rows, bars, restart, self._extended, self._store.state, self._store.ring, records, counts)
        return np.take(out, self._columns, axis=1), counts[:, self._groups] >= self._warmup

    def is_warm(self, name: str) -> bool:
        """Whether the set of this name, one in use, is ready for any series."""
        place = next(place for place, feature_set in enumerate(self.sets) if feature_set.name == name)
        bars = self._store.state["extended" if self._groups[place] else "count"]
        return bool((bars >= self._warmup[place]).any())

    def changes(self, rows: NDArray[np.int64]) -> list[tuple[bytes, bytes]]:
        """What to store after an update with these `rows`: fields and blobs.

        One blob a distinct row, and one for each of its new bars (at most 64), never the window.
        """
        touched, bars = np.unique(rows, return_counts=True)
        stale = self._stale.difference(touched.tolist())
        self._stale.clear()
        series = np.concatenate([touched, np.array(sorted(stale), np.int64)])
        new = np.minimum(bars, _held(self._store.state[touched]))
        return self._store.pack_series(series) + self._store.pack_items(touched, new)

    def restore(self, fields: Mapping[bytes, bytes]) -> None:
        """Replace the whole state by a stored one; continuing is bit for bit the same.

        Raises StateCorruptError, and changes nothing, where a blob is wrong or missing.
        """
        self._store.restore(fields, _held)
        self._stale.clear()
        if not self._extended:
            self._forget_extended()

    def _forget_extended(self) -> None:
        """Also in what is stored: else a crash would bring the group back for series without new bars."""
        self._stale.update(np.flatnonzero(self._store.state["extended"]).tolist())
        self._store.state["extended"] = 0


def _held(state: NDArray[Any]) -> NDArray[np.int64]:
    held: NDArray[np.int64] = np.minimum(state["count"], DEPTH)
    return held


def _is_extended(feature_set: FeatureSet) -> bool:
    return any(DEFINITIONS[name].column not in CORE_COLUMNS for name in feature_set.features)


def _warmup_bars(feature_set: FeatureSet, bars: int) -> int:
    if bars < feature_set.longest_window:
        raise ValueError(
            f"warm-up of {feature_set.name}: {bars} bars are fewer than its longest window; "
            f"set at least {feature_set.longest_window}"
        )
    return bars


def _check_batch(rows: NDArray[np.int64], ohlcv: NDArray[np.float64], restart: NDArray[np.bool_]) -> None:
    if ohlcv.shape != (len(rows), 5) or restart.shape != rows.shape:
        raise ValueError(
            f"rows {rows.shape}, ohlcv {ohlcv.shape}, restart {restart.shape}: expected [N], [N, 5] and [N]"
        )
    if len(rows) and rows.min() < 0:
        raise ValueError(f"row {rows.min()}: series are numbered from 0")
