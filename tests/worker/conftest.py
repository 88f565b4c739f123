"""Trained versions of one agent for all tests of orders."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def versions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `models`, `next` and `lazy`: see `tests.worker.orders.train`."""
    from tests.worker.orders import train

    folder = tmp_path_factory.mktemp("versions")
    train(folder)
    return folder


@pytest.fixture
def models(versions: Path, tmp_path: Path) -> Path:
    """A models folder of the test's own."""
    return Path(shutil.copytree(versions / "models", tmp_path / "models"))


@pytest.fixture
def desk(models: Path) -> Iterator[Callable[..., Any]]:
    """Make workers over streams in memory, closed at the end."""
    from tests.worker.orders import Desk

    made: list[Desk] = []

    def make(**settings: Any) -> Desk:
        made.append(Desk(models, **settings))
        return made[-1]

    yield make
    for one in made:
        one.close()
