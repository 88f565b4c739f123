"""joblib's compressed containers, opened with a bound on what comes out."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable
from typing import Protocol

from agents.agent import SAVE_AGAIN, Refused
from streams.messages import Reason

MAX_BYTES = 128 * 2**20
"""The largest pickle, before and after decompression."""

_LZMA_MEMORY = 128 * 2**20
_REFUSED = {
    b"\x04\x22\x4d\x18": "lz4-compressed",
    b"ZF": "written by joblib before 0.10",
}


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


# The first bytes of a container, and what opens it: the same choice as joblib makes.
_OPENERS: dict[bytes, Callable[[], _Decompressor]] = {
    b"\x78": zlib.decompressobj,
    b"\x1f\x8b": lambda: zlib.decompressobj(wbits=31),
    b"BZ": bz2.BZ2Decompressor,
    b"\xfd7zXZ": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, _LZMA_MEMORY),
    b"\x5d\x00": lambda: lzma.LZMADecompressor(lzma.FORMAT_ALONE, _LZMA_MEMORY),
}


def unpack(data: bytes, limit: int = MAX_BYTES) -> bytes:
    """The bytes inside a container, or `data` itself where it is none.

    Raises `Refused` with `corrupt_artifact` above `limit` bytes, in or out, on a truncated
    container, on bytes after its end and on a container that is not read.
    """
    if len(data) > limit:
        raise _corrupt(f"{len(data)} bytes: at most {limit} are read")
    for prefix, what in _REFUSED.items():
        if data.startswith(prefix):
            raise _corrupt(f"the file is {what}: write it again with joblib.dump(model, file, compress=3)")
    for prefix, opener in _OPENERS.items():
        if data.startswith(prefix):
            return _inflate(opener(), data, limit)
    return data


def _inflate(decompressor: _Decompressor, data: bytes, limit: int) -> bytes:
    try:
        plain = decompressor.decompress(data, limit + 1)
    except (zlib.error, OSError, lzma.LZMAError, EOFError, ValueError, MemoryError) as error:
        raise _corrupt(f"the compressed container is damaged: {error}") from error
    if len(plain) > limit:
        raise _corrupt(f"the container holds more than {limit} bytes")
    if not decompressor.eof or decompressor.unused_data:
        raise _corrupt("the compressed container is truncated or has bytes after its end")
    return plain


def _corrupt(detail: str) -> Refused:
    return Refused(Reason.CORRUPT_ARTIFACT, f"{detail}; {SAVE_AGAIN}")
