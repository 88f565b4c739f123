"""Every class of bad bar on every field it can stand in: rejected with its reason, never a crash."""

import math

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams import validation
from streams.messages import Bar
from streams.validation import (
    REASONS,
    BadBarError,
    Limits,
    UnclosedBarError,
    check_bar,
    interval_ms,
    missing_bars,
    read_fields,
)

TS = 1_750_000_020_000
NOW = TS + 60_000
GOOD = {"symbol": "BTC-USD", "ts": TS, "interval": "1m", "open": 10, "high": 12, "low": 9, "close": 11, "volume": 5}
PRICES = ("open", "high", "low", "close")
NUMBERS = (*PRICES, "volume")


def flat(**changes):
    """The fields of a flat entry: everything is text."""
    merged = {**GOOD, **changes}
    return {
        k.encode() if isinstance(k, str) else k: v if isinstance(v, bytes) else str(v).encode()
        for k, v in merged.items()
        if v is not ...
    }


def as_json(**changes):
    """An entry with one field, `data`."""
    merged = {k: v for k, v in {**GOOD, **changes}.items() if v is not ...}
    return {b"data": orjson.dumps(merged)}


def outcome(fields, now=NOW, limits=None):
    """The bar, or the reason why there is none."""
    try:
        return check_bar(read_fields(fields), now, limits or Limits())
    except BadBarError as error:
        return error.reason if error.detail and error.reason in REASONS else f"not a stated reason: {error}"
    except UnclosedBarError:
        return "unclosed"


@pytest.mark.parametrize("write", [flat, as_json])
def test_flat_fields_and_json_give_the_same_bar(write):
    assert outcome(write()) == Bar("BTC-USD", TS, "1m", 10.0, 12.0, 9.0, 11.0, 5.0)
    assert outcome(write(interval=...)) == Bar("BTC-USD", TS, "1m", 10.0, 12.0, 9.0, 11.0, 5.0)


@pytest.mark.parametrize(
    ("text", "value"),
    [("10.50", 10.5), ("1.05e1", 10.5), ("1.05E+1", 10.5), ("+10.5", 10.5), ("00010.5", 10.5), ("10.", 10.0)],
)
def test_decimal_text_is_a_number_in_every_spelling(text, value):
    assert outcome(flat(close=text)).close == value
    assert outcome(as_json(close=text)).close == value


EITHER = [
    # what stands in the field, the reason: for every number, flat and JSON alike
    ("nan", "not_finite"),
    ("NaN", "not_finite"),
    ("-inf", "not_finite"),
    ("Infinity", "not_finite"),
    ("1e999", "not_finite"),
    ("-1e999", "not_finite"),
    ("", "missing_field"),
    (..., "missing_field"),
    ("ten", "type"),
    ("1_0", "type"),
    ("0x10", "type"),
    (" 10", "type"),
    ("10,5", "type"),
    ("1e", "type"),
    ("٣", "type"),
    ("9007199254740993", "magnitude"),
    ("1" * 300, "magnitude"),
    ("4e-320", "magnitude"),
]


@pytest.mark.parametrize("write", [flat, as_json])
@pytest.mark.parametrize("field", NUMBERS)
@pytest.mark.parametrize(("value", "reason"), EITHER)
def test_what_is_no_number_is_rejected_in_every_field(write, field, value, reason):
    assert outcome(write(**{field: value})) == reason


@pytest.mark.parametrize("field", NUMBERS)
@pytest.mark.parametrize(
    ("value", "reason"),
    [(True, "type"), ([1], "type"), ({"a": 1}, "type"), (None, "missing_field"), (2**53 + 1, "magnitude")],
)
def test_what_only_json_can_say_is_rejected_in_every_field(field, value, reason):
    assert outcome(as_json(**{field: value})) == reason


@pytest.mark.parametrize("write", [flat, as_json])
@pytest.mark.parametrize("field", PRICES)
@pytest.mark.parametrize(("value", "reason"), [(0, "price_sign"), (-1, "price_sign"), (1.1e12, "magnitude")])
def test_a_price_is_above_zero_and_of_this_world(write, field, value, reason):
    assert outcome(write(**{field: value})) == reason


