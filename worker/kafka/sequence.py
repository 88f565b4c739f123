"""Which record of a partition is the one to go on with: each is taken once, in order, and none is passed over."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

from faust.types import TP


class Verdict(Enum):
    """What to do about a record that came."""

    TAKE = "take"
    LEAVE = "leave"
    READ_AGAIN = "read again"


class Sequencer:
    """`next` is, for each partition of an input, the offset to go on with.

    Faust drops what it has fetched when the group changes in that moment, and goes back only to what was committed:
    a gap is read again, once. What is missing then is no record: the markers of a producer's transactions take
    offsets too. Until then nothing past the record that showed the gap is taken.
    """

    def __init__(self, first: Mapping[TP, int]) -> None:
        self.next = dict(first)
        self._gaps: dict[TP, int] = {}

    def judge(self, tp: TP, offset: int) -> Verdict:
        """Whether to take this record, to leave it, or to leave it and read from `next` again."""
        expected, gap = self.next[tp], self._gaps.get(tp)
        if offset < expected or (gap is not None and offset > gap):
            return Verdict.LEAVE
        if offset > expected and gap is None:
            self._gaps[tp] = offset
            return Verdict.READ_AGAIN
        self.next[tp] = offset + 1
        self._gaps.pop(tp, None)
        return Verdict.TAKE
