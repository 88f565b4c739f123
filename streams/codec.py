"""Messages to bytes and back: JSON on the streams, sealed msgpack in the state."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import msgpack
import orjson

from streams.messages import Event, Reject
from streams.validation import MAX_PAYLOAD_BYTES

SEAL_VERSION = 1
_OPTIONS = orjson.OPT_SERIALIZE_NUMPY


class StateCorruptError(Exception):
    """A stored state blob whose checksum or version is not what was written."""

    def __init__(self, field: str | bytes, problem: str) -> None:
        name = field.decode("ascii", "backslashreplace") if isinstance(field, bytes) else field
        super().__init__(
            f"state field {name!r}: {problem}; the stored state cannot be trusted: stop every worker and rebuild it "
            "from the input with `quartet run --rebuild`"
        )
        self.field = field


def to_json(value: Any) -> bytes:
    """Compact JSON; numpy scalars and arrays pass, NaN and infinities become null."""
    return orjson.dumps(value, option=_OPTIONS)


def from_json(data: bytes) -> Any:
    return orjson.loads(data)


def seal(value: Any) -> bytes:
    """Msgpack behind a version byte and a CRC-32."""
    body: bytes = msgpack.packb(value)
    return bytes((SEAL_VERSION,)) + zlib.crc32(body).to_bytes(4, "little") + body


def unseal(field: str, data: bytes) -> Any:
    """The value of `seal`. Raises `StateCorruptError` where a byte differs from what was sealed."""
    if len(data) < 5 or data[0] != SEAL_VERSION:
        raise StateCorruptError(field, f"version {data[0] if data else 'absent'}, {SEAL_VERSION} was expected")
    if zlib.crc32(data[5:]).to_bytes(4, "little") != data[1:5]:
        raise StateCorruptError(field, "the checksum does not match")
    return msgpack.unpackb(data[5:])


def encode_event(event: Event) -> bytes:
    return to_json(
        {
            "kind": event.kind,
            "ts": event.ts,
            "bar_id": event.bar_id,
            "agent": event.agent,
            "symbol": event.symbol,
            "interval": event.interval,
            "reason": event.reason,
            "detail": event.detail,
            "evidence": event.evidence,
        }
    )


def encode_reject(reject: Reject) -> list[bytes]:
    """Flat fields: why and where it came from, then the original fields prefixed `in:`, cut at 4 kB."""
    entry = reject.entry
    flat = [
        *(b"reason", reject.reason.encode(), b"detail", reject.detail.encode(errors="replace")),
        *(b"source_key", entry.key.encode(), b"source_id", entry.id.encode(), b"stage", reject.stage.encode()),
    ]
    kept, size = cut_fields(list(entry.fields.items()))
    return [*flat, *kept, b"in_bytes", str(size).encode()]


def cut_fields(fields: Sequence[tuple[bytes, bytes]]) -> tuple[list[bytes], int]:
    """The fields prefixed `in:` as they came, as far as 4 kB go, and the size of all of them."""
    left = MAX_PAYLOAD_BYTES
    kept: list[bytes] = []
    for name, value in fields:
        name_cut = name[:left]
        value_cut = value[: left - len(name_cut)]
        left -= len(name_cut) + len(value_cut)
        kept += (b"in:" + name_cut, value_cut)
        if left <= 0:
            break
    return kept, sum(len(n) + len(v) for n, v in fields)
