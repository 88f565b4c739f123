"""A recording as separate streams: each is taken from as far as it is needed.

Nothing is read ahead in a thread: Python code beside the models would make each of their calls wait for
the interpreter's lock, which costs more than the reading.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Iterator

from streams.messages import Entry
from streams.recording import Lost, Recorded, Recording, decode

_IGNORED = frozenset({"events", "rejected", "control"})


class Source:
    """The streams of one recording, for any threads; taking gives fewer entries only at the end."""

    def __init__(self, recording: Recording) -> None:
        self.namespace = str(recording.header["namespace"])
        self._blocks: Iterator[list[bytes]] = recording.blocks()
        self._waiting: dict[str, deque[Recorded]] = defaultdict(deque)
        self._lock = threading.RLock()

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
        lines = next(self._blocks, None)
        if lines is None:
            return False
        for item in map(decode, lines):
            if not isinstance(item, Lost) and item.stream not in _IGNORED:
                self._waiting[item.stream].append(item)
        return True
