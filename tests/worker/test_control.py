"""Orders over `quartet:control`: strict, in the commit in which they take effect, answered by an event."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.messages import AGENTS, Entry
from tests.worker.orders import FIRST, KEYS, market
from worker.control import ORDERS, BadOrderError, Order, parse

BARS = market(2, 100)
SHA = "a" * 64


def entry(data: bytes, field: bytes = b"data") -> Entry:
    return Entry("quartet:control", "5-1", {field: data})


@pytest.mark.parametrize(
    "order",
    [
        Order("reload"),
        Order("reload", "nhits", by="me"),
        Order("canary", "nhits", "nhits_v20260101_000000.pth", SHA),
        Order("shadow", "xgboost", "/elsewhere/xgb_v20260101_000000.ubj", SHA, "me"),
        *(Order(name, "lightgbm") for name in ("mute", "unmute", "promote", "rollback")),
    ],
)
def test_what_is_written_is_what_is_read(order):
    read = parse(entry(order.encode()))
    assert (read.order, read.agent, read.file, read.sha256, read.by) == (
        order.order, order.agent, order.file, order.sha256, order.by
    )  # fmt: skip
    assert read.id == "5-1"


BAD = {
    "not json": b"{",
    "not an object": b"[]",
    "no order": b"{}",
    "unknown order": b'{"order":"dance"}',
    "an order that is no text": b'{"order":7}',
    "an unknown name": b'{"order":"reload","force":"yes"}',
    "an agent that is none": b'{"order":"mute","agent":"oracle"}',
    "no agent": b'{"order":"mute"}',
    "a canary as agent": b'{"order":"mute","agent":"xgboost_canary"}',
    "an empty agent": b'{"order":"reload","agent":""}',
    "a list as agent": b'{"order":"reload","agent":["xgboost"]}',
    "a canary without a file": b'{"order":"canary","agent":"xgboost"}',
    "a canary without a hash": b'{"order":"canary","agent":"xgboost","file":"xgboost_v20260101_000000.ubj"}',
    "a hash that is none": b'{"order":"canary","agent":"xgboost","file":"x.ubj","sha256":"' + b"Z" * 64 + b'"}',
    "a file where none belongs": b'{"order":"mute","agent":"xgboost","file":"x"}',
    "a control character": b'{"order":"reload","by":"\\u0007"}',
    "not utf-8": b'{"order":"\xff"}',
    "too long a name": b'{"order":"reload","by":"' + b"x" * 2000 + b'"}',
    "too large": b'{"order":"reload"' + b" " * 5000 + b"}",
    "nested deeply": b"[" * 4000,
}


@pytest.mark.parametrize("data", BAD.values(), ids=BAD.keys())
def test_what_is_no_order_is_rejected_with_its_reason(desk, data):
    """It takes no effect, and a good order after it does."""
    one = desk()
    one.write(data)
    assert [e["kind"] for e in one.order("mute", "xgboost")] == ["agent_muted"]
    ((_, rejected),) = one.store.streams.after(KEYS.rejected, "0-0")
    assert (rejected[b"reason"], rejected[b"stage"]) == (b"order", b"control")
    assert rejected[b"source_key"] == KEYS.control.encode()
    assert rejected[b"in:data"] == data[:4092]
    assert one.registry.get_sample_value("quartet_rejected_total", {"stage": "control", "reason": "order"}) == 1
    assert one.store.position.inputs[KEYS.control].consumed == 2


def test_other_fields_are_no_order():
    with pytest.raises(BadOrderError, match="one field data"):
        parse(entry(b'{"order":"reload"}', b"order"))


def test_an_agent_that_is_not_configured_takes_no_order():
    with pytest.raises(BadOrderError, match="xgboost, lightgbm"):
        parse(entry(Order("mute", "nhits").encode()), ("xgboost", "lightgbm"))


TEXTS = st.dictionaries(st.text(max_size=8), st.text(max_size=8))


@given(st.binary(max_size=300) | TEXTS.map(json.dumps).map(str.encode))
def test_no_bytes_do_more_than_be_rejected(data):
    try:
        order = parse(entry(data))
    except BadOrderError:
        return
    assert order.order in ORDERS
    assert order.agent in ("", *AGENTS)


def test_mute_and_unmute_take_the_weight_and_give_it_back(desk):
    one = desk(quorum=1)
    one.feed(BARS[:80])
    (muted,) = one.order("mute", "xgboost")
    one.feed(BARS[80:100])
    (unmuted,) = one.order("unmute", "xgboost")
    one.feed(BARS[100:120])
    (again,) = one.order("unmute", "xgboost")
    assert (muted["kind"], muted["reason"], muted["evidence"]["by"]) == ("agent_muted", "operator", "a test")
    assert (unmuted["kind"], unmuted["evidence"]["was"]) == ("agent_readmitted", "operator")
    assert (again["kind"], again["reason"]) == ("order_refused", "not_muted")
    during, after = one.signals()[-40:-20], one.signals()[-20:]
    names = ("state", "reason", "effective_weight")
    assert {tuple(s["votes"]["xgboost"][n] for n in names) for s in during} == {("muted", "operator", 0.0)}
    assert {tuple(s["votes"]["xgboost"][n] for n in names) for s in after} == {("active", None, 0.5)}


def test_a_mute_survives_a_restart(desk):
    one = desk()
    one.feed(BARS[:80])
    one.order("mute", "xgboost")
    one.restart()
    one.feed(BARS[80:100])
    assert {vote["state"] for vote in one.votes()[-20:]} == {"muted"}


def test_an_order_is_carried_out_once_and_in_the_order_given(desk):
    one = desk()
    for order in ("mute", "unmute", "mute"):
        one.write(Order(order, "xgboost").encode())
    one.turn()
    one.restart()
    one.turn()
    kinds = [e["kind"] for e in one.events() if e["agent"] == "xgboost" and e["evidence"].get("order")]
    assert kinds == ["agent_muted", "agent_readmitted", "agent_muted"]


def test_an_order_moves_no_output_id(desk):
    """With orders between the bars the IDs are those of the bars, as without."""
    one = desk()
    one.feed(BARS[:80])
    one.order("mute", "xgboost")
    one.feed(BARS[80:100])
    read = [entry_id for entry_id, _ in one.store.streams.after(KEYS.bars, "0-0")]
    assert [entry_id for entry_id, _ in one.store.streams.after(KEYS.features, "0-0")] == read
    assert [entry_id for entry_id, _ in one.store.streams.after(KEYS.signals, "0-0")] == read[58:]


def test_lost_orders_are_said_and_bars_go_on(desk):
    one = desk()
    one.order("mute", "xgboost")
    one.store.streams.delete(KEYS.control)
    one.store.streams.now_ms += 1
    one.feed(BARS[:80])
    assert [e["evidence"]["key"] for e in one.events("gap")] == [KEYS.control]
    assert len(one.signals()) == 80 - 58
    assert [e["kind"] for e in one.order("unmute", "xgboost")] == ["agent_readmitted"]


def test_the_signal_to_reload_is_a_reload_of_all(desk):
    one = desk()
    one.worker.options.reload.set()
    while len(one.events("reload")) < 2:
        one.worker._turn()
    assert [(e["agent"], e["evidence"]["by"], e["evidence"]["version"]) for e in one.events("reload")] == [
        ("xgboost", "SIGHUP", FIRST),
        ("lightgbm", "SIGHUP", FIRST),
    ]
