"""The way of a bar, on one page: entries in, one commit's worth of outputs and state out.

Every stage is a plain object: a batch in, a batch out, no I/O and no clock. Redis, Kafka and replay
drive this same pipeline. `docs/life-of-a-bar.md` follows a bar through it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from streams.codec import seal, unseal
from streams.contracts import FEATURE_SETS, V3, FeatureSet
from streams.formats import FormatReader
from streams.messages import Action, AgentState, Bar, Entry, Event, Reject
from streams.validation import Limits
from worker import consensus
from worker.batches import STATES, Ballot, Signals, Vectors
from worker.features.bank import FeatureBank
from worker.intake import Accepted, Intake
from worker.qsc import QualityLimits, Safeguard
from worker.voting import Seat, Stopwatch, VotingStage

State = Mapping[str, Mapping[bytes, bytes]]
"""Stored state: part of the pipeline, of `PARTS`, to its fields."""

PARTS = ("series", "features", "agents", "quality", *(f"windows:{name}" for name in FEATURE_SETS))


@dataclass(frozen=True)
class Result:
    """What a batch came to. The rows of `ballots` and `signals` are those of `vectors.index`."""

    accepted: Accepted
    vectors: Vectors
    ballots: Sequence[Ballot]
    signals: Signals
    state: Mapping[str, Sequence[tuple[bytes, bytes]]]
    events: Sequence[Event] = field(default_factory=list)

    @property
    def rejects(self) -> Sequence[Reject]:
        return self.accepted.rejects

    @property
    def voted_ids(self) -> list[str]:
        """The output IDs of the votes and signals."""
        return [self.accepted.ids[i] for i in self.vectors.index]

    @property
    def voted_bars(self) -> list[Bar]:
        return [self.accepted.bars[i] for i in self.vectors.index]


@dataclass(frozen=True, slots=True)
class AgentReport:
    """One agent as it stands: its state, the reason (None where all is well), its model or refusal."""

    agent: str
    state: AgentState
    reason: str | None
    seat: Seat


class Pipeline:
    """All stages chained. `process` changes the state in memory; `Result.state` is what to commit."""

    def __init__(
        self,
        seats: Sequence[Seat],
        *,
        quorum: int = 3,
        limits: Limits | None = None,
        warmup_bars: Mapping[str, int] | None = None,
        window_capacity: int = 64,
        quality: Mapping[str, QualityLimits] | None = None,
        reader: FormatReader | None = None,
        several_keys: bool = False,
    ) -> None:
        self.quorum = quorum
        self.intake = Intake(limits or Limits(), reader=reader, several_keys=several_keys)
        self.voting = VotingStage(seats, capacity=window_capacity)
        self.features = FeatureBank(self._sets_in_use(), warmup_bars)
        self.safeguard = Safeguard(quality)

    def process(
        self,
        entries: Sequence[Entry],
        now_ms: int,
        *,
        poison: frozenset[tuple[str, str]] = frozenset(),
        stopwatch: Stopwatch = nullcontext,
    ) -> Result:
        """One batch of input entries. `now_ms` judges lateness and bars from the future, never values."""
        with stopwatch("intake"):
            accepted = self.intake.accept(entries, now_ms, poison)
        with stopwatch("features"):
            vectors = self._compute(accepted)
        with stopwatch("agents"):
            ballots = self.voting.vote(vectors, stopwatch)
        with stopwatch("safeguard"):
            ballots, verdicts = self.safeguard.watch(vectors, ballots)
        with stopwatch("consensus"):
            signals = self._decide(vectors, ballots)
        with stopwatch("pack"):
            state = self._changes(accepted)
        return Result(accepted, vectors, ballots, signals, state, [*accepted.events, *verdicts])

    def _compute(self, accepted: Accepted) -> Vectors:
        values, ready = self.features.update(accepted.rows, accepted.ohlcv, accepted.restart)
        by_set = {s.name: ready[:, place] for place, s in enumerate(self.features.sets)}
        return Vectors(accepted, self.features.names, values, by_set, np.flatnonzero(by_set[V3.name]))

    def _decide(self, vectors: Vectors, ballots: Sequence[Ballot]) -> Signals:
        return consensus.decide(
            ballots,
            configured=len(self.voting.stages),
            quorum=self.quorum,
            withheld=vectors.accepted.withheld[vectors.index],
            stale=vectors.accepted.stale[vectors.index],
        )

    def _sets_in_use(self) -> tuple[FeatureSet, ...]:
        return tuple(dict.fromkeys((V3, *self.voting.feature_sets)))

    def reseat(self, seat: Seat) -> None:
        """Swap one agent's model between two batches."""
        self.voting.reseat(seat)
        self.features.set_sets(self._sets_in_use())

    def _changes(self, accepted: Accepted) -> dict[str, list[tuple[bytes, bytes]]]:
        windows = self.voting.changes(accepted.rows)
        return {
            "series": self.intake.changes(),
            "features": self.features.changes(accepted.rows),
            **{f"windows:{name}": fields for name, fields in windows.items()},
            "quality": self.safeguard.changes(),
            "agents": self.agent_changes(),
        }

    def reports(self) -> list[AgentReport]:
        """What every agent is between two batches, and why."""
        reports = []
        for stage in self.voting.stages:
            state, why = self.safeguard.status(stage.seat.agent, stage.state)
            reports.append(AgentReport(stage.seat.agent, state, why or stage.reason, stage.seat))
        return reports

    def agent_changes(self) -> list[tuple[bytes, bytes]]:
        """Each agent's artifact in use and whether it has been active, so that a restart knows."""
        return [(s.seat.agent.encode(), seal([s.seat.sha256, s.active])) for s in self.voting.stages]

    def restore(self, state: State) -> None:
        """Take up committed state. Raises `StateCorruptError` where it is not what was written."""
        self.intake.restore(state.get("series", {}))
        self.features.restore(state.get("features", {}))
        for name in FEATURE_SETS:
            self.voting.restore(name, state.get(f"windows:{name}", {}))
        self.safeguard.restore(state.get("quality", {}))
        in_use = agents_in_use(state)
        for stage in self.voting.stages:
            stage.active = in_use.get(stage.seat.agent, (None, False))[1]

    def unused(self, state: State) -> list[str]:
        """Stored parts that nothing keeps up to date any more: to be dropped, or they would come back stale."""
        kept = {f"windows:{name}" for name in self.voting.window_sets}
        return [part for part in state if part.startswith("windows:") and state[part] and part not in kept]


