"""Universal Binary JSON as XGBoost writes it, read with bounds.

Objects with sized keys, arrays with a count and, where they are numeric, one type for all items.
Numbers are big-endian. Typed arrays become numpy arrays, so that a model of many trees is cheap.
Format: ubjson.org, draft 12, less what XGBoost never writes (high-precision numbers, no-ops).
"""

from __future__ import annotations

from typing import Any

import numpy as np

MAX_DEPTH = 24
MAX_VALUES = 1_000_000

_NUMBERS: dict[bytes, np.dtype[Any]] = {
    b"i": np.dtype(">i1"),
    b"U": np.dtype(">u1"),
    b"I": np.dtype(">i2"),
    b"l": np.dtype(">i4"),
    b"L": np.dtype(">i8"),
    b"d": np.dtype(">f4"),
    b"D": np.dtype(">f8"),
}
_CONSTANTS = {b"Z": None, b"T": True, b"F": False}


def decode(data: bytes) -> dict[str, Any]:
    """The document. Raises `ValueError` on whatever is not exactly one well-formed object."""
    reader = _Reader(data)
    if reader.take(1) != b"{":
        raise ValueError("a document begins with an object")
    document = reader.object(0)
    if reader.at != len(data):
        raise ValueError(f"{len(data) - reader.at} bytes after the end")
    return document


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at, self.values = data, 0, 0

    def take(self, n: int) -> bytes:
        if n < 0 or self.at + n > len(self.data):
            raise ValueError(f"truncated at byte {self.at}")
        self.at += n
        return self.data[self.at - n : self.at]

    def number(self, kind: bytes) -> int | float:
        dtype = _NUMBERS[kind]
        value: int | float = np.frombuffer(self.take(dtype.itemsize), dtype)[0].item()
        return value

    def count(self) -> int:
        kind = self.take(1)
        n = self.number(kind) if kind in _NUMBERS else -1
        if not isinstance(n, int) or n < 0:
            raise ValueError(f"a bad length at byte {self.at}")
        return n

    def text(self) -> str:
        return self.take(self.count()).decode()

    def value(self, depth: int) -> Any:
        self.values += 1
        if depth > MAX_DEPTH or self.values > MAX_VALUES:
            raise ValueError(f"nested deeper than {MAX_DEPTH} or more than {MAX_VALUES} values")
        kind = self.take(1)
        if kind in _NUMBERS:
            return self.number(kind)
        if kind in _CONSTANTS:
            return _CONSTANTS[kind]
        if kind == b"S":
            return self.text()
        if kind == b"{":
            return self.object(depth)
        if kind == b"[":
            return self.array(depth)
        raise ValueError(f"unknown marker {kind!r} at byte {self.at - 1}")

    def object(self, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while self.data[self.at : self.at + 1] != b"}":
            key = self.text()
            if key in found:
                raise ValueError(f"the key {key[:40]!r} twice")
            found[key] = self.value(depth + 1)
        self.at += 1
        return found

    def array(self, depth: int) -> Any:
        kind = self.take(2)[1:] if self.data[self.at : self.at + 1] == b"$" else None
        if self.data[self.at : self.at + 1] == b"#":
            self.at += 1
            n = self.count()
            if kind is None:
                return [self.value(depth + 1) for _ in range(n)]
            if kind not in _NUMBERS:
                raise ValueError(f"an array of {kind!r}")
            return np.frombuffer(self.take(n * _NUMBERS[kind].itemsize), _NUMBERS[kind])
        if kind is not None:
            raise ValueError("a typed array without a count")
        items = []
        while self.data[self.at : self.at + 1] != b"]":
            items.append(self.value(depth + 1))
        self.at += 1
        return items


def encode(value: Any) -> bytes:
    """The bytes of a document of objects, lists, text, integers, float32 and numeric arrays."""
    parts: list[bytes] = []
    _write(value, parts)
    return b"".join(parts)


_MARKERS = {dtype.str[1:]: marker for marker, dtype in _NUMBERS.items()}


def _length(n: int) -> bytes:
    return b"L" + n.to_bytes(8, "big")


def _text(value: str) -> bytes:
    data = value.encode()
    return _length(len(data)) + data


def _write(value: Any, parts: list[bytes]) -> None:
    if isinstance(value, dict):
        parts.append(b"{")
        for key, item in value.items():
            parts.append(_text(key))
            _write(item, parts)
        parts.append(b"}")
    elif isinstance(value, np.ndarray):
        marker = _MARKERS[value.dtype.str[1:]]
        parts.append(b"[$" + marker + b"#" + _length(len(value)) + value.astype(_NUMBERS[marker]).tobytes())
    elif isinstance(value, (list, tuple)):
        parts.append(b"[#" + _length(len(value)))
        for item in value:
            _write(item, parts)
    elif isinstance(value, str):
        parts.append(b"S" + _text(value))
    elif isinstance(value, int):
        parts.append(b"L" + value.to_bytes(8, "big", signed=True))
    elif isinstance(value, float):
        parts.append(b"d" + np.array(value, _NUMBERS[b"d"]).tobytes())
    else:
        raise TypeError(f"{type(value).__name__} is not written")
