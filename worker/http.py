"""One port for Prometheus, for probes and for a page: `/metrics`, `/healthz`, `/readyz`; the rest is a `Site`'s.

It knows nothing of the pipeline: it is given callables and asks them at each request, from its own
threads. A client that is slow or sends nonsense costs one of `MAX_CLIENTS` threads for at most
`CLIENT_TIMEOUT_S` a read or write; the loop that makes signals is never waited for.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol

import orjson
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from worker.errors import Unavailable

CLIENT_TIMEOUT_S = 5.0
MAX_CLIENTS = 32
HEARTBEAT_LIMIT_S = 30.0
"""A loop that has not turned for longer is stuck. Before its first turn models load and kernels may compile, which
takes 10 s and more on a small machine without a cache; a call of the server gives up after 5 s."""

_TEXT = "text/plain; charset=utf-8"
_JSON = "application/json"


@dataclass(frozen=True, slots=True)
class Condition:
    """One thing that readiness needs, and in words how it stands."""

    ok: bool
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Readiness:
    """What `/readyz` says: ready only if there are conditions and all hold.

    `agents` lists every configured agent: its `state`, its `reason` (empty where there is none) and
    whatever else helps, such as the version. `counts` are configured, loaded, eligible, voting and agreeing.
    """

    conditions: Mapping[str, Condition]
    agents: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)

    @property
    def ready(self) -> bool:
        return bool(self.conditions) and all(condition.ok for condition in self.conditions.values())

    def body(self) -> dict[str, Any]:
        return {
            "ready": self.ready,
            "conditions": {name: {"ok": c.ok, "detail": c.detail} for name, c in self.conditions.items()},
            "counts": dict(self.counts),
            "agents": {name: dict(facts) for name, facts in self.agents.items()},
        }


@dataclass(frozen=True, slots=True)
class Answer:
    status: HTTPStatus
    content_type: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


class Chunks(Protocol):
    """Bytes to send, as they come. `close` is called once, whether or not they were begun."""

    def __iter__(self) -> Iterator[bytes]: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Stream:
    """An answer that goes on until `chunks` end or the client hangs up."""

    content_type: str
    chunks: Chunks
    headers: Mapping[str, str] = field(default_factory=dict)


Site = Callable[[str], Answer | Stream | None]
"""The answer to a GET of a path with its query; None where nothing is there."""


@dataclass(frozen=True, slots=True)
class Probes:
    """What the server asks. Each is called from a request's thread and must not block.

    `heartbeat` gives `time.monotonic()` of the loop's last turn; `readiness` how things stand now;
    `site` answers what is not for a machine, in place of the plain index.
    """

    registry: CollectorRegistry
    heartbeat: Callable[[], float]
    readiness: Callable[[], Readiness]
    heartbeat_limit_s: float = HEARTBEAT_LIMIT_S
    site: Site | None = None


class HttpServer:
    """Serves `probes` from a daemon thread until `close`.

    `port` 0 takes any free port; `self.port` is the one in use. Raises `Unavailable` (exit code 3)
    where the address cannot be bound: the port may be free again when the service is restarted.
    """

    def __init__(self, probes: Probes, host: str = "127.0.0.1", port: int = 9464) -> None:
        try:
            self._server = _Server(probes, host, port)
        except OSError as error:
            raise Unavailable(
                f"cannot listen on {host}:{port}: {error.strerror or error}; "
                f"stop what holds the port, or give another with --http-port (0 is any free one)"
            ) from None
        self.host = host
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="http", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    def close(self) -> None:
        """Stop listening. Requests in hand end by themselves."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = MAX_CLIENTS

    def __init__(self, probes: Probes, host: str, port: int) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.probes = probes
        self._free = threading.BoundedSemaphore(MAX_CLIENTS)
        super().__init__((host, port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give the request a thread, or hang up where too many are busy already."""
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is its own affair."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = CLIENT_TIMEOUT_S
    server_version = "quartet"
    sys_version = ""

    def do_GET(self) -> None:
        self._send(self._answer(), with_body=True)

    def do_HEAD(self) -> None:
        self._send(self._answer(), with_body=False)

    def end_headers(self) -> None:
        """Every answer, errors of the protocol too, is what its type says and nothing else."""
        self.send_header("X-Content-Type-Options", "nosniff")
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  the base class's name
        """Probes come every few seconds; they are no news."""

    def _answer(self) -> Answer | Stream:
        probes = self.server.probes
        route = _ROUTES.get(self.path.partition("?")[0])
        try:
            if route is not None:
                return route(probes, self.headers.get("Accept", ""))
            found = probes.site(self.path) if probes.site else _index(self.path)
            return found or Answer(HTTPStatus.NOT_FOUND, _TEXT, b"not found; see /\n")
        except Exception as error:  # noqa: BLE001  a probe that fails is the answer, not a reason to hang up
            return Answer(HTTPStatus.INTERNAL_SERVER_ERROR, _TEXT, f"{type(error).__name__}: {error}\n".encode())

    def _send(self, answer: Answer | Stream, *, with_body: bool) -> None:
        if isinstance(answer, Stream):
            self._stream(answer, with_body=with_body)
            return
        self._head(answer.status, answer, {"Content-Length": str(len(answer.body))})
        if with_body:
            self.wfile.write(answer.body)

    def _stream(self, stream: Stream, *, with_body: bool) -> None:
        try:
            self._head(HTTPStatus.OK, stream, {})
            for chunk in stream.chunks if with_body else ():
                self.wfile.write(chunk)
        finally:
            stream.chunks.close()

    def _head(self, status: HTTPStatus, answer: Answer | Stream, more: Mapping[str, str]) -> None:
        self.send_response(status)
        plain = {"Content-Type": answer.content_type, "Cache-Control": "no-store"}
        for name, value in {**plain, **answer.headers, **more}.items():
            self.send_header(name, value)
        self.end_headers()


def _metrics(probes: Probes, accept: str) -> Answer:
    encode, content_type = choose_encoder(accept)
    return Answer(HTTPStatus.OK, content_type, encode(probes.registry))


def _healthz(probes: Probes, _: str) -> Answer:
    age = time.monotonic() - probes.heartbeat()
    if age > probes.heartbeat_limit_s:
        text = f"stuck: the loop last turned {age:.1f} s ago, over {probes.heartbeat_limit_s:g} s\n"
        return Answer(HTTPStatus.SERVICE_UNAVAILABLE, _TEXT, text.encode())
    return Answer(HTTPStatus.OK, _TEXT, b"ok\n")


def _readyz(probes: Probes, _: str) -> Answer:
    readiness = probes.readiness()
    status = HTTPStatus.OK if readiness.ready else HTTPStatus.SERVICE_UNAVAILABLE
    return Answer(status, _JSON, orjson.dumps(readiness.body(), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))


def _index(path: str) -> Answer | None:
    """What is here, for a server without a site."""
    if path.partition("?")[0] != "/":
        return None
    lines = (
        "quartet",
        "/metrics  for Prometheus",
        "/healthz  the loop turns",
        "/readyz   signals can be made, as JSON",
    )
    return Answer(HTTPStatus.OK, _TEXT, "".join(f"{line}\n" for line in lines).encode())


_ROUTES: Mapping[str, Callable[[Probes, str], Answer]] = {
    "/metrics": _metrics,
    "/healthz": _healthz,
    "/readyz": _readyz,
}
