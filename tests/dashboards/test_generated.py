"""The committed dashboards and rules are what the code writes, and keep to the conventions."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from grafana_foundation_sdk.models.dashboard import Dashboard
from prometheus_client import CollectorRegistry
from ruamel.yaml import YAML

from dashboards.__main__ import HERE, files
from dashboards.runbook import FILE, sections
from streams.messages import AgentState, Event, Reason, Status
from tests.helpers import ROOT
from worker.metrics import BridgeMetrics, Metrics
from worker.sensors import Sensors

GRAFANA = HERE / "grafana"
NAMES = sorted(path.name for path in GRAFANA.glob("*.json"))
WITH_QUERIES = [name for name in NAMES if name != "runbook.json"]


@cache
def board(name: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((GRAFANA / name).read_text())
    return value


def panels(name: str) -> Iterator[dict[str, Any]]:
    """Every panel, those inside of collapsed rows too."""
    for panel in board(name)["panels"]:
        yield panel
        yield from panel.get("panels", [])


def queries(name: str) -> Iterator[tuple[str, str]]:
    """Title and expression of every query, annotations too."""
    for panel in panels(name):
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]
    for mark in board(name)["annotations"].get("list", []):
        yield mark["name"], mark["expr"]


def test_regenerating_gives_no_difference() -> None:
    written = files()
    committed = {str(p.relative_to(HERE)) for folder in ("grafana", "prometheus") for p in (HERE / folder).iterdir()}
    assert committed == set(written)
    for name, text in written.items():
        assert (HERE / name).read_text() == text, f"{name} differs: run `python -m dashboards`"


def test_there_are_five_dashboards_and_the_runbook() -> None:
    assert NAMES == ["agents.json", "feed.json", "kafka.json", "pipeline.json", "runbook.json", "signal.json"]
    assert board("signal.json")["title"] == "Can I trust the signal now"


@pytest.mark.parametrize("name", NAMES)
def test_a_dashboard_survives_the_types_of_the_sdk(name: str) -> None:
    """Whatever the SDK's types do not know would be lost on the way; `id` null and the marks' texts aside."""
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins

    register_default_plugins()
    raw = board(name)
    again = json.loads(json.dumps(Dashboard.from_json(raw), cls=JSONEncoder))
    for mark in raw["annotations"].get("list", []):
        for key in ("titleFormat", "tagKeys", "step"):
            assert mark[key]
    beyond = {"titleFormat", "tagKeys", "step"}
    marks = [{k: v for k, v in m.items() if k not in beyond} for m in raw["annotations"].get("list", [])]
    assert again["annotations"].get("list", []) == marks
    drop = ("id", "annotations")
    assert {k: v for k, v in again.items() if k not in drop} == {k: v for k, v in raw.items() if k not in drop}


@pytest.mark.parametrize("name", NAMES)
def test_nothing_makes_a_provisioned_dashboard_open_empty(name: str) -> None:
    text, raw = (GRAFANA / name).read_text(), board(name)
    assert "${DS_" not in text
    assert "__inputs" not in text
    assert raw["id"] is None
    assert raw["uid"] == f"quartet-{name.removesuffix('.json')}"
    sources = [v for v in raw["templating"].get("list", []) if v["type"] == "datasource"]
    assert len(sources) == (0 if name == "runbook.json" else 1)
    for panel in panels(name):
        if panel["type"] in ("row", "text"):
            continue
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert all(target["datasource"] == panel["datasource"] for target in panel["targets"])


@pytest.mark.parametrize("name", NAMES)
def test_panels_have_ids_and_a_place_of_their_own(name: str) -> None:
    found = list(panels(name))
    ids = [panel["id"] for panel in found]
    assert len(set(ids)) == len(ids)
    assert all(isinstance(i, int) and i > 0 for i in ids)
    for panel in found:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
    for a, b in combinations([panel["gridPos"] for panel in found], 2):
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        above = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert beside or above, f"{a} and {b} overlap"


@pytest.mark.parametrize("name", WITH_QUERIES)
def test_every_panel_says_what_it_shows_in_which_unit_and_where_to_read_on(name: str) -> None:
    for panel in panels(name):
        if panel["type"] == "row":
            continue
        title = panel["title"]
        assert len(panel["description"]) > 15, title
        defaults = panel["fieldConfig"]["defaults"]
        assert defaults["unit"], title
        assert defaults["thresholds"]["steps"], title
        assert defaults["thresholds"]["steps"][0]["value"] is None, title
        assert [t["refId"] for t in panel["targets"]] == [chr(ord("A") + n) for n in range(len(panel["targets"]))]
        assert panel["links"], title
        for link in panel["links"]:
            assert link["url"] in runbook_links(), title


def runbook_links() -> dict[str, str]:
    """Link to the title of the runbook's panel that it shows."""
    return {f"/d/quartet-runbook?viewPanel={panel['id']}": panel["title"] for panel in panels("runbook.json")}


