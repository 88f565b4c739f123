"""The state of many series, a ring each, and its form in storage.

A series has one blob under the field `<row>` and one for each item of its ring under
`<row>:<slot>`: fixed little-endian records, each with a version and a CRC-32 that covers the name of
its field too. Items carry the life of their series (how often it was restarted) and their index in
it, so that what an earlier life left in storage is never taken for the present one's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from streams.codec import StateCorruptError

VERSION = 1
_HEADER = [("crc", "<u4"), ("version", "<u4"), ("row", "<i8")]
_CRC_BYTES = 4


class SeriesStore:
    """State `[R]` and rings `[R, capacity]` of series, grown as rows appear.

    `state_record` must have the integers `life` (restarts so far) and `count` (items since then);
    item `i` of a life is in slot `i % capacity`.
    """

    def __init__(self, state_record: np.dtype[Any], item: np.dtype[Any], capacity: int) -> None:
        self.state: NDArray[Any] = np.zeros(0, state_record)
        self.ring: NDArray[Any] = np.zeros((0, capacity), item)
        self._capacity = capacity
        self._item = item
        self._series_blob = np.dtype([*_HEADER, ("state", state_record)])
        self._item_blob = np.dtype([*_HEADER, ("life", "<i8"), ("index", "<i8"), ("item", item)])

    def reserve(self, rows: int) -> None:
        """Make room for rows `0 .. rows - 1`, the new ones 0; doubled, so that growth is rare."""
        known = len(self.state)
        if rows > known:
            size = max(rows, 2 * known)
            self.state = np.concatenate([self.state, np.zeros(size - known, self.state.dtype)])
            self.ring = np.concatenate([self.ring, np.zeros((size - known, self._capacity), self._item)])

    def widen(self, capacity: int, held: NDArray[np.int64]) -> None:
        """Make every ring `capacity` items long; of each series the last `held` items are kept."""
        ring = np.zeros((len(self.state), capacity), self._item)
        for back in range(1, self._capacity + 1):
            rows = np.flatnonzero(held >= back)
            index = self.state["count"][rows] - back
            ring[rows, index % capacity] = self.ring[rows, index % self._capacity]
        self.ring, self._capacity = ring, capacity

    def pack_series(self, rows: NDArray[np.int64]) -> list[tuple[bytes, bytes]]:
        """Field and blob of each of the distinct `rows`."""
        records = np.zeros(len(rows), self._series_blob)
        records["row"] = rows
        records["state"] = self.state[rows]
        return _pack([b"%d" % row for row in rows.tolist()], records)

    def pack_items(self, rows: NDArray[np.int64], new: NDArray[np.int64]) -> list[tuple[bytes, bytes]]:
        """Field and blob of the last `new[i]` items of each of the distinct `rows`."""
        row = np.repeat(rows, new)
        first = np.repeat(self.state["count"][rows] - new - (np.cumsum(new) - new), new)
        index = first + np.arange(len(row))
        slot = index % self._capacity
        records = np.zeros(len(row), self._item_blob)
        records["row"] = row
        records["life"] = self.state["life"][row]
        records["index"] = index
        records["item"] = self.ring[row, slot]
        names = [b"%d:%d" % pair for pair in zip(row.tolist(), slot.tolist(), strict=True)]
        return _pack(names, records)

    def restore(self, fields: Mapping[bytes, bytes], held: Callable[[NDArray[Any]], NDArray[np.int64]]) -> None:
        """Replace everything by `fields`; `held` says from the state how many items each ring must have.

        Raises StateCorruptError, and changes nothing, where a blob is wrong or missing.
        """
        series_fields, item_fields = _split(fields)
        series = _unpack(series_fields, self._series_blob)
        items = _unpack(item_fields, self._item_blob)
        for row in np.setdiff1d(items["row"], series["row"]):
            raise StateCorruptError(b"%d" % row, "missing, though items of its ring are there")
        state = np.zeros(int(series["row"].max(initial=-1)) + 1, self.state.dtype)
        state[series["row"]] = series["state"]
        self.ring = self._rings(state, held(state), items)
        self.state = state

    def _rings(self, state: NDArray[Any], held: NDArray[np.int64], items: NDArray[Any]) -> NDArray[Any]:
        owner = state[items["row"]]
        index = items["index"]
        present = (items["life"] == owner["life"]) & (index < owner["count"])
        live = items[present & (index >= owner["count"] - held[items["row"]])]
        # After a change of capacity an item may still be in its old slot too: count each once.
        there = np.zeros((len(state), self._capacity), np.bool_)
        there[live["row"], live["index"] % self._capacity] = True
        found = there.sum(axis=1)
        for row in np.flatnonzero(found != held):
            raise StateCorruptError(b"%d" % row, f"{found[row]} items of its ring found, {held[row]} expected")
        ring = np.zeros((len(state), self._capacity), self._item)
        ring[live["row"], live["index"] % self._capacity] = live["item"]
        return ring


def _pack(names: Iterable[bytes], records: NDArray[Any]) -> list[tuple[bytes, bytes]]:
    """Field and blob of each record; fills the version and the CRC."""
    records["version"] = VERSION
    size = records.itemsize
    data = records.tobytes()
    packed = []
    for i, name in enumerate(names):
        body = data[i * size + _CRC_BYTES : (i + 1) * size]
        packed.append((name, crc32(body, crc32(name)).to_bytes(_CRC_BYTES, "little") + body))
    return packed


def _unpack(fields: Mapping[bytes, bytes], layout: np.dtype[Any]) -> NDArray[Any]:
    """The records of `fields`, in their order. Raises `StateCorruptError` for the first wrong blob."""
    for name, blob in fields.items():
        if len(blob) != layout.itemsize:
            _refuse_size(name, blob, layout.itemsize)
    records = np.frombuffer(b"".join(fields.values()), layout)
    computed = np.array([crc32(blob[_CRC_BYTES:], crc32(name)) for name, blob in fields.items()], np.uint32)
    names = list(fields)
    for wrong in np.flatnonzero(records["version"] != VERSION):
        _refuse_version(names[wrong], int(records["version"][wrong]))
    for wrong in np.flatnonzero(records["crc"] != computed):
        stored = int(records["crc"][wrong])
        raise StateCorruptError(names[wrong], f"CRC-32 {stored:08x} stored, {int(computed[wrong]):08x} computed")
    return records


def _split(fields: Mapping[bytes, bytes]) -> tuple[dict[bytes, bytes], dict[bytes, bytes]]:
    """The blobs of series and those of ring items."""
    series = {name: blob for name, blob in fields.items() if b":" not in name}
    items = {name: blob for name, blob in fields.items() if b":" in name}
    return series, items


def _refuse_size(name: bytes, blob: bytes, expected: int) -> None:
    version = int.from_bytes(blob[4:8], "little")
    if len(blob) >= 8 and version != VERSION:
        _refuse_version(name, version)
    raise StateCorruptError(name, f"{len(blob)} bytes found, {expected} expected")


def _refuse_version(name: bytes, version: int) -> None:
    raise StateCorruptError(name, f"layout version {version} found, this program reads version {VERSION}")
