"""Every metric of the program, and the only place that names one.

`Metrics` takes counts of a batch, not single bars, so that a batch of 256 costs about as much as one
of 1. Every label value comes from a closed set and is touched at start: a dead model shows 0, not a
gap. What is not in its set raises `KeyError`. Gauges that describe a loaded model are removed when it
is refused or unloaded, never frozen; those of a muted one stay.

Histograms share `BUCKETS_S`, 0.5 ms to 10 s: one bar through one tree is near the first, a burst of
5,000 symbols near 1 s, and what is over 10 s has stopped being live.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, disable_created_metrics
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from streams.contracts import DEFINITIONS
from streams.messages import AGENTS, CANARY, Action, AgentState, Reason, Status
from streams.validation import REASONS
from worker import quality
from worker.intake import FLAGS, OUTCOMES

BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

STAGES = ("read", "intake", "features", "agents", "safeguard", "consensus", "pack", "commit")
# `lost_reply`: found applied by a later try; `error`: any other refusal, such as that of a full disk.
COMMIT_RESULTS = ("ok", "fenced", "unavailable", "lost_reply", "out_of_memory", "read_only", "error")
CRITERIA = tuple(str(criterion) for criterion in quality.CRITERIA)
ENSEMBLE = ("configured", "loaded", "eligible", "voting")
STANDS = "the series of the shortest interval where most voted, of those fresh within 3 intervals of the newest bar"
BRIDGE_OUTCOMES = ("carried", "rejected", "unclosed", "lost")
ROLLED_BACK_BY = ("safeguard", "operator")


class Metrics:
    """The metrics of one worker, in the registry that it is given."""

    def __init__(self, registry: CollectorRegistry, agents: Sequence[str] = AGENTS) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # the time a series was made is half of the exposition and used by nobody
        self.registry = registry
        self._declare_bars(registry)
        self._declare_agents(registry)
        self._declare_ensemble(registry)
        self._declare_streams(registry)
        self._states: dict[str, AgentState] = {}
        self._infos: dict[str, tuple[str, str, str]] = {}
        for agent in agents:
            self.add_agent(agent)

    def _declare_bars(self, registry: CollectorRegistry) -> None:
        self._bars = _Counts(registry, "quartet_bars", "Input entries by outcome; the sum is what came in", "outcome")
        self._bars.touch(OUTCOMES)
        self._flags = _Counts(registry, "quartet_bar_flags", "Accepted bars that were flagged", "flag")
        self._flags.touch(FLAGS)
        self._rejected = _Counts(registry, "quartet_rejected", "Refused entries", "stage", "reason")
        self._rejected.touch(("intake",), REASONS)
        self._rejected.touch(("control",), ("order",))
        self._rejected.touch(("agent", "consensus"), ("poison",))

    def _declare_agents(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"quartet_agent_{name}", text, ("agent", *labels), registry=registry)

        self._state = gauge("state", "1 for the state an agent is in, 0 for the others", "state")
        self._info = gauge("info", "The artifact in use, always 1", "version", "contract", "sha256")
        self._weight = gauge("weight", f"Weight of an agent's vote; effective: as it counted on {STANDS}", "kind")
        self._top_action = gauge("top_action_ratio", "Share of BUY or of SELL, the larger, among recent votes")
        self._hold = gauge("hold_ratio", "Share of HOLD among recent votes")
        self._stddev = gauge("confidence_stddev", "Standard deviation of the confidence of recent votes")
        self._range = gauge("confidence_p10_p90_range", "Range from the 10th to the 90th percentile of the confidence")
        self._hit_ratio = gauge("hit_ratio", "Share of BUY and SELL votes that the market moved with, 12 bars later")
        self._signed_return = gauge("signed_return_mean", "Mean return 12 bars after BUY, or its negative after SELL")
        self._brier = gauge("brier_score", "Brier score of the confidence of recent votes, 0 is best")
        self._scored = gauge("scored_votes", "Votes among the last 500 scored bars")
        self._degenerate = gauge("degenerate", "1 where a criterion finds an agent's output degenerate", "criterion")
        self._inference = Histogram(
            "quartet_agent_inference_seconds",
            "Time of one batch in a model",
            ("agent",),
            registry=registry,
            buckets=BUCKETS_S,
        )
        self._votes = _Counts(
            registry, "quartet_agent_votes", "Votes by action, abstentions included", "agent", "action"
        )
        self._abstentions = _Counts(registry, "quartet_agent_abstentions", "Abstentions by reason", "agent", "reason")
        self._rollbacks = _Counts(registry, "quartet_agent_rollbacks", "Versions that were rolled back", "agent", "by")
        self._late = _Counts(registry, "quartet_agent_late_votes", "Votes on vectors decided without them", "agent")

    def _declare_ensemble(self, registry: CollectorRegistry) -> None:
        self._ensemble = Gauge(
            "quartet_ensemble_agents",
            f"Agents, from configured to voting; voting: on {STANDS}",
            ("kind",),
            registry=registry,
        )
        for kind in ENSEMBLE:
            self._ensemble.labels(kind)
        self._agreement = LateGauge(
            "quartet_ensemble_agreement_ratio", "Agreeing among the voting, mean over recent signals"
        )
        self._disagreement = LateGauge(
            "quartet_ensemble_hard_disagreement_ratio",
            "Share of recent signals with both a BUY and a SELL among the votes",
        )
        self._quorum = LateGauge("quartet_ensemble_quorum", "Agents that have to say the same for a BUY or SELL")
        registry.register(self._quorum)
        registry.register(self._agreement)
        registry.register(self._disagreement)
        self._drift = Gauge(
            "quartet_feature_drift",
            "Distance of recent features from those the scalers were fitted on, in fitted deviations",
            ("feature",),
            registry=registry,
        )
        self._drifting: frozenset[str] = frozenset()
        self._signals = _Counts(registry, "quartet_signals", "Signals by action and status", "action", "status")
        self._signals.touch((Action.BUY.name, Action.SELL.name), (str(Status.OK),))
        self._signals.touch((Action.HOLD.name,), [str(status) for status in Status if status is not Status.OK])

    def _declare_streams(self, registry: CollectorRegistry) -> None:
        self._stage = Histogram(
            "quartet_stage_seconds", "Time of one batch in a stage", ("stage",), registry=registry, buckets=BUCKETS_S
        )
        for stage in STAGES:
            self._stage.labels(stage)
        self._latency = BatchHistogram(
            "quartet_bar_to_signal_seconds",
            "From a bar's entry (the server's clock) to its committed signal (the worker's); 0 where that is negative",
        )
        registry.register(self._latency)
        self._last_bar = Gauge(
            "quartet_last_bar_timestamp_seconds",
            "When the last bar of the shortest interval arrived (its entry's ID), Unix time; 0 before the first",
            registry=registry,
        )
        self._lag = Gauge("quartet_stream_lag", "Entries not yet consumed", ("stream",), registry=registry)
        self._length = Gauge("quartet_stream_length", "Entries in a stream", ("stream",), registry=registry)
        text = "Tries to commit by result; ok and lost_reply were written, out_of_memory counts refused reads too"
        self._commits = _Counts(registry, "quartet_commits", text, "result")
        self._commits.touch(COMMIT_RESULTS)
        self._recoveries = Counter("quartet_recoveries", "Starts that took up an earlier position", registry=registry)

    def declare_kafka(self) -> None:
        """What only a worker on Kafka has."""
        text = "Times that the group's partitions were dealt out anew"
        self._rebalances = Counter("quartet_kafka_rebalances", text, registry=self.registry)

    # ------------------------------------------------------------------ agents come and go

    def add_agent(self, agent: str) -> None:
        """Touch every series of an agent or of its canary (`nhits_canary`), in state `loading`."""
        self.agent_state(agent, AgentState.LOADING)
        self._inference.labels(agent)
        self._votes.touch((agent,), [action.name for action in Action])
        self._abstentions.touch((agent,), [str(reason) for reason in Reason])
        if not agent.endswith(CANARY):
            self._rollbacks.touch((agent,), ROLLED_BACK_BY)
            self._late.touch((agent,))

    def add_voter(self, agent: str) -> None:
        """Touch what the consensus knows of an agent that runs in a process of its own."""
        self._abstentions.touch((agent,), (str(Reason.DEADLINE_MISSED),))
        self._late.touch((agent,))

    def forget_state(self, agent: str) -> None:
        """Remove the state of an agent whose own process tells it."""
        if self._states.pop(agent, None) is not None:
            for state in AgentState:
                self._state.remove(agent, str(state))

    def remove_agent(self, agent: str) -> None:
        """Remove every series of an agent: of a canary that was promoted or rolled back."""
        self._forget_model(agent)
        self._states.pop(agent, None)
        for state in AgentState:
            self._state.remove(agent, str(state))
        self._inference.remove(agent)
        self._votes.remove(agent)
        self._abstentions.remove(agent)

    def agent_state(self, agent: str, state: AgentState) -> None:
        """Set the one state that holds; to become `refused` or `loading` removes what described the model."""
        if self._states.get(agent) is state:
            return
        self._states[agent] = state
        for each in AgentState:
            self._state.labels(agent, str(each)).set(each is state)
        if state in (AgentState.REFUSED, AgentState.LOADING):
            self._forget_model(agent)

    def agent_info(self, agent: str, version: str, contract: str, sha256: str) -> None:
        """The artifact that serves, in place of the one before."""
        if self._is_refused(agent) or self._infos.get(agent) == (version, contract, sha256):
            return
        self._infos[agent] = version, contract, sha256
        self._info.remove_by_labels({"agent": agent})
        self._info.labels(agent, version, contract, sha256).set(1)

    def configured_weight(self, agent: str, weight: float) -> None:
        """The weight in the settings, from the load on."""
        self._weigh(agent, "configured", weight)

    def effective_weight(self, agent: str, weight: float) -> None:
        """The weight that counted in the vote that stands for the worker, 0 for an agent that did not vote."""
        self._weigh(agent, "effective", weight)

    def _weigh(self, agent: str, kind: str, weight: float) -> None:
        if not self._is_refused(agent):
            self._weight.labels(agent, kind).set(weight)

    def quality(self, agent: str, *, top_action: float, hold: float, stddev: float, p10_p90: float) -> None:
        """The shape of an agent's recent votes; ratios 0..1."""
        if self._is_refused(agent):
            return
        self._top_action.labels(agent).set(top_action)
        self._hold.labels(agent).set(hold)
        self._stddev.labels(agent).set(stddev)
        self._range.labels(agent).set(p10_p90)

    def degenerate(self, agent: str, found: Iterable[str]) -> None:
        """Which of `CRITERIA` find the agent's output degenerate; the others are 0."""
        hits = frozenset(found)
        if not hits <= set(CRITERIA):
            raise KeyError(f"quartet_agent_degenerate: {sorted(hits - set(CRITERIA))} are not among {CRITERIA}")
        if self._is_refused(agent):
            return
        for criterion in CRITERIA:
            self._degenerate.labels(agent, criterion).set(criterion in hits)

    def scores(
        self, agent: str, scored: int, hit_ratio: float | None, signed_return: float | None, brier: float | None
    ) -> None:
        """What the market did after an agent's votes, or after the signals (`consensus`); None is not known yet."""
        if self._is_refused(agent):
            return
        self._scored.labels(agent).set(scored)
        figures = ((self._hit_ratio, hit_ratio), (self._signed_return, signed_return), (self._brier, brier))
        for gauge, value in figures:
            if value is not None:
                gauge.labels(agent).set(value)

    def drift(self, distances: Mapping[str, float]) -> None:
        """Distance by feature; features that are no longer fed to any model go."""
        for feature in self._drifting - distances.keys():
            self._drift.remove(feature)
        for feature, distance in distances.items():
            if feature not in DEFINITIONS:
                raise KeyError(f"quartet_feature_drift: {feature!r} is not a feature of any set")
            self._drift.labels(feature).set(distance)
        self._drifting = frozenset(distances)

    def _is_refused(self, agent: str) -> bool:
        """A refused agent has no gauges of a model, whatever is reported of it."""
        return self._states.get(agent) is AgentState.REFUSED

    def _forget_model(self, agent: str) -> None:
        self._infos.pop(agent, None)
        for gauge in (
            self._info,
            self._weight,
            self._top_action,
            self._hold,
            self._stddev,
            self._range,
            self._hit_ratio,
            self._signed_return,
            self._brier,
            self._scored,
            self._degenerate,
        ):
            gauge.remove_by_labels({"agent": agent})

    # ------------------------------------------------------------------ counts of a batch

    def bars(self, outcome: str, n: int = 1) -> None:
        self._bars.add(n, outcome)

    def flag(self, flag: str, n: int = 1) -> None:
        self._flags.add(n, flag)

    def rejected(self, stage: str, reason: str, n: int = 1) -> None:
        self._rejected.add(n, stage, reason)

    def votes(self, agent: str, action: Action, n: int = 1) -> None:
        self._votes.add(n, agent, action.name)

    def abstentions(self, agent: str, reason: Reason, n: int = 1) -> None:
        self._abstentions.add(n, agent, str(reason))

    def late(self, agent: str, n: int = 1) -> None:
        self._late.add(n, agent)

    def signals(self, action: Action, status: Status, n: int = 1) -> None:
        self._signals.add(n, action.name, str(status))

    def commits(self, result: str, n: int = 1) -> None:
        self._commits.add(n, result)

    def recoveries(self, n: int = 1) -> None:
        self._recoveries.inc(n)

    def rebalances(self, n: int = 1) -> None:
        """For a worker on Kafka: see `declare_kafka`."""
        self._rebalances.inc(n)

    # ------------------------------------------------------------------ times and levels

    def stage(self, stage: str, seconds: float) -> None:
        """The time of one batch in one of `STAGES`."""
        if stage not in STAGES:
            raise KeyError(f"quartet_stage_seconds: {stage!r} is not among {STAGES}")
        self._stage.labels(stage).observe(seconds)

    def inference(self, agent: str, seconds: float) -> None:
        """The time of one batch in a model."""
        self._inference.labels(agent).observe(seconds)

    def rollbacks(self, agent: str, by: str) -> None:
        """A version of `agent`, mostly a canary, was taken back by one of `ROLLED_BACK_BY`."""
        self._rollbacks.add(1, agent, by)

    def bar_to_signal(self, seconds: Iterable[float]) -> None:
        """One time for each bar of the batch."""
        self._latency.observe(seconds)

    def ensemble(self, counts: Mapping[str, int]) -> None:
        """The latest counts by kind, any of `ENSEMBLE`."""
        for kind, n in counts.items():
            if kind not in ENSEMBLE:
                raise KeyError(f"quartet_ensemble_agents: {kind!r} is not among {ENSEMBLE}")
            self._ensemble.labels(kind).set(n)

    def quorum(self, agents: int) -> None:
        self._quorum.set(agents)

    def agreement(self, agreement: float, hard_disagreement: float) -> None:
        """Over the last 500 signals on which at least two voted, 0..1."""
        self._agreement.set(agreement)
        self._disagreement.set(hard_disagreement)

    def last_bar(self, unix_s: float) -> None:
        self._last_bar.set(unix_s)

    def lag(self, stream: str, entries: int) -> None:
        """`stream` is the key, without our own namespace (`bars`), or the pattern that it matched."""
        self._lag.labels(stream).set(entries)

    def length(self, stream: str, entries: int) -> None:
        self._length.labels(stream).set(entries)


