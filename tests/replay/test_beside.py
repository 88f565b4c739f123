"""What is done beside the models is done in order, ends with them, and does not lose an error."""

from __future__ import annotations

import sys
import threading
from functools import partial

import pytest

from tests.helpers import wait_for
from worker.replay.beside import TURN_S, Beside


def test_a_job_waits_for_its_beginning_and_then_runs_beside_the_caller() -> None:
    done: list[str] = []
    free = threading.Event()

    def job() -> None:
        assert free.wait(120)
        done.append(threading.current_thread().name)

    with Beside() as beside:
        beside.leave(job)
        assert not done
        beside.begin()
        free.set()
        wait_for(lambda: bool(done))
        beside.settle()
    assert done != [threading.current_thread().name]


def test_settling_begins_what_nobody_began_and_each_job_runs_once() -> None:
    done: list[int] = []
    with Beside() as beside:
        for number in range(5):
            beside.leave(partial(done.append, number))
            if number % 2:
                beside.begin()
            beside.settle()
            beside.settle()
    assert done == [0, 1, 2, 3, 4]


def test_what_a_job_raises_is_raised_where_it_is_settled() -> None:
    def fail() -> None:
        raise OSError("the disk is gone")

    with Beside() as beside:
        beside.leave(fail)
        beside.begin()
        with pytest.raises(OSError, match="the disk is gone"):
            beside.settle()


def test_threads_take_short_turns_only_meanwhile() -> None:
    usual = sys.getswitchinterval()
    with Beside():
        assert sys.getswitchinterval() == pytest.approx(TURN_S)
    assert sys.getswitchinterval() == usual
