"""Follows the streams for everybody who looks at the page: one thread, and none while nobody looks."""

from __future__ import annotations

import queue
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import orjson
import redis

from streams.codec import from_json
from worker.page.reader import News, Pair, StreamReader, concerns, symbol_of, trouble
from worker.page.rows import columns, event_note, reject_note

MOST_VIEWERS = 16
"""Fewer than the threads of the HTTP server, so that probes are always answered."""
QUEUE_LENGTH = 64
LOOK_EVERY_S = 0.5
READS_A_LOOK = 4
"""A worker that catches up writes faster than anybody can watch: what is not read by then is skipped."""
HEARTBEAT_S = 3.0

_INSTANCE = uuid.uuid4().hex
_HEARTBEAT = b": still here\n\n"


class Viewer:
    """One browser that watches one symbol. Messages wait in a short queue; who lets it fill up is dropped."""

    def __init__(self, pair: Pair, leave: Callable[[Viewer], None]) -> None:
        self.pair = pair
        self._leave = leave
        self._messages: queue.Queue[bytes] = queue.Queue(QUEUE_LENGTH)
        self._end = threading.Event()

    def tell(self, event: str, value: Any) -> None:
        """Send `value` under the name `event`."""
        try:
            self._messages.put_nowait(b"event: %s\ndata: %s\n\n" % (event.encode(), orjson.dumps(value)))
        except queue.Full:
            self.end()

    def end(self) -> None:
        self._end.set()

    def close(self) -> None:
        """The browser is gone."""
        self._leave(self)

    def __iter__(self) -> Iterator[bytes]:
        """What to send, until the end; a comment every few seconds keeps the connection known to be alive."""
        silent_s = 0.0
        while not self._end.is_set():
            try:
                yield self._messages.get(timeout=LOOK_EVERY_S)
                silent_s = 0.0
            except queue.Empty:
                silent_s += LOOK_EVERY_S
                if silent_s >= HEARTBEAT_S:
                    yield _HEARTBEAT
                    silent_s = 0.0


class Hub:
    """Reads what is new twice a second and tells each viewer what concerns it."""

    def __init__(self, reader: StreamReader, overview: Callable[[], dict[str, Any]]) -> None:
        self._reader = reader
        self._overview = overview
        self._viewers: list[Viewer] = []
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()

    @property
    def viewers(self) -> int:
        return len(self._viewers)

    def watch(self, pair: Pair) -> Viewer | None:
        """One more viewer; None where there are `MOST_VIEWERS` already, or at the end."""
        with self._lock:
            if len(self._viewers) >= MOST_VIEWERS or self._closed.is_set():
                return None
            viewer = Viewer(pair, self._leave)
            self._viewers.append(viewer)
            viewer.tell("hello", {"instance": _INSTANCE})
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="page", daemon=True)
                self._thread.start()
            else:
                viewer.tell("reload", {})
        return viewer

    def close(self) -> None:
        """End every viewer's stream and the thread."""
        self._closed.set()
        with self._lock:
            for viewer in self._viewers:
                viewer.end()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _leave(self, viewer: Viewer) -> None:
        with self._lock:
            self._viewers.remove(viewer)

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        positions: dict[str, str] = {}
        while self._is_needed():
            try:
                positions = self._look(positions)
            except redis.RedisError as error:
                positions = {}
                self._tell_all("away", {"detail": trouble(error)})
            self._closed.wait(LOOK_EVERY_S)

    def _is_needed(self) -> bool:
        with self._lock:
            if self._viewers and not self._closed.is_set():
                return True
            self._thread = None
            return False

    def _look(self, positions: dict[str, str]) -> dict[str, str]:
        """Tell what is new since `positions`; the positions after it."""
        self._tell_all("overview", self._overview())
        if not positions:
            ends = self._reader.ends()
            self._tell_all("reload", {})  # read the series now: what comes later follows these ends
            return ends
        for _ in range(READS_A_LOOK):
            news = self._reader.news(positions)
            self._pass_on(news)
            if not news.more:
                return positions
        return {}

    def _pass_on(self, news: News) -> None:
        notes = [event_note(entry_id, fields[b"data"]) for entry_id, fields in news.events]
        notes += [reject_note(entry_id, fields) for entry_id, fields in news.rejected]
        with self._lock:
            viewers = list(self._viewers)
        rows = {pair: _rows(news, pair) for pair in {viewer.pair for viewer in viewers}}
        for viewer in viewers:
            if rows[viewer.pair]["ts"]:
                viewer.tell("rows", rows[viewer.pair])
            mine = [note for note in notes if concerns(note, viewer.pair)]
            if mine:
                viewer.tell("notes", mine)

    def _tell_all(self, event: str, value: Any) -> None:
        with self._lock:
            for viewer in self._viewers:
                viewer.tell(event, value)


def _rows(news: News, pair: Pair) -> dict[str, Any]:
    found = []
    for entries in (news.features, news.signals):
        mine = (from_json(f[b"data"]) for _, f in entries if symbol_of(f[b"data"]) == pair[0])
        found.append([message for message in mine if message["interval"] == pair[1]])
    return columns(*found)
