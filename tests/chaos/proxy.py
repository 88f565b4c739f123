"""A TCP proxy before a server that loses replies: the request arrives and is carried out, its answer is not heard."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from urllib.parse import unquote, urlparse

FAULTS = ("cut", "half_close", "mute", "delay", "torn")
"""Close both sides; end the answering direction only; never answer; answer too late; half an answer, then close."""


class Proxy:
    """`fault` is what happens to the next reply that comes from the server; then it is None again.

    With `only` it happens to the next reply to a request that holds these bytes.
    """

    def __init__(self, url: str, delay_s: float = 0.6) -> None:
        self.fault: str | None = None
        self.only = b""
        self.down = False
        self.lost = 0
        self._target = urlparse(url)
        self._delay_s = delay_s
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: set[socket.socket] = set()
        self._asked: dict[socket.socket, bytes] = {}
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"

    def close(self) -> None:
        self._listener.close()
        self._drop_all()

    def go_away(self) -> None:
        """As a server that is gone: connections break, new ones are closed at once."""
        self.down = True
        self._drop_all()

    def come_back(self) -> None:
        self.down = False

    def _drop_all(self) -> None:
        for each in list(self._open):
            _end(each)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            upstream = self._connect()
            self._open |= {client, upstream}
            if self.down:  # looked at once both are among the open ones, which `go_away` ends after it has set this
                _end(client)
                _end(upstream)
                continue
            for source, target, answers in ((client, upstream, False), (upstream, client, True)):
                threading.Thread(target=self._pump, args=(source, target, answers), daemon=True).start()

    def _connect(self) -> socket.socket:
        if self._target.scheme == "unix":
            upstream = socket.socket(socket.AF_UNIX)
            upstream.connect(unquote(self._target.path))
            return upstream
        return socket.create_connection((self._target.hostname or "", self._target.port or 0))

    def _pump(self, source: socket.socket, target: socket.socket, answers: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if not answers:
                    self._asked[target] = data
                elif (fault := self.fault) and self.only in self._asked.get(source, b""):
                    self.fault = None
                    self.lost += 1
                    if not self._fail(fault, data, target):
                        return
                    continue
                target.sendall(data)
        _end(source)
        _end(target)

    def _fail(self, fault: str, data: bytes, client: socket.socket) -> bool:
        """Do to a reply what `fault` says; whether the connection lives on."""
        if fault == "delay":
            time.sleep(self._delay_s)
            client.sendall(data)
            return True
        if fault == "mute":
            return True
        if fault == "half_close":
            client.shutdown(socket.SHUT_WR)
            return True
        if fault == "torn":
            client.sendall(data[: len(data) // 2])
        _end(client)
        return False


def _end(each: socket.socket) -> None:
    with contextlib.suppress(OSError):
        each.shutdown(socket.SHUT_RDWR)
    each.close()


@contextlib.contextmanager
def proxy(url: str) -> Iterator[Proxy]:
    made = Proxy(url)
    try:
        yield made
    finally:
        made.close()
