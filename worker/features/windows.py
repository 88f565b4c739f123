"""The last vectors of each series, for models that read a whole window of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from worker.features.kernel import compiled
from worker.features.packing import SeriesStore

_STATE_RECORD = np.dtype([("life", "<i8"), ("count", "<i8"), ("held", "<i8"), ("capacity", "<i8")])
# life: restarts so far; count: vectors since then; held: those still in the ring.


@compiled
def _copy(source: NDArray[np.float64], target: NDArray[np.float64]) -> None:
    for j in range(source.size):  # compiles and runs faster than an array assignment
        target[j] = source[j]


@compiled
def _push(
    rows: NDArray[np.int64],
    vectors: NDArray[np.float64],
    restart: NDArray[np.bool_],
    ready: NDArray[np.bool_],
    state: NDArray[Any],
    ring: NDArray[np.float64],
    windows: NDArray[np.float64],
    held: NDArray[np.int64],
) -> None:
    capacity = ring.shape[1]
    length = windows.shape[1]
    for i in range(rows.size):
        s = state[rows[i]]
        if restart[i]:
            s.life += 1
            s.count = 0
            s.held = 0
        held[i] = 0
        if ready[i]:
            _copy(vectors[i], ring[rows[i], s.count % capacity])
            s.count += 1
            s.held = min(s.held + 1, capacity)
            held[i] = s.held
            for k in range(max(0, length - s.held), length):
                _copy(ring[rows[i], (s.count - length + k) % capacity], windows[i, k])


class SequenceWindows:
    """The last `capacity` vectors of `width` numbers of any number of series (rows, as in the bank)."""

    def __init__(self, width: int, capacity: int = 64) -> None:
        self.width = width
        self.capacity = capacity
        self._store = SeriesStore(_STATE_RECORD, np.dtype(("<f8", (width,))), capacity)
        # Compile, or load from the cache, now rather than at the first bar.
        self.push(np.zeros(0, np.int64), np.zeros((0, width)), 1)

    @property
    def counts(self) -> NDArray[np.int64]:
        """Vectors at hand of each series, at most `capacity`, `[R]`."""
        counts: NDArray[np.int64] = self._store.state["held"].copy()
        return counts

    def push(
        self,
        rows: NDArray[np.int64],
        vectors: NDArray[np.float64],
        length: int,
        restart: NDArray[np.bool_] | None = None,
        ready: NDArray[np.bool_] | None = None,
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Append vectors `[N, C]` in order; give each row's last `length`, oldest first, `[N, length, C]`.

        The second value `[N]` is how many vectors the series then holds: a window is full where that
        is `length` or more, and holds as many at its end where it is less; the rest of it is
        unspecified. `restart[i]` forgets the series before vector i; a vector that is not `ready[i]`
        is not appended, and 0 are held for it.
        """
        rows = np.require(rows, np.int64, ["C", "W"])
        vectors = np.require(vectors, np.float64, ["C", "W"])
        restart = np.zeros(len(rows), np.bool_) if restart is None else np.require(restart, np.bool_, ["C", "W"])
        ready = np.ones(len(rows), np.bool_) if ready is None else np.require(ready, np.bool_, ["C", "W"])
        self._check(rows, vectors, restart, ready, length)
        windows = np.empty((len(rows), length, self.width))
        held = np.zeros(len(rows), np.int64)
        self._store.reserve(int(rows.max(initial=-1)) + 1)
        _push(rows, vectors, restart, ready, self._store.state, self._store.ring, windows, held)
        return windows, held

    def widen(self, capacity: int) -> None:
        """Hold `capacity` vectors from now on, where that is more; what is held stays."""
        if capacity > self.capacity:
            self._store.widen(capacity, self._store.state["held"])
            self.capacity = capacity

    def changes(self, rows: NDArray[np.int64]) -> list[tuple[bytes, bytes]]:
        """What to store after a push with these `rows`: one blob a distinct row, one a new vector."""
        touched, pushed = np.unique(rows, return_counts=True)
        state = self._store.state
        held = state["held"][touched]
        # A series stored under another capacity has its vectors in other slots: store them all anew.
        moved = state["capacity"][touched] != self.capacity
        state["capacity"][touched] = self.capacity
        new = np.where(moved, held, np.minimum(pushed, held))
        return self._store.pack_series(touched) + self._store.pack_items(touched, new)

    def restore(self, fields: Mapping[bytes, bytes]) -> None:
        """Replace everything by what was stored; of a longer ring the newest vectors are kept.

        Raises StateCorruptError, and changes nothing, where a blob is wrong or missing.
        """
        self._store.restore(fields, self._clip_held)

    def _clip_held(self, state: NDArray[Any]) -> NDArray[np.int64]:
        state["held"] = np.minimum(state["held"], self.capacity)
        return state["held"]

    def _check(
        self,
        rows: NDArray[np.int64],
        vectors: NDArray[np.float64],
        restart: NDArray[np.bool_],
        ready: NDArray[np.bool_],
        length: int,
    ) -> None:
        if vectors.shape != (len(rows), self.width) or restart.shape != rows.shape or ready.shape != rows.shape:
            raise ValueError(
                f"rows {rows.shape}, vectors {vectors.shape}, restart {restart.shape}, ready {ready.shape}: "
                f"expected [N], [N, {self.width}], [N] and [N]"
            )
        if not 1 <= length <= self.capacity:
            raise ValueError(f"window of {length} vectors: 1 to {self.capacity} (the capacity) can be had")
        if len(rows) and rows.min() < 0:
            raise ValueError(f"row {rows.min()}: series are numbered from 0")