@pytest.mark.parametrize("write", [flat, as_json])
def test_a_volume_may_be_zero_but_not_less(write):
    assert outcome(write(volume=0)).volume == 0
    assert math.copysign(1, outcome(write(volume="-0.0")).volume) == 1
    assert outcome(write(volume=-1)) == "volume_sign"
    assert outcome(write(volume=1.1e18)) == "magnitude"


@pytest.mark.parametrize("change", [{"high": 8}, {"open": 13}, {"open": 8}, {"close": 12.5}, {"close": 8.9}])
def test_prices_that_contradict_each_other_are_rejected(change):
    assert outcome(flat(**change)) == "ohlc"


@pytest.mark.parametrize(
    ("ts", "reason"),
    [
        (TS // 1000, "unit"),
        (TS * 1000, "unit"),
        (TS * 1_000_000, "unit"),
        (-TS, "unit"),
        (TS + 1, "grid"),
        (TS + 59_999, "grid"),
        (NOW + 120_000, "future"),
        (1.5, "type"),
        (float(TS), "type"),
        ("soon", "type"),
        ("nan", "not_finite"),
        ("", "missing_field"),
        (..., "missing_field"),
    ],
)
def test_a_time_is_in_milliseconds_on_the_grid_and_not_ahead(ts, reason):
    assert outcome(as_json(ts=ts)) == reason


def test_a_bar_may_be_ahead_by_an_interval_and_the_skew():
    limits = Limits(clock_skew_ms=5_000)
    assert isinstance(outcome(flat(ts=TS + 60_000), now=TS - 5_000, limits=limits), Bar)
    assert outcome(flat(ts=TS + 60_000), now=TS - 5_001, limits=limits) == "future"


@pytest.mark.parametrize(
    ("interval", "reason"),
    [("1x", "interval"), ("m", "interval"), ("0m", "interval"), ("01m", "interval"), ("", "missing_field")],
)
def test_an_interval_has_its_form(interval, reason):
    assert outcome(flat(interval=interval)) == reason


def test_intervals_may_be_limited():
    limits = Limits(intervals=frozenset({"5m"}))
    assert outcome(flat(), limits=limits) == "interval"
    assert outcome(flat(interval="5m", ts=TS - TS % 300_000), limits=limits).interval == "5m"


@pytest.mark.parametrize("closed", ["false", "False", "0", False, 0])
def test_a_forming_candle_is_not_an_error(closed):
    assert outcome(as_json(closed=closed)) == "unclosed"


@pytest.mark.parametrize("closed", ["true", "True", "1", True, 1])
def test_a_closed_candle_is_used(closed):
    assert isinstance(outcome(as_json(closed=closed)), Bar)
    assert outcome(as_json(closed="maybe")) == "type"


@pytest.mark.parametrize("symbol", ["a b", "x" * 65, "Ω", "a|b", "a\\b"])
def test_a_symbol_fits_its_pattern(symbol):
    assert outcome(flat(symbol=symbol)) == "symbol"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({**flat(), b"note": b"x" * 4096}, "oversize"),
        ({**flat(), **{b"f%d" % i: b"" for i in range(64)}}, "oversize"),
        ({b"data": b'{"a":{"b":{"c":{"d":{}}}}}'}, "oversize"),
        ({b"data": b"[" * 2000 + b"]" * 2000}, "oversize"),
        ({b"data": orjson.dumps({**GOOD, **{f"f{i}": 0 for i in range(60)}})}, "oversize"),
        (flat(symbol=b"\xff\xfe"), "encoding"),
        (flat(symbol=b"BTC\x00"), "encoding"),
        (flat(close=b"1\n"), "encoding"),
        ({**flat(), b"\x01": b""}, "encoding"),
        ({b"data": b'{"symbol":"\xff"}'}, "encoding"),
        ({b"data": b'{"symbol":"\x00"}'}, "encoding"),
        ({b"data": b"{"}, "type"),
        ({b"data": b"[1]"}, "type"),
        ({b"data": b'{"close": NaN}'}, "type"),
        ({b"data": b""}, "type"),
        ({}, "missing_field"),
        ({b"else": b"1"}, "missing_field"),
    ],
)
def test_what_cannot_be_read_is_rejected(fields, reason):
    assert outcome(fields) == reason


