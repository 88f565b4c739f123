"""What the worker's loop tells the metrics; keeps them out of the stages."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from streams.messages import CANARY, Action, AgentState, Event, Reason, Reject, Status
from streams.store import Position, StreamFacts
from worker.batches import Ballot, Signals, Vectors
from worker.drift import DriftWatch
from worker.intake import Accepted
from worker.metrics import CRITERIA, ENSEMBLE, Metrics
from worker.pipeline import Pipeline, Result
from worker.scoreboard import CONSENSUS
from worker.stages.agents import AgentGroup
from worker.stages.consensus import ConsensusStage
from worker.status import Status as WorkerStatus

CRITERIA_NAMES = frozenset(CRITERIA)

LONGEST_LATENCY_MS = 86_400_000
"""An entry that is older than a day was not live: its age is no latency."""


class Sensors:
    """Feeds one worker's `Metrics`, a batch at a time."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self._drift = DriftWatch()
        self._canaries: set[str] = set()

    @contextmanager
    def stopwatch(self, stage: str) -> Iterator[None]:
        """Time what runs inside: a stage, or one model as `agent:<name>`."""
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        _, is_agent, agent = stage.partition("agent:")
        if is_agent:
            self.metrics.inference(agent, seconds)
        else:
            self.metrics.stage(stage, seconds)

    def batch(self, result: Result, committed_ms: int) -> None:
        """Count a batch after its commit."""
        self.taken(result.accepted)
        self.voted(result.vectors, result.ballots)
        self.decided(result, committed_ms)

    def taken(self, accepted: Accepted) -> None:
        """What came in."""
        for outcome, n in accepted.outcomes.items():
            self.metrics.bars(outcome, n)
        for flag, n in accepted.flags.items():
            self.metrics.flag(flag, n)
        self.rejected(accepted.rejects)

    def rejected(self, rejects: Sequence[Reject]) -> None:
        for (stage, reason), n in Counter((r.stage.partition(":")[0], r.reason) for r in rejects).items():
            self.metrics.rejected(stage, reason, n)

    def voted(self, vectors: Vectors, ballots: Sequence[Ballot]) -> None:
        """What agents said, and of what."""
        if len(vectors.index):
            for ballot in ballots:
                self._votes(ballot)
            self._drift.push(vectors.names, vectors.values[vectors.index])

    def decided(self, result: Result, committed_ms: int) -> None:
        """What became of it, and when."""
        if len(result.vectors.index):
            self._signals(result.signals)
            self._latency(result, committed_ms)

    def missed(self, ballots: Sequence[Ballot]) -> None:
        """Abstentions that stand for votes which came too late: no agent knows of them."""
        for ballot in ballots:
            n = sum(reason == Reason.DEADLINE_MISSED for reason in ballot.reason)
            if n and not ballot.agent.endswith(CANARY):
                n -= sum(
                    action != Action.ABSTAIN and reason == Reason.DEADLINE_MISSED
                    for action, reason in zip(ballot.action.tolist(), ballot.reason, strict=True)
                )
                self.metrics.abstentions(ballot.agent, Reason.DEADLINE_MISSED, n)

    def late(self, agent: str, n: int) -> None:
        """Votes on vectors that had been decided without them."""
        self.metrics.late(agent, n)

    def muted_here(self, muted: Container[str], agents: Sequence[str]) -> None:
        """Which agents missed too many deadlines; of the others their own processes tell the state."""
        for agent in agents:
            if agent in muted:
                self.metrics.agent_state(agent, AgentState.MUTED)
            else:
                self.metrics.forget_state(agent)
            self.metrics.degenerate(agent, {str(Reason.DEADLINE_MISSED)} if agent in muted else ())

    def _votes(self, ballot: Ballot) -> None:
        self._meet(ballot.agent)
        action, reasons = ballot.action[ballot.rows], [ballot.reason[row] for row in ballot.rows]
        for code, n in zip(*np.unique(action, return_counts=True), strict=True):
            self.metrics.votes(ballot.agent, Action(code), int(n))
        abstained = (r for a, r in zip(action, reasons, strict=True) if a == Action.ABSTAIN and r)
        for reason, n in Counter(abstained).items():
            self.metrics.abstentions(ballot.agent, Reason(reason), n)

    def _signals(self, signals: Signals) -> None:
        for (action, status), n in Counter(zip(signals.action.tolist(), signals.status, strict=True)).items():
            self.metrics.signals(Action(action), Status(status), n)

    def standing(self, status: WorkerStatus) -> None:
        """What `/readyz` says too: the counts, the quorum, the weights that count, and when the newest bar arrived."""
        counts = status.counts()
        self.metrics.quorum(status.quorum)
        self.metrics.ensemble({kind: counts[kind] for kind in ENSEMBLE})
        if status.last_arrival is not None:
            self.metrics.last_bar(status.last_arrival[1] / 1000)
        for agent, weight in (status.vote.effective if status.vote else {}).items():
            if agent in self._canaries or not agent.endswith(CANARY):
                self.metrics.effective_weight(agent, weight)

    def events(self, events: Sequence[Event]) -> None:
        """Count what was rolled back."""
        for event in events:
            if event.kind == "rolled_back":
                by = "operator" if event.reason == Reason.OPERATOR else "safeguard"
                self.metrics.rollbacks(event.agent.removesuffix(CANARY), by)

    def _latency(self, result: Result, committed_ms: int) -> None:
        """The server's clock gave the ID and ours is read here: what seems to be from the future took no time."""
        ages = (max(0, committed_ms - result.accepted.arrived_ms[i]) for i in result.vectors.index)
        self.metrics.bar_to_signal(age / 1000 for age in ages if age < LONGEST_LATENCY_MS)

    def _meet(self, agent: str) -> None:
        """A canary has series only while there is one."""
        if agent.endswith(CANARY) and agent not in self._canaries:
            self._canaries.add(agent)
            self.metrics.add_agent(agent)

    def agents(self, pipeline: Pipeline) -> None:
        """The state of every agent, the artifact of those that have one, and everything over windows."""
        self.group(pipeline.agents)
        self.windows(pipeline)

    def group(self, group: AgentGroup) -> None:
        """The state of every agent, and the artifact of those that have one."""
        reports = group.reports()
        for gone in self._canaries - {report.agent for report in reports}:
            self._canaries.remove(gone)
            self.metrics.remove_agent(gone)
        for report in reports:
            self._meet(report.agent)
            self.metrics.agent_state(report.agent, report.state)
            model = report.seat.model
            if model is not None:
                self.metrics.agent_info(report.agent, model.version, model.contract, model.sha256)
                self.metrics.configured_weight(report.agent, report.seat.weight)

    def windows(self, pipeline: Pipeline) -> None:
        """Everything over sliding windows: well under a millisecond, so every couple of seconds, not every batch."""
        self.watched(pipeline.agents)
        loaded = [report.agent for report in pipeline.reports() if report.seat.model is not None]
        self.looked_back(pipeline.consensus, loaded)

    def watched(self, group: AgentGroup) -> None:
        """The shape of the agents' recent votes, and how far what they are fed has drifted."""
        self._quality(group)
        models = [report.seat.model for report in group.reports() if report.seat.model is not None]
        self.metrics.drift({d.feature: d.distance for d in self._drift.against(models)})

    def looked_back(self, consensus: ConsensusStage, loaded: Sequence[str]) -> None:
        """What the market did after votes and signals, and how far the agents agree."""
        for agent in (*loaded, CONSENSUS):
            s = consensus.scoreboard.scores(agent)
            self.metrics.scores(agent, s.scored, s.hit_ratio, s.signed_return_mean, s.brier_score)
        ensemble = consensus.ensemble
        agreement, hard = ensemble.agreement_ratio, ensemble.hard_disagreement_ratio
        if agreement is not None and hard is not None and ensemble.signals >= ensemble.limits.minimum:
            self.metrics.agreement(agreement, hard)

    def _quality(self, group: AgentGroup) -> None:
        """The shape of every loaded agent's recent votes, and what is held against them."""
        for report in group.reports():
            if report.seat.model is None:
                continue
            quality = group.safeguard.quality(report.agent)
            muted_for = {report.reason} if report.state is AgentState.MUTED else set()
            self.metrics.degenerate(report.agent, CRITERIA_NAMES & ({str(v) for v in quality.violations} | muted_for))
            if quality.votes:
                self.metrics.quality(
                    report.agent,
                    top_action=quality.figures[Reason.ACTION_COLLAPSE],
                    hold=quality.figures[Reason.DEAD_ZONE],
                    stddev=quality.figures[Reason.FLAT_CONFIDENCE],
                    p10_p90=quality.figures[Reason.NARROW_RANGE],
                )

    def inputs(
        self, position: Position, facts: Mapping[str, StreamFacts], label: Callable[[str], str] = lambda key: key
    ) -> None:
        """Lag and length of the inputs, summed over the keys of one `label`."""
        lags: Counter[str] = Counter()
        lengths: Counter[str] = Counter()
        for key, fact in facts.items():
            lags[label(key)] += max(0, fact.added - position.inputs[key].consumed)
            lengths[label(key)] += fact.length
        for name, lag in lags.items():
            self.metrics.lag(name, lag)
            self.metrics.length(name, lengths[name])
