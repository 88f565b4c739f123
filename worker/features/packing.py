"""State blobs: fixed little-endian records, each with a version and a CRC-32 that covers its field's name.

A series has one blob under `<row>` and one for each row of its ring under `<row>:<slot>`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

VERSION = 1
_HEADER = [("crc", "<u4"), ("version", "<u4"), ("row", "<i8")]
_CRC_BYTES = 4


class StateCorruptError(Exception):
    """A stored blob is not what was written, so nothing computed from it could be trusted."""

    def __init__(self, field: bytes, found: str) -> None:
        super().__init__(
            f"state field {field.decode('ascii', 'backslashreplace')!r}: {found}; "
            "the stored state cannot be used: rebuild it from the input (`rebuild`)"
        )
        self.field = field


def blob_record(*parts: Any) -> np.dtype[Any]:
    """The layout of a blob: the header (crc, version, row), then `parts`."""
    return np.dtype([*_HEADER, *parts])


def grown(array: NDArray[Any], rows: int) -> NDArray[Any]:
    """`array` with room for at least `rows` rows, the new ones 0; doubled, so that growth is rare."""
    if rows <= len(array):
        return array
    larger = np.zeros((max(rows, 2 * len(array)), *array.shape[1:]), array.dtype)
    larger[: len(array)] = array
    return larger


def pack(names: Iterable[bytes], records: NDArray[Any]) -> list[tuple[bytes, bytes]]:
    """Field and blob of each record; fills the version and the CRC."""
    records["version"] = VERSION
    size = records.itemsize
    data = records.tobytes()
    packed = []
    for i, name in enumerate(names):
        body = data[i * size + _CRC_BYTES : (i + 1) * size]
        packed.append((name, crc32(body, crc32(name)).to_bytes(_CRC_BYTES, "little") + body))
    return packed


def unpack(fields: Mapping[bytes, bytes], layout: np.dtype[Any]) -> NDArray[Any]:
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


def split(fields: Mapping[bytes, bytes]) -> tuple[dict[bytes, bytes], dict[bytes, bytes]]:
    """The blobs of series (`<row>`) and those of ring rows (`<row>:<slot>`)."""
    series = {name: blob for name, blob in fields.items() if b":" not in name}
    ring = {name: blob for name, blob in fields.items() if b":" in name}
    return series, ring


def _refuse_size(name: bytes, blob: bytes, expected: int) -> None:
    version = int.from_bytes(blob[4:8], "little")
    if len(blob) >= 8 and version != VERSION:
        _refuse_version(name, version)
    raise StateCorruptError(name, f"{len(blob)} bytes found, {expected} expected")


def _refuse_version(name: bytes, version: int) -> None:
    raise StateCorruptError(name, f"layout version {version} found, this program reads version {VERSION}")
