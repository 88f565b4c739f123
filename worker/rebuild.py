"""State that cannot be trusted is computed again from the input that is still there, without emitting anything."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from streams.messages import Entry
from streams.redis import with_baseline
from streams.store import Batch, Position, Store, id_tuple
from worker.pipeline import Pipeline

BATCH = 256
DECIDED_THEN = (b"future", b"poison")
"""Rejections that the entry alone does not explain: they are taken from the rejected stream."""


@dataclass(frozen=True)
class Rebuilt:
    """What a rebuild came to. `missing` are the entries of each input that were trimmed away."""

    bars: int
    missing: Mapping[str, int]
    state: Mapping[str, Sequence[tuple[bytes, bytes]]] = field(default_factory=dict)


def rebuild(
    pipeline: Pipeline, store: Store, position: Position, now_ms: int, rejected: str, reaching: Callable[..., Batch]
) -> Rebuilt:
    """Bring a fresh `pipeline` to the committed `position` from the retained input.

    `rejected` is the key of the rejected stream; `reaching` calls until the server answers. The
    state is every field that the commits up to `position` would have left behind.
    """
    left_out = _left_out(store, rejected, reaching)
    missing: dict[str, int] = {}
    fields: dict[str, dict[bytes, bytes]] = defaultdict(dict)
    bars = 0
    for entries in _consumed(store, position, missing, reaching):
        result = pipeline.process(entries, now_ms, poison=left_out)
        bars += len(result.accepted)
        for part, changed in result.state.items():
            fields[part].update(changed)
    fields["agents"].update(pipeline.agents.record_changes())
    return Rebuilt(bars, missing, {part: list(found.items()) for part, found in fields.items()})


def _consumed(
    store: Store, position: Position, missing: dict[str, int], reaching: Callable[..., Batch]
) -> Iterator[list[Entry]]:
    """The entries up to `position` that are still there, in batches, in the order in which they were read."""
    ends = {key: id_tuple(at.id) for key, at in position.inputs.items()}
    cursor = Position()
    while keys := [key for key, end in ends.items() if key not in cursor.inputs or _at(cursor, key) < end]:
        batch = _read(store, cursor, keys, reaching)
        cursor = with_baseline(cursor, batch.facts)
        for key, fact in batch.facts.items():
            missing[key] = fact.added - fact.length
        wanted = [entry for entry in batch.entries if id_tuple(entry.id) <= ends[entry.key]]
        if not wanted:
            return
        cursor = cursor.advanced(batch.entries, cursor.last_output_id)
        yield wanted


def _at(cursor: Position, key: str) -> tuple[int, int]:
    return id_tuple(cursor.inputs[key].id)


def _left_out(store: Store, rejected: str, reaching: Callable[..., Batch]) -> frozenset[tuple[str, str]]:
    """The entries that were refused for a reason of that moment."""
    found: set[tuple[str, str]] = set()
    cursor = Position()
    while (batch := _read(store, cursor, [rejected], reaching)).entries:
        cursor = with_baseline(cursor, batch.facts).advanced(batch.entries, cursor.last_output_id)
        found.update(
            (entry.fields[b"source_key"].decode(), entry.fields[b"source_id"].decode())
            for entry in batch.entries
            if entry.fields[b"reason"] in DECIDED_THEN
        )
    return frozenset(found)


def _read(store: Store, cursor: Position, keys: Sequence[str], reaching: Callable[..., Batch]) -> Batch:
    return reaching(lambda: store.read(cursor, keys, BATCH))
