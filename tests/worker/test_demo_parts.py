"""Parts of the demonstration: which bars it shows, what it publishes, what it makes of what it sees."""

from __future__ import annotations

import io
import re
import time
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import redis
from rich.console import Console

from agents.discovery import candidate_of, ranks_above
from streams.keys import Keys
from streams.messages import Bar
from streams.validation import Limits, check_bar
from tests.helpers import LIMIT_S
from worker.demo import publisher, show
from worker.demo.children import ChildFailed, child
from worker.demo.follow import AgentView, Tally, View, entries
from worker.demo.sabotage import newer_stem
from worker.demo.scene import GAP_BARS, LATER_BARS, MOST_BARS, rounds, training_bars
from worker.demo.story import Story, Turn

NOW = 1_760_000_040_000
MINUTE = 60_000


def test_the_shown_stretch_begins_after_the_training_stretch_and_is_the_same_however_much_is_shown() -> None:
    many = list(islice(rounds(3, 20, 600, NOW), 600))
    few = list(islice(rounds(3, 2, 250, NOW), 250))
    assert [bar.ohlcv for minute in few for bar in minute] == [bar.ohlcv for m in many[:250] for bar in m[:2]]
    assert (many[-1][0].ts, few[-1][0].ts) == (NOW, NOW)
    trained = training_bars(3)
    seen = {tuple(row) for row in trained.ohlcv.tolist()}
    assert not any(bar.ohlcv in seen for minute in many for bar in minute)
    # One random walk: the gap of an hour between the stretches leaves the price where it was, roughly.
    last = trained.take(trained.symbol == "SYN01").ohlcv[-1, 3]
    assert abs(np.log(many[0][0].open / last)) < 0.002 * np.sqrt(GAP_BARS) * 6


def test_another_seed_is_another_market() -> None:
    assert next(rounds(1, 1, 200, NOW))[0].ohlcv != next(rounds(2, 1, 200, NOW))[0].ohlcv


def test_every_published_bar_is_one_that_the_worker_accepts(valkey: str, namespace: str) -> None:
    key = Keys(namespace).bars
    publisher.main([valkey, key, "--symbols", "3", "--bars", "210", "--seed", "0"])
    now = time.time_ns() // 1_000_000
    with redis.Redis.from_url(valkey) as client:
        fields = [f for _, f in client.xrange(key)]
    bars = [check_bar({k.decode(): v.decode() for k, v in f.items()}, now, Limits()) for f in fields]
    wanted = [bar for minute in islice(rounds(0, 3, 210, bars[-1].ts), 210) for bar in minute]
    assert bars == wanted, "what arrives is bit for bit what was generated"
    assert Counter(bar.symbol for bar in bars) == {"SYN01": 210, "SYN02": 210, "SYN03": 210}


def test_the_market_goes_on_without_end_and_without_a_seam() -> None:
    first_later = MOST_BARS + LATER_BARS
    minutes = list(islice(rounds(0, 3, 200, NOW), first_later + LATER_BARS + 2))
    assert [m[0].ts for m in minutes] == [NOW + (n - 199) * MINUTE for n in range(len(minutes))]
    for seam in (first_later, first_later + LATER_BARS):
        for before, after in zip(minutes[seam - 1], minutes[seam], strict=True):
            assert abs(after.open / before.close - 1) < 1e-9, "it opens where the bar before closed"
    for bar in (bar for minute in minutes[first_later:] for bar in minute):
        check_bar(publisher.fields_of(bar), minutes[-1][0].ts + MINUTE, Limits())
    levels = [np.median([m[0].volume for m in part]) for part in (minutes[:first_later], minutes[first_later:-2])]
    assert 0.2 < levels[1] / levels[0] < 5


def test_rounds_are_published_in_parts_as_they_are_in_one(valkey: str, namespace: str) -> None:
    keys = [f"{namespace}:one", f"{namespace}:two"]
    common = ["--symbols", "2", "--bars", "200", "--seed", "1", "--last-ts", str(NOW)]
    publisher.main([valkey, keys[0], *common])
    publisher.main([valkey, keys[1], *common, "--stop", "90"])
    with redis.Redis.from_url(valkey) as client:
        assert client.xlen(keys[1]) == 180
        publisher.main([valkey, keys[1], *common, "--start", "90"])
        one, two = ([fields for _, fields in client.xrange(key)] for key in keys)
    assert one == two


def test_bars_that_are_kept_coming_leave_a_stream_of_bounded_length(valkey: str, namespace: str) -> None:
    with redis.Redis.from_url(valkey) as client:
        publisher.publish(client, namespace, islice(rounds(0, 50, 200, NOW), 60), most=500)
        assert 500 <= client.xlen(namespace) < 1_000  # trimmed by whole nodes of the stream


@pytest.mark.parametrize("now", [NOW, NOW + 59_999])
def test_the_newest_bar_published_is_the_newest_that_is_closed(now: int) -> None:
    ts = publisher.last_closed_ts(now)
    assert ts % MINUTE == 0
    assert ts + MINUTE <= now < ts + 2 * MINUTE


def test_numbers_survive_their_way_as_text() -> None:
    bar = Bar("S", NOW, "1m", 0.1 + 0.2, 1e12 / 3, 1e-9, 8.12e-06, 0.0)
    fields = publisher.fields_of(bar)
    assert tuple(float(fields[name]) for name in ("open", "high", "low", "close", "volume")) == bar.ohlcv


