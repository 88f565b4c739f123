"""The streams of a recording, taken line by line: what is told by bytes alone agrees with what decoding says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import orjson
import pytest

from streams.recording import Item, Lost, Recorded, Recording, Writer, decode, encode, holds, key_of, stream_of
from worker.replay.lines import lines_of
from worker.replay.source import Source

PAYLOADS = (
    b'{"bar_id":"A|1m|1","x":1}',
    b'{"bar_id":"A|1m|2","x":[1.5,null]}',
    b'{"bar_id":"\xc3\xa9","data":{"x":1}}',
)
ITEMS: tuple[Item, ...] = (
    *(Recorded("signals", "q:signals", f"{n}-0", {b"data": data}) for n, data in enumerate(PAYLOADS, 1)),
    Recorded("signals", "q:signals", "4-0", {b"data": b'{ "spaced": 1 }'}),
    Recorded("signals", "q:signals", "5-0", {b"data": b"not JSON"}),
    Recorded("signals", "q:signals", "6-0", {}),
    Recorded("bars", "q:bars", "1-0", {b"symbol": b"A", b"data": b"1"}),
    Recorded("bars", "q:bars", "2-0", {b"symbol": b"\xff"}),
    Recorded("votes:" + "x" * 40, "q:votes", "1-0", {b"data": PAYLOADS[0]}),
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "some.jsonl.zst"
    with Writer(path) as writer:
        writer.header({"id": "x", "part": 1, "namespace": "q", "inputs": ["q:bars"], "positions": {}})
        for item in ITEMS:
            writer.add(item)
            writer.add(Lost(item.stream, item.key, item.id, 3))
    return path


@pytest.mark.parametrize("item", ITEMS, ids=str)
def test_a_line_tells_its_stream_and_its_data_without_being_decoded(item: Recorded) -> None:
    line = encode(item)
    assert decode(line) == item
    assert stream_of(line) == item.stream.encode()
    # Equal bytes, and only those: not the same value with other spaces, nor less or more of them.
    data = item.fields.get(b"data", b"")
    is_object = data.startswith(b'{"')
    assert holds(line, data) == (is_object and len(item.fields) == 1)
    assert not any(
        holds(line, other) for other in (*PAYLOADS, b'{"spaced":1}', data[:-1], data + b"}") if other != data
    )


def test_neither_a_loss_nor_a_line_with_other_spaces_has_a_stream_by_its_bytes() -> None:
    lost = encode(Lost("signals", "q:signals", "1-0", 3))
    assert [stream_of(line) for line in (lost, lost + b" ")] == [b"", b""]
    assert [stream_of(line) for line in (b"", b"}", b"}}", b'{"stream":"bars}}')] == [b""] * 4
    assert stream_of(b'{ "stream": "signals", "key": "q:signals", "id": "1-0", "data": {"a": 1}}') == b""


@pytest.mark.parametrize("key", ["q:bars", 'a","id":"b', "candles-\u00e9"])
def test_a_line_tells_its_key_as_json_has_it(key: str) -> None:
    line = encode(Recorded("bars", key, "1-0", {b"symbol": b"A"}))
    assert orjson.loads(b'"' + key_of(line) + b'"') == key


def test_entries_are_taken_by_stream_and_losses_are_none(file: Path) -> None:
    source = Source(Recording(file))
    assert source.peek("signals", 5) == ITEMS[5]
    assert source.peek("signals", 6) is None
    assert source.take("signals", 2) == list(ITEMS[:2])
    assert [entry.fields for entry in source.entries(9)] == [item.fields for item in ITEMS[6:8]]
    assert source.left() == {"signals": 4, ITEMS[8].stream: 1}


def test_entries_are_taken_as_long_as_they_are_equal(file: Path) -> None:
    source = Source(Recording(file))
    first, second, third = PAYLOADS
    assert source.take_equal("votes:nhits", iter([first])) == (0, first)
    assert source.take_equal("signals", iter([second])) == (0, second)
    rest = iter([first, third, second])
    assert source.take_equal("signals", rest) == (1, third)
    assert list(rest) == [second], "what comes behind the first difference is left to the caller"
    assert source.take_equal("signals", iter([second, third])) == (2, None)
    assert source.take_equal("signals", iter([b'{"spaced":1}'])) == (0, b'{"spaced":1}')
    assert [item.id for item in source.take("signals", 9)] == ["4-0", "5-0", "6-0"]
    assert source.take_equal("signals", iter([first])) == (0, first)


def test_lines_that_another_program_wrote_are_read_as_well(tmp_path: Path) -> None:
    path = tmp_path / "foreign.jsonl.zst"
    with Writer(path) as writer:
        writer.header({"id": "x", "part": 1, "namespace": "q", "inputs": ["q:bars"], "positions": {}})
        writer._put(b'{ "stream": "signals", "key": "q:signals", "id": "1-0", "data": {"a": 1}}')
        writer._put(b'{"key":"q:events","stream":"events","id":"1-0","data":{"a":1}}')
    source = Source(Recording(path))
    assert source.take_equal("signals", iter([b'{"a":1}'])) == (1, None)
    assert source.left() == {}


def odd_lines() -> list[bytes]:
    """Lines of every kind, neighbours of one beginning and other ends among them."""
    whole = [encode(item) for item in ITEMS]
    lost = [encode(Lost(item.stream, item.key, item.id, 3)) for item in ITEMS]
    cut = [line[:-1] for line in whole]
    bad = [b"", b"}", b"}}", b'{"stream":"bars}}', b'{"stream":"bars"}}', b'{"stream":"' + b"y" * 60 + b"}}"]
    short = [b'{"stream":"","key":"","id":"","data":{}}', b'{"stream":"s","key":"","id":"","data":{}}']
    like = [encode(Recorded("votes:" + name, "q:v", "1-0", {b"data": b"{}"})) for name in ("x" * 14, "x" * 15, "x")]
    spaced = [b'{ "stream": "signals", "key": "q:signals", "id": "1-0", "data": {"a": 1}}', b" " * 90]
    return [*whole, *lost, *cut, *bad, *short, *like, *spaced]


@pytest.mark.parametrize("seed", range(20))
def test_the_lines_of_a_text_are_those_between_its_ends_each_with_its_stream(seed: int) -> None:
    rng = np.random.default_rng(seed)
    known: dict[bytes, bytes] = {}
    odd = odd_lines()
    for _ in range(20):
        lines = [odd[n] for n in rng.integers(0, len(odd), rng.integers(1, 12))]
        text = b"\n".join(lines) + b"\n" * int(rng.integers(0, 2) or not lines[-1])
        found = [(stream, text[begin:end]) for stream, begin, end in lines_of(text, known)]
        assert found == [(stream_of(line), line) for line in lines]


def test_an_empty_text_has_no_lines() -> None:
    assert list(lines_of(b"", {})) == []
