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
        if self.answer.set_running_or_notify_cancel():
            try:
                self.answer.set_result(self.run())
            except BaseException as error:  # noqa: BLE001 - it is the caller's, who asks for the answer
                self.answer.set_exception(error)


class Lanes(Generic[T]):
    """Threads that compute the calls of several lanes; those of one lane never at once, nor in another order."""

    def __init__(self, name: str) -> None:
        self._threads = ThreadPoolExecutor(cores(), name)
        self._waiting: list[_Call[T]] = []
        self._busy: set[str] = set()
        self._lock = Lock()

    def submit(self, lane: str, run: Callable[[], T]) -> Future[T]:
        """The answer to come of `run`. Raises RuntimeError after `close`."""
        call = _Call(lane, run)
        with self._lock:
            self._threads.submit(self._work)
            self._waiting.append(call)
        return call.answer

    def _work(self) -> None:
        """Compute what is ready, until nothing is. A call behind another of its lane is left to who computes that."""
        while (call := self._next()) is not None:
            call()
            with self._lock:
                self._busy.remove(call.lane)

    def _next(self) -> _Call[T] | None:
        """The oldest call whose lane is free, which is busy from now on."""
        with self._lock:
            call = next((call for call in self._waiting if call.lane not in self._busy), None)
            if call is not None:
                self._waiting.remove(call)
                self._busy.add(call.lane)
            return call

    def close(self) -> None:
        """Wait for every call, and end the threads."""
        self._threads.shutdown()


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
