"""`--bars` with several keys and patterns: on real servers, through the worker's own loop."""

from __future__ import annotations

import redis
import structlog
from structlog.testing import LogCapture

from streams.inputs import Inputs
from streams.keys import Keys
from streams.redis import RedisStore, connect
from streams.store import Position
from streams.validation import Limits
from worker.intake import Intake
from worker.lookout import Lookout

KINDS = {"candles-A": "stream", "candles-B": "zset", "n:features": "stream", "n:bars": "stream"}


def test_a_pattern_takes_streams_alone_and_tells_once_of_what_is_none():
    inputs = Inputs(["candles-*"], "n")
    find = {"candles-A": "stream", "candles-B": "zset"}
    first, second = inputs.refresh(lambda _: find), inputs.refresh(lambda _: find)
    assert inputs.keys == ("candles-A",)
    assert (first.new, dict(first.skipped)) == (("candles-A",), {"candles-B": "zset"})
    assert (second.new, dict(second.skipped)) == ((), {})


def test_a_pattern_never_takes_the_outputs_of_its_own_namespace():
    inputs = Inputs(["*"], "n")
    inputs.refresh(lambda _: KINDS)
    assert inputs.keys == ("candles-A", "n:bars")


def test_a_look_out_says_once_what_is_read_what_is_not_and_that_nothing_is_there_yet(monkeypatch):
    monkeypatch.setattr("worker.lookout.REFRESH_S", 0.0)
    seen = LogCapture()
    log = structlog.wrap_logger(structlog.testing.ReturnLogger(), processors=[seen])
    looks = iter([{}, {}, {"candles-B": "zset"}, {"candles-A": "stream", "candles-B": "zset"}])
    lookout = Lookout(Inputs(["candles-*"], "n"), lambda _: next(looks), log)
    none = "no stream matches yet; waiting for one"
    for _ in range(4):
        lookout.look()
    skipped = "not read: keys that match a pattern but are no streams"
    assert [entry["event"] for entry in seen.entries] == [none, skipped, "reading"]
    assert (seen.entries[1]["keys"], seen.entries[2]["key"]) == ("candles-B (zset)", "candles-A")


def test_a_key_that_was_read_stays_also_while_it_is_gone():
    inputs = Inputs(["x", "c*"], "n")
    inputs.refresh(lambda _: {"c1": "stream"})
    inputs.refresh(lambda _: {"c2": "stream"})
    assert inputs.keys == ("x", "c1", "c2")


def test_keys_of_one_pattern_share_a_metric_label():
    inputs = Inputs(["x", "c*"], "n")
    assert [inputs.label(key) for key in ("x", "c1", "c2")] == ["x", "c*", "c*"]
    assert inputs.several
    own = Inputs(["n:bars", "other:bars", "n:x*"], "n")
    assert [own.label(key) for key in ("n:bars", "other:bars", "n:x1")] == ["bars", "other:bars", "x*"]
    assert not Inputs(["x"], "n").several


def test_the_look_up_finds_keys_by_glob_with_their_types(server: str, namespace: str):
    client = redis.Redis.from_url(server)
    client.xadd(f"{namespace}-a1", {"x": 1})
    client.zadd(f"{namespace}-a2", {"x": 1})
    client.set(f"{namespace}-b".encode() + b"\xff", 1)
    found = RedisStore(connect(server), Keys(namespace)).find(f"{namespace}-*")
    assert found == {f"{namespace}-a1": "stream", f"{namespace}-a2": "zset"}


def test_entries_of_several_keys_are_merged_by_id_and_each_output_has_an_id_of_its_own(server: str, namespace: str):
    client = redis.Redis.from_url(server)
    keys = [f"{namespace}-a", f"{namespace}-b"]
    ids = [f"{1_750_000_000_000 + ms}-0" for ms in (1, 1, 2, 5, 5, 9)]
    for number, entry_id in enumerate(ids):
        prices = dict.fromkeys(("open", "high", "low", "close"), 1 + number)
        bar = {"symbol": f"S{number}", "ts": 1_749_999_960_000, "volume": 1, **prices}
        client.xadd(keys[number % 2], bar, id=entry_id)
    batch = RedisStore(connect(server), Keys(namespace)).read(Position(), keys, 10)
    accepted = Intake(Limits(), several_keys=True).accept(batch.entries, 1_750_000_000_010)
    assert [bar.symbol for bar in accepted.bars] == ["S0", "S1", "S2", "S4", "S3", "S5"], "equal IDs go by key"
    expected = ["1-0", "1-1", "2-0", "5-0", "5-1", "9-0"]
    assert accepted.ids == [f"{1_750_000_000_000 + int(i[0])}-{i[2]}" for i in expected]
