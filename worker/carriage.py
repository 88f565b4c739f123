"""What the bridge does to a batch: entries of any known format become the contract's bars, by partition.

Pure: the same entries after the same state give the same bytes, which is how a bridge that died finds out what it
had sent already.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from streams.codec import to_json
from streams.formats import FormatReader
from streams.messages import Entry, Reject
from streams.records import unpack
from streams.topics import partition_of
from streams.validation import BadBarError, Raw, is_closed

STAGE = "bridge"
"""The stage that a bridge owns, and the part of the state that it keeps."""

FIELDS = ("symbol", "ts", "interval", "open", "high", "low", "close", "volume", "closed")


@dataclass
class Load:
    """A batch on its way: encoded bars by partition, refused entries, and how many rows were no closed bar."""

    bars: dict[int, list[bytes]] = field(default_factory=dict)
    rejects: list[Reject] = field(default_factory=list)
    unclosed: int = 0

    def refuse(self, entry: Entry, error: BadBarError) -> None:
        self.rejects.append(Reject(entry, error.reason, error.detail, STAGE))

    @property
    def size(self) -> int:
        """Bars."""
        return sum(map(len, self.bars.values()))


def load_of(entries: Iterable[Entry], reader: FormatReader, partitions: int) -> Load:
    """The bars of `entries`, each in the partition of its symbol, in the order in which they came."""
    load = Load()
    for entry in entries:
        try:
            raws = reader(entry)
        except BadBarError as error:
            load.refuse(entry, error)
            continue
        load.unclosed += not raws  # another program's message
        for raw in raws:
            _add(load, entry, raw, partitions)
    return load


def _add(load: Load, entry: Entry, raw: Raw, partitions: int) -> None:
    try:
        closed, symbol, encoded = is_closed(raw), _symbol(raw), _encode(raw)
    except BadBarError as error:
        load.refuse(entry, error)
        return
    if closed:
        load.bars.setdefault(partition_of(symbol, partitions), []).append(encoded)
    else:
        load.unclosed += 1


def _symbol(raw: Raw) -> str:
    symbol = raw.get("symbol")
    if not isinstance(symbol, str) or not symbol:
        raise BadBarError("missing_field", "symbol is missing or no text, so nobody knows where the bar belongs")
    return symbol


def _encode(raw: Raw) -> bytes:
    """The bar's own fields as JSON, judged by nobody yet; a number that JSON has no form for goes as text."""
    try:
        return to_json({name: _plain(raw[name]) for name in FIELDS if name in raw})
    except TypeError as error:  # bytes, or an integer of more than 64 bits
        raise BadBarError("type", f"a field cannot be written as JSON: {error}") from None


def _plain(value: Any) -> Any:
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


class Sent:
    """Objects that stand in the topic after the last commit: what the one before sent and could not note."""

    def __init__(self, values: Sequence[Sequence[bytes]] = ()) -> None:
        self._left = [Counter(one for value in partition for one in unpack(value)) for partition in values]

    def without(self, bars: Mapping[int, Sequence[bytes]]) -> dict[int, list[bytes]]:
        """`bars` less those that were sent, each found once for each time it stands there."""
        return {partition: self._unsent(partition, some) for partition, some in bars.items()}

    def _unsent(self, partition: int, bars: Sequence[bytes]) -> list[bytes]:
        left = self._left[partition] if partition < len(self._left) else None
        if not left:
            return list(bars)
        unsent = []
        for bar in bars:
            if left[bar] > 0:
                left[bar] -= 1
            else:
                unsent.append(bar)
        return unsent
