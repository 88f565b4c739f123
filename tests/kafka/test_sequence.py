"""Records in order, whatever is dropped on the way and whichever offsets hold no record."""

from __future__ import annotations

from faust.types import TP
from hypothesis import given
from hypothesis import strategies as st

from worker.kafka.sequence import Sequencer, Verdict

BARS = TP("quartet.bars", 0)


def follow(records: list[int], dropped: set[int]) -> list[int]:
    """The offsets that are taken where the first fetch of `dropped` is lost and a seek is obeyed after two more."""
    sequencer = Sequencer({BARS: 0})
    taken: list[int] = []
    coming = [offset for offset in records if offset not in dropped]
    while coming:
        offset = coming.pop(0)
        match sequencer.judge(BARS, offset):
            case Verdict.TAKE:
                taken.append(offset)
            case Verdict.READ_AGAIN:
                coming = coming[:2] + [one for one in records if one >= sequencer.next[BARS]]
    return taken


def test_a_transactions_marker_within_a_gap_costs_no_record() -> None:
    """5 is a marker, 6 and 7 were dropped when the group changed: 8 shows the gap, and all three are taken."""
    records = [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    assert follow(records, {6, 7}) == records


@given(st.sets(st.integers(0, 30)), st.sets(st.integers(0, 30)))
def test_every_record_is_taken_once_and_in_order(markers: set[int], dropped: set[int]) -> None:
    records = [offset for offset in range(35) if offset not in markers]
    assert follow(records, dropped) == records
