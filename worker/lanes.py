"""Calls side by side: no more at once than there are cores, what was given first first, each lane in order."""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import count
from threading import Lock
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class _Call(NamedTuple):
    number: int
    run: Callable[[], object]
    answer: Future[object]


class Lanes(Generic[T]):
    """Threads that compute calls of several lanes; those of one lane never at once, nor in another order.

    For one caller. `initializer` runs at the start of each thread.
    """

    def __init__(self, name: str, initializer: Callable[[], None]) -> None:
        self._threads = ThreadPoolExecutor(cores(), name, initializer)
        self._numbers = count()
        self._last: dict[str, Future[T]] = {}
        self._ready: list[_Call] = []
        self._lock = Lock()

    def submit(self, lane: str, run: Callable[[], T]) -> Future[T]:
        """The answer to come of `run`, which begins when the lane's call before it has ended."""
        answer: Future[T] = Future()
        call = _Call(next(self._numbers), run, answer)  # type: ignore[arg-type]
        before, self._last[lane] = self._last.get(lane), answer
        if before is None:
            self._offer(call)
        else:
            before.add_done_callback(lambda _: self._offer(call))
        return answer

    def _offer(self, call: _Call) -> None:
        with self._lock:
            heapq.heappush(self._ready, call)
        self._threads.submit(self._run_first)

    def _run_first(self) -> None:
        with self._lock:
            _, run, answer = heapq.heappop(self._ready)
        try:
            answer.set_result(run())
        except BaseException as error:  # noqa: BLE001 - it is the caller's, who asks for the answer
            answer.set_exception(error)

    def close(self) -> None:
        """Wait for every call, and end the threads."""
        wait(self._last.values())
        self._threads.shutdown()


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