class BridgeMetrics:
    """The metrics of one bridge, in a registry of its own; those it shares with a worker have the same names."""

    def __init__(self, registry: CollectorRegistry) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._bars = _Counts(registry, "quartet_bridge_bars", "Bars by what became of them at the bridge", "outcome")
        self._bars.touch(BRIDGE_OUTCOMES)
        self._records = Counter("quartet_bridge_records", "Records acknowledged by the broker", registry=registry)
        self._rejected = _Counts(registry, "quartet_rejected", "Refused entries", "stage", "reason")
        self._rejected.touch(("bridge",), REASONS)
        self._lag = Gauge("quartet_stream_lag", "Entries not yet consumed", ("stream",), registry=registry)
        self._commits = _Counts(registry, "quartet_commits", "Tries to commit by result", "result")
        self._commits.touch(COMMIT_RESULTS)
        self._recoveries = Counter("quartet_recoveries", "Starts that took up an earlier position", registry=registry)

    def bars(self, outcome: str, n: int) -> None:
        self._bars.add(n, outcome)

    def records(self, n: int) -> None:
        self._records.inc(n)

    def rejected(self, reason: str) -> None:
        self._rejected.add(1, "bridge", reason)

    def lag(self, stream: str, entries: int) -> None:
        self._lag.labels(stream).set(entries)

    def commits(self, result: str) -> None:
        self._commits.add(1, result)

    def recoveries(self) -> None:
        self._recoveries.inc()


