"""Every query of every panel against a real Prometheus that scraped a real run.

In the run an artifact is refused, bars are rejected and flagged, and an agent is muted by the
safeguard: its limit on the share of one action is set so low that any three-way vote exceeds it.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from tests.chaos.scene import market
from tests.dashboards.scrape import Seen, child, filled, prometheus, up
from tests.dashboards.test_generated import WITH_QUERIES, board, panels, rules
from tests.helpers import environment, free_port, wait_for

AGENTS = ("xgboost", "lightgbm", "nhits")
ROUNDS = 4
"""Portions in which the bars come, so that there are rates to be seen."""


def entries() -> list[dict[bytes, bytes]]:
    """Bars of four symbols; every fortieth comes again with an impossible high, the last four twice."""
    good = market(4, 130)
    bad = [{**fields, b"high": b"0.001"} for fields in good[::40]]
    repeated = good[-4:]
    return [*good, *bad, *repeated]


@pytest.fixture(scope="module")
def seen(
    tmp_path_factory: pytest.TempPathFactory, tree_models: Path, valkey: str, needs: Callable[[str], str]
) -> Iterator[Seen]:
    """Of two real tree models, and a network that is no network."""
    folder = tmp_path_factory.mktemp("run")
    shutil.copytree(tree_models, folder / "models")
    (folder / "models" / "nhits_v20260101_000000_v3.pth").write_bytes(b"PK\x03\x04 cut")
    port = free_port()
    settings = {
        "QUARTET_WARMUP_BARS__V3": "30",
        "QUARTET_AGENTS": ",".join(AGENTS),
        "QUARTET_QUORUM": "2",
        "QUARTET_QUALITY__XGBOOST__ACTION_SHARE": "0.3",
        "NUMBA_CACHE_DIR": os.environ["NUMBA_CACHE_DIR"],
    }
    flags = ["--redis", valkey, "--namespace", folder.name, "--models", folder / "models", "--state-dir", folder]
    worker = [sys.executable, "-m", "worker", "run", *flags, "--http-port", port]
    with (
        prometheus(needs("prometheus"), folder, {"quartet": port}) as scraping,
        child(worker, folder, folder / "worker.log", environment(settings)) as life,
    ):
        wait_for(lambda: life.poll() is not None or up(f"http://127.0.0.1:{port}/metrics"))
        start = time.time()
        assert life.poll() is None, (folder / "worker.log").read_text()
        yield Seen(scraping.url, start, _feed(scraping, valkey, folder.name))


def _feed(seen: Seen, url: str, namespace: str) -> float:
    """Publish the bars in portions, each once the one before was scraped as consumed; the time of the last scrape.

    That one was whole, and whatever becomes of a later one is later.
    """
    rows = entries()
    size = -(-len(rows) // ROUNDS)
    with redis.Redis.from_url(url) as client:
        for first in range(0, len(rows), size):
            pipe = client.pipeline(transaction=False)
            for fields in rows[first : first + size]:
                pipe.xadd(f"{namespace}:bars", fields)
            pipe.execute()
            sent = min(first + size, len(rows))
            wait_for(lambda sent=sent: seen.now("sum(quartet_bars_total)") == sent)
    # Scores, drift and lengths are published every couple of seconds.
    for metric in ("quartet_agent_hit_ratio", "quartet_feature_drift", 'quartet_stream_length{stream="signals"}'):
        wait_for(lambda metric=metric: seen.now(f"count({metric})") > 0)
    wait_for(lambda: seen.now('quartet_stream_lag{stream="bars"}') == 0)
    scraped: list[float] = []
    wait_for(lambda: bool(scraped.append(seen.now("max(timestamp(quartet_ensemble_agents))"))) or scraped[-1] > 0)
    return scraped[-1]


def test_in_the_run_an_agent_was_muted_an_artifact_refused_and_bars_rejected(seen: Seen) -> None:
    states = {
        sample["metric"]["agent"]: sample["metric"]["state"] for sample in seen.at_end("quartet_agent_state == 1")
    }
    assert states == {"xgboost": "muted", "lightgbm": "active", "nhits": "refused"}
    bars = {s["metric"]["outcome"]: float(s["value"][1]) for s in seen.at_end("quartet_bars_total")}
    assert bars["rejected"] > 0
    assert bars["duplicate"] == 4


@pytest.mark.parametrize("name", [name for name in WITH_QUERIES if name != "kafka.json"])  # tests/kafka has it
def test_every_query_of_every_panel_returns_data(seen: Seen, name: str) -> None:
    # A refused agent has neither a version nor votes' figures: those of the others must be there.
    asked = [
        (panel["title"], target, agent)
        for panel in panels(name)
        for target in panel.get("targets", [])
        for agent in (("xgboost", "lightgbm") if "$agent" in target["expr"] else ("",))
    ]
    assert asked
    assert [(title, agent, target["expr"]) for title, target, agent in asked if not seen.data(target, agent)] == []


def test_of_a_refused_agent_state_votes_and_abstentions_are_shown(seen: Seen) -> None:
    """What there is to say of an agent without a model."""
    shown = {
        panel["title"]
        for panel in panels("agents.json")
        for target in panel.get("targets", [])
        if seen.data(target, "nhits")
    }
    assert {"State", "Votes by action", "Abstentions"} <= shown
    assert shown.isdisjoint({"Version", "Hit ratio", "Deviation of the confidence"})


def test_annotations_are_valid_and_those_of_what_happened_have_data(seen: Seen) -> None:
    marks = {mark["name"]: mark["expr"] for mark in board("signal.json")["annotations"]["list"]}
    found = {name: seen.over_time(filled(expr, "")) for name, expr in marks.items()}
    assert {sample["metric"]["agent"] for sample in found["Muted"]} == {"xgboost"}
    assert {sample["metric"]["agent"] for sample in found["Loaded or reloaded"]} == {"xgboost", "lightgbm"}
    assert found["Rolled back"] == []


def test_the_state_timeline_shows_the_state(seen: Seen) -> None:
    panel = next(panel for panel in panels("signal.json") if panel["title"] == "State of each agent")
    texts = {code: value["text"] for code, value in panel["fieldConfig"]["defaults"]["mappings"][0]["options"].items()}
    found = {s["metric"]["agent"]: texts[s["value"][1]] for s in seen.at_end(panel["targets"][0]["expr"])}
    assert found == {"xgboost": "muted", "lightgbm": "active", "nhits": "refused"}


def test_the_variables_find_the_agents(seen: Seen) -> None:
    variable = next(v for v in board("agents.json")["templating"]["list"] if v["name"] == "agent")
    metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]).groups()
    assert set(seen.ask(f"label/{label}/values", **{"match[]": metric})) == set(AGENTS)


def test_prometheus_takes_the_rules_and_evaluates_them_all(seen: Seen) -> None:
    taken = [rule for group in seen.ask("rules")["groups"] for rule in group["rules"]]
    assert {rule["name"] for rule in taken} == {rule["alert"] for rule in rules()}
    assert [rule["lastError"] for rule in taken if rule.get("lastError")] == []
