"""A batch of the bridge: formats become the contract's bars, and what was sent is not sent again."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.formats import FormatReader
from streams.messages import Entry
from streams.records import pack
from streams.topics import partition_of
from streams.validation import Limits, check_bar
from tests.formats.samples import BARS, FIRST_OPEN_MS, NOW_MS, entry, expected_ohlcv, golden
from worker.carriage import Sent, load_of

BAR = {"symbol": "A", "ts": FIRST_OPEN_MS, "open": 1, "high": 2, "low": 1, "close": 2, "volume": 3}


def bars_of(*entries: Entry, partitions: int = 3) -> list[dict[str, object]]:
    load = load_of(entries, FormatReader(), partitions)
    assert load.rejects == []
    return [json.loads(bar) for some in load.bars.values() for bar in some]


def test_flat_fields_keep_their_text_and_lose_what_is_no_part_of_a_bar() -> None:
    [bar] = bars_of(entry(1, **{**BAR, "close": "1.50", "note": "x" * 900, "closed": "true"}))
    assert bar == {k: str(v) for k, v in BAR.items()} | {"close": "1.50", "closed": "true"}


@pytest.mark.parametrize("name", ["nautilus-1.221-json", "nautilus-1.221-msgpack-one-stream", "cryptofeed-2.4.1"])
def test_foreign_formats_arrive_as_the_bars_that_their_libraries_published(name: str) -> None:
    """Some samples end with a revision of their last bar, which is carried too."""
    entries = [one for one in golden(name) if "KRAKEN" not in one.key]
    load = load_of(entries, FormatReader(), 4)
    found = [check_bar(json.loads(bar), NOW_MS, Limits()) for some in load.bars.values() for bar in some]
    assert [(bar.ts, bar.ohlcv) for bar in found[:BARS]] == [
        (FIRST_OPEN_MS + 60_000 * k, expected_ohlcv(k)) for k in range(BARS)
    ]
    assert load.rejects == []


def test_a_bar_goes_to_the_partition_of_its_symbol_and_keeps_its_place_among_its_own() -> None:
    entries = [entry(n, **{**BAR, "symbol": f"S{n % 7}", "ts": FIRST_OPEN_MS + 60_000 * n}) for n in range(70)]
    load = load_of(entries, FormatReader(), 3)
    for partition, some in load.bars.items():
        bars = [json.loads(bar) for bar in some]
        assert {partition_of(bar["symbol"], 3) for bar in bars} == {partition}
        assert [bar["ts"] for bar in bars] == sorted(bar["ts"] for bar in bars)
    assert load.size == 70


def test_what_cannot_be_read_is_refused_with_its_reason_and_what_is_not_closed_is_counted() -> None:
    entries = [
        entry(1, data="{"),
        entry(2, hello="world"),
        entry(3, data={k: v for k, v in BAR.items() if k != "symbol"}),
        entry(4, data={**BAR, "symbol": 7}),
        entry(5, data={**BAR, "volume": 10**30}),
        entry(6, **{**BAR, "closed": "maybe"}),
        entry(7, **{**BAR, "closed": "false"}),
        entry(8, data={**BAR, "closed": False}),
        entry(9, topic="data.quotes.X", payload="{}"),
    ]
    load = load_of(entries, FormatReader(), 3)
    assert [reject.reason for reject in load.rejects] == [
        "type",
        "missing_field",
        "missing_field",
        "missing_field",
        "type",
    ]
    assert (load.unclosed, load.size) == (3, 1)


def test_a_bad_bar_is_carried_as_it_is_and_judged_by_the_worker() -> None:
    [bar] = bars_of(entry(1, **{**BAR, "close": "-1", "ts": "soon", "volume": "nan"}))
    assert (bar["close"], bar["ts"], bar["volume"]) == ("-1", "soon", "nan")


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from("abcde")), max_size=40), st.data())
def test_after_a_crash_exactly_the_rest_is_sent(pairs: list[tuple[int, str]], data: st.DataObject) -> None:
    """Of each partition any prefix may have been written before the crash; then all of it stands there once."""
    bars: dict[int, list[bytes]] = {}
    for partition, name in pairs:
        bars.setdefault(partition, []).append(json.dumps({"x": name}).encode().replace(b" ", b""))
    written = [bars.get(p, [])[: data.draw(st.integers(0, len(bars.get(p, []))))] for p in range(3)]
    size = data.draw(st.integers(1, 5))
    rest = Sent([pack(some, size) for some in written]).without(bars)
    for partition, some in bars.items():
        assert Counter(written[partition] + rest[partition]) == Counter(some)
        assert len(rest[partition]) == len(some) - len(written[partition])


def test_what_others_wrote_meanwhile_is_left_alone() -> None:
    sent = Sent([[b'{"x":9}'], [b'[{"x":1},{"x":2}]']])
    assert sent.without({0: [b'{"x":1}'], 1: [b'{"x":1}', b'{"x":3}'], 2: [b'{"x":1}']}) == {
        0: [b'{"x":1}'],
        1: [b'{"x":3}'],
        2: [b'{"x":1}'],
    }
