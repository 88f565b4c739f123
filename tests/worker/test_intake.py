"""Intake: every entry has one outcome, order per series is kept, IDs of outputs only grow."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.codec import StateCorruptError, encode_reject
from streams.messages import Entry, Reject
from streams.validation import Limits
from worker.intake import FEED_MINIMUM, FEED_WINDOW, Intake, OutputIds

MINUTE = 60_000
START = 1_750_000_020_000
NOW = START + 10_000 * MINUTE


def fields(at: int = 0, symbol: str = "A", close: float = 10.0, **changes: str) -> dict[bytes, bytes]:
    """The bar `at` minutes after the start."""
    row = {"symbol": symbol, "ts": str(START + at * MINUTE), "open": "10", "high": "20", "low": "5", "volume": "1"}
    return {name.encode(): value.encode() for name, value in {**row, "close": str(close), **changes}.items()}


def entries(*rows: dict[bytes, bytes], first: int = 1) -> list[Entry]:
    return [Entry("in", f"{START + n}-0", row) for n, row in enumerate(rows, first)]


def reasons(accepted) -> list[str]:
    return [reject.reason for reject in accepted.rejects]


def test_a_repeated_bar_is_dropped_a_changed_one_is_a_revision_and_an_older_one_is_out_of_order():
    intake = Intake(Limits())
    rows = [fields(1), fields(1), fields(1, close=11.0), fields(0), fields(2)]
    found = intake.accept(entries(*rows), NOW)
    assert found.outcomes == {"accepted": 2, "duplicate": 1, "rejected": 2}
    assert reasons(found) == ["revision", "out_of_order"]
    assert [event.kind for event in found.events] == ["revision"]
    assert [bar.close for bar in found.bars] == [10.0, 10.0]


def test_a_gap_is_told_and_a_long_one_warms_the_series_up_again():
    intake = Intake(Limits(max_gap_bars=5))
    found = intake.accept(entries(fields(0), fields(6), fields(13), fields(14)), NOW)
    assert found.restart.tolist() == [False, False, True, False]
    assert [(event.kind, event.evidence["missing"], event.evidence["rewarm"]) for event in found.events] == [
        ("gap", 5, False),
        ("gap", 6, True),
    ]
    assert found.flags["gap"] == 2


def test_after_an_accepted_loss_every_series_warms_up_once():
    intake = Intake(Limits())
    intake.accept(entries(fields(0), fields(0, "B")), NOW)
    intake.rewarm_all()
    again = Intake(Limits())
    again.restore(dict(intake.changes()))
    for each in (intake, again):
        found = each.accept(entries(fields(1), fields(2), fields(1, "B")), NOW)
        assert found.restart.tolist() == [True, False, True]


def test_no_more_series_than_the_cap():
    intake = Intake(Limits(max_symbols=2))
    found = intake.accept(entries(fields(0), fields(0, "B"), fields(0, "C"), fields(1), fields(0, interval="1h")), NOW)
    assert reasons(found) == ["symbol_cap", "grid"]
    assert found.rows.tolist() == [0, 1, 0]


def test_a_feed_of_bad_bars_is_withheld_and_comes_back():
    """Over 5 % of the last 500, from 200 entries on: the boundary is written out by hand."""
    intake = Intake(Limits())
    bad = fields(0, close=-1.0)
    first = [*[bad] * 10, *[fields(n) for n in range(FEED_MINIMUM - 10)]]
    found = intake.accept(entries(*first), NOW)
    assert not found.withheld.any(), "10 of 200 are 5 %, not more"
    found = intake.accept(entries(bad, fields(200), first=1_000), NOW)
    assert found.withheld.tolist() == [True]
    assert [event.kind for event in found.events if event.kind.startswith("feed")] == ["feed_unhealthy"]
    restarted = Intake(Limits())
    restarted.restore(dict(intake.changes()))
    found = restarted.accept(entries(*[fields(n) for n in range(201, 201 + FEED_WINDOW)], first=2_000), NOW)
    held = int(found.withheld.sum())
    assert held == found.withheld.tolist().index(False) == 17, "11 of 220 are 5 %; 202 entries were seen before"
    assert [event.kind for event in found.events] == ["feed_healthy"]


def test_a_bar_that_is_too_old_on_arrival_is_stale_only_where_that_is_judged():
    row = entries(fields(0))
    now = START + 5 * MINUTE
    assert not Intake(Limits()).accept(row, now).stale.any()
    assert Intake(Limits(max_bar_age_intervals=3)).accept(row, now).stale.all()
    at_limit = Intake(Limits(max_bar_age_intervals=3)).accept(row, START + 4 * MINUTE)
    assert (at_limit.stale.tolist(), at_limit.flags["late"]) == ([False], 1)


def test_jumps_and_flat_lines_pass_with_a_flag():
    flat = dict.fromkeys(("open", "high", "low"), "10")
    rows = [fields(n, close=10, **flat) for n in range(4)]
    jump = fields(4, close=20.0)
    found = Intake(Limits(frozen_bars=3)).accept(entries(*rows, jump), NOW)
    assert found.outcomes == {"accepted": 5}
    assert (found.flags["frozen"], found.flags["jump"]) == (1, 1)


def test_a_poisoned_entry_is_not_even_read():
    def explode(entry: Entry):
        raise AssertionError(entry.id)

    [entry] = entries(fields(0))
    found = Intake(Limits(), reader=explode).accept([entry], NOW, frozenset({(entry.key, entry.id)}))
    assert reasons(found) == ["poison"]


def test_an_entry_of_several_bars_gets_ids_of_its_own():
    rows = [{k.decode(): v.decode() for k, v in fields(n).items()} for n in range(3)]
    intake = Intake(Limits(), reader=lambda _: rows)
    assert intake.accept(entries({}), NOW).ids == [f"{START + 1}-0", f"{START + 1}-1", f"{START + 1}-2"]


def test_one_key_keeps_the_ids_of_its_entries_and_several_share_a_rising_one():
    rows = [Entry("a", f"{START}-7", fields(0)), Entry("b", f"{START}-7", fields(0, "B"))]
    assert Intake(Limits()).accept(rows[:1], NOW).ids == [f"{START}-7"]
    assert Intake(Limits(), several_keys=True).accept(rows, NOW).ids == [f"{START}-0", f"{START}-1"]


def test_one_id_in_nanoseconds_does_not_poison_the_outputs():
    """Adopted as it is, it would make the server refuse every later ID in milliseconds."""
    ids = OutputIds()
    given_out = [ids.derive(f"{ms}-0", NOW, own=True) for ms in (START, START * 1_000_000, START + 5)]
    assert given_out == [f"{START}-0", f"{START}-1", f"{START + 5}-0"]


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 2), st.booleans()), max_size=30))
def test_ids_of_outputs_strictly_increase_whatever_comes_in(inputs):
    ids, last = OutputIds(), (0, 0)
    for ms, seq, own in inputs:
        found = tuple(map(int, ids.derive(f"{ms}-{seq}", NOW, own=own).split("-")))
        assert found > last
        assert found[0] <= NOW + 3_600_000
        last = found


def test_a_restored_intake_goes_on_as_if_nothing_had_happened():
    rng = np.random.default_rng(5)
    rows = [fields(int(n), symbol=f"S{s}") for n, s in rng.integers((0, 0), (60, 4), (400, 2))]
    whole, parts = Intake(Limits()), Intake(Limits())
    stored: dict[bytes, bytes] = {}
    expected = whole.accept(entries(*rows), NOW)
    outcomes: list[tuple] = []
    for start in range(0, 400, 37):
        found = parts.accept(entries(*rows[start : start + 37], first=start + 1), NOW)
        outcomes += list(zip(found.ids, found.rows.tolist(), found.restart.tolist(), strict=True))
        stored.update(parts.changes())
        last = parts.ids.last
        parts = Intake(Limits())
        parts.restore(stored)
        parts.ids.last = last
    assert outcomes == list(zip(expected.ids, expected.rows.tolist(), expected.restart.tolist(), strict=True))
    stored_whole = dict(whole.changes())
    assert stored_whole == stored


def stored_state() -> dict[bytes, bytes]:
    intake = Intake(Limits())
    intake.accept(entries(fields(0), fields(0, "B")), NOW)
    return dict(intake.changes())


def test_a_flipped_bit_anywhere_in_the_stored_series_is_found():
    state = stored_state()
    for name, blob in state.items():
        for place in range(len(blob)):
            spoilt = blob[:place] + bytes([blob[place] ^ 4]) + blob[place + 1 :]
            with pytest.raises(StateCorruptError, match="--rebuild"):
                Intake(Limits()).restore({**state, name: spoilt})


def test_series_that_were_swapped_or_lost_are_found():
    state = stored_state()
    with pytest.raises(StateCorruptError, match="holds series 1"):
        Intake(Limits()).restore({**state, b"0": state[b"1"]})
    with pytest.raises(StateCorruptError, match="missing"):
        Intake(Limits()).restore({b"1": state[b"1"]})


def test_a_reject_carries_where_it_came_from_and_the_bytes_as_they_came():
    raw = {b"symbol": b"\xff\x00", b"note": b"x" * 5_000, b"late": b"never shown"}
    flat = encode_reject(Reject(Entry("k", "1-2", raw), "encoding", "not UTF-8", "intake"))
    found = dict(zip(flat[::2], flat[1::2], strict=True))
    assert found == {
        b"reason": b"encoding",
        b"detail": b"not UTF-8",
        b"source_key": b"k",
        b"source_id": b"1-2",
        b"stage": b"intake",
        b"in:symbol": b"\xff\x00",
        b"in:note": b"x" * (4096 - len(b"symbol\xff\x00note")),
        b"in_bytes": str(len(b"symbol\xff\x00note") + 5_000 + len(b"latenever shown")).encode(),
    }
