"""Whatever comes in ends as exactly one of: accepted, rejected, duplicate, unclosed, lost. On real servers."""

from __future__ import annotations

import json
import os
import signal
import time
import urllib.request
from collections import Counter

import pytest
import redis

from tests.chaos.scene import TREES, assert_same, market, until
from tests.chaos.servers import Server
from tests.helpers import LIMIT_S


def row(**changes: object) -> dict[bytes, bytes]:
    """A bar of a symbol that has no good ones, so that the good ones stay what they are."""
    plain = {"symbol": "BAD", "ts": 1_750_000_020_000, "open": 10, "high": 20, "low": 5, "close": 10, "volume": 1}
    return {
        name.encode(): value if isinstance(value, bytes) else str(value).encode()
        for name, value in {**plain, **changes}.items()
        if value is not None
    }


def as_json(text: str) -> dict[bytes, bytes]:
    return {b"data": text.encode()}


NUMBERS = ("open", "high", "low", "close", "volume")
BAD = [
    *((row(**{name: text}), "not_finite") for name in NUMBERS for text in ("nan", "-inf", "1e999")),
    *((row(**{name: text}), "type") for name in NUMBERS for text in ("ten", "0x10", "1_000", "١")),
    *((row(**{name: ""}), "missing_field") for name in (*NUMBERS, "symbol", "ts", "interval")),
    *((row(**{name: None}), "missing_field") for name in (*NUMBERS, "symbol", "ts")),
    *((row(**{name: 0}), "price_sign") for name in NUMBERS[:4]),
    *((row(**{name: "9007199254740993"}), "magnitude") for name in NUMBERS),
    *((row(**{name: "1e-310"}), "magnitude") for name in NUMBERS),
    (row(volume=-1), "volume_sign"),
    (row(high="2e12"), "magnitude"),
    (row(volume="2e18"), "magnitude"),
    (row(high=4), "ohlc"),
    (row(open=21), "ohlc"),
    (row(close=4), "ohlc"),
    (row(ts=1_750_000_020), "unit"),
    (row(ts=1_750_000_020_000_000), "unit"),
    (row(ts=1_750_000_020_001), "grid"),
    (row(ts="soon"), "type"),
    (row(interval="1M"), "interval"),
    (row(interval="0m"), "interval"),
    (row(symbol="A B"), "symbol"),
    (row(symbol="x" * 65), "symbol"),
    (row(note="x" * 5_000), "oversize"),
    ({b"f%d" % n: b"" for n in range(2_000)}, "oversize"),
    (row(symbol=b"\xff\xfe"), "encoding"),
    (row(symbol=b"A\x00"), "encoding"),
    (row(closed="maybe"), "type"),
    (as_json("{"), "type"),
    (as_json("[1]"), "type"),
    (as_json('{"a":' * 6 + "1" + "}" * 6), "oversize"),
    (as_json('{"symbol": "BAD", "ts": 1750000020000, "open": true}'), "type"),
    (as_json('{"symbol": "BAD", "ts": 1750000020000, "open": [1]}'), "type"),
    ({b"data": b'{"symbol": "\x01"}'}, "encoding"),
]


