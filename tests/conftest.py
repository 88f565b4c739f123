"""What all tests share: real servers, workers and models, and the rule that a missing part never hides a failure.

`pytest` alone skips what this machine lacks; with `CI=true` the same test fails. Every server is
a child of the test process and is stopped by its own process id.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from streams import embedded
from tests.helpers import LIMIT_S, ROOT, answers, free_port, missing, wait_for

if TYPE_CHECKING:
    from tests.chaos.scene import Forge

# Compiled kernels are kept between runs and shared by workers and by the programs that tests start.
os.environ.setdefault("NUMBA_CACHE_DIR", str(ROOT / ".quartet" / "numba"))
for variable in [name for name in os.environ if name.startswith("QUARTET_") and not name.startswith("QUARTET_TEST_")]:
    del os.environ[variable]

# A shell that runs the suite in the background lets it ignore Ctrl-C, and so would the programs that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in every run, and no limit on time: `--hypothesis-profile default` looks for new ones.
settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("same")

_numbers = itertools.count()


@pytest.fixture(scope="session")
def needs() -> Callable[[str], str]:
    """Give the path of a program, or skip; `needs("promtool")`."""

    def find(program: str) -> str:
        path = shutil.which(program)
        if path is None:
            missing(f"the program {program}")
        return str(path)

    return find


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of an embedded Valkey that lives as long as the session."""
    with embedded.start(tmp_path_factory.mktemp("valkey")) as server:
        yield server.url


@pytest.fixture(scope="session")
def redis7(tmp_path_factory: pytest.TempPathFactory, needs: Callable[[str], str]) -> Iterator[str]:
    """The URL of a redis-server of this machine's own, which lives as long as the session."""
    program = needs("redis-server")
    directory = tmp_path_factory.mktemp("redis")
    port = free_port()
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    with (directory / "redis.log").open("wb") as log:
        child = subprocess.Popen([program, *options], cwd=directory, stdout=log, stderr=subprocess.STDOUT)
    url = f"redis://127.0.0.1:{port}/0"
    try:
        wait_for(lambda: answers(url) or child.poll() is not None)
        assert child.poll() is None, (directory / "redis.log").read_text()
        yield url
    finally:
        child.terminate()
        child.wait(LIMIT_S)


@pytest.fixture(params=["valkey", "redis7"])
def server(request: pytest.FixtureRequest) -> str:
    """The URL of each kind of server in turn. Use `namespace` to keep apart from other tests."""
    return str(request.getfixturevalue(request.param))


@pytest.fixture
def namespace() -> str:
    """A namespace that no other test uses."""
    return f"t{os.getpid()}x{next(_numbers)}"


@pytest.fixture(scope="session")
def workers() -> Iterator[Forge]:
    """The parent of the workers that tests start and kill."""
    from tests.chaos.scene import forge

    with forge() as parent:
        yield parent


@pytest.fixture(scope="session")
def four_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four real models, small and quickly trained. Tests change copies only."""
    from worker.training.market import generate
    from worker.training.train import ensure_models

    folder = tmp_path_factory.mktemp("models")
    ensure_models(folder, generate(4, 900, 3, signal="planted").bars(), seed=1)
    return folder


@pytest.fixture(scope="session")
def tree_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two real tree models, trained in an instant. Tests change copies only."""
    from tests.chaos.scene import TREES
    from worker.training.market import generate
    from worker.training.train import train_agents

    folder = tmp_path_factory.mktemp("models")
    train_agents(generate(4, 600, 3, signal="planted").bars(), folder, agents=TREES, seed=1)
    return folder
