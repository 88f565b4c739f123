"""The log: one line per state change, on stderr; JSON unless that is a terminal.

Keys in this order: `ts level event bar_id symbol agent reason`, then whatever else helps. The same
event of the same agent for the same reason is written once in `REPEAT_S`; the next line that is
written says in `repeats` how many were held back.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, MutableMapping
from typing import Any, TextIO

import orjson
import structlog
from structlog.typing import FilteringBoundLogger, Processor

KEYS = ("ts", "level", "event", "bar_id", "symbol", "agent", "reason")
REPEAT_S = 30.0
_REMEMBERED = 1024

EventDict = MutableMapping[str, Any]


def make_logger(
    level: str = "info",
    *,
    stream: TextIO | None = None,
    as_json: bool | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> FilteringBoundLogger:
    """A logger that writes to `stream`, stderr unless given. Nothing global is changed.

    `as_json` None means: not on a terminal. `clock` gives seconds and drives the limit on repeats.
    """
    out = sys.stderr if stream is None else stream
    if as_json is None:
        as_json = not out.isatty()
    processors: list[Processor] = [
        structlog.processors.add_log_level,
        Repeats(clock),
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="ts"),
        structlog.processors.format_exc_info,
        _ordered,
        _Json() if as_json else structlog.dev.ConsoleRenderer(colors=out.isatty(), timestamp_key="ts", sort_keys=False),
    ]
    logger: FilteringBoundLogger = structlog.wrap_logger(
        structlog.WriteLogger(out),
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        cache_logger_on_first_use=True,
    )
    return logger


class Repeats:
    """Drops a line that repeats event, agent and reason within `REPEAT_S` of the last one written.

    At most 1,024 of them are remembered; when there are more the oldest is forgotten.
    """

    def __init__(self, clock: Callable[[], float], every_s: float = REPEAT_S) -> None:
        self._clock, self._every_s = clock, every_s
        self._written: dict[tuple[Any, ...], tuple[float, int]] = {}

    def __call__(self, _logger: Any, _method: str, event: EventDict) -> EventDict:
        key = (event.get("event"), event.get("agent"), event.get("reason"))
        now = self._clock()
        at, held = self._written.pop(key, (-float("inf"), 0))
        if now - at < self._every_s:
            self._written[key] = at, held + 1
            raise structlog.DropEvent
        self._written[key] = now, 0
        if len(self._written) > _REMEMBERED:
            del self._written[next(iter(self._written))]
        if held:
            event["repeats"] = held
        return event


def _ordered(_logger: Any, _method: str, event: EventDict) -> EventDict:
    """The known keys first, in their order; absent ones are left out."""
    known = {key: event[key] for key in KEYS if event.get(key) not in (None, "")}
    return known | {key: value for key, value in event.items() if key not in KEYS}


class _Json:
    """One JSON object a line; what JSON does not know is written as text."""

    def __call__(self, _logger: Any, _method: str, event: EventDict) -> str:
        return orjson.dumps(dict(event), default=str, option=orjson.OPT_NON_STR_KEYS).decode()
