"""Names of topics, and objects packed into records and out of them."""

from __future__ import annotations

from itertools import pairwise

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.records import pack, unpack
from streams.topics import Topics, topic_of

VALUES = st.integers(-(2**53), 2**53) | st.text() | st.floats(allow_nan=False, allow_infinity=False)
JSON_OBJECTS = st.dictionaries(st.text(), VALUES, max_size=4)


def test_topics_are_the_keys_with_dots() -> None:
    votes = "votes.xgboost votes.lightgbm votes.nhits votes.patchtst"
    canaries = "votes.xgboost_canary votes.lightgbm_canary votes.nhits_canary votes.patchtst_canary"
    names = f"bars features {votes} {canaries} signals rejected events control"
    assert Topics().all() == tuple(f"quartet.{name}" for name in names.split())
    assert topic_of("team:a:votes:nhits") == "team.a.votes.nhits"


def test_a_namespace_that_kafka_does_not_allow_is_named() -> None:
    with pytest.raises(ValueError, match="set another namespace"):
        Topics("caf\u00e9")


@settings(max_examples=60, deadline=None)
@given(st.lists(JSON_OBJECTS, max_size=12), st.integers(1, 9), st.integers(40, 400))
def test_packed_objects_come_out_in_order_within_both_limits(objects: list[object], limit: int, cap: int) -> None:
    encoded = [orjson.dumps(one) for one in objects]
    if any(len(one) > cap for one in encoded):
        with pytest.raises(ValueError, match="does not fit"):
            pack(encoded, limit, cap)
        return
    values = pack(encoded, limit, cap)
    assert [orjson.loads(one) for value in values for one in unpack(value)] == objects
    sizes = [len(unpack(value)) for value in values]
    assert all(1 <= size <= limit for size in sizes)
    assert all(len(value) <= cap for value in values)
    for value, after in pairwise(values):
        assert len(unpack(value)) == limit or len(value) + len(unpack(after)[0]) + 3 > cap


def test_256_bars_travel_in_one_record_and_257_in_two() -> None:
    assert len(pack([b"{}"] * 256)) == 1
    assert [len(unpack(value)) for value in pack([b"{}"] * 257)] == [256, 1]


def test_a_record_stays_under_the_limit_of_a_broker_with_default_settings() -> None:
    values = pack([b'{"x":"' + b"x" * 4_000 + b'"}'] * 1_000)
    assert max(map(len, values)) < 1_000_000 < sum(map(len, values))


@pytest.mark.parametrize("value", [b'{"a":1}', b"not json", b"\xff\x00", b"[1,", b"[" * 3_000, b'[{"a":NaN}]'])
def test_what_is_no_array_that_can_be_read_comes_back_whole(value: bytes) -> None:
    assert unpack(value) == [value]


@pytest.mark.parametrize("value", [None, b"", b"[]", b" [ ] "])
def test_nothing_in_a_record_is_nothing(value: bytes | None) -> None:
    assert unpack(value) == []


def test_what_stands_in_an_array_is_judged_one_by_one_by_whoever_reads_it() -> None:
    assert unpack(b'[{"a":1}, 7, "x", [1, 2]]') == [b'{"a":1}', b"7", b'"x"', b"[1,2]"]
