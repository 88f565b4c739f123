"""What the page shows is what lies on the streams: of the demonstration, and of the sabotaged one.

The expected values are read from the streams and from `/readyz` here, over a client of the test's own,
and compared with the text and the pixels in a real browser.
"""

from __future__ import annotations

import datetime as dt
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.helpers import LIMIT_S, wait_for
from tests.page.conftest import AGENTS, GAP_AT, REJECTED_AT, Scene
from worker.page.reader import MOST_BARS

SYMBOL = "SYN01"
KEPT = {("sabotaged", "light", 1280): "page.png", ("demo", "dark", 1280): "page-demo.png"}
"""The pictures of the documents; `QUARTET_TEST_PICTURES=docs` makes them anew."""
LEAST_PIXELS = 8
"""Of exactly one colour; the strokes of a mark are mostly blended at their edges."""


class Visit:
    """The page in a browser of its own that notes every request, every message and every error."""

    def __init__(self, page: Page, scene: Scene) -> None:
        self.page = page
        self.scene = scene
        self.requests: list[str] = []
        self.complaints: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def open(self, symbol: str = SYMBOL) -> None:
        self.page.goto(f"{self.scene.url}/#{symbol}|1m")
        expect(self.page.locator("#chart")).to_have_attribute("data-symbol", f"{symbol} 1m")
        expect(self.page.locator("#connection")).to_have_text("live")
        expect(self.page.locator("#agents li")).to_have_count(len(AGENTS))

    def table(self) -> list[list[str]]:
        """The rows of the table, oldest first: the time in ms, then the cells."""
        self.page.locator("#table").evaluate("table => { table.open = true }")
        rows = self.page.locator("#table tbody tr")
        expect(rows.first).to_be_attached()
        found: list[list[str]] = rows.evaluate_all(
            "rows => rows.map(row => [row.dataset.ts, ...[...row.cells].map(cell => cell.textContent)])"
        )
        return found[::-1]

    def lanes(self) -> dict[str, Any]:
        """What each lane last drew: its label, and how many cells of which colour."""
        found: dict[str, Any] = json.loads(self.page.locator("#chart").get_attribute("data-lanes") or "{}")
        return found

    def colour(self, name: str) -> str:
        return str(self.page.evaluate(f"getComputedStyle(document.body).getPropertyValue('--{name}').trim()"))

    def pixels(self, name: str, pane: int) -> int:
        """How many pixels of a colour of the style sheet are drawn on one pane of the chart, 0 the candles'.

        Counting is long work of the page's one thread: it lets two frames be drawn first, where any are to come.
        """
        return int(
            self.page.evaluate(
                """async ([colour, pane]) => {
                  const frame = () => new Promise(requestAnimationFrame);
                  const late = new Promise(done => setTimeout(done, 1000));
                  await Promise.race([frame().then(frame), late]);
                  const [r, g, b] = [1, 3, 5].map(at => parseInt(colour.slice(at, at + 2), 16));
                  const row = [...document.querySelectorAll('#chart tr')].filter(row => row.clientHeight > 40)[pane];
                  let count = 0;
                  const copy = document.createElement('canvas');
                  const pen = copy.getContext('2d', { willReadFrequently: true });
                  for (const canvas of row.querySelectorAll('td:nth-child(2) canvas')) {
                    [copy.width, copy.height] = [canvas.width, canvas.height];
                    pen.drawImage(canvas, 0, 0);
                    const { data } = pen.getImageData(0, 0, canvas.width, canvas.height);
                    for (let i = 0; i < data.length; i += 4)
                      if (data[i] === r && data[i + 1] === g && data[i + 2] === b && data[i + 3] === 255) count += 1;
                  }
                  return count;
                }""",
                [self.colour(name), pane],
            )
        )


@pytest.fixture(params=["demo", "sabotaged"])
def scene(request: pytest.FixtureRequest) -> Scene:
    found: Scene = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def visit(browser: Browser, scene: Scene) -> Iterator[Visit]:
    with visiting(browser, scene) as visit:
        yield visit


