"""How much the page reads is bounded, whatever lies on the streams."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import redis

from streams.codec import encode_event, encode_reject, seal, to_json
from streams.keys import Keys
from streams.messages import Entry, Event, Reject
from worker.http import Answer, Readiness
from worker.intake import Series
from worker.page import Page
from worker.page.hub import READS_A_LOOK, Hub, Viewer
from worker.page.reader import MOST_BARS, MOST_READ, MOST_SCANNED, StreamReader

MANY = 5_000
MINUTE_MS = 60_000
FIRST_MS = 1_750_000_020_000


@pytest.fixture
def client(valkey: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(valkey) as client:
        yield client


@pytest.fixture
def keys(namespace: str) -> Keys:
    return Keys(namespace)


def fill(client: redis.Redis, keys: Keys, symbols: int, bars: int, first: int = 0) -> None:
    """Feature vectors of many symbols, minute by minute, as lean as the page can read them."""
    for bar in range(first, first + bars):
        pipe = client.pipeline(transaction=False)
        for number in range(symbols):
            ts = FIRST_MS + bar * MINUTE_MS
            values = {"open": 1.0, "high": 2.0, "low": 0.5, "close": 1.5, "volume": 9.0}
            message = {"symbol": f"S{number}", "ts": ts, "interval": "1m", "ready": False, "values": values}
            pipe.xadd(keys.features, {"data": to_json(message)})
        pipe.execute()


def test_looking_back_for_a_symbol_among_thousands_ends_and_says_so(client: redis.Redis, keys: Keys) -> None:
    fill(client, keys, MANY, 12)
    found = StreamReader(client, keys).series(("S7", "1m"), MOST_BARS)
    assert found["looked_through"] == MOST_SCANNED == 10 * MANY
    assert found["rows"]["ts"] == [FIRST_MS + bar * MINUTE_MS for bar in range(2, 12)]
    assert not found["complete"]


def test_looking_back_ends_with_the_last_bar_that_is_wanted(client: redis.Redis, keys: Keys) -> None:
    fill(client, keys, 3, 30)
    found = StreamReader(client, keys).series(("S1", "1m"), 20)
    assert found["rows"]["ts"] == [FIRST_MS + bar * MINUTE_MS for bar in range(10, 30)]
    assert found["looked_through"] <= 60
    assert found["complete"]
    whole = StreamReader(client, keys).series(("S1", "1m"), MOST_BARS)
    assert len(whole["rows"]["ts"]) == 30
    assert whole["complete"], "the stream has no more"


def test_a_burst_that_cannot_be_followed_makes_the_browser_read_anew(client: redis.Redis, keys: Keys) -> None:
    hub = Hub(StreamReader(client, keys), dict)
    viewer = Viewer(("S0", "1m"), lambda _: None)
    hub._viewers.append(viewer)
    positions = hub._look({})
    assert events(viewer) == ["overview", "reload"]
    fill(client, keys, MOST_READ, 1)
    positions = hub._look(positions)
    assert positions
    assert events(viewer) == ["overview", "rows"]
    fill(client, keys, MOST_READ, READS_A_LOOK + 1, first=1)
    positions = hub._look(positions)
    assert positions == {}
    assert events(viewer) == ["overview", *["rows"] * READS_A_LOOK]
    positions = hub._look(positions)
    assert events(viewer) == ["overview", "reload"]
    assert hub._look(positions) == positions, "nothing is new after the end"


def events(viewer: Viewer) -> list[str]:
    """The names of the events that wait, taken out."""
    names = []
    while not viewer._messages.empty():
        names.append(viewer._messages.get().split(b"\n")[0].removeprefix(b"event: ").decode())
    return names


def test_thousands_of_symbols_are_found_by_typing_and_never_sent_at_once(client: redis.Redis, keys: Keys) -> None:
    state = {
        str(row): Series(row, f"SYM{row:04}", "5m", FIRST_MS, (1.0, 1.0, 1.0, 1.0, 1.0)).pack() for row in range(MANY)
    }
    client.hset(keys.state("series"), mapping={**state, "feed": seal(b"")})
    page = Page(client, keys, lambda: Readiness({}), quorum=3, warmup_bars=100)
    every = json.loads(body(page, "/api/symbols"))
    assert (every["total"], every["matching"], len(every["matches"])) == (MANY, MANY, 50)
    some = json.loads(body(page, "/api/symbols?q=sym420"))
    assert some["matches"] == [[f"SYM420{n}", "5m"] for n in range(10)]
    assert json.loads(body(page, "/api/symbols?q=420%205m"))["matching"] == 5, "0420 to 4420"
    page.close()


def body(page: Page, target: str) -> bytes:
    answer = page.answer(target)
    assert isinstance(answer, Answer)
    return answer.body


def test_notes_are_those_of_the_symbol_of_every_agent_and_of_nobody_known(client: redis.Redis, keys: Keys) -> None:
    told = [
        Event("gap", FIRST_MS, "", "", "A", "1m", "gap", "of A"),
        Event("gap", FIRST_MS, "", "", "B", "1m", "gap", "of B"),
        Event("agent_muted", FIRST_MS, "", "nhits", "B", "1m", "dead_zone", "of an agent"),
        Event("started", detail="of the worker"),
    ]
    for event in told:
        client.xadd(keys.events, {"data": encode_event(event)})
    bars = [
        {b"symbol": b"A", b"ts": b"%d" % FIRST_MS, b"open": b"nan"},
        {b"symbol": b"B", b"ts": b"%d" % FIRST_MS},
        {b"data": b'{"symbol": "A", "interval": "1m", "ts": true}'},
        {b"data": b"no JSON \xff"},
    ]
    for number, fields in enumerate(bars):
        flat = encode_reject(Reject(Entry(keys.bars, f"{number}-1", fields), "type", f"reject {number}", "intake"))
        client.xadd(keys.rejected, dict(zip(flat[::2], flat[1::2], strict=True)))  # type: ignore[arg-type]
    notes = StreamReader(client, keys).series(("A", "1m"), 10)["notes"]
    assert {note["detail"] for note in notes if note["kind"] != "rejected"} == {"of A", "of an agent", "of the worker"}
    rejected = {note["detail"]: (note["symbol"], note["ts"]) for note in notes if note["kind"] == "rejected"}
    assert rejected == {"reject 0": ("A", FIRST_MS), "reject 2": ("A", None), "reject 3": ("", None)}
