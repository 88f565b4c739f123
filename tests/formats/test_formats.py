"""Each trap of each format, and what fits none. Messages are as the producers document them."""

from __future__ import annotations

import json

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.formats import FormatReader, InputRule, recognise
from streams.formats.document import read_plain
from streams.messages import Entry
from streams.validation import MAX_PAYLOAD_BYTES, REASONS, Limits
from tests.formats.samples import FIRST_OPEN_MS, NOW_MS, entry
from worker.intake import Accepted, Intake

T = FIRST_OPEN_MS
K = {"t": T, "T": T + 59_999, "s": "BTCUSDT", "i": "1m", "o": "10.5", "c": "11", "h": "12", "l": "10", "v": "3"}
CCXT = InputRule("feed", symbol="BTC/USDT", interval="1m")


def accept(entries: list[Entry], *rules: InputRule) -> Accepted:
    return Intake(Limits(), reader=FormatReader(rules)).accept(entries, NOW_MS)


def one(item: Entry, *rules: InputRule):
    accepted = accept([item], *rules)
    assert dict(accepted.outcomes) == {"accepted": 1}, accepted.rejects
    return accepted.bars[0]


def refusal(item: Entry) -> tuple[str, str]:
    accepted = accept([item])
    assert dict(accepted.outcomes) == {"rejected": 1}
    return accepted.rejects[0].reason, accepted.rejects[0].detail


KLINE = {"e": "kline", "E": T + 60_000, "s": "BTCUSDT", "k": {**K, "x": True}}


@pytest.mark.parametrize(
    "fields",
    [
        {"data": KLINE},
        {"message": KLINE},
        {"data": {"stream": "btcusdt@kline_1m", "data": KLINE}},
        {"stream": "btcusdt@kline_1m", "data": KLINE},
        {"data": KLINE["k"]},
        {"e": "kline", "E": str(T), "s": "BTCUSDT", "k": KLINE["k"]},
        {"data": {"e": "continuous_kline", "ps": "BTCUSDT", "ct": "PERPETUAL", "k": {**KLINE["k"], "s": None}}},
        {"data": {**KLINE, "k": {**KLINE["k"], "t": T * 1000, "T": T * 1000 + 59_999_999}}},
    ],
    ids=["bare", "other-field", "wrapped", "wrapped-flat", "kline-alone", "flat", "continuous", "microseconds"],
)
def test_a_binance_kline_is_read_however_it_is_wrapped(fields):
    bar = one(entry(**fields))
    assert (bar.symbol, bar.interval, bar.ts) == ("BTCUSDT", "1m", T)
    assert bar.ohlcv == (10.5, 12, 10, 11, 3)


@pytest.mark.parametrize("closed", [False, None, "false", 0])
def test_only_x_true_closes_a_kline(closed):
    assert dict(accept([entry(data={**KLINE, "k": {**K, "x": closed}})]).outcomes) == {"unclosed": 1}


@pytest.mark.parametrize(
    "message",
    [
        {"e": "trade", "s": "BTCUSDT", "p": "1"},
        {"result": None, "id": 1},
        {"e": "24hrTicker", "k": 1},
        {"result": ["btcusdt@trade"], "id": 3},
        {"error": {"code": 2, "msg": "x"}, "id": 1},
        {"result": True, "id": 5},
    ],
)
def test_other_messages_of_binance_are_no_bars_and_no_errors(message):
    assert dict(accept([entry(data=message)]).outcomes) == {"unclosed": 1}


def test_a_kline_event_without_its_kline_is_rejected():
    assert refusal(entry(data={"e": "kline", "s": "BTCUSDT"})) == ("type", "k is None, an object was expected")


def test_a_quarterly_contract_is_a_series_of_its_own():
    message = {"e": "continuous_kline", "ps": "BTCUSD", "ct": "NEXT_QUARTER", "k": {**K, "s": None, "x": True}}
    assert one(entry(data=message)).symbol == "BTCUSD_NEXT_QUARTER"


@pytest.mark.parametrize("interval", ["1w", "1M"])
def test_intervals_without_fixed_minutes_are_rejected(interval):
    assert refusal(entry(data={**KLINE, "k": {**K, "i": interval, "x": True}}))[0] == "interval"


def rest(k: int) -> list[object]:
    t = T + 60_000 * k
    return [t, "10.5", "12", "10", "11", "3", t + 59_999, "0", 5, "0", "0", "0"]


def test_binances_rest_table_tells_its_interval_and_its_last_row_is_still_forming():
    accepted = accept([entry(data=[rest(k) for k in range(4)])], InputRule("feed", symbol="BTCUSDT"))
    assert [(bar.interval, bar.ts) for bar in accepted.bars] == [("1m", T + 60_000 * k) for k in range(3)]
    assert dict(accepted.outcomes) == {"accepted": 3, "unclosed": 1}


