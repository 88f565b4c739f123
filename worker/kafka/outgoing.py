"""What a commit sends, as records of its topics: the same JSON as on Redis, packed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgpack
import zstandard

from streams.codec import to_json
from streams.records import pack
from streams.store import Commit
from streams.topics import topic_of

Outgoing = tuple[str, bytes]
"""A topic and the value of one record for it."""

_LEVEL = 1


def outgoing_of(commit: Commit) -> list[Outgoing]:
    """The records of a commit's outputs, rejects and events, in the order in which a reader wants them."""
    objects = {topic_of(output.key): output.payloads for output in commit.outputs if output.payloads}
    objects |= {topic_of(key): [_object(row) for row in rows] for key, rows in commit.appends.items() if rows}
    return [(topic, value) for topic, payloads in objects.items() for value in pack(payloads)]


def _object(row: Sequence[bytes]) -> bytes:
    """Flat fields as a JSON object; the one field `data` is JSON already. Bytes that are no text are escaped."""
    if len(row) == 2 and row[0] == b"data":
        return row[1]
    texts = [part.decode(errors="backslashreplace") for part in row]
    fields = dict(zip(texts[::2], texts[1::2], strict=True))
    if ":" in fields.get("source_key", ""):
        fields["source_key"] = topic_of(fields["source_key"])
    return to_json(fields)


def folded(outgoing: Sequence[Outgoing]) -> bytes:
    """All of them as bytes that a ledger keeps; none are no bytes."""
    return zstandard.compress(msgpack.packb(outgoing), _LEVEL) if outgoing else b""


def unfolded(kept: bytes) -> Iterator[Outgoing]:
    """What `folded` was given."""
    yield from msgpack.unpackb(zstandard.decompress(kept)) if kept else ()