def test_every_class_of_bad_bar_has_one_outcome_in_the_streams_and_in_the_metrics(server, stage):
    """The sum of the outcomes is what came in; every reject holds the bytes as they came; good bars are untouched."""
    good = market(2, 60)
    calm, mixed = stage(server, TREES, "calm"), stage(server, TREES, "mixed")
    calm.feed(good)
    calm.finish()
    ahead = (time.time_ns() // 60_000_000_000 + 60) * 60_000
    bad = [*BAD, (row(ts=ahead), "future")]
    mixed.feed(good)
    following = [fields for fields, _ in bad]
    following += [good[-1], {**good[-1], b"close": good[-1][b"open"], b"open": good[-1][b"close"]}, good[0]]
    following += [row(closed="false"), {**good[-1], b"closed": b"false"}]
    mixed.feed(following, len(good))
    life = mixed.start()
    total = len(good) + len(following)
    expected = {"accepted": len(good), "rejected": len(bad) + 2, "duplicate": 1, "unclosed": 2, "lost": 0}
    url = None

    def counted() -> bool:
        nonlocal url
        url = url or _url(life.text)
        return bool(url) and sum(outcomes(url).values()) == total

    until(counted, life)
    assert outcomes(url) == expected
    assert life.terminate() == 0
    assert_same(mixed.outputs(), calm.outputs())
    with redis.Redis.from_url(server) as client:
        rejected = [fields for _, fields in client.xrange(mixed.keys.rejected)]
        source = dict(client.xrange(mixed.keys.bars))
    assert [r[b"reason"].decode() for r in rejected[: len(bad)]] == [reason for _, reason in bad]
    assert [r[b"reason"] for r in rejected[len(bad) :]] == [b"revision", b"out_of_order"]
    assert Counter(r[b"source_id"] for r in rejected).most_common(1)[0][1] == 1
    for reject in rejected:
        came = source[reject[b"source_id"]]
        assert int(reject[b"in_bytes"]) == sum(len(k) + len(v) for k, v in came.items())
        kept = {k[3:]: v for k, v in reject.items() if k.startswith(b"in:")}
        assert sum(len(k) + len(v) for k, v in kept.items()) == min(4096, int(reject[b"in_bytes"]))
        assert all(came[k].startswith(v) for k, v in list(kept.items())[:-1])
        if int(reject[b"in_bytes"]) <= 4096:
            assert kept == came
        assert (reject[b"source_key"].decode(), reject[b"stage"]) == (mixed.keys.bars, b"intake")


def _url(text: str) -> str | None:
    lines = [line for line in text.splitlines() if "metrics and health" in line]
    return json.loads(lines[0])["url"] if lines else None


def outcomes(url: str) -> dict[str, int]:
    """`quartet_bars_total` of a running worker."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=LIMIT_S) as answer:
        lines = answer.read().decode().splitlines()
    found = [line.split() for line in lines if line.startswith("quartet_bars_total{")]
    return {name.split('"')[1]: int(float(value)) for name, value in found}


def events(url: str, key: str, kind: str) -> list[dict]:
    with redis.Redis.from_url(url) as client:
        found = [json.loads(fields[b"data"]) for _, fields in client.xrange(key)]
    return [event for event in found if event["kind"] == kind]


def test_trimmed_input_stops_the_worker_and_is_counted_when_that_is_accepted(server, stage):
    """The count is exact, each symbol warms up again, and nothing of the gap is invented. A later gap is not."""
    rows = market(2, 130)
    chain = stage(server, TREES)
    chain.feed(rows[:100])
    chain.finish()
    chain.feed(rows[100:240], 100)
    with redis.Redis.from_url(server) as client:
        client.xtrim(chain.keys.bars, maxlen=100, approximate=False)
    life = chain.start("--until-idle", "0.1")
    assert life.wait() == 1
    last = life.text.splitlines()[-1]
    assert "40 entries were trimmed before they were read" in last
    assert "--accept-gap" in last
    life = chain.start("--accept-gap")
    until(lambda: (url := _url(life.text)) is not None and sum(outcomes(url).values()) == 140, life)
    assert outcomes(_url(life.text)) == {"accepted": 100, "rejected": 0, "duplicate": 0, "unclosed": 0, "lost": 40}
    os.kill(life.pid, signal.SIGSTOP)
    chain.feed(rows[240:], 240)
    with redis.Redis.from_url(server) as client:
        client.xtrim(chain.keys.bars, maxlen=5, approximate=False)
    assert life.signal(signal.SIGCONT) == 1, "the gap that was accepted is that of the start"
    assert "15 entries were trimmed before they were read" in life.text.splitlines()[-1]
    [lost] = [event for event in events(server, chain.keys.events, "gap") if event["reason"] == "lost"]
    assert lost["evidence"]["lost"] == 40
    features = [json.loads(data) for _, data in chain.outputs()[":features"]]
    after = [f["ready"] for f in features[100:]]
    assert after == [n >= 29 * 2 for n in range(100)], "30 bars of warm-up for each of two symbols"


def test_input_that_was_made_anew_or_went_back_stops_the_worker(server, stage):
    rows = market(2, 60)
    chain = stage(server, TREES)
    chain.feed(rows[60:], 60)
    chain.finish()
    with redis.Redis.from_url(server) as client:
        client.delete(chain.keys.bars)
        life = chain.start()
        assert (life.wait(), "recreated" in life.text) == (1, True)
        chain.feed(rows[:60])
        life = chain.start()
        assert (life.wait(), "rewound" in life.text) == (1, True)
        client.delete(chain.keys.bars)
        chain.feed(rows, 500)
        life = chain.start()
        assert (life.wait(), "recreated" in life.text) == (1, True)
    before = chain.progress()
    chain.finish("--accept-gap")
    assert chain.progress() == before, "all of these bars were seen before the stream was made anew, or are older"


def test_two_inputs_end_in_one_rising_order(server, stage):
    rows = market(2, 60)
    chain = stage(server, TREES)
    chain.env["QUARTET_BARS"] = f"{chain.namespace}:left,{chain.namespace}:right"
    with redis.Redis.from_url(server) as client:
        for number, fields in enumerate(rows):
            name = "left" if fields[b"symbol"].endswith(b"1") else "right"
            client.xadd(f"{chain.namespace}:{name}", fields, id=f"{1_750_000_000_000 + number // 2}-0")
    chain.finish()
    found = chain.outputs()
    ids = [tuple(map(int, entry_id.split(b"-"))) for entry_id, _ in found[":features"]]
    assert len(ids) == len(rows)
    assert ids == sorted(set(ids))
    alone = stage(server, TREES, "alone")
    alone.feed(rows)
    alone.finish()
    for stream, entries in alone.outputs().items():
        assert sorted(data for _, data in found[stream]) == sorted(data for _, data in entries)


@pytest.mark.parametrize("part", ["series", "features", "agents"])
def test_a_flipped_byte_of_state_stops_the_worker_and_a_rebuild_mends_it(stage, valkey, part):
    """The signals after a rebuild are those of a run that nothing happened to."""
    rows = market(2, 120)
    calm, spoilt = stage(valkey, TREES, "calm"), stage(valkey, TREES, "spoilt")
    calm.feed(rows)
    calm.finish()
    spoilt.feed(rows[:150])
    spoilt.finish()
    with redis.Redis.from_url(valkey) as client:
        key = spoilt.keys.state(part)
        name, blob = min(client.hgetall(key).items())
        client.hset(key, name, blob[:-1] + bytes([blob[-1] ^ 1]))
    spoilt.feed(rows[150:], 150)
    life = spoilt.start("--until-idle", "0.1")
    assert life.wait() == 1
    assert life.text.splitlines()[-1].startswith("error: state field")
    assert "quartet run --rebuild" in life.text.splitlines()[-1]
    assert spoilt.progress() == 150
    text = spoilt.finish("--rebuild")
    assert '"bars":150' in text
    assert_same(spoilt.outputs(), calm.outputs())
    [told] = [e for e in events(valkey, spoilt.keys.events, "recovery") if e["reason"] == "rebuild"]
    assert told["evidence"]["bars"] == 150
    spoilt.finish()  # the state that the rebuild committed is whole


def test_a_rebuild_from_a_trimmed_input_says_what_is_missing(stage, tmp_path):
    rows = market(2, 120)
    with Server("redis", tmp_path / "server") as server:
        chain = stage(server.url, TREES)
        chain.feed(rows[:200])
        chain.finish()
        with redis.Redis.from_url(server.url) as client:
            client.xtrim(chain.keys.bars, maxlen=120, approximate=False)
        text = chain.finish("--rebuild")
        assert "the input was trimmed" in text
        assert '"missing":80' in text
        assert '"bars":120' in text
        chain.feed(rows[200:], 200)
        chain.finish()
        assert chain.progress() == len(rows)
