"""What the worker tells a service manager, read from a real socket."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from worker.notify import EVERY_S, Notifier


class Manager:
    """The receiving end of `NOTIFY_SOCKET`."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self._socket.settimeout(0.0)

    def said(self) -> list[str]:
        """The messages since the last call; a datagram is there once it was sent."""
        found = []
        while True:
            try:
                found.append(self._socket.recv(4096).decode())
            except BlockingIOError:
                return found

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path, namespace: str) -> Iterator[Manager]:
    made = Manager(str(tmp_path / "notify") if request.param == "path" else f"@quartet-{namespace}")
    yield made
    made.close()


def test_readiness_status_and_the_end_are_one_message_each(manager: Manager) -> None:
    notifier = Notifier(manager.address)
    notifier.status("standing by")
    notifier.ready("serving quartet")
    notifier.stopping()
    assert [message.split("\n")[0] for message in manager.said()] == ["STATUS=standing by", "READY=1", "STOPPING=1"]


def test_before_readiness_a_turn_asks_for_time_and_after_it_feeds_the_watchdog(manager: Manager) -> None:
    now = [0.0]
    notifier = Notifier(manager.address, lambda: now[0])
    notifier.alive()
    assert manager.said() == ["EXTEND_TIMEOUT_USEC=60000000"]
    notifier.ready("serving")
    manager.said()
    now[0] = EVERY_S
    notifier.alive()
    assert [message.split("\n")[-1] for message in manager.said()] == ["WATCHDOG=1"]


def test_thousands_of_turns_a_second_send_one_sign_of_life_a_second(manager: Manager) -> None:
    now = [0.0]
    notifier = Notifier(manager.address, lambda: now[0])
    notifier.ready("serving")
    manager.said()
    for thousandth in range(3_000):
        now[0] = thousandth / 1000
        notifier.alive()
    assert len(manager.said()) == 3


def test_without_a_manager_nothing_is_sent_and_with_a_dead_one_nothing_fails(tmp_path: Path) -> None:
    for notifier in (Notifier.from_environment({}), Notifier(str(tmp_path / "gone"))):
        notifier.ready("serving")
        notifier.alive()
        notifier.stopping()


def test_the_address_comes_from_the_environment(manager: Manager) -> None:
    Notifier.from_environment({"NOTIFY_SOCKET": manager.address}).status("here")
    assert manager.said() == ["STATUS=here"]
