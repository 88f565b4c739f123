"""A recording as separate streams: each is taken from as far as it is needed.

Lines wait as they are. Most are only ever held against the bytes that were computed again, so that
nothing of them is decoded.
"""

from __future__ import annotations

import re
import threading
from collections import defaultdict, deque
from collections.abc import Iterator
from itertools import islice

from streams.messages import Entry
from streams.recording import Lost, Recorded, Recording, decode, encode, holds
from worker.replay.lines import read_lines

_BAR_ID = re.compile(rb'"bar_id":"([^"]*)"')
_IGNORED = frozenset({b"events", b"rejected", b"control"})


class Source:
    """The streams of one recording, for any threads; taking gives fewer entries only at the end."""

    def __init__(self, recording: Recording) -> None:
        self.namespace = str(recording.header["namespace"])
        self._texts = read_lines(recording)
        self._waiting: dict[bytes, deque[bytes]] = defaultdict(deque)
        self._lock = threading.RLock()

    def entries(self, count: int) -> list[Entry]:
        """The next entries of the inputs, in the order in which they were read."""
        with self._lock:
            return [Entry(item.key, item.id, item.fields) for item in self.take("bars", count)]

    def take(self, stream: str, count: int) -> list[Recorded]:
        """The next `count` entries of a stream."""
        with self._lock:
            waiting = self._await(stream, count)
            return [_recorded(waiting.popleft()) for _ in range(min(count, len(waiting)))]

    def take_equal(self, stream: str, payloads: Iterator[bytes]) -> tuple[int, bytes | None]:
        """Take the next entries of a stream as long as their `data` are exactly these.

        Gives how many were, and the payload that is not what comes next; None at the end of `payloads`.
        """
        equal = 0
        with self._lock:
            waiting = self._waiting[stream.encode()]
            for payload in payloads:
                if not (waiting or self._await(stream, 1)) or not holds(waiting[0], payload):
                    return equal, payload
                waiting.popleft()
                equal += 1
        return equal, None

    def peek(self, stream: str, place: int = 0) -> Recorded | None:
        """An entry that `take` would give, `place` entries ahead; None behind the end."""
        with self._lock:
            line = next(islice(self._await(stream, place + 1), place, None), None)
            return None if line is None else _recorded(line)

    def bar_ids(self, stream: str, count: int) -> list[str]:
        """The bars of the next `count` entries of a stream; fewer at the end."""
        with self._lock:
            lines = islice(self._await(stream, count), count)
            found = [_BAR_ID.search(line) for line in lines]
        return [match[1].decode() if match else "" for match in found]

    def left(self) -> dict[str, int]:
        """How many entries of each stream nobody took, once everything was read."""
        while self._more():
            pass
        return {stream.decode(): len(waiting) for stream, waiting in self._waiting.items() if waiting}

    def _await(self, stream: str, count: int) -> deque[bytes]:
        """The lines of a stream that wait: `count` or more, unless the recording ends before."""
        waiting = self._waiting[stream.encode()]
        while len(waiting) < count and self._more():
            pass
        return waiting

    def _more(self) -> bool:
        text, lines = next(self._texts, (None, ()))
        if text is None:
            return False
        for stream, begin, end in lines:
            if not stream:
                self._add_foreign(text[begin:end])
            elif stream not in _IGNORED:
                self._waiting[stream].append(text[begin:end])
        return True

    def _add_foreign(self, line: bytes) -> None:
        """A line that is no entry, or that another program wrote with other spaces."""
        item = decode(line)
        if not isinstance(item, Lost) and item.stream.encode() not in _IGNORED:
            self._waiting[item.stream.encode()].append(encode(item))


def _recorded(line: bytes) -> Recorded:
    item = decode(line)
    assert isinstance(item, Recorded)  # noqa: S101 - notes of losses never wait
    return item
