"""The page lives: new bars, a restarted worker, the keyboard, a warm-up; and it never gets in the worker's way."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis
from playwright.sync_api import Browser, Page, expect

from streams.codec import encode_event, encode_reject
from streams.keys import Keys
from streams.messages import Entry, Event, Reject
from tests.helpers import LIMIT_S, free_port, wait_for
from tests.page.conftest import Scene, market, worker
from worker.http import Readiness
from worker.page import Page as Site
from worker.page.hub import MOST_VIEWERS, QUEUE_LENGTH, Viewer

SYMBOL = "SYN02"


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1280, "height": 1000})
    yield context.new_page()
    context.close()


def opened(page: Page, scene: Scene, symbol: str = SYMBOL) -> None:
    page.goto(f"{scene.url}/#{symbol}|1m")
    expect(page.locator("#chart")).to_have_attribute("data-symbol", f"{symbol} 1m")
    expect(page.locator("#connection")).to_have_text("live")


class Sse:
    """A bare client of the live stream."""

    def __init__(self, scene: Scene, symbol: str = SYMBOL) -> None:
        parts = urlsplit(scene.url)
        self.connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=LIMIT_S)
        self.connection.request("GET", f"/api/live?symbol={symbol}&interval=1m")
        self.response = self.connection.getresponse()

    def event(self, name: str) -> object:
        """The data of the next event of this name."""
        while True:
            line = self.response.readline()
            assert line, "the stream ended"
            if line == f"event: {name}\n".encode():
                return json.loads(self.response.readline().removeprefix(b"data: "))

    def close(self) -> None:
        self.response.close()
        self.connection.close()


def test_new_bars_appear_without_a_reload(page: Page, live: Scene) -> None:
    opened(page, live)
    page.locator("#table summary").click()
    expect(page.locator("#table tbody tr").first).to_be_visible()
    before = page.locator("#table tbody tr").count()
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    live.publish(2)
    expect(page.locator("#table tbody tr")).to_have_count(before + 2)
    last = live.messages(live.keys.signals, SYMBOL)[-1]
    newest = page.locator("#table tbody tr").first
    expect(newest).to_have_attribute("data-ts", str(last["ts"]))
    expect(newest.locator("td").nth(3)).to_have_text(last["status"])
    assert requests == [], "the stream brought them"


def test_a_bar_that_is_rejected_now_is_listed_now(page: Page, live: Scene) -> None:
    opened(page, live)
    before = page.locator("#notes li[data-kind=rejected]").count()
    live.client.xadd(live.keys.bars, {"symbol": SYMBOL, "ts": "yesterday", "open": "1"})
    live.published += 1
    expect(page.locator("#notes li[data-kind=rejected]")).to_have_count(before + 1)


def test_what_the_streams_say_is_shown_as_text_and_never_as_markup(page: Page, live: Scene) -> None:
    opened(page, live)
    script, image = "<script>window.hit = 1</script>", '<img src="x" onerror="window.hit = 1">'
    ts = live.messages(live.keys.signals, SYMBOL)[-1]["ts"]
    event = Event("agent_muted", ts, "", "nhits", script, "1m", "dead_zone", image)
    live.client.xadd(live.keys.events, {"data": encode_event(event)})
    bar = {b"symbol": SYMBOL.encode(), b"ts": b"%d" % ts, b"open": image.encode()}
    flat = encode_reject(Reject(Entry(live.keys.bars, "1-1", bar), "type", f"open is {image}", "intake"))
    live.client.xadd(live.keys.rejected, dict(zip(flat[::2], flat[1::2], strict=True)))  # type: ignore[arg-type]
    live.published += 1
    muted = page.locator("#notes li[data-kind=agent_muted]").first
    expect(muted).to_contain_text(f"{script} nhits agent muted: dead_zone {image}")
    expect(page.locator("#notes li[data-kind=rejected]").first).to_contain_text(f"open is {image}")
    page.locator("#chart").focus()
    page.keyboard.press("End")
    expect(page.locator("#readout")).to_contain_text(f"open is {image}")
    assert page.locator("main script, #notes img, #readout img").count() == 0
    assert page.evaluate("window.hit") is None


def test_everything_is_reached_and_used_by_keyboard(page: Page, live: Scene) -> None:
    opened(page, live)
    reached = []
    page.locator("body").focus()
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement === document.body"):
            break
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
        ring = page.evaluate(
            "(e => [getComputedStyle(e), getComputedStyle(e.nextElementSibling ?? e)].map(s => s.outlineStyle))"
            "(document.activeElement)"
        )
        assert "solid" in ring, f"no focus is seen on {reached[-1]}"
    wanted = ["Skip to the chart", "readiness", "metrics", "symbol", "", "chart"]
    places = [reached.index(name) for name in wanted]
    assert places == sorted(places), reached
    assert {"notes", "The same as a table"} <= set(reached)


def test_a_symbol_is_chosen_by_typing(page: Page, live: Scene) -> None:
    opened(page, live)
    field = page.get_by_role("combobox", name="Symbol")
    field.focus()
    page.keyboard.type("syn03")
    options = page.get_by_role("option")
    expect(options).to_have_text(["SYN03 1m"])
    expect(field).to_have_attribute("aria-expanded", "true")
    page.keyboard.press("Enter")
    expect(page.locator("#chart")).to_have_attribute("data-symbol", "SYN03 1m")
    expect(page.locator("#chart-title")).to_have_text("SYN03 1m")
    page.keyboard.press("ArrowDown")
    expect(options).to_have_count(4)
    page.keyboard.press("ArrowDown")
    expect(page.get_by_role("option", selected=True)).to_have_text("SYN04 1m")
    page.keyboard.press("Escape")
    expect(options).to_have_count(0)
    expect(field).to_have_value("SYN03 1m")


def test_an_address_that_cannot_be_read_shows_the_first_symbol(page: Page, live: Scene) -> None:
    page.goto(f"{live.url}/#%")
    expect(page.locator("#chart")).to_have_attribute("data-symbol", "SYN01 1m")
    expect(page.locator("#connection")).to_have_text("live")


@pytest.mark.parametrize(
    ("address", "why"), [("NO%20SUCH|1m", "symbol: expected 1 to 64 characters"), ("SYN01|1y", "interval: expected")]
)
def test_an_address_with_a_symbol_that_cannot_be_says_so_until_another_is_chosen(
    page: Page, live: Scene, address: str, why: str
) -> None:
    page.goto(f"{live.url}/#{address}")
    connection = page.locator("#connection")
    expect(connection).to_contain_text(why)
    expect(page.locator("h1")).to_contain_text("4 configured")
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.wait_for_timeout(2_500)  # longer than the page waits before it tries a lost connection again
    assert requests == [], "asking again would not help"
    expect(connection).to_contain_text(why)
    page.evaluate("window.location.hash = 'SYN02|1m'")
    expect(page.locator("#chart")).to_have_attribute("data-symbol", "SYN02 1m")
    expect(connection).to_have_text("live")


def test_a_warm_up_is_counted_and_a_restarted_worker_is_found_again(
    page: Page, valkey: str, models: Path, namespace: str, tmp_path: Path
) -> None:
    port = free_port()
    with worker(valkey, namespace, models, tmp_path / "first", port) as (process, scene):
        page.goto(scene.url)
        expect(page.locator("#decision")).to_have_text("No signal yet: no bar has come in.")
        scene.publish(37)
        expect(page.locator("#decision")).to_have_text("no signal yet: warming up (37 of 100 bars)")
        expect(page.locator("h1")).to_have_text("4 configured · 4 loaded")
        expect(page.locator("#progress")).to_contain_text("SYN01: no signal yet: warming up (37 of 100 bars)")
        process.terminate()
        assert process.wait(LIMIT_S) == 0, "an open page does not keep the worker from its end"
        expect(page.locator("#connection")).to_contain_text("reconnecting since")
    with worker(valkey, namespace, models, tmp_path / "second", port) as (_, again):
        expect(page.locator("#connection")).to_contain_text("the worker restarted")
        again.minutes, again.published = market()[37:], scene.published
        again.publish(64)
        expect(page.locator("h1")).to_have_text("4 configured · 4 loaded · 2 voting")
        expect(page.locator("#progress")).to_be_empty()


def test_twenty_viewers_are_bounded_and_probes_are_still_answered(live: Scene) -> None:
    with ExitStack() as stack:
        served: list[Sse] = []

        def admitted() -> bool:
            viewer = Sse(live)
            stack.callback(viewer.close)
            served.extend([viewer] if viewer.response.status == 200 else [])
            return viewer.response.status == 200

        for _ in range(MOST_VIEWERS):  # those of the tests before are noticed to be gone only after a while
            wait_for(admitted)
        assert [admitted() for _ in range(20 - MOST_VIEWERS)] == [False] * (20 - MOST_VIEWERS)
        signals = len(live.messages(live.keys.signals))
        live.publish(1)
        assert len(live.messages(live.keys.signals)) == signals + 4
        ts = live.messages(live.keys.signals, SYMBOL)[-1]["ts"]
        for viewer in served:
            rows = viewer.event("rows")
            assert isinstance(rows, dict)
            assert rows["ts"][-1] == ts
        connection = http.client.HTTPConnection(urlsplit(live.url).netloc, timeout=LIMIT_S)
        connection.request("GET", "/healthz")
        assert connection.getresponse().status == 200
        connection.close()
    # Who hung up is noticed at the next message, and makes room.
    wait_for(lambda: room_for_one_more(live))


def room_for_one_more(scene: Scene) -> bool:
    viewer = Sse(scene)
    viewer.close()
    return viewer.response.status == 200


def test_a_request_for_the_head_of_the_live_stream_takes_no_place(live: Scene) -> None:
    def asked() -> tuple[int, str | None]:
        connection = http.client.HTTPConnection(urlsplit(live.url).netloc, timeout=LIMIT_S)
        connection.request("HEAD", f"/api/live?symbol={SYMBOL}&interval=1m")
        response = connection.getresponse()
        connection.close()
        return response.status, response.getheader("Content-Type")

    # All at once, before anybody who took a place could be noticed to have left it.
    wait_for(lambda: {asked() for _ in range(2 * MOST_VIEWERS)} == {(200, "text/event-stream")})


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/api/series?symbol=SYN01&interval=1m&bars=501", 400),
        ("/api/series?symbol=SYN01&interval=1m&bars=-1", 400),
        ("/api/series?symbol=SYN01&interval=1m&bars=0", 400),
        ("/api/series?symbol=SYN01&interval=1m&bars=00001999999", 400),
        pytest.param("/api/series?symbol=SYN01&interval=1m&bars=00001" + "0" * 5000, 400, id="5000 zeros"),
        ("/api/series?symbol=%00&interval=1m", 400),
        ("/api/series?symbol=SYN01&interval=1y", 400),
        ("/api/series", 400),
        ("/api/live?symbol=", 400),
        ("/__init__.py", 404),
        ("/../site.py", 404),
        ("/%2e%2e/site.py", 404),
        ("/page.css", 200),
        ("/api/series?symbol=NOSUCH&interval=1m", 200),
    ],
)
def test_what_is_not_there_or_not_sense_is_refused(live: Scene, path: str, status: int) -> None:
    connection = http.client.HTTPConnection(urlsplit(live.url).netloc, timeout=LIMIT_S)
    connection.request("GET", path)
    response = connection.getresponse()
    body = response.read()
    assert response.status == status
    if status == 200:
        assert "default-src 'self'" in (response.getheader("Content-Security-Policy") or "")
    elif status == 400:
        assert "expected" in json.loads(body)["error"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 200),
        ("GET", "/metrics", 200),
        ("GET", "/healthz", 200),
        ("HEAD", f"/api/live?symbol={SYMBOL}", 200),
        ("GET", "/api/series", 400),
        ("GET", "/nosuch", 404),
        ("POST", "/", 501),
    ],
)
def test_no_answer_is_taken_for_another_type_than_it_says(live: Scene, method: str, path: str, status: int) -> None:
    connection = http.client.HTTPConnection(urlsplit(live.url).netloc, timeout=LIMIT_S)
    connection.request(method, path)
    response = connection.getresponse()
    assert response.status == status
    assert response.headers.get_all("X-Content-Type-Options") == ["nosniff"]
    connection.close()


def test_while_nobody_looks_nothing_runs(valkey: str, namespace: str) -> None:
    site = Site(redis.Redis.from_url(valkey), Keys(namespace), lambda: Readiness({}), quorum=3, warmup_bars=100)
    assert not follows()
    viewer = site.hub.watch(("A", "1m"))
    assert viewer is not None
    assert follows()
    viewer.close()
    wait_for(lambda: not follows())
    site.close()
    assert site.hub.watch(("A", "1m")) is None, "not after the end"


def follows() -> bool:
    """Whether this process has the thread that follows the streams."""
    return "page" in [thread.name for thread in threading.enumerate()]


def test_a_viewer_that_does_not_read_is_dropped() -> None:
    viewer = Viewer(("A", "1m"), lambda _: None)
    for number in range(QUEUE_LENGTH + 1):
        viewer.tell("rows", number)
    assert list(viewer) == [], "it ends, and what waited is not sent"