def row(k: int, close: object = 11) -> list[object]:
    return [T + 60_000 * k, 10.5, 12, 10, close, 3]


def test_a_ccxt_row_is_closed_by_the_next_and_the_forming_one_repeats():
    rows = [row(0, 10.6), row(0, 10.8), row(0, 11), row(1, 10.7), row(1, 11.5), row(2)]
    accepted = accept([entry(n, data=r) for n, r in enumerate(rows)], CCXT)
    assert [(bar.symbol, bar.ts, bar.close) for bar in accepted.bars] == [
        ("BTC/USDT", T, 11),
        ("BTC/USDT", T + 60_000, 11.5),
    ]
    assert dict(accepted.outcomes) == {"unclosed": 4, "accepted": 2}


def test_the_rolling_window_that_ccxt_gives_again_and_again_yields_each_bar_once():
    """Windows of 6 rows, each two rows further: every bar but the last, once; the last closed one comes again."""
    windows = [[row(k) for k in range(start, start + 6)] for start in range(0, 12, 2)]
    accepted = accept([entry(n, data=rows) for n, rows in enumerate(windows)], CCXT)
    assert [bar.ts for bar in accepted.bars] == [T + 60_000 * k for k in range(15)]
    assert not accepted.rejects
    assert accepted.outcomes["duplicate"] == len(windows) - 1


def test_a_correction_of_the_last_closed_bar_is_a_revision():
    windows = [[row(0), row(1)], [row(0, 11.5), row(1), row(2)]]
    accepted = accept([entry(n, data=rows) for n, rows in enumerate(windows)], CCXT)
    assert [reject.reason for reject in accepted.rejects] == ["revision"]


