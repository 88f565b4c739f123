"""What the worker's loop tells the metrics; keeps them out of the stages."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from streams.messages import Action, AgentState, Reason, Status
from streams.store import Position, StreamFacts
from worker.batches import Ballot, Signals
from worker.metrics import CRITERIA, Metrics
from worker.pipeline import Pipeline, Result

CRITERIA_NAMES = frozenset(CRITERIA)

LONGEST_LATENCY_MS = 86_400_000
"""An entry that is older than a day was not live: its age is no latency."""


class Sensors:
    """Feeds one worker's `Metrics`, a batch at a time."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics

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
        for outcome, n in result.accepted.outcomes.items():
            self.metrics.bars(outcome, n)
        for flag, n in result.accepted.flags.items():
            self.metrics.flag(flag, n)
        for (stage, reason), n in Counter((r.stage, r.reason) for r in result.rejects).items():
            self.metrics.rejected(stage, reason, n)
        if result.accepted.bars:
            self.metrics.last_bar(committed_ms / 1000)
        if len(result.vectors.index):
            for ballot in result.ballots:
                self._votes(ballot)
            self._signals(result.signals, result.ballots)
            self._latency(result, committed_ms)

    def _votes(self, ballot: Ballot) -> None:
        for code, n in zip(*np.unique(ballot.action, return_counts=True), strict=True):
            self.metrics.votes(ballot.agent, Action(code), int(n))
        abstained = (r for a, r in zip(ballot.action, ballot.reason, strict=True) if a == Action.ABSTAIN and r)
        for reason, n in Counter(abstained).items():
            self.metrics.abstentions(ballot.agent, Reason(reason), n)

    def _signals(self, signals: Signals, ballots: Sequence[Ballot]) -> None:
        for (action, status), n in Counter(zip(signals.action.tolist(), signals.status, strict=True)).items():
            self.metrics.signals(Action(action), Status(status), n)
        self.metrics.ensemble(
            {
                "configured": signals.configured,
                "loaded": int(signals.loaded[-1]),
                "eligible": int(signals.eligible[-1]),
                "voting": int(signals.voting[-1]),
            }
        )
        actions = np.stack([b.action for b in ballots], axis=1)
        both = (actions == Action.BUY).any(axis=1) & (actions == Action.SELL).any(axis=1)
        self.metrics.agreement(float(signals.agreement.mean()), float(both.mean()))
        for place, ballot in enumerate(ballots):
            self.metrics.weights(ballot.agent, ballot.weight, float(signals.effective[-1, place]))

    def _latency(self, result: Result, committed_ms: int) -> None:
        ages = (committed_ms - result.accepted.arrived_ms[i] for i in result.vectors.index)
        self.metrics.bar_to_signal(age / 1000 for age in ages if 0 <= age < LONGEST_LATENCY_MS)

    def agents(self, pipeline: Pipeline) -> None:
        """The state of every agent, and the artifact of those that have one."""
        for report in pipeline.reports():
            self.metrics.agent_state(report.agent, report.state)
            model = report.seat.model
            if model is not None:
                self.metrics.agent_info(report.agent, model.version, model.contract, model.sha256)

    def quality(self, pipeline: Pipeline) -> None:
        """The shape of every loaded agent's recent votes, and what is held against them."""
        for report in pipeline.reports():
            if report.seat.model is None:
                continue
            quality = pipeline.safeguard.quality(report.agent)
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