@settings(max_examples=500, deadline=None)
@given(st.dictionaries(st.binary(max_size=12), st.binary(max_size=60), max_size=10))
def test_arbitrary_bytes_never_crash_the_decoder(fields):
    assert isinstance(outcome(fields), str)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20), lambda c: st.lists(c, max_size=3)
)


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(sorted(GOOD)), json_values)
def test_any_json_in_any_field_gives_a_sane_bar_or_a_reason(field, value):
    try:
        data = orjson.dumps({**GOOD, field: value})
    except TypeError:
        return  # an integer that this JSON writer cannot write
    result = outcome({b"data": data})
    if isinstance(result, Bar):
        assert all(math.isfinite(x) for x in result.ohlcv)
        assert 0 < result.low <= min(result.open, result.close) <= max(result.open, result.close) <= result.high


def test_intervals_are_milliseconds():
    assert [interval_ms(i) for i in ("1s", "5m", "4h", "1d")] == [1_000, 300_000, 14_400_000, 86_400_000]


DAY = 86_400_000
FRIDAY = 20_252 * DAY  # 2025-06-13


@pytest.mark.parametrize(
    ("last", "ts", "step", "missing"),
    [
        (FRIDAY, FRIDAY + DAY, DAY, 0),
        (FRIDAY, FRIDAY + 3 * DAY, DAY, 0),  # Monday after Friday
        (FRIDAY, FRIDAY + 4 * DAY, DAY, 1),
        (FRIDAY, FRIDAY + 31 * DAY, DAY, 30 - 10),  # five weekends in between
        (FRIDAY + 20 * 3_600_000, FRIDAY + 3 * DAY, 3_600_000, 3),  # hourly: 21, 22 and 23 o'clock on Friday
        (FRIDAY, FRIDAY + 3 * DAY, 60_000, 3 * 1440 - 1),  # minutes: the weekend counts
    ],
)
def test_weekends_of_hourly_and_daily_bars_are_no_gap(last, ts, step, missing):
    assert missing_bars(last, ts, step) == missing


DIGITS = st.text("0123456789", min_size=0, max_size=22)
NEARLY_NUMBERS = st.one_of(
    st.builds(
        lambda whole, point, rest: whole + point + rest, DIGITS, st.sampled_from(["", ".", ",", "e", " "]), DIGITS
    ),
    st.sampled_from(
        ["0", "0.0", "-1", "+1", "1e3", "1e-320", "nan", "inf", "1_0", "\u0661", "1\n", "", "999999999999.9"]
    ),
    st.decimals(min_value=1, max_value=10**13, allow_nan=False, places=4).map(str),
)


@settings(max_examples=300, deadline=None)
@given(values=st.tuples(*[NEARLY_NUMBERS] * 5))
def test_plain_values_judged_at_once_are_those_that_are_judged_one_by_one(values):
    raw = dict(zip(NUMBERS, values, strict=True))
    at_once = validation._plain_ohlcv(raw)
    try:
        one_by_one = validation._ohlcv(raw)
    except BadBarError:
        one_by_one = None
    assert at_once in (None, one_by_one)
    if at_once is not None:
        assert [math.copysign(1, x) for x in at_once] == [1.0] * 5


@pytest.mark.parametrize("values", [("10", "12.5", "9", "11", "5"), ("0.1", "0.1", "0.1", "0.1", "0.0")])
def test_values_as_most_feeds_write_them_are_judged_at_once(values):
    raw = dict(zip(NUMBERS, values, strict=True))
    assert validation._plain_ohlcv(raw) == validation._ohlcv(raw) == tuple(map(float, values))