def test_what_is_in_hand_is_part_of_the_state():
    rows = [entry(n, data=row(n // 2, 11 + n % 2 / 2)) for n in range(20)]
    whole = accept(rows, CCXT)
    bars, state = [], {}
    for item in rows:  # a restart between any two entries
        intake = Intake(Limits(), reader=FormatReader([CCXT]))
        intake.restore(state)
        bars += intake.accept([item], NOW_MS).bars
        state |= dict(intake.changes())
    assert bars == whole.bars
    assert len(bars) == 9


def test_after_a_loss_of_input_nothing_in_hand_is_used_also_not_after_a_restart():
    intake = Intake(Limits(), reader=FormatReader([CCXT]))
    intake.accept([entry(1, data=row(0, 10.6))], NOW_MS)
    state = dict(intake.changes())
    intake.rewarm_all()
    state |= dict(intake.changes())
    restarted = Intake(Limits(), reader=FormatReader([CCXT]))
    restarted.restore(state)
    for survivor in (intake, restarted):
        accepted = survivor.accept([entry(2, data=row(1)), entry(3, data=row(2))], NOW_MS)
        assert [bar.ts for bar in accepted.bars] == [T + 60_000]


def test_a_row_in_hand_is_not_closed_by_one_that_is_further_on():
    """Its last updates may be among what is missing; the series goes on from the later row."""
    rows = [row(0), row(1, 10.1), row(7), row(8)]
    accepted = accept([entry(n, data=r) for n, r in enumerate(rows)], CCXT)
    assert [bar.ts for bar in accepted.bars] == [T, T + 7 * 60_000]
    assert dict(accepted.outcomes) == {"accepted": 2, "unclosed": 2}


def test_within_one_list_every_row_but_the_last_has_ended_also_before_a_gap():
    """Some exchanges have no bar where nobody traded."""
    windows = [[row(0), row(1, 10.1)], [row(0), row(1), row(7)], [row(7), row(8)]]
    accepted = accept([entry(n, data=rows) for n, rows in enumerate(windows)], CCXT)
    assert [(bar.ts - T) // 60_000 for bar in accepted.bars] == [0, 1, 7]
    assert {bar.close for bar in accepted.bars} == {11}


def test_daily_rows_go_on_over_a_weekend():
    friday = 1_699_574_400_000  # 2023-11-10
    rows = [[friday + day * 86_400_000, 10.5, 12, 10, 11, 3] for day in (0, 3)]
    accepted = accept([entry(n, data=r) for n, r in enumerate(rows)], InputRule("feed", symbol="A", interval="1d"))
    assert [bar.ts for bar in accepted.bars] == [friday]


def test_null_values_are_rejected_once_the_row_is_closed():
    accepted = accept([entry(1, data=row(0, None)), entry(2, data=row(1))], CCXT)
    assert [(r.reason, "close" in r.detail) for r in accepted.rejects] == [("missing_field", True)]


def test_null_values_of_a_forming_row_do_no_harm():
    rows = [row(0, None), row(0), row(1)]
    assert len(accept([entry(n, data=r) for n, r in enumerate(rows)], CCXT)) == 1


def test_a_ccxt_row_without_its_symbol_says_where_to_set_it():
    reason, detail = refusal(entry(data=row(0)))
    assert reason == "missing_field"
    assert "inputs" in detail


def test_symbol_and_timeframe_may_stand_beside_a_ccxt_row():
    items = [entry(n, symbol="BTC/USDT", timeframe="1m", ohlcv=row(n)) for n in range(2)]
    assert [(bar.symbol, bar.interval) for bar in accept(items).bars] == [("BTC/USDT", "1m")]


@pytest.mark.parametrize("ts", [T * 1000, T // 1000, T * 10**6])
def test_a_row_in_another_unit_is_rejected_at_once_and_does_not_stand_in_the_way(ts):
    items = [entry(1, data=[ts, *row(0)[1:]]), entry(2, data=row(0)), entry(3, data=row(1))]
    accepted = accept(items, CCXT)
    assert [r.reason for r in accepted.rejects] == ["unit"]
    assert [bar.ts for bar in accepted.bars] == [T]


def test_a_row_from_the_future_is_not_taken_in_hand():
    items = [entry(1, data=row(10_000)), entry(2, data=row(0)), entry(3, data=row(1))]
    accepted = accept(items, CCXT)
    assert [bar.ts for bar in accepted.bars] == [T]


def test_an_empty_list_is_no_bar_and_no_error():
    assert dict(accept([entry(data=[])]).outcomes) == {"unclosed": 1}


def nautilus(topic: str = "data.bars.X", **payload: object) -> Entry:
    value = {
        "type": "Bar", "bar_type": "ETHUSDT.BINANCE-5-MINUTE-LAST-EXTERNAL", "open": "10.5", "high": "12",
        "low": "10", "close": "11", "volume": "3", "ts_event": str((T // 300_000 + 1) * 300_000 * 10**6),
    } | payload  # fmt: skip
    return entry(topic=topic, payload=json.dumps(value))


@pytest.mark.parametrize(
    ("bar_type", "symbol", "interval"),
    [
        ("ETHUSDT.BINANCE-5-MINUTE-LAST-EXTERNAL", "ETHUSDT.BINANCE", "5m"),
        ("BTCUSDT-PERP.BINANCE-1-MINUTE-LAST-EXTERNAL", "BTCUSDT-PERP.BINANCE", "1m"),
        ("EUR/USD.SIM-1-MINUTE-BID-INTERNAL", "EUR/USD.SIM-BID", "1m"),
        ("ETHUSDT.BINANCE-5-MINUTE-LAST-INTERNAL@1-MINUTE-EXTERNAL", "ETHUSDT.BINANCE", "5m"),
    ],
)
def test_symbol_and_interval_come_from_the_text_of_the_bar_type(bar_type, symbol, interval):
    bar = one(nautilus(bar_type=bar_type))
    assert (bar.symbol, bar.interval) == (symbol, interval)


@pytest.mark.parametrize("bar_type", ["ETHUSDT.BINANCE-100-TICK-LAST-EXTERNAL", "X.Y-1-MONTH-LAST-EXTERNAL"])
def test_bars_without_a_fixed_interval_are_rejected(bar_type):
    assert refusal(nautilus(bar_type=bar_type))[0] == "interval"


CLOSE_NS = (T + 60_000) * 10**6


@pytest.mark.parametrize(
    "ts_event",
    [str(CLOSE_NS), CLOSE_NS, CLOSE_NS - 10**6, str(CLOSE_NS - 999_936), CLOSE_NS - 1_000_192,
     "2023-11-14T22:15:00Z", "2023-11-14T22:15:00.000000000Z", "2023-11-14T22:14:59.999000064+00:00"],
)  # fmt: skip
def test_the_close_time_in_every_writing_gives_the_same_open_time(ts_event):
    assert one(nautilus(bar_type="X.Y-1-MINUTE-LAST-EXTERNAL", ts_event=ts_event)).ts == T


def test_a_close_time_off_the_grid_is_rejected_and_never_moved():
    item = nautilus(bar_type="X.Y-1-MINUTE-LAST-EXTERNAL", ts_event=CLOSE_NS - 3 * 10**6)
    assert refusal(item)[0] == "grid"


def test_the_fields_of_the_newer_message_bus_are_read_whatever_encoding_says():
    value = {"type": "Bar", "bar_type": "X.Y-1-MINUTE-LAST-EXTERNAL", "open": "10.5", "high": "12", "low": "10",
             "close": "11", "volume": "3", "ts_event": str(CLOSE_NS), "ts_init": "0"}  # fmt: skip
    for payload in (msgpack.packb(value), json.dumps(value).encode()):
        bar = one(entry(topic="data.bars.X", type="", payload=payload, encoding="Json"))
        assert bar.ts == T


@pytest.mark.parametrize("topic", ["klines", "market"])
def test_a_topic_of_another_program_does_not_hide_its_bars(topic):
    assert one(entry(topic=topic, payload=KLINE)).symbol == "BTCUSDT"


@pytest.mark.parametrize(
    ("topic", "payload"),
    [("events.order.S-1", json.dumps(KLINE)), ("commands.x", "{}"), ("x", b"\x81\xc1"), ("x", "[" + "1," * 4000)],
)
def test_every_other_message_with_topic_and_payload_is_no_bar_and_no_error(topic, payload):
    assert dict(accept([entry(topic=topic, payload=payload)]).outcomes) == {"unclosed": 1}


def test_a_large_message_of_another_topic_is_skipped_not_rejected():
    item = entry(topic="data.book.snapshots", payload=b"\xde" + bytes(20_000))
    assert dict(accept([item]).outcomes) == {"unclosed": 1}


@pytest.mark.parametrize("payload", [b"", b"\x00", b"\x89\xa4type", b"\x81\xc1\xc1", b"[1]", b"{", b"\x81" * 4000])
def test_a_payload_that_cannot_be_read_is_rejected(payload):
    assert refusal(entry(topic="data.bars.X", payload=payload))[0] in ("encoding", "type")


@pytest.mark.parametrize(
    "item",
    [
        entry(side="buy", price="1"),
        entry(data={"a": 1}),
        entry(data=[1, 2]),
        entry(ts=str(T), foo="1"),
        entry(data={"topic": "kline.1.BTCUSDT", "ts": T, "data": [{"start": T, "open": "1"}]}),
        entry(data={"e": 1, "foo": 2}),
        entry(data={"e": "unheard of", "foo": 2}),
        entry(data={"e": ["kline"], "k": K}),
        entry(e="1", price="2"),
        entry(data={"id": 5, "result": [1, 2]}),
        entry(data={"id": 5, "status": 200, "result": [[T, "1", "1", "1", "1", "1"]]}),
    ],
)
def test_what_fits_no_format_is_rejected_with_what_was_tried(item):
    _, detail = refusal(item)
    for name in ("native", "cryptofeed", "nautilus", "binance", "ccxt"):
        assert name in detail


def test_a_native_bar_that_lacks_ts_is_told_that_ts_is_missing():
    item = entry(symbol="A", open="1", high="1", low="1", close="1", volume="1")
    assert refusal(item) == ("missing_field", "ts is missing or empty")


def test_a_rule_can_keep_two_exchanges_apart():
    fields = {"symbol": "BTC-USDT", "ts": str(T), "open": "1", "high": "1", "low": "1", "close": "1", "volume": "1"}
    assert one(entry(**fields), InputRule("feed", prefix="OKX:")).symbol == "OKX:BTC-USDT"


CANDLE = {
    "exchange": "X", "symbol": "A", "start": str(T / 1000), "stop": str(T / 1000 + 60), "interval": "1m", "open": "1",
    "high": "1", "low": "1", "close": "1", "volume": "1", "closed": "True",
}  # fmt: skip


@pytest.mark.parametrize("rules", [(), (InputRule("other"),), (InputRule("feed"),)])
@pytest.mark.parametrize("pack", [lambda fields: fields, lambda fields: {"data": fields}], ids=["flat", "json"])
def test_a_close_time_named_ts_beside_start_and_stop_never_becomes_the_open_time(rules, pack):
    assert one(entry(**pack({**CANDLE, "ts": str(T + 60_000)})), *rules).ts == T


@pytest.mark.parametrize("absent", ["exchange", "stop", "interval"])
def test_ts_beside_start_is_refused_where_no_format_says_what_it_means(absent):
    fields = {name: value for name, value in CANDLE.items() if name != absent} | {"ts": str(T + 60_000)}
    assert "fits no format" in refusal(entry(**fields))[1]


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=12) | st.dictionaries(st.sampled_from("etTsioclhvxk"), inner, max_size=9),
    max_leaves=14,
)
names = st.sampled_from(
    "data topic payload symbol ts start stop exchange interval closed open high low close volume stream".split()
)


@settings(deadline=None)
@given(
    fields=st.dictionaries(
        names,
        st.binary(max_size=40) | values.map(lambda v: json.dumps(v).encode()) | values.map(str).map(str.encode),
        max_size=9,
    ),
    closed=st.sampled_from([None, "flag", "next", "always"]),
)
def test_no_bytes_do_more_than_be_rejected_with_a_reason(fields, closed):
    item = Entry("k", "1-1", {k.encode(): v for k, v in fields.items()})
    reader = FormatReader([InputRule(symbol="A", interval="1m", closed=closed)])
    accepted = Intake(Limits(), reader=reader).accept([item], NOW_MS)
    assert {reject.reason for reject in accepted.rejects} <= set(REASONS)
    assert sum(accepted.outcomes.values()) >= 1
    assert Intake(Limits()).accept([item], NOW_MS).outcomes


NATIVE = {"symbol": "A", "ts": str(T), "open": "1", "high": "2", "low": "1", "close": "2", "volume": "1"}
shapes = st.sampled_from(
    [
        NATIVE,
        CANDLE,
        {"ts": str(T), "data": json.dumps(KLINE)},
        {"ts": str(T), "symbol": "A", "timeframe": "1m", "ohlcv": json.dumps(row(0))},
        {"ts": str(T), "data": json.dumps(NATIVE)},
        {"topic": "data.bars.X", "payload": json.dumps(NATIVE)},
        {"e": "kline", "s": "A", "k": json.dumps(KLINE["k"])},
    ]
)
extras = st.dictionaries(names, st.sampled_from(["", "1", "[1]", "{}", str(T), json.dumps(KLINE)]), max_size=3)


def judged(item: Entry, *rules: InputRule) -> tuple:
    accepted = accept([item], *rules)
    return accepted.outcomes, accepted.bars, [(reject.reason, reject.detail) for reject in accepted.rejects]


@settings(deadline=None)
@given(first=shapes, second=shapes | st.just({}), more=extras, absent=st.sets(names, max_size=2))
def test_a_rule_for_another_key_changes_nothing(first, second, more, absent):
    """Nor does a rule for the entry's own key that says nothing of it."""
    item = entry(**{name: value for name, value in {**first, **second, **more}.items() if name not in absent})
    assert judged(item) == judged(item, InputRule("other", closed="next")) == judged(item, InputRule("feed"))


further = st.dictionaries(
    st.sampled_from([b"note", b"closed", b"start", b"topic", b"payload", b"data", b"\xff", b"a\n", b"n" * 60]),
    st.sampled_from([b"", b"1", b"\0", b"a\0b", b"\x1f", b"\x7f", b"\xc3\xa9", b"\xc3", b"{}", b"\x80", b"x" * 3980]),
    max_size=3,
)


@given(further=further, first=st.booleans(), absent=st.none() | st.sampled_from(sorted(NATIVE)))
def test_a_plain_bar_is_read_as_every_entry_is_only_faster(further, first, absent):
    bar = {name.encode(): value.encode() for name, value in NATIVE.items() if name != absent}
    fields = {**further, **bar} if first else {**bar, **further}
    plain = read_plain(fields)
    if plain is not None:
        assert recognise(Entry("feed", "1-0", fields)) == ("native", [plain])
    assert (plain is None) == bool(
        absent
        or {b"start", b"topic", b"payload", b"data", b"\xff", b"a\n"} & further.keys()
        or {b"\0", b"a\0b", b"\x1f", b"\x7f", b"\xc3", b"\x80"} & set(further.values())
        or len(b"".join([*fields.keys(), *fields.values()])) > MAX_PAYLOAD_BYTES
    )


@pytest.mark.parametrize(("names", "size", "read"), [(64, 4096, True), (64, 4097, False), (65, 4096, False)])
def test_a_plain_bar_has_the_limits_of_every_entry(names, size, read):
    fields = {name.encode(): value.encode() for name, value in NATIVE.items()}
    fields |= {b"%d" % n: b"" for n in range(names - len(fields))}
    fields[b"0"] = b"x" * (size - len(b"".join([*fields.keys(), *fields.values()])))
    assert (read_plain(fields) is not None) is read
    assert bool(accept([Entry("feed", f"{T}-0", fields)]).bars) is read


def test_a_native_bar_may_carry_a_field_with_json():
    for rules in ((), (InputRule("other"),), (InputRule("feed"),)):
        assert one(entry(**NATIVE, trades="[1, 2]"), *rules).ts == T


def test_recognising_holds_nothing_back():
    assert recognise(entry(data=[row(0), row(1)]))[0] == "ccxt"
