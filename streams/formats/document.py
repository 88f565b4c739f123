"""An entry's plain values before anybody knows which format they are in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from streams.validation import CONTROL, MAX_PAYLOAD_BYTES, BadBarError, Raw, check_size, read_flat, read_json

_NATIVE = frozenset((b"symbol", b"ts", b"open", b"high", b"low", b"close", b"volume"))
_ELSEWHERE = frozenset((b"data", b"topic", b"payload", b"start"))
_JSON_STARTS = (b"{", b"[")


@dataclass(frozen=True, slots=True)
class Document:
    """`value` is the JSON in the entry, or its flat fields; `beside` are the fields around the JSON."""

    value: Mapping[str, Any] | list[Any]
    beside: Mapping[str, Any] = field(default_factory=dict)

    @property
    def mapping(self) -> Mapping[str, Any]:
        """The value as an object; empty where it is a list."""
        return self.value if isinstance(self.value, Mapping) else {}

    @property
    def rows(self) -> list[list[Any]]:
        """The value as rows of a table: one row stands for itself; empty where it is neither."""
        value = self.value
        if not isinstance(value, list) or not value:
            return []
        rows = value if isinstance(value[0], list) else [value]
        return rows if all(isinstance(row, list) for row in rows) else []


def read_document(fields: Mapping[bytes, bytes]) -> Document:
    """The JSON in `data`, else a flat native bar, else the JSON in the only field with any, else the flat fields.

    Raises `BadBarError` with `oversize`, `encoding` or `type`.
    """
    check_size(fields)
    name = _json_field(fields)
    if name is None:
        return Document(read_flat(fields))
    value = read_json(fields[name])
    if not isinstance(value, dict | list):
        raise BadBarError("type", f"{name.decode(errors='replace')} is a JSON {type(value).__name__}")
    rest = {k: v for k, v in fields.items() if k != name}
    return Document(value, read_flat(rest) if rest else {})


def _json_field(fields: Mapping[bytes, bytes]) -> bytes | None:
    if b"data" in fields:
        return b"data"
    if fields.keys() >= _NATIVE:
        return None
    candidates = [name for name, value in fields.items() if value[:1] in _JSON_STARTS]
    return candidates[0] if len(candidates) == 1 else None


def read_plain(fields: Mapping[bytes, bytes]) -> Raw | None:
    """What `read_document` reads of a flat native bar beyond doubt, at a fraction of its time; else None."""
    if not fields.keys() >= _NATIVE:
        return None
    try:
        names, room = _plain_names(tuple(fields))
        values = b"\0".join(fields.values())
        if len(values.translate(None, CONTROL)) != len(values) - len(names) + 1 or len(values) > room:
            return None
        return dict(zip(names, values.decode().split("\0"), strict=True))
    except (BadBarError, UnicodeDecodeError):
        return None


@lru_cache(maxsize=1024)
def _plain_names(names: tuple[bytes, ...]) -> tuple[tuple[str, ...], int]:
    """The fields of a native bar by name, and the room for their joined values; feeds use few sets of names.

    Raises `BadBarError` for what is more than a native bar, so that no such names are kept.
    """
    if not _ELSEWHERE.isdisjoint(names):
        raise BadBarError("type", "no flat native bar")
    texts = tuple(read_flat(dict.fromkeys(names, b"")))
    return texts, MAX_PAYLOAD_BYTES - len(b"".join(names)) + len(names) - 1
