"""Small things that tests call: wait, find a port, run the program."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import redis

ROOT = Path(__file__).parent.parent
LIMIT_S = 120.0
"""What nothing ever needs, on however busy a machine: whoever waits longer waits for something that hangs."""
PORTS = range(12_000, 32_000)
"""Below those that the kernel hands out to whoever asks for any."""


def missing(part: str) -> None:
    """Skip the test that needs `part`, or fail it where CI=true says that everything must be there."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{part} is missing, and CI=true lets no test be skipped for that; .ci/run installs it")
    pytest.skip(f"{part} is not installed here")


def free_port() -> int:
    """A loopback port that is free, and that no other process is given by chance before it is used."""
    while True:
        port = random.SystemRandom().choice(PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def answers(url: str) -> bool:
    """Whether a Redis at `url` serves."""
    with redis.Redis.from_url(url, socket_connect_timeout=1.0) as client:
        try:
            return bool(client.ping())
        except redis.RedisError:
            return False


def wait_for(condition: Callable[[], bool], limit_s: float = LIMIT_S) -> None:
    """Return once `condition` holds; fail after `limit_s`."""
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"the condition did not hold within {limit_s} s")
        time.sleep(0.01)


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a program that a test starts: none of this machine's settings."""
    own = {k: v for k, v in os.environ.items() if not k.startswith("QUARTET_") or k.startswith("QUARTET_TEST_")}
    return {**own, "PYTHONPATH": str(ROOT), "NO_COLOR": "1", "COLUMNS": "120", **(extra or {})}


def quartet(
    *arguments: str | Path, cwd: Path, env: Mapping[str, str] | None = None, timeout_s: float = 3 * LIMIT_S
) -> subprocess.CompletedProcess[str]:
    """Run the program to its end, in `cwd`, as a user would."""
    return subprocess.run(
        [sys.executable, "-m", "worker", *map(str, arguments)],
        cwd=cwd,
        env=environment(env),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
