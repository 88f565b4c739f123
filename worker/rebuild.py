"""State that cannot be trusted is computed again from the input that is still there, without emitting anything."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from structlog.typing import FilteringBoundLogger

from streams.messages import Entry
from streams.redis import with_baseline
from streams.store import Batch, Position, Store, id_tuple
from worker.batches import Fields

BATCH = 256
DECIDED_THEN = (b"future", b"poison")
"""Rejections that the entry alone does not explain: they are taken from the rejected stream."""


@dataclass(frozen=True)
class Rebuilt:
    """What a rebuild came to. `missing` are the entries of each input that were trimmed away."""

    bars: int
    missing: Mapping[str, int]
    state: Mapping[str, Fields] = field(default_factory=dict)

    @property
    def what(self) -> str:
        return f"state computed anew from {self.bars} retained bars"

    def plus(self, part: str, fields: Fields) -> Rebuilt:
        """With what no entry of the input explains."""
        return replace(self, state={**self.state, part: fields})

    def tell(self, log: FilteringBoundLogger) -> None:
        """Log what was done, and what could not be."""
        log.info("state rebuilt from the input", bars=self.bars)
        for key, missing in self.missing.items():
            if missing:
                log.warning(
                    "the input was trimmed: indicators start at its first entry and differ from before",
                    key=key,
                    missing=missing,
                )


Compute = Callable[[Sequence[Entry], frozenset[tuple[str, str]]], tuple[int, Mapping[str, Fields]]]
"""Takes entries, and those that are left out; gives how many bars they were and the state fields they change."""


def rebuild(
    compute: Compute, store: Store, position: Position, rejected: str, reaching: Callable[..., Batch]
) -> Rebuilt:
    """Bring a fresh stage to the committed `position` from the retained input.

    `rejected` is the key of the rejected stream; `reaching` calls until the server answers. The
    state is every field that the commits up to `position` would have left behind.
    """
    left_out = _left_out(store, rejected, reaching)
    missing: dict[str, int] = {}
    fields: dict[str, dict[bytes, bytes]] = defaultdict(dict)
    bars = 0
    for entries in _consumed(store, position, missing, reaching):
        n, state = compute(entries, left_out)
        bars += n
        for part, changed in state.items():
            fields[part].update(changed)
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
