"""The page's addresses: static files, three JSON answers, and the live stream."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qs, urlsplit

import orjson
import redis

from streams.keys import CHAIN, Keys
from worker.http import Answer, Readiness, Stream
from worker.page.hub import Hub
from worker.page.reader import MOST_BARS, Pair, StreamReader, trouble

MOST_MATCHES = 50
TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "mjs": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
    "txt": "text/plain; charset=utf-8",
}
_JSON = "application/json"
_SYMBOL = re.compile(r"[A-Za-z0-9._:/-]{1,64}")
_INTERVAL = re.compile(r"[1-9][0-9]{0,4}[smhd]")
_COUNT = re.compile(r"[1-9][0-9]{0,2}")
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}

Query = Mapping[str, str]


class BadQuery(Exception):
    """A request that asks for nothing there can be; the text says what was expected."""


class Page:
    """Answers for the HTTP server. `readiness` is the worker's own; all else is read from the server.

    `warmup_bars` is what the page shows as the goal of a warm-up, `quorum` the agents that must agree.
    """

    def __init__(
        self,
        client: redis.Redis,
        keys: Keys,
        readiness: Callable[[], Readiness],
        *,
        quorum: int,
        warmup_bars: int,
        stage: str = CHAIN,
    ) -> None:
        self._keys = keys
        self._readiness = readiness
        self._settings = {"namespace": keys.namespace, "quorum": quorum, "warmup_bars": warmup_bars}
        self._reader = StreamReader(client, keys, stage)
        self.hub = Hub(self._reader, self.overview)
        self._folder = files("worker.page.static")
        self._names = {one.name for one in self._folder.iterdir() if one.name.rpartition(".")[2] in TYPES}

    def answer(self, target: str) -> Answer | Stream | None:
        """The answer to a GET of `target`, path and query; None where nothing is there."""
        parts = urlsplit(target)
        name = parts.path.removeprefix("/") or "index.html"
        if name in self._names:
            body = self._folder.joinpath(name).read_bytes()
            return Answer(HTTPStatus.OK, TYPES[name.rpartition(".")[2]], body, _HEADERS)
        route = _ROUTES.get(parts.path)
        if route is None:
            return None
        query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
        try:
            return route(self, query)
        except BadQuery as error:
            return self._json({"error": str(error)}, HTTPStatus.BAD_REQUEST)
        except redis.RedisError as error:
            return self._json({"error": trouble(error)}, HTTPStatus.SERVICE_UNAVAILABLE)

    def close(self) -> None:
        """End the live streams."""
        self.hub.close()

    # ------------------------------------------------------------------ answers

    def overview(self) -> dict[str, Any]:
        """The newest signal, and every agent with its state, its reason, and since when that is so."""
        readiness, signal = self._readiness(), self._reader.last_signal()
        told = self._reader.told()
        agents = [
            {"agent": name, **facts, "since": _since(told, name, facts["reason"])}
            for name, facts in readiness.agents.items()
        ]
        conditions = {name: {"ok": one.ok, "detail": one.detail} for name, one in readiness.conditions.items()}
        return {
            **self._settings,
            "ready": readiness.ready,
            "conditions": conditions,
            "agents": agents,
            "signal": signal,
        }

    def _overview(self, _: Query) -> Answer:
        return self._json(self.overview())

    def _symbols(self, query: Query) -> Answer:
        wanted = query.get("q", "").strip().casefold()
        known = self._reader.symbols()
        matches = [pair for pair in known if wanted in f"{pair[0]} {pair[1]}".casefold()]
        return self._json({"total": len(known), "matching": len(matches), "matches": matches[:MOST_MATCHES]})

    def _series(self, query: Query) -> Answer:
        bars = query.get("bars", str(MOST_BARS))
        if not _COUNT.fullmatch(bars) or int(bars) > MOST_BARS:
            raise BadQuery(f"bars: expected 1 to {MOST_BARS}; found {bars[:20]!r}")
        return self._json(self._reader.series(_pair(query), int(bars)))

    def _live(self, query: Query) -> Answer | Stream:
        messages = self.hub.watch(_pair(query))
        if messages is None:
            return self._json({"error": "too many browsers watch already"}, HTTPStatus.SERVICE_UNAVAILABLE)
        return Stream("text/event-stream", messages, _HEADERS)

    def _json(self, value: Any, status: HTTPStatus = HTTPStatus.OK) -> Answer:
        return Answer(status, _JSON, orjson.dumps(value), _HEADERS)


_ROUTES: Mapping[str, Callable[[Page, Query], Answer | Stream]] = {
    "/api/overview": Page._overview,  # noqa: SLF001  its own
    "/api/symbols": Page._symbols,  # noqa: SLF001
    "/api/series": Page._series,  # noqa: SLF001
    "/api/live": Page._live,  # noqa: SLF001
}


def _pair(query: Query) -> Pair:
    symbol, interval = query.get("symbol", ""), query.get("interval", "1m")
    if not _SYMBOL.fullmatch(symbol):
        raise BadQuery("symbol: expected 1 to 64 characters of A-Z a-z 0-9 . _ : / -")
    if not _INTERVAL.fullmatch(interval):
        raise BadQuery("interval: expected a number with s, m, h or d, such as 1m")
    return symbol, interval


def _since(told: Sequence[Mapping[str, Any]], agent: str, reason: str) -> int | None:
    """When the newest event that gives `reason` for `agent` was: the bar's time, else when it was written, in ms."""
    for event in told:
        if reason and event["agent"] == agent and event["reason"] == reason:
            return int(event["ts"] or event["ms"])
    return None