def test_a_link_to_the_runbook_opens_the_section_that_it_names() -> None:
    links = runbook_links()
    for name in WITH_QUERIES:
        for panel in panels(name):
            for link in panel.get("links", []):
                assert link["title"] == f"Runbook: {links[link['url']]}"
    for rule in rules():
        assert links[rule["annotations"]["runbook_url"].removeprefix("http://127.0.0.1:3000")] == rule["alert"]


@pytest.mark.parametrize("name", WITH_QUERIES)
def test_variables_annotations_and_links_are_there(name: str) -> None:
    raw = board(name)
    variables = {variable["name"] for variable in raw["templating"]["list"]}
    assert {"datasource"} <= variables <= {"datasource", "agent", "interval"}
    used = {word for _, expr in queries(name) for word in re.findall(r"\$(\w+)", expr)} - {"__rate_interval"}
    assert used <= variables
    assert variables - {"datasource"} <= used
    assert {mark["name"] for mark in raw["annotations"]["list"]} == {"Muted", "Loaded or reloaded", "Rolled back"}
    assert any(link["url"] == "/d/quartet-runbook" for link in raw["links"] if link["type"] == "link")


def test_each_agent_has_a_row_of_its_own() -> None:
    rows = [panel for panel in panels("agents.json") if panel["type"] == "row"]
    assert [row["repeat"] for row in rows] == ["agent"]
    below = [panel for panel in panels("agents.json") if panel["gridPos"]["y"] > rows[0]["gridPos"]["y"]]
    assert all('agent="$agent"' in target["expr"] for panel in below for target in panel["targets"])


@pytest.mark.parametrize("name", WITH_QUERIES)
def test_rates_use_the_rate_interval(name: str) -> None:
    for title, expr in queries(name):
        for window in re.findall(r"\[([^\]]+)\]", expr):
            assert window == "$__rate_interval", title


def registered() -> set[str]:
    """The sample names that a worker exposes, on Kafka too, and a bridge."""
    worker, bridge = CollectorRegistry(), CollectorRegistry()
    Metrics(worker).declare_kafka()
    BridgeMetrics(bridge)
    names = set()
    for family in (*worker.collect(), *bridge.collect()):
        names.add(family.name + ("_total" if family.type == "counter" else ""))
        if family.type == "histogram":
            names |= {f"{family.name}_{suffix}" for suffix in ("bucket", "sum", "count")}
    return names


def test_every_metric_in_every_query_and_rule_exists() -> None:
    expressions = [expr for name in WITH_QUERIES for _, expr in queries(name)] + [rule["expr"] for rule in rules()]
    used = {name for expr in expressions for name in re.findall(r"quartet_\w+", expr)}
    assert len(used) > 20
    assert used - registered() == set()


def test_every_metric_of_the_worker_is_shown_somewhere() -> None:
    shown = {
        name for board_ in WITH_QUERIES for _, expr in queries(board_) for name in re.findall(r"quartet_\w+", expr)
    }
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in registered()}
    shown_families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown}
    assert families - shown_families <= {"quartet_agent_signed_return_mean"}


# ------------------------------------------------------------------ rules and the runbook


def rules() -> list[dict[str, Any]]:
    document = YAML(typ="safe").load(HERE / "prometheus" / "rules.yml")
    return [rule for group in document["groups"] for rule in group["rules"]]


