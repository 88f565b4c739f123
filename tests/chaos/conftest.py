"""One parent of workers and one folder of trained models for all chaos tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from streams.messages import AGENTS
from tests.chaos.scene import Forge, Stage, forge


@pytest.fixture(scope="session")
def workers() -> Iterator[Forge]:
    with forge() as parent:
        yield parent


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four real models, small and quickly trained."""
    from worker.training.market import generate
    from worker.training.train import ensure_models

    folder = tmp_path_factory.mktemp("models")
    ensure_models(folder, generate(4, 900, 3, signal="planted").bars(), seed=1)
    return folder


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