def test_all_pages_of_a_stream_are_read_in_order(valkey: str, namespace: str) -> None:
    with redis.Redis.from_url(valkey) as client:
        pipe = client.pipeline()
        for n in range(2_500):
            pipe.xadd(f"{namespace}:signals", {"data": f'{{"n":{n}}}'})
        pipe.execute()
        assert [entry["n"] for entry in entries(client, f"{namespace}:signals")] == list(range(2_500))


def test_where_the_symbols_differ_the_headline_says_from_what_to_what() -> None:
    signals = [{"configured": 4, "loaded": 3, "voting": voting} for voting in (2, 3)]
    assert View(last=signals).headline == "4 configured, 3 loaded, 2 to 3 voting"
    assert View().headline == "no signal yet"


VIEW = View(
    agents=[AgentView("xgboost", "active", votes={"BUY": 2, "ABSTAIN": 1}, abstentions={"stale": 1})],
    bars={"accepted": 5, "rejected": 1},
    signals={("BUY", "ok"): 2, ("HOLD", "hold"): 1},
)
TALLY = Tally(
    bars=6,
    features=5,
    rejected=1,
    signals={("BUY", "ok"): 2, ("HOLD", "hold"): 1},
    votes={"xgboost": {"BUY": 2, "ABSTAIN": 1}},
    abstentions={"xgboost": {"stale": 1}},
)


def test_equal_counts_are_no_difference() -> None:
    assert TALLY.differences(VIEW) == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"bars": 7}, "bars: 7 on the streams, 6 in the metrics"),
        ({"features": 4}, "accepted bars: 4 on the streams, 5 in the metrics"),
        ({"rejected": 0}, "rejected entries: 0 on the streams, 1 in the metrics"),
        ({"signals": {("BUY", "ok"): 2}}, "signals HOLD hold: 0 on the streams, 1 in the metrics"),
        ({"votes": {"xgboost": {"BUY": 2}}}, "votes of xgboost ABSTAIN: 0 on the streams, 1 in the metrics"),
        ({"abstentions": {"xgboost": {}}}, "abstentions of xgboost stale: 0 on the streams, 1 in the metrics"),
    ],
)
def test_a_count_that_differs_is_named_and_shown(changed: dict, said: str, tmp_path: Path) -> None:
    counted = replace(TALLY, **changed)
    assert counted.differences(VIEW) == [said]
    outcome = show.Outcome(VIEW, counted, 1.0, "http://h", tmp_path / "m", tmp_path)
    console = Console(width=200, record=True, file=(tmp_path / "out").open("w"))
    console.print(show.summary(outcome))
    assert f"streams and metrics DIFFER: {said}" in console.export_text()
    assert outcome.as_json()["streams_and_metrics_agree"] is False


def test_a_sabotage_that_nothing_caught_is_said_and_named() -> None:
    turns = [
        Turn("agent_refused", "patchtst", 0, "", "feature_mismatch", "d"),
        Turn("reload", "xgboost", 9, "", "", "", {"version": "v2", "replaces": {"version": "v1"}}),
    ]
    story = Story(["x: broken"], turns, {"ok": 3}, {})
    assert story.missing == ["no agent_muted of xgboost on the events stream"]
    assert Story(["x: broken"], [*turns, Turn("agent_muted", "xgboost", 12, "b", "operator", "")], {}, {}).missing == []
    outcome = show.Outcome(VIEW, TALLY, 1.0, "http://h", Path("m"), Path("models"), story)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(show.summary(outcome))
    text = console.export_text()
    assert re.search(r"swapped in +xgboost after bar 9: v2 replaces v1", text)
    assert re.search(r"MISSING +no agent_muted of xgboost", text)


@pytest.mark.parametrize(
    "name", ["xgboost_v20200101_000000_v3.ubj", "xgboost_v20990101_000000_v7.pkl", "xgb_v20200101_000000.pkl"]
)
def test_a_sabotaged_file_is_selected_before_the_one_it_replaces(name: str) -> None:
    old = candidate_of(Path("models") / name, "xgboost")
    assert old is not None
    new = candidate_of(Path("models") / f"{newer_stem(old)}.ubj", "xgboost")
    assert new is not None
    assert ranks_above(new, old)


def test_a_child_that_fails_is_named_with_its_code_and_the_end_of_its_log(tmp_path: Path) -> None:
    with child("feed", ["worker.demo.publisher", "redis://127.0.0.1:1", "k"], tmp_path / "log") as feed:
        feed.process.wait(LIMIT_S)
        with pytest.raises(ChildFailed, match=r"the feed ended with exit code 2; .*required: --symbols") as caught:
            feed.check(may_end=True)
    assert caught.value.exit_code == 2


def test_a_feed_without_a_server_says_so_in_one_line(tmp_path: Path) -> None:
    flags = ["--symbols", "1", "--bars", "200", "--seed", "0"]
    with child("feed", ["worker.demo.publisher", "redis://127.0.0.1:1/0", "k", *flags], tmp_path / "log") as feed:
        feed.process.wait(LIMIT_S)
        with pytest.raises(ChildFailed, match=r"exit code 1; .* the bars cannot be published: ") as caught:
            feed.check(may_end=True)
    assert not re.search("Traceback", str(caught.value))