@contextmanager
def visiting(browser: Browser, scene: Scene, **options: Any) -> Iterator[Visit]:
    wait_for(lambda: not midnight_is_near(), 3 * LIMIT_S)
    context = browser.new_context(viewport={"width": 1280, "height": 1000}, **options)
    with scene.still():
        visit = Visit(context.new_page(), scene)
        visit.open()
        yield visit
    context.close()
    assert visit.complaints == []
    assert [url for url in visit.requests if not url.startswith(scene.url)] == []


def midnight_is_near() -> bool:
    """Whether today may become yesterday before a test has ended: the page and the test name the day of other days."""
    now = dt.datetime.now(dt.UTC)
    return (now.hour, now.minute) >= (23, 57)


def clock(ms: int) -> str:
    """As the page writes a time: the day only where it is another."""
    at = dt.datetime.fromtimestamp(ms / 1000, dt.UTC)
    return at.strftime("%H:%M" if at.date() == dt.datetime.now(dt.UTC).date() else "%Y-%m-%d %H:%M")


def spoken(vote: dict[str, Any]) -> str:
    """A vote as the table says it, written down here from the contract and not from the page's own code."""
    said = "abstains" if vote["action"] == "ABSTAIN" else f"{vote['action']} {vote['confidence']:.2f}"
    why = ": ".join(part for part in ("" if vote["state"] == "active" else vote["state"], vote["reason"]) if part)
    return ", ".join(part for part in (said, why) if part)


def test_the_headline_is_that_of_the_last_signal(visit: Visit) -> None:
    last = visit.scene.messages(visit.scene.keys.signals)[-1]
    headline = f"{last['configured']} configured · {last['loaded']} loaded · {last['voting']} voting"
    expect(visit.page.locator("h1")).to_have_text(headline)
    expect(visit.page).to_have_title(headline)
    decision = visit.page.locator("#decision").inner_text()
    assert decision.startswith(last["action"])
    assert f"{last['symbol']} 1m {clock(last['ts'])}" in decision
    assert (last["status"] in decision) or last["status"] in ("ok", "hold")


def test_the_headlines_of_the_two_scenes_are_those_that_the_product_promises(
    browser: Browser, demo: Scene, sabotaged: Scene
) -> None:
    with visiting(browser, demo) as visit:
        expect(visit.page.locator("h1")).to_have_text("4 configured · 4 loaded · 4 voting")
        expect(visit.page.locator("#reasons li")).to_have_count(0)
    with visiting(browser, sabotaged) as visit:
        expect(visit.page.locator("h1")).to_have_text("4 configured · 3 loaded · 2 voting")
        lines = visit.page.locator("#reasons li").all_inner_texts()
        assert len(lines) == 3
        assert "patchtst refused: feature_mismatch" in lines[2]
        assert "xgboost muted: action_collapse since " in lines[1]


def test_what_is_off_is_said_with_its_reason_and_since_when(visit: Visit) -> None:
    scene = visit.scene
    last = scene.messages(scene.keys.signals)[-1]
    events = scene.messages(scene.keys.events)[::-1]
    expected = []
    if last["voting"] < last["quorum"]:
        expected.append(f"Below quorum: {last['voting']} voting, {last['quorum']} must agree. Every signal is a HOLD.")
    for agent, facts in scene.ready()["agents"].items():
        state, reason = facts["state"], facts["reason"]
        if state == "refused":
            expected.append(f"{agent} refused: {reason}, {facts['detail']}")
        elif state != "active":
            muted = next(one for one in events if one["agent"] == agent and one["reason"] == reason)
            expected.append(f"{agent} {state}: {reason} since {clock(muted['ts'])}")
    assert visit.page.locator("#reasons li").all_inner_texts() == expected


def test_every_agent_has_a_card_with_its_state_and_its_last_vote(visit: Visit) -> None:
    last = visit.scene.messages(visit.scene.keys.signals, SYMBOL)[-1]
    for name, facts in visit.scene.ready()["agents"].items():
        card = visit.page.locator(f"#agents li[data-agent={name}]")
        expect(card).to_have_attribute("data-state", facts["state"])
        expect(card.locator(".on")).to_have_text(f"last vote on {SYMBOL} 1m")
        vote = last["votes"][name]
        shown = card.locator(".vote").inner_text()
        if vote["action"] == "ABSTAIN":
            assert shown == "abstains"
        else:
            weight = "" if vote["state"] == "active" else " (no weight)"
            assert shown == f"{vote['action']} {vote['confidence']:.2f}{weight}"


