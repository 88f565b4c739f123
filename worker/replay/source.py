"""A recording as separate streams, read ahead in a thread: each is taken from as far as it is needed."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from queue import Full, Queue
from typing import Self

from streams.messages import Entry
from streams.recording import Item, Lost, Recorded, Recording, decode

AHEAD = 8
"""Frames that are decoded ahead of the models."""

_IGNORED = frozenset({"events", "rejected", "control"})


class Source:
    """The streams of one recording, for any threads. Use as a context; taking gives fewer entries only at the end."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._blocks: Queue[list[Item] | BaseException | None] = Queue(AHEAD)
        self._waiting: dict[str, deque[Recorded]] = defaultdict(deque)
        self._ended = False
        self._stop = threading.Event()
        self._lock = threading.RLock()
        self._thread = threading.Thread(target=self._read, name="recording", daemon=True)

    @property
    def namespace(self) -> str:
        """The namespace that was recorded."""
        return str(self._recording.header["namespace"])

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def entries(self, count: int) -> list[Entry]:
        """The next entries of the inputs, in the order in which they were read."""
        return [Entry(item.key, item.id, item.fields) for item in self.take("bars", count)]

    def take(self, stream: str, count: int) -> list[Recorded]:
        """The next `count` entries of a stream."""
        with self._lock:
            waiting = self._waiting[stream]
            while len(waiting) < count and self._more():
                pass
            return [waiting.popleft() for _ in range(min(count, len(waiting)))]

    def peek(self, stream: str, place: int = 0) -> Recorded | None:
        """An entry that `take` would give, `place` entries ahead; None behind the end."""
        with self._lock:
            waiting = self._waiting[stream]
            while len(waiting) <= place and self._more():
                pass
            return waiting[place] if place < len(waiting) else None

    def left(self) -> dict[str, int]:
        """How many entries of each stream nobody took, once everything was read."""
        while self._more():
            pass
        return {stream: len(waiting) for stream, waiting in self._waiting.items() if waiting}

    def _more(self) -> bool:
        if self._ended:
            return False
        block = self._blocks.get()
        if isinstance(block, BaseException):
            raise block
        if block is None:
            self._ended = True
            return False
        for item in block:
            if not isinstance(item, Lost) and item.stream not in _IGNORED:
                self._waiting[item.stream].append(item)
        return True

    # ------------------------------------------------------------------ the thread

    def _read(self) -> None:
        try:
            for lines in self._recording.blocks():
                if not self._put([decode(line) for line in lines]):
                    return
            self._put(None)
        except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
            self._put(error)

    def _put(self, block: list[Item] | BaseException | None) -> bool:
        while not self._stop.is_set():
            try:
                self._blocks.put(block, timeout=0.1)
            except Full:
                continue
            return True
        return False