class _Counts:
    """A counter whose children exist from the start; another label is a `KeyError`, not a new series."""

    def __init__(self, registry: CollectorRegistry, name: str, text: str, *labels: str) -> None:
        self._counter = Counter(name, text, labels, registry=registry)
        self._children: dict[tuple[str, ...], Counter] = {}

    def touch(self, *values: Iterable[str]) -> None:
        """Make every combination of the given label values."""
        combinations: list[tuple[str, ...]] = [()]
        for some in map(tuple, values):
            combinations = [(*head, value) for head in combinations for value in some]
        self._children |= {labels: self._counter.labels(*labels) for labels in combinations}

    def add(self, n: int, *labels: str) -> None:
        child = self._children.get(labels)
        if child is None:
            raise KeyError(f"{self._counter._name}: {labels} is outside the closed set of labels")  # noqa: SLF001
        child.inc(n)

    def remove(self, first: str) -> None:
        """Remove every series whose first label is `first`."""
        for labels in [labels for labels in self._children if labels[0] == first]:
            del self._children[labels]
            self._counter.remove(*labels)


class LateGauge(Collector):
    """A gauge without labels that has no sample before it is set: 0 would be a ratio that nobody saw."""

    def __init__(self, name: str, text: str) -> None:
        self._name, self._text = name, text
        self._value: float | None = None

    def set(self, value: float) -> None:
        self._value = value

    def describe(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(self._name, self._text)

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(self._name, self._text, value=self._value)


class BatchHistogram(Collector):
    """A histogram without labels that takes the observations of a whole batch in one go."""

    def __init__(self, name: str, text: str, bounds: Sequence[float] = BUCKETS_S) -> None:
        self._name, self._text, self._bounds = name, text, tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0
        self._lock = threading.Lock()

    def observe(self, values: Iterable[float]) -> None:
        """Add `values`; a value equal to a bound belongs below it, as Prometheus' `le` says."""
        seen = list(values)
        indices = [bisect.bisect_left(self._bounds, value) for value in seen]
        with self._lock:
            self._sum += sum(seen)
            for index in indices:
                self._counts[index] += 1

    def describe(self) -> Iterator[Metric]:
        yield HistogramMetricFamily(self._name, self._text)

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            counts, total = list(self._counts), self._sum
        names = [*map(floatToGoString, self._bounds), "+Inf"]
        buckets: list[Any] = [(name, sum(counts[: i + 1])) for i, name in enumerate(names)]
        yield HistogramMetricFamily(self._name, self._text, buckets=buckets, sum_value=total)
