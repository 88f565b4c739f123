"""The probes, asked over real sockets: truthful, and unharmed by bad clients."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.request import Request, urlopen

import pytest
from prometheus_client import CollectorRegistry, Counter

from tests.helpers import LIMIT_S, free_port, wait_for
from worker import http as probes_module
from worker.errors import UNAVAILABLE, Unavailable
from worker.http import Condition, HttpServer, Probes, Readiness


@dataclass
class Worker:
    """Stands for the process that is asked: what its callables say is set by the test."""

    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    turned_s_ago: float = 0.0
    says: Readiness = field(default_factory=lambda: Readiness({}))
    broken: bool = False

    def heartbeat(self) -> float:
        return time.monotonic() - self.turned_s_ago

    def readiness(self) -> Readiness:
        if self.broken:
            raise RuntimeError("no idea")
        return self.says

    @property
    def probes(self) -> Probes:
        return Probes(self.registry, self.heartbeat, self.readiness)


@pytest.fixture
def worker() -> Worker:
    return Worker()


@pytest.fixture
def server(worker: Worker) -> Iterator[HttpServer]:
    server = HttpServer(worker.probes, port=0)
    yield server
    server.close()


def ask(server: HttpServer, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(server.host, server.port, timeout=LIMIT_S)
    try:
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
    finally:
        connection.close()


GOOD = Readiness(
    {"redis": Condition(ok=True), "quorum": Condition(ok=True, detail="4 of 3 needed")},
    {"nhits": {"state": "active", "reason": ""}, "xgboost": {"state": "refused", "reason": "scaler_missing"}},
    {"configured": 2, "loaded": 1},
)


def test_port_0_takes_a_free_port_on_loopback(server: HttpServer) -> None:
    assert server.host == "127.0.0.1"
    assert server.port > 0
    with urlopen(server.url) as response:
        assert response.status == 200


def test_metrics_are_those_of_the_registry_in_the_format_of_prometheus(worker: Worker, server: HttpServer) -> None:
    Counter("things", "Things", registry=worker.registry).inc(3)
    status, headers, body = ask(server, "/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain; version=")
    assert b"\nthings_total 3.0\n" in body


def test_metrics_are_open_metrics_for_a_client_that_asks(server: HttpServer) -> None:
    _, headers, body = ask(server, "/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert headers["content-type"].startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")


def test_health_holds_while_the_loop_turns_and_fails_when_it_does_not(worker: Worker, server: HttpServer) -> None:
    assert ask(server, "/healthz")[::2] == (200, b"ok\n")
    worker.turned_s_ago = 60.0
    status, _, body = ask(server, "/healthz")
    assert status == 503
    assert body == b"stuck: the loop last turned 60.0 s ago, over 30 s\n"


def test_readiness_lists_every_agent_and_condition(worker: Worker, server: HttpServer) -> None:
    worker.says = GOOD
    status, headers, body = ask(server, "/readyz")
    assert (status, headers["content-type"]) == (200, "application/json")
    assert json.loads(body) == {
        "ready": True,
        "conditions": {"redis": {"ok": True, "detail": ""}, "quorum": {"ok": True, "detail": "4 of 3 needed"}},
        "counts": {"configured": 2, "loaded": 1},
        "agents": {
            "nhits": {"state": "active", "reason": ""},
            "xgboost": {"state": "refused", "reason": "scaler_missing"},
        },
    }


@pytest.mark.parametrize("failing", ["redis", "quorum"])
def test_one_condition_that_fails_is_enough(worker: Worker, server: HttpServer, failing: str) -> None:
    worker.says = Readiness({**GOOD.conditions, failing: Condition(ok=False, detail="away")}, GOOD.agents)
    status, _, body = ask(server, "/readyz")
    assert status == 503
    assert json.loads(body)["conditions"][failing] == {"ok": False, "detail": "away"}
    assert set(json.loads(body)["agents"]) == {"nhits", "xgboost"}


def test_nothing_known_is_not_ready(server: HttpServer) -> None:
    status, _, body = ask(server, "/readyz")
    assert (status, json.loads(body)["ready"]) == (503, False)


def test_a_probe_that_fails_is_an_error_and_the_next_request_is_served(worker: Worker, server: HttpServer) -> None:
    worker.broken = True
    assert ask(server, "/readyz")[::2] == (500, b"RuntimeError: no idea\n")
    worker.broken = False
    assert ask(server, "/readyz")[0] == 503


@pytest.mark.parametrize("path", ["/", "/metrics", "/healthz", "/readyz", "/absent"])
def test_head_has_the_headers_of_get_and_no_body(server: HttpServer, path: str) -> None:
    get_status, get_headers, get_body = ask(server, path)
    status, headers, body = ask(server, path, "HEAD")
    assert (status, body) == (get_status, b"")
    assert headers["content-type"] == get_headers["content-type"]
    assert headers["content-length"] == get_headers["content-length"] == str(len(get_body))


def test_a_query_is_not_part_of_the_path(server: HttpServer) -> None:
    assert ask(server, "/healthz?verbose=1")[0] == 200


@pytest.mark.parametrize("path", ["/absent", "/metrics/x", "//etc/passwd", "/../metrics"])
def test_what_is_not_there_is_404(server: HttpServer, path: str) -> None:
    assert ask(server, path)[0] == 404


def test_other_methods_are_refused(server: HttpServer) -> None:
    assert ask(server, "/readyz", "POST")[0] == 501


def test_answers_are_never_cached_and_name_no_software_version(server: HttpServer) -> None:
    headers = ask(server, "/readyz")[1]
    assert headers["cache-control"] == "no-store"
    assert headers["server"].strip() == "quartet"


def test_a_port_that_is_taken_is_one_line_and_exit_code_3(server: HttpServer, worker: Worker) -> None:
    with pytest.raises(Unavailable, match=rf"^cannot listen on 127\.0\.0\.1:{server.port}: .*--http-port") as failure:
        HttpServer(worker.probes, port=server.port)
    assert failure.value.exit_code == UNAVAILABLE
    assert "\n" not in str(failure.value)


def test_the_port_is_free_again_after_close(worker: Worker) -> None:
    port = free_port()
    for _ in range(3):
        server = HttpServer(worker.probes, port=port)
        assert ask(server, "/healthz")[0] == 200
        server.close()
    with pytest.raises(ConnectionRefusedError):
        ask(server, "/healthz")


def served(server: HttpServer) -> bool:
    """Whether a request is answered; this client too may be too slow where the server waits very shortly."""
    try:
        return ask(server, "/healthz")[0] == 200
    except (OSError, http.client.HTTPException):
        return False


def test_a_client_that_sends_nothing_keeps_nobody_waiting_and_is_dropped(
    server: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes_module._Handler, "timeout", 0.2)
    with socket.create_connection((server.host, server.port)) as mute:
        wait_for(lambda: served(server))
        mute.settimeout(LIMIT_S)
        assert mute.recv(1) == b"", "the server hangs up"


def test_more_mute_clients_than_threads_do_no_lasting_harm(server: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes_module._Handler, "timeout", 0.5)
    crowd = [socket.create_connection((server.host, server.port)) for _ in range(2 * probes_module.MAX_CLIENTS)]
    try:
        wait_for(lambda: served(server))
    finally:
        for client in crowd:
            client.close()


def test_nonsense_is_refused_and_a_client_that_hangs_up_is_survived(
    server: HttpServer, capfd: pytest.CaptureFixture[str]
) -> None:
    for nonsense in (b"\x00\xff\x16\x03\n\n", b"GET\n\n", b"GET / HTTP/9.9\r\n\r\n", b"GET /" + b"a" * 70_000):
        with socket.create_connection((server.host, server.port)) as client, contextlib.suppress(ConnectionError):
            client.sendall(nonsense)  # the server may hang up before it has heard all
    with urlopen(Request(server.url + "/healthz")) as response:
        assert response.read() == b"ok\n"
    assert capfd.readouterr() == ("", "")
