"""Calls side by side, no more at once than there are cores: the oldest first, and those of one lane one by one."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class _Call(Generic[T]):
    lane: str
    run: Callable[[], T]
    answer: Future[T] = field(default_factory=Future)

    def __call__(self) -> None:
        if not self.answer.set_running_or_notify_cancel():
            return
        try:
            self.answer.set_result(self.run())
        except BaseException as error:  # noqa: BLE001 - it is the caller's, who asks for the answer
            self.answer.set_exception(error)

    def interruption(self) -> BaseException | None:
        """What ended it that was no error: Ctrl-C."""
        error = None if self.answer.cancelled() else self.answer.exception()
        return None if isinstance(error, Exception) else error


class Lanes(Generic[T]):
    """Computes the calls of several lanes; those of one lane never at once, nor in another order.

    One thread gives calls and takes answers. It computes as well while it waits, so that there is one thread less than
    cores, and none on a single one.
    """

    def __init__(self, name: str) -> None:
        threads = cores() - 1
        self._threads = ThreadPoolExecutor(threads, name) if threads else None
        self._waiting: list[_Call[T]] = []
        self._busy: set[str] = set()
        self._closed = False
        self._lock = Lock()

    def submit(self, lane: str, run: Callable[[], T]) -> Future[T]:
        """The answer to come of `run`; see `result`. Raises RuntimeError after `close`."""
        call = _Call(lane, run)
        with self._lock:
            if self._closed:
                raise RuntimeError(f"a call of lane {lane} after the end")
            if self._threads is not None:
                self._threads.submit(self._work)
            self._waiting.append(call)
        return call.answer

    def result(self, answer: Future[T]) -> T:
        """The answer of a call, or what it raised. Until it is there, this thread computes what is ready."""
        while not answer.done() and (call := self._next()) is not None:
            self._compute(call)
            if (interruption := call.interruption()) is not None:
                raise interruption
        with self._lock:  # somebody has to look at the lane that this thread leaves
            if self._waiting and self._threads is not None and not self._closed:
                self._threads.submit(self._work)
        return answer.result()

    def _work(self) -> None:
        """Compute what is ready, until nothing is. A call behind another of its lane is left to who computes that."""
        while (call := self._next()) is not None:
            self._compute(call)

    def _next(self) -> _Call[T] | None:
        """The oldest call whose lane is free, which is busy from now on."""
        with self._lock:
            call = next((call for call in self._waiting if call.lane not in self._busy), None)
            if call is not None:
                self._waiting.remove(call)
                self._busy.add(call.lane)
            return call

    def _compute(self, call: _Call[T]) -> None:
        call()
        with self._lock:
            self._busy.remove(call.lane)

    def close(self) -> None:
        """Wait for every call, and end the threads."""
        with self._lock:
            self._closed = True
        self._work()
        if self._threads is not None:
            self._threads.shutdown()


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
