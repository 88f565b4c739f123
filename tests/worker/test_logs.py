"""The log: its keys and their order, its two forms, and the limit on repeats."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
from typing import Any

import pytest

from tests.helpers import LIMIT_S, ROOT, environment
from worker.logs import REPEAT_S, make_logger


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def out() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def lines(out: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_a_line_is_one_json_object_with_its_keys_in_order(out: io.StringIO, clock: Clock) -> None:
    log = make_logger(stream=out, clock=clock)
    log.warning("muted", version="v1", reason="dead_zone", agent="nhits", symbol="BTC", bar_id="BTC|1m|0")
    text = out.getvalue()
    assert text.endswith("\n")
    assert text.count("\n") == 1
    assert list(json.loads(text)) == ["ts", "level", "event", "bar_id", "symbol", "agent", "reason", "version"]
    assert lines(out)[0] | {"ts": ""} == {
        "ts": "",
        "level": "warning",
        "event": "muted",
        "bar_id": "BTC|1m|0",
        "symbol": "BTC",
        "agent": "nhits",
        "reason": "dead_zone",
        "version": "v1",
    }


def test_empty_keys_are_left_out(out: io.StringIO, clock: Clock) -> None:
    make_logger(stream=out, clock=clock).info("started", agent="", reason=None)
    assert list(lines(out)[0]) == ["ts", "level", "event"]


def test_a_line_break_in_a_value_stays_within_the_line(out: io.StringIO, clock: Clock) -> None:
    make_logger(stream=out, clock=clock).info("x", detail='a\nb"c')
    assert len(out.getvalue().splitlines()) == 1
    assert lines(out)[0]["detail"] == 'a\nb"c'


def test_values_that_json_does_not_know_are_written_as_text(out: io.StringIO, clock: Clock) -> None:
    make_logger(stream=out, clock=clock).info("x", path=ROOT, raw={1: b"bytes"})
    assert lines(out)[0]["path"] == str(ROOT)


def test_the_level_hides_what_is_below_it(out: io.StringIO, clock: Clock) -> None:
    log = make_logger("warning", stream=out, clock=clock)
    log.info("hidden")
    log.error("shown")
    assert [line["event"] for line in lines(out)] == ["shown"]


def test_a_repeat_is_held_back_and_the_next_line_counts_it(out: io.StringIO, clock: Clock) -> None:
    log = make_logger(stream=out, clock=clock)
    for _ in range(5):
        log.info("gap", reason="feed", symbol="BTC")
    assert len(lines(out)) == 1
    clock.now += REPEAT_S
    log.info("gap", reason="feed", symbol="ETH")
    assert [line.get("repeats") for line in lines(out)] == [None, 4]
    clock.now += REPEAT_S
    log.info("gap", reason="feed")
    assert "repeats" not in lines(out)[-1]


def test_another_agent_or_reason_is_another_line(out: io.StringIO, clock: Clock) -> None:
    log = make_logger(stream=out, clock=clock)
    for agent in ("xgboost", "nhits"):
        for reason in ("no_artifact", "scaler_missing"):
            log.info("refused", agent=agent, reason=reason)
    assert len(lines(out)) == 4


def test_the_memory_of_repeats_is_bounded(out: io.StringIO, clock: Clock) -> None:
    log = make_logger(stream=out, clock=clock)
    for number in range(3000):
        log.info("x", reason=str(number))
    log.info("x", reason="2999")
    log.info("x", reason="0")
    assert len(lines(out)) == 3001, "the newest is remembered, the oldest forgotten"


def test_an_exception_is_a_field_of_the_same_line(out: io.StringIO, clock: Clock) -> None:
    try:
        int("the cause")
    except ValueError:
        make_logger(stream=out, clock=clock).exception("failed")
    assert len(out.getvalue().splitlines()) == 1
    assert "ValueError: invalid literal" in lines(out)[0]["exception"]


PROGRAM = "from worker.logs import make_logger; make_logger().info('muted', agent='nhits')"


def test_on_a_pipe_it_writes_json_to_stderr() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment(), capture_output=True, text=True, timeout=LIMIT_S, check=True
    )
    assert done.stdout == ""
    assert json.loads(done.stderr)["agent"] == "nhits"


def test_on_a_terminal_it_is_readable() -> None:
    ours, theirs = pty.openpty()
    try:
        subprocess.run([sys.executable, "-c", PROGRAM], env=environment(), stderr=theirs, timeout=LIMIT_S, check=True)
        text = os.read(ours, 4096).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert "muted" in text
    assert not text.startswith("{")
