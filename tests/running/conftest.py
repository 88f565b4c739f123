"""Workers of two tree models on real servers, and servers with options."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.chaos.scene import TREES, Fields, Forge, Life, Stage, market
from tests.helpers import LIMIT_S, ROOT, wait_for

ACL_FILE = ROOT / "deploy" / "redis" / "users.acl"
PASSWORDS = {name: f"{name}-secret" for name in ("worker", "feed", "reader", "operator")}


@pytest.fixture(scope="session")
def models(tree_models: Path) -> Path:
    return tree_models


@dataclass(frozen=True)
class Server:
    """A redis-server of the test's own, in `directory`."""

    directory: Path
    process: subprocess.Popen[bytes]


@pytest.fixture
def redis_server(tmp_path: Path, needs: Callable[[str], str]) -> Iterator[Callable[..., Server]]:
    """Start a redis-server with options, and wait until its log says that it serves."""
    program = needs("redis-server")
    with ExitStack() as stack:

        def start(*options: str) -> Server:
            log = tmp_path / "redis.log"
            command = [program, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(tmp_path)]
            process = subprocess.Popen([*command, "--logfile", str(log), *options])
            stack.callback(process.wait, LIMIT_S)
            stack.callback(process.terminate)
            wait_for(
                lambda: process.poll() is not None or (log.exists() and "ready to accept" in log.read_text().lower())
            )
            assert process.poll() is None, log.read_text()
            return Server(tmp_path, process)

        yield start


@pytest.fixture
def stage(workers: Forge, models: Path, tmp_path: Path) -> Iterator[Callable[..., Stage]]:
    """A `Stage` of tree models in the default namespace, on the server at `url`."""
    made: list[Stage] = []

    def make(url: str, **env: str) -> Stage:
        made.append(Stage(workers, url, "quartet", models, tmp_path, TREES, env))
        return made[-1]

    yield make
    for each in made:
        each.end()


@pytest.fixture(scope="session")
def bars() -> Sequence[Fields]:
    """60 bars of each of 4 symbols: 31 ready vectors each at the stages' warm-up of 30."""
    return market(4, 60)


def served(life: Life) -> str:
    """Wait for the end of a run; its log. Fails unless it ended well."""
    assert life.wait() == 0, life.text
    return life.text


def acl_with_passwords(folder: Path) -> Path:
    """The ACL file as an operator would complete it."""
    lines = ACL_FILE.read_text().splitlines()
    path = folder / "users.acl"
    text = []
    for line in lines:
        name = line.split()[1]
        text.append(f"{line} >{PASSWORDS[name]}" if name in PASSWORDS else line)
    path.write_text("\n".join(text) + "\n")
    return path
