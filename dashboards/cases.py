"""Unit tests of the alert rules, for `promtool test rules`: each alert firing and silent, and where that begins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dashboards.alerts import Alert, pages, tickets
from dashboards.edges import ACCEPTED, BELOW, EDGES, OK, READS, REJECTED, STEP, Edge, Series

UNCLOSED = 'quartet_bars_total{outcome="unclosed"}'


@dataclass(frozen=True)
class Case:
    """`firing` and `silent` series, and when they are looked at; `fills` are what the templates come to."""

    alert: str
    firing: Series
    silent: tuple[Series, ...]
    at: str
    labels: Mapping[str, str] = field(default_factory=dict)
    fills: Mapping[str, str] = field(default_factory=dict)
    also: tuple[Series, ...] = ()
    """Other series on which it fires, at the same time with the same words."""


def _constant(value: float, steps: int) -> str:
    return f"{value:g}x{steps}"


def _warming(value: int, steps: int) -> dict[str, str]:
    return {'quartet_agent_state{agent="nhits",state="warming_up"}': _constant(value, steps)}


def _state(state: str, value: int, agent: str = "nhits") -> dict[str, str]:
    return {f'quartet_agent_state{{agent="{agent}",state="{state}"}}': _constant(value, 60)}


NO_EXCUSES = (
    _state("warming_up", 1, "nhits_canary"),
    {**_warming(1, 60), **_state("refused", 1, "xgboost")},
    {**_warming(1, 60), **_state("muted", 1, "xgboost")},
)
"""A warm-up that does not explain why there is no signal."""


CASES = (
    Case(
        "QuartetBelowQuorum",
        {BELOW: "0+1x60", OK: "0x60", **_warming(0, 60)},
        (
            {BELOW: "0+1x60", OK: "0+1x60", **_warming(0, 60)},
            {BELOW: "0+1x60", OK: "0x60", **_warming(1, 60)},
            {BELOW: "0x60", OK: "0x60", **_warming(0, 60)},
        ),
        "10m",
        fills={"{{ $value | humanizePercentage }}": "100%"},
        also=tuple({BELOW: "0+1x60", OK: "0x60", **states} for states in NO_EXCUSES),
    ),
    Case(
        "QuartetNoFreshBar",
        {"quartet_last_bar_timestamp_seconds": "30x60"},
        (
            {"quartet_last_bar_timestamp_seconds": "0+15x60"},
            {"quartet_last_bar_timestamp_seconds": "0x8 120+15x50"},
            # 180 s old at 10 minutes, and not over it.
            {"quartet_last_bar_timestamp_seconds": "420x60"},
        ),
        "10m",
        also=(
            {"quartet_last_bar_timestamp_seconds": "419x60"},
            {"quartet_last_bar_timestamp_seconds": "0x60"},
        ),
    ),
    Case(
        "QuartetNoSignals",
        {ACCEPTED: "0+1x60", OK: "0x60", **_warming(0, 60)},
        (
            {ACCEPTED: "0+1x60", OK: "0+1x60", **_warming(0, 60)},
            {ACCEPTED: "0+1x60", OK: "0x60", **_warming(1, 60)},
            {ACCEPTED: "0x60", OK: "0x60", **_warming(0, 60)},
        ),
        "10m",
        also=(
            *({ACCEPTED: "0+1x60", OK: "0x60", **states} for states in NO_EXCUSES),
            # Of stages as processes the consensus is down: nobody counts signals at all.
            {ACCEPTED: "0+1x60", **_warming(0, 60)},
        ),
    ),
    Case(
        "QuartetWorkerDown",
        {'up{job="quartet",instance="a"}': "1x10 0x50"},
        ({'up{job="quartet",instance="a"}': "1x10 0x50", 'up{job="quartet",instance="b"}': "1x60"},),
        "10m",
    ),
    Case(
        "QuartetWorkerStalled",
        {READS: "0+20x20 400x40"},
        ({READS: "0+20x60"}, {READS[:-1] + ',instance="a"}': "0x60", READS[:-1] + ',instance="b"}': "0+20x60"}),
        "10m",
    ),
    Case(
        "QuartetAgentMuted",
        _state("muted", 1),
        (_state("muted", 0),),
        "10m",
        labels={"agent": "nhits"},
    ),
    Case(
        "QuartetAgentRefused",
        _state("refused", 1),
        (_state("refused", 0),),
        "10m",
        labels={"agent": "nhits"},
    ),
    Case(
        "QuartetAgentLate",
        {'quartet_agent_abstentions_total{agent="nhits",reason="deadline_missed"}': "0x20 0+1x40"},
        (
            {'quartet_agent_abstentions_total{agent="nhits",reason="deadline_missed"}': "3x60"},
            {'quartet_agent_abstentions_total{agent="nhits",reason="insufficient_history"}': "0+1x60"},
        ),
        "10m",
        labels={"agent": "nhits"},
    ),
    Case(
        "QuartetRejects",
        {ACCEPTED: "0+9x80", REJECTED: "0+1x80"},
        (
            {ACCEPTED: "0+99x80", REJECTED: "0+1x80"},
            # Half of them, but only some 120 in four hours: too few to say.
            {ACCEPTED: "0+1x60 60x20", REJECTED: "0+1x60 60x20"},
        ),
        "20m",
        fills={"{{ $value | humanizePercentage }}": "10%"},
        also=({ACCEPTED: "0+9x80", REJECTED: "0+1x80", UNCLOSED: "0+90x80"},),
    ),
    Case(
        "QuartetLagGrowing",
        {'quartet_stream_lag{stream="bars"}': "1000+10x160"},
        (
            {'quartet_stream_lag{stream="bars"}': "4000-10x160"},
            # The worker was away for a while and catches up: it jumped, and only falls since.
            {'quartet_stream_lag{stream="bars"}': "0x80 9000-50x120"},
            {'quartet_stream_lag{stream="bars"}': " ".join(["0 5000 2500 0"] * 40)},
            # Nobody's grows who has many: a bridge catches up, and a worker has a few.
            {
                'quartet_stream_lag{stream="bars",instance="bridge"}': "9000-10x160",
                'quartet_stream_lag{stream="bars",instance="worker"}': "0+1x160",
            },
        ),
        # The least of the last five minutes is the sample of 26 minutes, the 105th.
        "31m",
        labels={"stream": "bars"},
        fills={"{{ $value }}": "2040"},
    ),
    Case(
        "QuartetRebalancing",
        {'quartet_kafka_rebalances_total{instance="a"}': "0+1x160"},
        # A rolling restart of three workers, two rebalances each.
        ({'quartet_kafka_rebalances_total{instance="a"}': "0x40 1 2 3 4 5 6 6x120"},),
        "31m",
        fills={"{{ $value | humanize }}": "120"},
    ),
    Case(
        "QuartetStreamLength",
        {'quartet_stream_length{stream="signals"}': "3000000x160"},
        ({'quartet_stream_length{stream="signals"}': "1010000x160"},),
        "16m",
        labels={"stream": "signals"},
        fills={"{{ $value | humanize }}": "3M"},
    ),
    Case(
        "QuartetInputLost",
        # A worker counts what was lost as it starts: the first sample that anybody reads has it already.
        {'quartet_bars_total{outcome="lost"}': "_x10 400x40"},
        ({'quartet_bars_total{outcome="lost"}': "0x50"},),
        "10m",
        fills={"{{ $value | humanize }}": "400"},
    ),
    Case(
        "QuartetPoison",
        {'quartet_rejected_total{stage="intake",reason="poison"}': "0x10 1x40"},
        ({'quartet_rejected_total{stage="intake",reason="ohlc"}': "0x10 1x40"},),
        "10m",
    ),
    Case(
        "QuartetAgentsDisagree",
        {"quartet_ensemble_hard_disagreement_ratio": "0.4x160", OK: "0+10x160"},
        (
            {"quartet_ensemble_hard_disagreement_ratio": "0.1x160", OK: "0+10x160"},
            {"quartet_ensemble_hard_disagreement_ratio": "0.4x160", OK: "0+1x160"},
        ),
        "21m",
        fills={"{{ $value | humanizePercentage }}": "40%"},
    ),
    Case(
        "QuartetAgreementLow",
        {"quartet_ensemble_agreement_ratio": "0.4x160", OK: "0+10x160"},
        (
            {"quartet_ensemble_agreement_ratio": "0.7x160", OK: "0+10x160"},
            {"quartet_ensemble_agreement_ratio": "0.4x160", OK: "0+1x160"},
            # Signals on which too few voted to agree: the ratio is not exposed.
            {OK: "0+10x160"},
        ),
        "21m",
        fills={"{{ $value | humanizePercentage }}": "40%"},
    ),
    Case(
        "QuartetAgreementHigh",
        {"quartet_ensemble_agreement_ratio": "0.9x160", OK: "0+10x160"},
        (
            {"quartet_ensemble_agreement_ratio": "0.7x160", OK: "0+10x160"},
            {"quartet_ensemble_agreement_ratio": "0.9x160", OK: "0+1x160"},
        ),
        "21m",
        fills={"{{ $value | humanizePercentage }}": "90%"},
    ),
    Case(
        "QuartetCanaryRolledBack",
        {'quartet_agent_rollbacks_total{agent="nhits",by="safeguard"}': "0x10 1x40"},
        (
            {'quartet_agent_rollbacks_total{agent="nhits",by="operator"}': "0x10 1x40"},
            {'quartet_agent_rollbacks_total{agent="nhits",by="safeguard"}': "1x50"},
        ),
        "10m",
        labels={"agent": "nhits"},
    ),
)


def rule_tests() -> dict[str, Any]:
    """The test file. Raises `KeyError` where an alert has no case."""
    cases = {case.alert: case for case in CASES}
    tests: list[dict[str, Any]] = []
    for alert in (*pages(), *tickets()):
        case = cases.pop(alert.name)
        tests.append(_test(case, case.firing, [_expected(alert, case)]))
        tests.extend(_test(case, series, [_expected(alert, case)]) for series in case.also)
        tests.extend(_test(case, series, []) for series in case.silent)
        tests.extend(_edge(alert, edge) for edge in EDGES if edge.alert == alert.name)
    if unknown := [*cases, *({edge.alert for edge in EDGES} - {alert.name for alert in (*pages(), *tickets())})]:
        raise KeyError(f"cases of alerts that do not exist: {', '.join(unknown)}")
    return {"rule_files": ["rules.yml"], "evaluation_interval": STEP, "tests": tests}


def _test(case: Case, series: Series, expected: list[dict[str, Any]]) -> dict[str, Any]:
    name = f"{case.alert} {'fires' if expected else 'is silent'}"
    return _on(name, series, [{"alertname": case.alert, "eval_time": case.at, "exp_alerts": expected}])


def _edge(alert: Alert, edge: Edge) -> dict[str, Any]:
    looks = {edge.silent: [], edge.fires: [_expected(alert, edge)]}
    tests = [{"alertname": edge.alert, "eval_time": at, "exp_alerts": expected} for at, expected in looks.items() if at]
    return _on(f"{edge.alert}: {edge.name}", edge.series, tests)


def _on(name: str, series: Series, tests: list[dict[str, Any]]) -> dict[str, Any]:
    inputs = [{"series": one, "values": values} for one, values in series.items()]
    return {"name": name, "interval": STEP, "input_series": inputs, "alert_rule_test": tests}


def _expected(alert: Alert, case: Case | Edge) -> dict[str, Any]:
    fills = {**{f"{{{{ $labels.{name} }}}}": value for name, value in case.labels.items()}, **case.fills}
    annotations = alert.annotations()
    for template, value in fills.items():
        annotations = {name: text.replace(template, value) for name, text in annotations.items()}
    return {"exp_labels": {"severity": alert.severity, **case.labels}, "exp_annotations": annotations}