def agents_in_use(state: State) -> dict[str, tuple[str | None, bool]]:
    """Each agent's committed artifact hash, and whether it has been active."""
    fields = state.get("agents", {})
    return {name.decode(): tuple(unseal(name.decode(), data)) for name, data in fields.items()}


def feature_messages(vectors: Vectors) -> list[dict[str, Any]]:
    """One feature vector for each accepted bar, as on the stream."""
    contracts = {name: FEATURE_SETS[name].contract for name in vectors.ready}
    ready = vectors.ready[V3.name].tolist()
    return [
        {
            **_bar_fields(bar),
            "ready": ready[row],
            "contract": V3.contract,
            "contracts": contracts,
            "values": dict(zip(vectors.names, values, strict=True)),
        }
        for row, (bar, values) in enumerate(zip(vectors.accepted.bars, vectors.values.tolist(), strict=True))
    ]


def vote_messages(bars: Sequence[Bar], ballot: Ballot) -> list[dict[str, Any]]:
    """One vote of one agent for each ready vector, an abstention included."""
    outputs = [None] * len(bars) if ballot.outputs is None else ballot.outputs.tolist()
    rows = zip(
        *(bars, ballot.action.tolist(), ballot.confidence.tolist(), outputs),
        *(ballot.answered.tolist(), ballot.state.tolist(), ballot.reason),
        strict=True,
    )
    return [
        {
            **_bar_fields(bar),
            "agent": ballot.agent,
            "version": ballot.version,
            "action": Action(action).name,
            "confidence": confidence,
            "outputs": raw if answered else None,
            "weight": ballot.weight,
            "state": STATES[state],
            "reason": reason,
        }
        for bar, action, confidence, raw, answered, state, reason in rows
    ]


def signal_messages(result: Result) -> list[dict[str, Any]]:
    """Exactly one signal for each ready vector."""
    s = result.signals
    columns = (s.action, s.confidence, s.agreement, s.loaded, s.eligible, s.voting, s.agreeing)
    rows = zip(result.voted_bars, _signal_votes(result), s.status, *(c.tolist() for c in columns), strict=True)
    return [
        {
            **_bar_fields(bar),
            "action": Action(action).name,
            "confidence": confidence,
            "agreement": agreement,
            "configured": s.configured,
            "loaded": loaded,
            "eligible": eligible,
            "voting": voting,
            "agreeing": agreeing,
            "quorum": s.quorum,
            "status": status,
            "votes": votes,
        }
        for bar, votes, status, action, confidence, agreement, loaded, eligible, voting, agreeing in rows
    ]


def _signal_votes(result: Result) -> list[dict[str, Any]]:
    """Agent to its vote, for each ready vector."""
    votes: list[dict[str, Any]] = [{} for _ in result.vectors.index]
    for place, ballot in enumerate(result.ballots):
        columns = zip(
            *(votes, ballot.action.tolist(), ballot.confidence.tolist()),
            *(result.signals.effective[:, place].tolist(), ballot.state.tolist(), ballot.reason),
            strict=True,
        )
        for row, action, confidence, effective, state, reason in columns:
            row[ballot.agent] = {
                "action": Action(action).name,
                "confidence": confidence,
                "weight": ballot.weight,
                "effective_weight": effective,
                "state": STATES[state],
                "reason": reason,
                "version": ballot.version,
            }
    return votes


def _bar_fields(bar: Bar) -> dict[str, Any]:
    return {"symbol": bar.symbol, "ts": bar.ts, "interval": bar.interval, "bar_id": bar.bar_id}
