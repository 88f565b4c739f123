"""Every query of the Kafka dashboard against a real Prometheus that scraped a worker and a bridge at work."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from dashboards.kafka import OF_BRIDGE, OF_WORKERS
from streams.keys import Keys
from tests.chaos.scene import TREES, Forge, Life, market, until
from tests.dashboards.scrape import Seen, child, filled, prometheus, up
from tests.dashboards.test_generated import panels, rules
from tests.helpers import environment, free_port, wait_for
from tests.kafka.cluster import Cluster
from tests.kafka.scene import Group

BARS = market(4, 60)
ROUNDS = 3
"""Portions in which the bars come, so that there are rates to be seen."""


@pytest.fixture(scope="module")
def seen(
    tmp_path_factory: pytest.TempPathFactory,
    needs: Callable[[str], str],
    workers: Forge,
    cluster: Cluster,
    models: Path,
    valkey: str,
) -> Iterator[Seen]:
    """Bars go to Redis, from there over the bridge to Kafka, and a worker makes signals of them."""
    folder = tmp_path_factory.mktemp("dashboard")
    namespace, of_worker, of_bridge = f"dashboard{os.getpid()}", free_port(), free_port()
    group = Group(workers, cluster, namespace, models, folder, TREES)
    bridge = [sys.executable, "-m", "worker", "bridge", "--from", valkey, "--to", cluster.url]
    bridge += ["--namespace", namespace, "--http-port", of_bridge]
    log = folder / "bridge.log"
    targets = {"quartet": of_worker, "quartet-bridge": of_bridge}
    with (
        prometheus(needs("prometheus"), folder, targets) as scraping,
        child(bridge, folder, log, environment()) as carrier,
    ):
        try:
            life = group.serve("--http-port", str(of_worker))
            wait_for(lambda: carrier.poll() is not None or up(f"http://127.0.0.1:{of_bridge}/metrics"))
            assert carrier.poll() is None, log.read_text()
            start = time.time()
            yield Seen(scraping.url, start, _feed(scraping, valkey, namespace, life))
        finally:
            group.end()


def _feed(seen: Seen, url: str, namespace: str, life: Life) -> float:
    """Publish the bars in portions, each once the one before was scraped as carried and as consumed; the time then."""
    size = len(BARS) // ROUNDS
    with redis.Redis.from_url(url) as client:
        for first in range(0, len(BARS), size):
            for fields in BARS[first : first + size]:
                client.xadd(Keys(namespace).bars, fields)
            for metric in ("quartet_bridge_bars_total", "quartet_bars_total"):
                until(lambda metric=metric, sent=first + size: seen.now(f"sum({metric})") == sent, life)
    until(lambda: seen.now("sum(quartet_stream_lag) == 0 and count(quartet_stream_lag) == 2") == 0, life)
    return seen.now("max(timestamp(quartet_stream_lag))")


def test_every_query_of_every_panel_returns_data(seen: Seen) -> None:
    asked = [(panel["title"], target) for panel in panels("kafka.json") for target in panel.get("targets", [])]
    assert asked
    assert [(title, target["expr"]) for title, target in asked if not seen.data(target)] == []


def test_the_panels_show_what_happened(seen: Seen) -> None:
    targets = {panel["title"]: panel["targets"][0] for panel in panels("kafka.json")}
    figures = ("Workers", "Lag of all partitions", "Lag of the bridge", "Lag by topic")
    at_end = [[float(s["value"][1]) for s in seen.at_end(filled(targets[title]["expr"]))] for title in figures]
    assert at_end == [[1], [0], [0], [0]]
    rates = {
        series["metric"].get("outcome", "records"): max(float(value) for _, value in series["values"])
        for title in ("Bridge: bars by outcome", "Bridge: records a second")
        for series in seen.data(targets[title])
    }
    assert {what for what, rate in rates.items() if rate > 0} == {"carried", "records"}


def test_the_lag_of_workers_and_that_of_the_bridge_are_told_apart(seen: Seen) -> None:
    """They have one name, and the same stream."""
    of = [[s["metric"]["job"] for s in seen.at_end(e)] for e in ("quartet_stream_lag", OF_WORKERS, OF_BRIDGE)]
    assert [sorted(jobs) for jobs in of] == [["quartet", "quartet-bridge"], ["quartet"], ["quartet-bridge"]]


def test_a_worker_on_kafka_tells_what_the_rules_that_page_look_at(seen: Seen) -> None:
    looked_at = {
        n for rule in rules() if rule["labels"]["severity"] == "page" for n in re.findall(r"quartet_\w+", rule["expr"])
    }
    assert looked_at
    assert looked_at - set(seen.ask("label/__name__/values", **{"match[]": '{job="quartet"}'})) == set()
    assert seen.at_end('rate(quartet_stage_seconds_count{stage="read"}[30s]) > 0')
    taken = [rule for group in seen.ask("rules")["groups"] for rule in group["rules"]]
    assert [rule["lastError"] for rule in taken if rule.get("lastError")] == []
