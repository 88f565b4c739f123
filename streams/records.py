"""What the value of one Kafka record holds: a JSON object, or an array of them.

A record costs about 100 us of CPU where Faust reads it, whatever is in it. So what travels together
is packed together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import orjson

MAX_OBJECTS = 256
MAX_BYTES = 900_000
"""A broker takes records of up to 1 MiB unless told otherwise; the rest is for headers and the batch around it."""


def pack(objects: Iterable[bytes], limit: int = MAX_OBJECTS, max_bytes: int = MAX_BYTES) -> list[bytes]:
    """Record values of `objects`, each encoded JSON, in order. Raises `ValueError` for one over `max_bytes`."""
    return [join(group) for group in groups(objects, limit, max_bytes)]


def groups(objects: Iterable[bytes], limit: int = MAX_OBJECTS, max_bytes: int = MAX_BYTES) -> Iterator[Sequence[bytes]]:
    """`objects` in runs that fill one record each: up to `limit` of them, up to `max_bytes` joined."""
    group: list[bytes] = []
    size = 1
    for one in objects:
        if len(one) > max_bytes:
            raise ValueError(f"an object of {len(one)} bytes does not fit a record of at most {max_bytes}")
        if group and (len(group) == limit or size + len(one) + 1 > max_bytes):
            yield group
            group, size = [], 1
        group.append(one)
        size += len(one) + 1
    if group:
        yield group


def join(group: Sequence[bytes]) -> bytes:
    """One object as it is, several as an array."""
    return group[0] if len(group) == 1 else b"[" + b",".join(group) + b"]"


def flat_object(row: Sequence[bytes]) -> bytes:
    """Flat fields, name and value in turn, as one JSON object of text; bytes that are no text are escaped."""
    texts = [part.decode(errors="backslashreplace") for part in row]
    return orjson.dumps(dict(zip(texts[::2], texts[1::2], strict=True)))


def unpack(value: bytes | None) -> list[bytes]:
    """The objects in a record's value, each as encoded JSON; none in an empty value.

    What is no JSON array comes back whole, unread: whoever reads the object judges it, by the same rules and
    with the same reasons as one that came alone.
    """
    if not value:
        return []
    if not value.lstrip(b" \t\r\n").startswith(b"["):
        return [value]
    try:
        return [orjson.dumps(one) for one in orjson.loads(value)]
    except ValueError:  # what orjson raises is one
        return [value]
