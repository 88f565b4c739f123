"""The last vectors of each series, for models that read a whole window of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from worker.features.kernel import compiled
from worker.features.packing import StateCorruptError, blob_record, grown, pack, split, unpack

_STATE_RECORD = np.dtype([("life", "<i8"), ("count", "<i8"), ("held", "<i8"), ("capacity", "<i8")])
# life: restarts so far; count: vectors since then; held: those still in the ring.
_SERIES_BLOB = blob_record(("state", _STATE_RECORD))


@compiled
def _push(
    rows: NDArray[np.int64],
    vectors: NDArray[np.float64],
    restart: NDArray[np.bool_],
    state: NDArray[Any],
    ring: NDArray[np.float64],
    windows: NDArray[np.float64],
    full: NDArray[np.bool_],
) -> None:
    capacity = ring.shape[1]
    length = windows.shape[1]
    for i in range(rows.size):
        s = state[rows[i]]
        if restart[i]:
            s.life += 1
            s.count = 0
            s.held = 0
        ring[rows[i], s.count % capacity] = vectors[i]
        s.count += 1
        s.held = min(s.held + 1, capacity)
        full[i] = s.held >= length
        if full[i]:
            for k in range(length):
                windows[i, k] = ring[rows[i], (s.count - length + k) % capacity]


class SequenceWindows:
    """The last `capacity` vectors of `width` numbers of any number of series (rows, as in the bank)."""

    def __init__(self, width: int, capacity: int = 64) -> None:
        self.width = width
        self.capacity = capacity
        self._state = np.zeros(0, _STATE_RECORD)
        self._ring = np.zeros((0, capacity, width))
        self._ring_blob = blob_record(("life", "<i8"), ("index", "<i8"), ("vector", "<f8", (width,)))

    @property
    def counts(self) -> NDArray[np.int64]:
        """Vectors at hand of each series, at most `capacity`, `[R]`."""
        return self._state["held"].copy()

    def push(
        self,
        rows: NDArray[np.int64],
        vectors: NDArray[np.float64],
        length: int,
        restart: NDArray[np.bool_] | None = None,
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Append vectors `[N, C]` in order; give each row's last `length`, oldest first, `[N, length, C]`.

        The second value `[N]` says which windows are full; the content of the others is
        unspecified. `restart[i]` forgets the series before vector i.
        """
        rows = np.require(rows, np.int64, ["C", "W"])
        vectors = np.require(vectors, np.float64, ["C", "W"])
        restart = np.zeros(len(rows), np.bool_) if restart is None else np.require(restart, np.bool_, ["C", "W"])
        self._check(rows, vectors, restart, length)
        windows = np.empty((len(rows), length, self.width))
        full = np.empty(len(rows), np.bool_)
        if len(rows):
            self._reserve(int(rows.max()) + 1)
            _push(rows, vectors, restart, self._state, self._ring, windows, full)
        return windows, full

    def changes(self, rows: NDArray[np.int64]) -> list[tuple[bytes, bytes]]:
        """What to store after a push with these `rows`: one blob a distinct row, one a new vector."""
        touched, pushed = np.unique(rows, return_counts=True)
        # A series stored under another capacity has its vectors in other slots: store them all anew.
        moved = self._state["capacity"][touched] != self.capacity
        self._state["capacity"][touched] = self.capacity
        held = self._state["held"][touched]
        return self._pack_series(touched) + self._pack_ring(touched, np.where(moved, held, np.minimum(pushed, held)))

    def restore(self, fields: Mapping[bytes, bytes]) -> None:
        """Replace everything by what was stored; of a longer ring the newest vectors are kept.

        Raises StateCorruptError, and changes nothing, where a blob is wrong or missing.
        """
        series_fields, ring_fields = split(fields)
        series = unpack(series_fields, _SERIES_BLOB)
        vectors = unpack(ring_fields, self._ring_blob)
        size = int(max(series["row"].max(initial=-1), vectors["row"].max(initial=-1))) + 1
        state = np.zeros(size, _STATE_RECORD)
        state[series["row"]] = series["state"]
        state["held"] = np.minimum(state["held"], self.capacity)
        self._ring = self._restore_ring(state, vectors)
        self._state = state

    def _restore_ring(self, state: NDArray[Any], vectors: NDArray[Any]) -> NDArray[np.float64]:
        owner = state[vectors["row"]]
        index = vectors["index"]
        current = (vectors["life"] == owner["life"]) & (index < owner["count"])
        live = vectors[current & (index >= owner["count"] - owner["held"])]
        found = np.bincount(live["row"], minlength=len(state))
        for row in np.flatnonzero(found != state["held"]):
            raise StateCorruptError(b"%d" % row, f"{found[row]} vectors found, {state['held'][row]} expected")
        ring = np.zeros((len(state), self.capacity, self.width))
        ring[live["row"], live["index"] % self.capacity] = live["vector"]
        return ring

    def _reserve(self, rows: int) -> None:
        known = len(self._state)
        self._state = grown(self._state, rows)
        self._state["capacity"][known:] = self.capacity
        self._ring = grown(self._ring, rows)

    def _pack_series(self, rows: NDArray[np.int64]) -> list[tuple[bytes, bytes]]:
        records = np.zeros(len(rows), _SERIES_BLOB)
        records["row"] = rows
        records["state"] = self._state[rows]
        return pack([b"%d" % row for row in rows.tolist()], records)

    def _pack_ring(self, rows: NDArray[np.int64], new: NDArray[np.int64]) -> list[tuple[bytes, bytes]]:
        row = np.repeat(rows, new)
        first = np.repeat(self._state["count"][rows] - new - (np.cumsum(new) - new), new)
        index = first + np.arange(len(row))
        slot = index % self.capacity
        records = np.zeros(len(row), self._ring_blob)
        records["row"] = row
        records["life"] = self._state["life"][row]
        records["index"] = index
        records["vector"] = self._ring[row, slot]
        names = [b"%d:%d" % pair for pair in zip(row.tolist(), slot.tolist(), strict=True)]
        return pack(names, records)

    def _check(
        self, rows: NDArray[np.int64], vectors: NDArray[np.float64], restart: NDArray[np.bool_], length: int
    ) -> None:
        if vectors.shape != (len(rows), self.width) or restart.shape != rows.shape:
            raise ValueError(
                f"rows {rows.shape}, vectors {vectors.shape}, restart {restart.shape}: "
                f"expected [N], [N, {self.width}] and [N]"
            )
        if not 1 <= length <= self.capacity:
            raise ValueError(f"window of {length} vectors: 1 to {self.capacity} (the capacity) can be had")
        if len(rows) and rows.min() < 0:
            raise ValueError(f"row {rows.min()}: series are numbered from 0")