def test_a_rollback_by_the_safeguard_and_one_by_an_operator_are_counted_apart() -> None:
    """Only the first is a ticket."""
    registry = CollectorRegistry()
    sensors = Sensors(Metrics(registry))
    sensors.events(
        [
            Event("rolled_back", agent="nhits_canary", reason="action_collapse"),
            Event("rolled_back", agent="nhits_canary", reason="operator"),
            Event("rolled_back", agent="nhits", reason="operator"),
            Event("agent_muted", agent="nhits", reason="action_collapse"),
        ]
    )
    name = "quartet_agent_rollbacks_total"
    counted = {by: registry.get_sample_value(name, {"agent": "nhits", "by": by}) for by in ("safeguard", "operator")}
    assert counted == {"safeguard": 1.0, "operator": 2.0}


def test_ratios_of_the_ensemble_have_no_sample_before_they_are_known() -> None:
    """A 0 at the start would be read as the agents never agreeing, and be a ticket."""
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    names = ("quartet_ensemble_agreement_ratio", "quartet_ensemble_hard_disagreement_ratio")
    assert [registry.get_sample_value(name) for name in names] == [None, None]
    metrics.agreement(0.75, 0.0)
    assert [registry.get_sample_value(name) for name in names] == [0.75, 0.0]


def test_promtool_accepts_the_rules_and_each_fires_and_is_silent(needs: Callable[[str], str]) -> None:
    promtool = needs("promtool")
    for arguments in (["check", "rules", "rules.yml"], ["test", "rules", "rules.test.yml"]):
        done = subprocess.run(
            [promtool, *arguments], cwd=HERE / "prometheus", capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_is_tested_both_ways() -> None:
    document = YAML(typ="safe").load(HERE / "prometheus" / "rules.test.yml")
    seen = {(case["alertname"], bool(case["exp_alerts"])) for t in document["tests"] for case in t["alert_rule_test"]}
    assert seen == {(rule["alert"], fires) for rule in rules() for fires in (True, False)}


def test_symptoms_page_and_everything_else_is_a_ticket() -> None:
    pages = {rule["alert"] for rule in rules() if rule["labels"]["severity"] == "page"}
    assert pages == {f"Quartet{x}" for x in "BelowQuorum NoFreshBar NoSignals WorkerDown WorkerStalled".split()}
    assert {rule["labels"]["severity"] for rule in rules()} == {"page", "ticket"}
    for rule in rules():
        assert {"summary", "description", "runbook_url"} == set(rule["annotations"])
        assert {"for", "keep_firing_for"} <= set(rule)


def test_the_runbook_explains_every_alert_state_status_and_reason() -> None:
    text = FILE.read_text()
    assert {rule["alert"] for rule in rules()} <= set(sections())
    words = set(re.findall(r"`([a-z_0-9]+)`", text))
    for kind in (AgentState, Status, Reason):
        assert {str(member) for member in kind} <= words


def test_rules_for_another_interval_are_other_rules(tmp_path: Path, needs: Callable[[str], str]) -> None:
    made = files(3600, "https://grafana.example/")
    assert "prometheus/rules.test.yml" not in made
    path = tmp_path / "rules.yml"
    path.write_text(made["prometheus/rules.yml"])
    assert subprocess.run([needs("promtool"), "check", "rules", path], capture_output=True, check=False).returncode == 0
    assert "> 10800" in path.read_text()
    assert "https://grafana.example/d/quartet-runbook" in path.read_text()


def test_provisioning_names_the_folder_and_the_source_that_compose_mounts() -> None:
    yaml = YAML(typ="safe")
    provisioning = ROOT / "deploy" / "grafana" / "provisioning"
    source = yaml.load(provisioning / "datasources" / "prometheus.yml")["datasources"][0]
    provider = yaml.load(provisioning / "dashboards" / "quartet.yml")["providers"][0]
    compose = yaml.load(ROOT / "docker-compose.yml")["services"]
    mounts = dict(volume.split(":")[:2] for volume in compose["grafana"]["volumes"])
    assert source["type"] == "prometheus"
    assert source["isDefault"]
    assert source["url"] == "http://prometheus:9090"
    assert mounts["./dashboards/grafana"] == provider["options"]["path"]
    home = compose["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/signal.json"
    scrape = yaml.load(ROOT / "deploy" / "prometheus" / "prometheus.yml")
    assert source["jsonData"]["timeInterval"] == scrape["global"]["scrape_interval"]
