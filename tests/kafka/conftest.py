"""One broker for all tests of a file; a namespace keeps the tests apart."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kafka.cluster import Cluster, any_cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with any_cluster() as running:
        yield running
