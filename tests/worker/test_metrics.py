"""Metrics: the names of the contract, closed label sets, and what a dead model looks like."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from streams.contracts import DEFINITIONS
from streams.messages import AGENTS, Action, AgentState, Reason, Status
from worker.metrics import BUCKETS_S, CRITERIA, OUTCOMES, BatchHistogram, Metrics

# Written out from section 5 of the contract, name to labels and type; not derived from the code.
CONTRACT = {
    "quartet_bars_total": ({"outcome"}, "counter"),
    "quartet_bar_flags_total": ({"flag"}, "counter"),
    "quartet_rejected_total": ({"stage", "reason"}, "counter"),
    "quartet_agent_state": ({"agent", "state"}, "gauge"),
    "quartet_agent_info": ({"agent", "version", "contract", "sha256"}, "gauge"),
    "quartet_agent_weight": ({"agent", "kind"}, "gauge"),
    "quartet_agent_votes_total": ({"agent", "action"}, "counter"),
    "quartet_agent_abstentions_total": ({"agent", "reason"}, "counter"),
    "quartet_agent_top_action_ratio": ({"agent"}, "gauge"),
    "quartet_agent_hold_ratio": ({"agent"}, "gauge"),
    "quartet_agent_confidence_stddev": ({"agent"}, "gauge"),
    "quartet_agent_confidence_p10_p90_range": ({"agent"}, "gauge"),
    "quartet_agent_degenerate": ({"agent", "criterion"}, "gauge"),
    # Beyond the contract: canaries that were rolled back, the scoreboard, feature drift, the quorum.
    "quartet_agent_rollbacks_total": ({"agent", "by"}, "counter"),
    "quartet_agent_late_votes_total": ({"agent"}, "counter"),
    "quartet_agent_hit_ratio": ({"agent"}, "gauge"),
    "quartet_agent_signed_return_mean": ({"agent"}, "gauge"),
    "quartet_agent_brier_score": ({"agent"}, "gauge"),
    "quartet_agent_scored_votes": ({"agent"}, "gauge"),
    "quartet_feature_drift": ({"feature"}, "gauge"),
    "quartet_ensemble_quorum": (set(), "gauge"),
    "quartet_agent_inference_seconds": ({"agent"}, "histogram"),
    "quartet_ensemble_agents": ({"kind"}, "gauge"),
    "quartet_ensemble_agreement_ratio": (set(), "gauge"),
    "quartet_ensemble_hard_disagreement_ratio": (set(), "gauge"),
    "quartet_signals_total": ({"action", "status"}, "counter"),
    "quartet_stage_seconds": ({"stage"}, "histogram"),
    "quartet_bar_to_signal_seconds": (set(), "histogram"),
    "quartet_last_bar_timestamp_seconds": (set(), "gauge"),
    "quartet_stream_lag": ({"stream"}, "gauge"),
    "quartet_stream_length": ({"stream"}, "gauge"),
    "quartet_commits_total": ({"result"}, "counter"),
    "quartet_recoveries_total": (set(), "counter"),
}
MOST_SERIES = 800
"""Four agents, everything set, and a canary make about 720; a label that is not closed makes many more."""


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> Metrics:
    return Metrics(registry)


def describe_model(metrics: Metrics, agent: str) -> None:
    """Set everything that only a loaded model has."""
    metrics.agent_info(agent, "20260101_000000", "c" * 64, "f" * 64)
    metrics.configured_weight(agent, 0.3)
    metrics.effective_weight(agent, 0.5)
    metrics.quality(agent, top_action=0.6, hold=0.2, stddev=0.1, p10_p90=0.3)
    metrics.degenerate(agent, [])
    metrics.scores(agent, 500, 0.5, 0.0001, 0.25)


def series(registry: CollectorRegistry) -> set[tuple[str, tuple[tuple[str, str], ...]]]:
    return {(s.name, tuple(sorted(s.labels.items()))) for family in registry.collect() for s in family.samples}


def everything(metrics: Metrics) -> None:
    for agent in AGENTS:
        metrics.agent_state(agent, AgentState.ACTIVE)
        describe_model(metrics, agent)
    metrics.scores("consensus", 500, 0.5, 0.0001, 0.25)
    metrics.drift(dict.fromkeys(DEFINITIONS, 1.0))
    for stream in ("bars", "features", "signals", *(f"votes:{agent}" for agent in AGENTS)):
        metrics.lag(stream, 1)
        metrics.length(stream, 1)


def test_names_labels_and_types_are_those_of_the_contract(registry: CollectorRegistry, metrics: Metrics) -> None:
    everything(metrics)
    found = {}
    for family in registry.collect():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        found[name] = (labels, family.type)
    assert found == CONTRACT


def test_the_number_of_series_is_bounded_whatever_is_called_how_often(
    registry: CollectorRegistry, metrics: Metrics
) -> None:
    for _ in range(3):
        everything(metrics)
        metrics.add_agent("nhits_canary")
        describe_model(metrics, "nhits_canary")
        metrics.bar_to_signal([0.1] * 100)
    assert 500 < len(series(registry)) < MOST_SERIES


def test_promtool_finds_nothing_to_mend(
    registry: CollectorRegistry, metrics: Metrics, needs: Callable[[str], str]
) -> None:
    everything(metrics)
    checked = subprocess.run(
        [needs("promtool"), "check", "metrics"], input=generate_latest(registry), capture_output=True, check=False
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


def test_every_counter_of_a_dead_model_is_0_from_the_start_not_absent(
    registry: CollectorRegistry, metrics: Metrics
) -> None:
    for agent in AGENTS:
        for action in ("BUY", "SELL", "HOLD", "ABSTAIN"):
            labels = {"agent": agent, "action": action}
            assert registry.get_sample_value("quartet_agent_votes_total", labels) == 0
        for reason in Reason:
            labels = {"agent": agent, "reason": str(reason)}
            assert registry.get_sample_value("quartet_agent_abstentions_total", labels) == 0
        assert registry.get_sample_value("quartet_agent_inference_seconds_count", {"agent": agent}) == 0


def test_exactly_one_state_of_an_agent_is_1(registry: CollectorRegistry, metrics: Metrics) -> None:
    for state in AgentState:
        metrics.agent_state("nhits", state)
        values = {
            str(each): registry.get_sample_value("quartet_agent_state", {"agent": "nhits", "state": str(each)})
            for each in AgentState
        }
        assert values == {str(each): float(each is state) for each in AgentState}


@pytest.mark.parametrize("state", [AgentState.REFUSED, AgentState.LOADING])
def test_gauges_of_a_model_that_is_gone_are_removed_not_frozen(
    registry: CollectorRegistry, metrics: Metrics, state: AgentState
) -> None:
    before = series(registry)
    metrics.agent_state("nhits", AgentState.ACTIVE)
    describe_model(metrics, "nhits")
    assert len(series(registry) - before) == 11 + len(CRITERIA)
    metrics.agent_state("nhits", state)
    assert series(registry) == before


def test_what_is_reported_of_a_refused_agent_makes_no_gauges(registry: CollectorRegistry, metrics: Metrics) -> None:
    before = series(registry)
    metrics.agent_state("nhits", AgentState.REFUSED)
    describe_model(metrics, "nhits")
    assert series(registry) == before


@pytest.mark.parametrize("state", [AgentState.MUTED, AgentState.SHADOW, AgentState.ACTIVE, AgentState.WARMING_UP])
def test_gauges_of_a_loaded_model_stay_live(registry: CollectorRegistry, metrics: Metrics, state: AgentState) -> None:
    describe_model(metrics, "nhits")
    before = series(registry)
    metrics.agent_state("nhits", state)
    assert series(registry) == before


def test_a_reload_leaves_one_info_series(registry: CollectorRegistry, metrics: Metrics) -> None:
    for version in ("old", "new"):
        metrics.agent_info("nhits", version, "c", "f")
    infos = [labels for name, labels in series(registry) if name == "quartet_agent_info"]
    assert [dict(labels)["version"] for labels in infos] == ["new"]


def test_a_model_that_comes_back_the_same_has_its_info_again(registry: CollectorRegistry, metrics: Metrics) -> None:
    labels = {"agent": "nhits", "version": "v", "contract": "c", "sha256": "f"}
    for state in (AgentState.ACTIVE, AgentState.REFUSED, AgentState.ACTIVE):
        metrics.agent_state("nhits", state)
        metrics.agent_info("nhits", "v", "c", "f")
    assert registry.get_sample_value("quartet_agent_info", labels) == 1


def test_a_canary_has_series_only_while_there_is_one(registry: CollectorRegistry, metrics: Metrics) -> None:
    before = series(registry)
    metrics.add_agent("nhits_canary")
    describe_model(metrics, "nhits_canary")
    metrics.votes("nhits_canary", Action.BUY, 3)
    assert {dict(labels).get("agent") for _, labels in series(registry) - before} == {"nhits_canary"}
    metrics.remove_agent("nhits_canary")
    assert series(registry) == before
    metrics.add_agent("nhits_canary")
    state = {"agent": "nhits_canary", "state": "loading"}
    assert registry.get_sample_value("quartet_agent_state", state) == 1
    metrics.remove_agent("nhits_canary")
    with pytest.raises(KeyError):
        metrics.votes("nhits_canary", Action.BUY)


def test_counts_add_up(registry: CollectorRegistry, metrics: Metrics) -> None:
    for n, outcome in enumerate(OUTCOMES, start=1):
        metrics.bars(outcome, n)
        metrics.bars(outcome)
    values = [registry.get_sample_value("quartet_bars_total", {"outcome": outcome}) for outcome in OUTCOMES]
    assert values == [2, 3, 4, 5, 6]
    metrics.signals(Action.HOLD, Status.BELOW_QUORUM, 4)
    assert registry.get_sample_value("quartet_signals_total", {"action": "HOLD", "status": "below_quorum"}) == 4
    metrics.rejected("intake", "ohlc", 2)
    assert registry.get_sample_value("quartet_rejected_total", {"stage": "intake", "reason": "ohlc"}) == 2
    metrics.recoveries()
    assert registry.get_sample_value("quartet_recoveries_total") == 1


def test_levels_are_what_was_last_set(registry: CollectorRegistry, metrics: Metrics) -> None:
    metrics.ensemble({"configured": 4, "loaded": 3, "eligible": 2, "voting": 1})
    assert registry.get_sample_value("quartet_ensemble_quorum") is None, "not 0 before it is known"
    metrics.quorum(3)
    assert registry.get_sample_value("quartet_ensemble_quorum") == 3
    metrics.agreement(0.75, 0.25)
    metrics.last_bar(1_700_000_000.5)
    metrics.lag("bars", 12)
    metrics.degenerate("nhits", ["dead_zone"])
    kinds = {
        kind: registry.get_sample_value("quartet_ensemble_agents", {"kind": kind}) for kind in ("loaded", "voting")
    }
    assert kinds == {"loaded": 3, "voting": 1}
    assert registry.get_sample_value("quartet_ensemble_agreement_ratio") == 0.75
    assert registry.get_sample_value("quartet_ensemble_hard_disagreement_ratio") == 0.25
    assert registry.get_sample_value("quartet_last_bar_timestamp_seconds") == 1_700_000_000.5
    assert registry.get_sample_value("quartet_stream_lag", {"stream": "bars"}) == 12
    flags = {
        c: registry.get_sample_value("quartet_agent_degenerate", {"agent": "nhits", "criterion": c}) for c in CRITERIA
    }
    assert flags == {c: float(c == "dead_zone") for c in CRITERIA}


def test_a_label_outside_its_closed_set_is_an_error_and_makes_no_series(
    registry: CollectorRegistry, metrics: Metrics
) -> None:
    before = series(registry)
    calls: list[Callable[[], None]] = [
        lambda: metrics.bars("BTC-USDT"),
        lambda: metrics.flag("odd"),
        lambda: metrics.rejected("intake", "1700000000000-0"),
        lambda: metrics.rejected("elsewhere", "ohlc"),
        lambda: metrics.signals(Action.BUY, Status.STALE),
        lambda: metrics.commits("Connection refused"),
        lambda: metrics.stage("lunch", 1.0),
        lambda: metrics.ensemble({"agreeing": 1}),
        lambda: metrics.degenerate("nhits", ["ugly"]),
        lambda: metrics.votes("dummy", Action.BUY),
    ]
    for call in calls:
        with pytest.raises(KeyError):
            call()
    assert series(registry) == before


@given(st.lists(st.lists(st.floats(0, 20) | st.sampled_from(BUCKETS_S))))
def test_a_batch_histogram_equals_the_librarys_own_fed_one_by_one(batches: list[list[float]]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    batch = BatchHistogram("x_seconds", "x")
    ours.register(batch)
    single = Histogram("x_seconds", "x", registry=theirs, buckets=BUCKETS_S)
    for values in batches:
        batch.observe(values)
        for value in values:
            single.observe(value)
    for sample in next(iter(theirs.collect())).samples:
        if sample.name != "x_seconds_created":
            assert ours.get_sample_value(sample.name, sample.labels) == pytest.approx(sample.value, rel=1e-12)