def test_every_bar_signal_and_vote_of_the_symbol_is_the_one_on_the_streams(visit: Visit) -> None:
    scene = visit.scene
    closes = {one["ts"]: one["values"]["close"] for one in scene.messages(scene.keys.features, SYMBOL)}
    signals = {one["ts"]: one for one in scene.messages(scene.keys.signals, SYMBOL)}
    votes = {
        agent: {one["ts"]: one for one in scene.messages(scene.keys.votes(agent), SYMBOL)} for agent in AGENTS
    }  # fmt: skip
    rows = visit.table()
    assert [int(row[0]) for row in rows] == sorted(closes)[-MOST_BARS:]
    assert [row[3] for row in rows].count("") < len(rows), "there are signals among them"
    for ts, time, close, action, status, voting, quorum, *cells in rows:
        at = int(ts)
        assert time == clock(at)
        assert float(close) == pytest.approx(closes[at], rel=1e-7)
        signal = signals.get(at)
        if signal is None:
            assert [action, status, voting, quorum, *cells] == [""] * 8
            continue
        assert [action, status] == [signal["action"], signal["status"]]
        assert [int(voting), int(quorum)] == [signal["voting"], signal["quorum"]]
        assert cells == [spoken(votes[agent][at]) for agent in AGENTS]


def test_a_rejected_bar_and_a_gap_are_marked_on_their_bars_and_listed_with_their_reason(
    browser: Browser, live: Scene
) -> None:
    bars = sorted(one["ts"] for one in live.messages(live.keys.features, SYMBOL))
    after = bars[GAP_AT - 3]
    assert after - bars[GAP_AT - 4] == 4 * 60_000, "the market has this gap"
    with visiting(browser, live) as visit:
        (rejected,) = visit.page.locator("#notes li[data-kind=rejected]").all_inner_texts()
        assert clock(bars[REJECTED_AT]) in rejected
        assert "rejected: ohlc" in rejected
        (gap,) = visit.page.locator("#notes li[data-kind=gap]").all_inner_texts()
        assert clock(after) in gap
        assert "3 bars are missing" in gap
        wait_for(lambda: visit.pixels("bad", 1) >= LEAST_PIXELS)
        wait_for(lambda: visit.pixels("warn", 1) >= LEAST_PIXELS)
        visit.open("SYN02")
        wait_for(lambda: visit.pixels("bad", 1) == visit.pixels("warn", 1) == 0)
        assert visit.page.locator("#notes li[data-kind=gap]").all() == []


def test_the_demo_is_drawn_in_the_colours_of_its_votes_and_signals(browser: Browser, demo: Scene) -> None:
    with visiting(browser, demo) as visit:
        visit.page.get_by_label("500", exact=True).check()
        shown = demo.messages(demo.keys.signals, SYMBOL)[-400:]
        votes = {vote["action"] for one in shown for vote in one["votes"].values()}
        assert {"BUY", "SELL", "HOLD"} <= votes, "a market on which all three are seen"
        for action in ("buy", "sell", "hold"):
            wait_for(lambda action=action: visit.pixels(action, 1) >= LEAST_PIXELS)
        assert not {one["status"] for one in shown[-60:]} & {"below_quorum", "stale", "withheld"}
        visit.page.get_by_label("60", exact=True).check()
        wait_for(lambda: visit.pixels("buy", 0) + visit.pixels("sell", 0) >= LEAST_PIXELS)
        assert visit.pixels("grey", 0) == 0
        assert visit.pixels("bad", 2) == 0


def test_the_sabotaged_demo_is_grey_where_it_failed_closed_and_where_an_agent_is_muted(
    browser: Browser, sabotaged: Scene
) -> None:
    with visiting(browser, sabotaged) as visit:
        shown = sabotaged.messages(sabotaged.keys.signals, SYMBOL)[-30:]
        assert {one["status"] for one in shown} == {"below_quorum"}
        visit.page.get_by_label("60", exact=True).check()
        wait_for(lambda: visit.pixels("grey", 0) >= LEAST_PIXELS)  # candles
        wait_for(lambda: visit.pixels("grey", 1) >= LEAST_PIXELS)  # lanes
        wait_for(lambda: visit.pixels("bad", 2) >= LEAST_PIXELS)  # voting under the quorum


