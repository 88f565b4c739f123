"""Calls of several lanes: in order there, the oldest first, and no more at once than there are cores."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import pytest

from tests.helpers import LIMIT_S, wait_for
from worker.lanes import Lanes, cores

Blocked = tuple[Lanes[Any], Future[str], threading.Event]


@contextmanager
def one_core() -> Iterator[None]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def lanes_of(number: int, monkeypatch: pytest.MonkeyPatch) -> Lanes[Any]:
    """On so many cores."""
    monkeypatch.setattr("worker.lanes.cores", lambda: number)
    return Lanes("test")


@pytest.fixture
def blocked(monkeypatch: pytest.MonkeyPatch) -> Blocked:
    """Lanes of two cores, and the call of lane `slow` that their one thread is busy with until the event is set."""
    lanes = lanes_of(2, monkeypatch)
    free = threading.Event()
    first = lanes.submit("slow", lambda: "first" if free.wait(LIMIT_S) else "never")
    wait_for(first.running)
    return lanes, first, free


def test_on_one_core_calls_run_one_by_one_in_the_order_in_which_they_were_given() -> None:
    names = ["a", "b", "c", "a", "a", "b", "c", "c"]
    computing = threading.Lock()
    ran = []

    def run(number: int) -> int:
        assert computing.acquire(blocking=False), "two at once"
        time.sleep(0.001)
        ran.append(number)
        computing.release()
        return number

    with one_core():
        lanes: Lanes[int] = Lanes("test")
        answers = [lanes.submit(name, lambda n=n: run(n)) for n, name in enumerate(names)]  # type: ignore[misc]
        assert [lanes.result(answer) for answer in answers] == list(range(len(names)))
    lanes.close()
    assert ran == list(range(len(names)))


def test_a_lane_that_waits_keeps_nobody_else_from_computing(blocked: Blocked) -> None:
    lanes, first, free = blocked
    second = lanes.submit("slow", lambda: "second")
    others = [lanes.submit("quick", lambda n=n: f"{n}") for n in range(3)]  # type: ignore[misc]
    assert [lanes.result(answer) for answer in others] == ["0", "1", "2"]
    assert not first.done()
    assert not second.done()
    free.set()
    assert [lanes.result(first), lanes.result(second)] == ["first", "second"]
    lanes.close()


def test_what_a_call_raises_is_its_answer_and_the_next_one_runs() -> None:
    lanes: Lanes[float] = Lanes("test")
    broken = lanes.submit("a", lambda: 1 / 0)
    whole = lanes.submit("a", lambda: 1.0)
    with pytest.raises(ZeroDivisionError):
        lanes.result(broken)
    assert lanes.result(whole) == 1.0
    lanes.close()


def test_closing_waits_for_every_call_that_was_given() -> None:
    computing: set[int] = set()
    lanes: Lanes[None] = Lanes("test")
    ran = []

    def run(number: int) -> None:
        time.sleep(0.001)
        computing.add(threading.get_ident())
        ran.append(number)

    for number in range(20):
        lanes.submit("ab"[number % 2], lambda n=number: run(n))  # type: ignore[misc]
    lanes.close()
    assert sorted(ran) == list(range(20))
    assert [number for number in ran if number % 2] == list(range(1, 20, 2))
    assert 1 <= len(computing) <= cores()


def test_after_the_end_a_call_is_refused_and_nobody_waits_for_ever() -> None:
    lanes: Lanes[int] = Lanes("test")
    assert lanes.result(lanes.submit("a", lambda: 1)) == 1
    lanes.close()
    with pytest.raises(RuntimeError, match="after the end"):
        lanes.submit("a", lambda: 2)
    lanes.close()


def test_a_call_that_is_cancelled_while_it_waits_stops_nobody(blocked: Blocked) -> None:
    lanes, first, free = blocked
    second, third = (lanes.submit("slow", lambda n=n: n) for n in ("second", "third"))  # type: ignore[misc]
    assert second.cancel()
    free.set()
    assert [lanes.result(first), lanes.result(third)] == ["first", "third"]
    lanes.close()


@pytest.mark.parametrize("number", [1, 2, 3])
def test_who_waits_for_an_answer_computes_and_is_one_of_as_many_as_there_are_cores(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lanes = lanes_of(number, monkeypatch)
    together = threading.Barrier(number)

    def run() -> int:
        together.wait(LIMIT_S)  # none goes on before all of them compute
        return threading.get_ident()

    computed_by = [lanes.result(answer) for answer in [lanes.submit(f"{n}", run) for n in range(number)]]
    assert threading.get_ident() in computed_by
    assert len(set(computed_by)) == number
    lanes.close()


def test_a_call_behind_one_that_the_waiting_thread_computed_is_not_forgotten(blocked: Blocked) -> None:
    lanes, blocking, free = blocked

    def ahead() -> str:
        free.set()  # the other thread finds nothing to do as long as this lane is busy
        assert blocking.result(LIMIT_S) == "first"
        time.sleep(0.05)
        return "ahead"

    answers = [lanes.submit("a", ahead), lanes.submit("a", lambda: "second")]
    assert lanes.result(answers[0]) == "ahead"
    assert answers[1].result(LIMIT_S) == "second", "without anybody who waits for it in the lanes"
    lanes.close()


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_call_that_ends_its_thread_holds_up_nobody_behind_it(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lanes = lanes_of(number, monkeypatch)

    def leaving() -> str:
        time.sleep(0.05)
        raise SystemExit

    first, second = lanes.submit("a", leaving), lanes.submit("a", lambda: "second")
    with pytest.raises(SystemExit):
        lanes.result(first)
    assert lanes.result(second) == "second"
    lanes.close()


def test_ctrl_c_in_a_call_reaches_the_thread_that_computes_and_frees_its_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    lanes = lanes_of(1, monkeypatch)

    def interrupted() -> str:
        raise KeyboardInterrupt

    lanes.submit("a", interrupted)
    second = lanes.submit("a", lambda: "second")
    with pytest.raises(KeyboardInterrupt):
        lanes.result(second)
    assert lanes.result(second) == "second"
    lanes.close()
