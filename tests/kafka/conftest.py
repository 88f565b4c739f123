"""One broker for all tests of a file; a namespace keeps the tests apart."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.scene import TREES, Forge
from tests.kafka.cluster import Cluster, any_cluster
from tests.kafka.scene import Group
from worker.training.market import generate
from worker.training.train import train_agents

_numbers = itertools.count()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with any_cluster() as running:
        yield running


@pytest.fixture(scope="session")
def models(tree_models: Path) -> Path:
    return tree_models


@pytest.fixture(scope="session")
def all_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All four, trained for an instant."""
    folder = tmp_path_factory.mktemp("all")
    train_agents(generate(4, 600, 3, signal="planted").bars(), folder, seed=1)
    return folder


@pytest.fixture
def group(workers: Forge, cluster: Cluster, tmp_path: Path) -> Iterator[Callable[..., Group]]:
    """Make a `Group` over a folder of models; whatever is given further is its own."""
    made: list[Group] = []

    def make(models: Path, agents: Sequence[str] = TREES, **given: Any) -> Group:
        made.append(Group(workers, cluster, f"k{os.getpid()}x{next(_numbers)}", models, tmp_path, agents, **given))
        return made[-1]

    yield make
    for each in made:
        each.end()