def test_every_signal_that_counts_has_its_arrow_and_every_vote_the_colour_of_its_weight(visit: Visit) -> None:
    scene = visit.scene
    first = scene.messages(scene.keys.features, SYMBOL)[-MOST_BARS:][0]["ts"]
    signals = [one for one in scene.messages(scene.keys.signals, SYMBOL) if one["ts"] >= first]
    actions = [one["action"] if one["status"] == "ok" else None for one in signals]
    assert any(actions), "some that count are among them"
    chart = visit.page.locator("#chart")
    visit.page.get_by_label("60", exact=True).check()
    expect(chart).to_have_attribute("data-markers", arrows(actions))
    visit.page.get_by_label("500", exact=True).check()
    begun = [now if now != before else None for before, now in pairwise([None, *actions])]
    expect(chart).to_have_attribute("data-markers", arrows(begun))
    cells = {agent: Counter(colour(one["votes"][agent]) for one in signals) for agent in AGENTS}
    wait_for(lambda: {agent: lane["cells"] for agent, lane in visit.lanes().items()} == {"feed": {}, **cells})
    muted = {agent for agent, facts in scene.ready()["agents"].items() if facts["state"] == "muted"}
    assert all(cells[agent]["grey"] > 0 < cells[agent].total() - cells[agent]["grey"] for agent in muted)
    for agent, facts in scene.ready()["agents"].items():
        off = ": ".join(word for word in (facts["state"], facts["reason"]) if word)
        label = agent if facts["state"] == "active" else f"{agent} · {off}"
        assert visit.lanes()[agent]["label"] == label


def arrows(actions: list[str | None]) -> str:
    return f"{actions.count('BUY')} up, {actions.count('SELL')} down"


def colour(vote: dict[str, Any]) -> str:
    """Of a vote's cell: grey where it has no weight."""
    weighs = vote["state"] in ("active", "canary") and vote["action"] != "ABSTAIN"
    return str(vote["action"]).lower() if weighs else "grey"


def test_the_bar_under_the_crosshair_is_told_in_words(visit: Visit) -> None:
    scene = visit.scene
    last = scene.messages(scene.keys.signals, SYMBOL)[-1]
    visit.page.locator("#chart").focus()
    visit.page.keyboard.press("End")
    readout = visit.page.locator("#readout")
    expect(readout).to_contain_text(clock(last["ts"]))
    expect(readout).to_contain_text(f"{last['voting']} voting, {last['agreeing']} agreeing, quorum {last['quorum']}")
    for agent in AGENTS:
        expect(readout).to_contain_text(f"{agent} {spoken(last['votes'][agent])}")
    visit.page.keyboard.press("Home")
    first = scene.messages(scene.keys.features, SYMBOL)[-MOST_BARS:][0]["ts"]
    expect(readout).to_contain_text(clock(first))


@pytest.mark.parametrize("played", ["demo", "sabotaged"])
@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 400), ("dark", 400)])
def test_it_fits_and_its_pictures_are_made(
    browser: Browser, request: pytest.FixtureRequest, played: str, scheme: str, width: int, tmp_path: Path
) -> None:
    with visiting(browser, request.getfixturevalue(played), color_scheme=scheme) as visit:
        visit.page.set_viewport_size({"width": width, "height": 1360})
        wide = visit.page.evaluate("document.documentElement.scrollWidth")
        assert wide <= width, f"{wide} pixels are needed, there are {width}"
        shown = "500" if played == "sabotaged" else "250"  # from before the collapse to now; both kinds of arrows
        visit.page.get_by_label(shown, exact=True).check()
        visit.page.wait_for_timeout(300)  # the picture is of the chart at this width
        kept = KEPT.get((played, scheme, width))
        folder = Path(os.environ.get("QUARTET_TEST_PICTURES") or tmp_path) if kept else tmp_path
        name = kept or f"{played}-{scheme}-{width}.png"
        picture = visit.page.screenshot(path=folder / name, full_page=width < 1280)
        assert picture.startswith(b"\x89PNG")
