"""Messages to bytes and back: what is JSON, what a seal catches, and what a reject keeps of its entry."""

from __future__ import annotations

import json
import math
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from streams.codec import StateCorruptError, cut_fields, encode_event, encode_reject, from_json, seal, to_json, unseal
from streams.messages import Entry, Event, Reject

MOST_BYTES = 4096  # "cut at 4 kB" of the contract

numbers = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**53), 2**53)
scalars = st.none() | st.booleans() | numbers | st.text(st.characters(exclude_categories=["Cs"]))
plain = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc", max_size=3), inner, max_size=4),
    max_leaves=12,
)
fields = st.dictionaries(st.binary(min_size=1, max_size=40), st.binary(max_size=3_000), max_size=6)


@given(plain)
def test_json_comes_back_as_it_went_and_python_reads_it_the_same(value: Any) -> None:
    assert from_json(to_json(value)) == value
    assert json.loads(to_json(value)) == value


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_comes_back_with_every_bit(value: float) -> None:
    back = from_json(to_json([value, np.float64(value)]))
    assert [np.float64(x).tobytes() for x in back] == [np.float64(value).tobytes()] * 2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float64("nan"), np.float32("inf")])
def test_what_json_cannot_say_is_null(value: float) -> None:
    assert to_json({"a": value, "b": [value, 1.5]}) == b'{"a":null,"b":[null,1.5]}'


def test_arrays_and_scalars_of_numpy_are_plain_json_and_nan_in_them_is_null() -> None:
    value = {"a": np.array([[1.0, np.nan], [np.inf, 2.0]]), "b": np.int64(7), "c": np.array([], np.float64)}
    assert to_json(value) == b'{"a":[[1.0,null],[null,2.0]],"b":7,"c":[]}'


@given(plain | st.binary(max_size=200))
def test_what_was_sealed_comes_back(value: Any) -> None:
    assert unseal("x", seal(value)) == value


@given(plain, st.data())
def test_any_flipped_bit_of_a_sealed_blob_is_seen(value: Any, data: st.DataObject) -> None:
    blob = bytearray(seal(value))
    bit = data.draw(st.integers(0, 8 * len(blob) - 1))
    blob[bit // 8] ^= 1 << bit % 8
    with pytest.raises(StateCorruptError, match=r"state field 'f7': .*quartet run --rebuild") as caught:
        unseal("f7", bytes(blob))
    assert caught.value.field == "f7"


@given(plain, st.data())
def test_a_sealed_blob_that_was_cut_short_or_grew_is_seen(value: Any, data: st.DataObject) -> None:
    blob = seal(value)
    with pytest.raises(StateCorruptError):
        unseal("f", blob[: data.draw(st.integers(0, len(blob) - 1))])
    with pytest.raises(StateCorruptError):
        unseal("f", blob + data.draw(st.binary(min_size=1, max_size=8)))


def test_a_seal_is_a_version_a_checksum_and_msgpack_and_another_version_is_named() -> None:
    blob = seal([1, "a"])
    body = b"\x92\x01\xa1a"  # msgpack: an array of two, 1, a text of one byte
    assert blob == b"\x01" + zlib.crc32(body).to_bytes(4, "little") + body
    with pytest.raises(StateCorruptError, match="version 2, 1 was expected"):
        unseal("f", b"\x02" + blob[1:])
    with pytest.raises(StateCorruptError, match="version absent"):
        unseal("f", b"")


def test_an_event_has_all_its_names_and_null_for_figures_that_are_not_defined() -> None:
    event = Event(
        "agent_muted", 60_000, "S|1m|60000", "xgboost", "S", "1m", "dead_zone", "why", {"a": math.nan, "n": 3}
    )
    assert json.loads(encode_event(event)) == {
        "kind": "agent_muted",
        "ts": 60_000,
        "bar_id": "S|1m|60000",
        "agent": "xgboost",
        "symbol": "S",
        "interval": "1m",
        "reason": "dead_zone",
        "detail": "why",
        "evidence": {"a": None, "n": 3},
    }
    assert set(json.loads(encode_event(Event("gap")))) == set(json.loads(encode_event(event)))


def pairs(flat: list[bytes]) -> list[tuple[bytes, bytes]]:
    assert len(flat) % 2 == 0, "flat fields are names and values in turn"
    return list(zip(flat[::2], flat[1::2], strict=True))


@given(fields)
@example({b"data": b"x" * MOST_BYTES})
@example({b"d": b"x" * (MOST_BYTES - 1)})
@example({b"data": b"x" * (MOST_BYTES - 5), b"d": b""})
def test_a_reject_says_why_and_where_from_then_what_came_as_it_came(given_fields: dict[bytes, bytes]) -> None:
    reject = Reject(Entry("q:bars", "5-1", given_fields), "ohlc", "high 1 is below low 2", "intake")
    flat = pairs(encode_reject(reject))
    assert flat[:5] == [
        (b"reason", b"ohlc"),
        (b"detail", b"high 1 is below low 2"),
        (b"source_key", b"q:bars"),
        (b"source_id", b"5-1"),
        (b"stage", b"intake"),
    ]
    size = sum(len(name) + len(value) for name, value in given_fields.items())
    assert flat[-1] == (b"in_bytes", b"%d" % size)
    kept = flat[5:-1]
    assert all(name.startswith(b"in:") for name, _ in kept)
    if size <= MOST_BYTES:
        assert [(name[3:], value) for name, value in kept] == list(given_fields.items())


@given(st.lists(st.tuples(st.binary(max_size=60), st.binary(max_size=6_000)), max_size=8))
def test_what_is_kept_is_the_first_four_kilobytes_to_the_byte(came: list[tuple[bytes, bytes]]) -> None:
    flat, size = cut_fields(came)
    kept = [(name.removeprefix(b"in:"), value) for name, value in pairs(flat)]
    whole, stayed = (b"".join(name + value for name, value in some) for some in (came, kept))
    assert size == len(whole)
    assert stayed == whole[:MOST_BYTES]
    for (name, value), (cut_name, cut_value) in zip(came, kept, strict=False):
        assert name.startswith(cut_name)
        assert value.startswith(cut_value)
    if size > MOST_BYTES:
        assert all(pair == cut for pair, cut in zip(came, kept[:-1], strict=False)), "only the last one is cut"


def test_a_detail_that_is_no_unicode_is_still_said() -> None:
    flat = pairs(encode_reject(Reject(Entry("k", "1-0", {}), "encoding", "found \udcff", "intake")))
    assert dict(flat)[b"detail"] == b"found ?"
