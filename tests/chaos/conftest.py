"""Workers on four models, to be killed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from streams.messages import AGENTS
from tests.chaos.scene import Forge, Stage


@pytest.fixture(scope="session")
def models(four_models: Path) -> Path:
    return four_models


@pytest.fixture
def stage(workers: Forge, models: Path, tmp_path: Path, namespace: str) -> Iterator[Callable[..., Stage]]:
    """Make a `Stage`: of a server's URL, and its agents."""
    made: list[Stage] = []

    def make(url: str, agents: tuple[str, ...] = AGENTS, name: str = "", **env: str) -> Stage:
        made.append(Stage(workers, url, namespace + name, models, tmp_path, agents, env))
        return made[-1]

    yield make
    for each in made:
        each.end()
