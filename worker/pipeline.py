"""The way of a bar, on one page: entries in, one commit's worth of outputs and state out.

Every stage is a plain object: a batch in, a batch out, no I/O and no clock. Redis, Kafka and replay
drive this same pipeline; `quartet run --stage` drives its stages one by one. `docs/life-of-a-bar.md`
follows a bar through it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from agents.agent import Model
from streams.formats import FormatReader
from streams.messages import AgentState, Bar, Entry, Event, Reject
from streams.validation import Limits
from worker import consensus
from worker.batches import Ballot, Fields, Signals, State, Vectors
from worker.ensemble import EnsembleWatch
from worker.intake import Accepted, Intake
from worker.qsc import Safeguard
from worker.quality import EnsembleLimits, QualityLimits
from worker.roster import Record
from worker.scoreboard import Scoreboard
from worker.stages import agents, features
from worker.stages import consensus as consensus_stage
from worker.stages.agents import CANARY_PERIOD_MS, AgentGroup, AgentReport
from worker.stages.consensus import ConsensusStage
from worker.stages.features import FeatureStage
from worker.stages.lateness import Lateness
from worker.voting import Seat, Stopwatch, VotingStage

PARTS = (*features.PARTS, *agents.PARTS, *consensus_stage.PARTS)
NO_ROWS = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Underway:
    """A batch that the models compute."""

    vectors: Vectors
    asked: Sequence[Future[Ballot]]


@dataclass(frozen=True)
class Result:
    """What a batch came to. The rows of `ballots` and `signals` are those of `vectors.index`.

    `decided_on` are the ballots behind the signals where they are others than those that were cast: of agents
    that were too late.
    """

    accepted: Accepted
    vectors: Vectors
    ballots: Sequence[Ballot]
    signals: Signals
    state: Mapping[str, Fields]
    events: Sequence[Event] = field(default_factory=list)
    drops: Sequence[str] = ()
    decided_on: Sequence[Ballot] | None = None

    @property
    def counted(self) -> Sequence[Ballot]:
        """The ballots behind the signals."""
        return self.ballots if self.decided_on is None else self.decided_on

    @property
    def rejects(self) -> Sequence[Reject]:
        return self.accepted.rejects

    @property
    def voted_ids(self) -> list[str]:
        """The output IDs of the votes and signals."""
        return self.vectors.voted_ids

    @property
    def voted_bars(self) -> list[Bar]:
        return self.vectors.bars


class Pipeline:
    """All stages chained. `process` changes the state in memory; `Result.state` is what to commit."""

    def __init__(
        self,
        seats: Sequence[Seat],
        *,
        quorum: int = 3,
        limits: Limits | None = None,
        feature_sets: Sequence[str] = (),
        fixed_sets: bool = False,
        warmup_bars: Mapping[str, int] | None = None,
        window_capacity: int = 64,
        quality: Mapping[str, QualityLimits] | None = None,
        ensemble: EnsembleLimits | None = None,
        reader: FormatReader | None = None,
        several_keys: bool = False,
        canary_share: float = consensus.CANARY_SHARE,
        canary_period_ms: int = CANARY_PERIOD_MS,
    ) -> None:
        self.features = FeatureStage(
            limits,
            always=feature_sets,
            fixed=fixed_sets,
            warmup_bars=warmup_bars,
            reader=reader,
            several_keys=several_keys,
        )
        self.agents = AgentGroup(
            seats,
            self.features,
            window_capacity=window_capacity,
            quality=quality,
            canary_share=canary_share,
            canary_period_ms=canary_period_ms,
        )
        self.consensus = ConsensusStage(
            len(self.agents.records), quorum=quorum, canary_share=canary_share, ensemble=ensemble
        )
        self.lateness: Lateness | None = None
        self.missed: Mapping[str, Collection[str]] = {}
        """In one process no agent is late; a recording of several says by `bar_id` which ones were."""

    def process(
        self,
        entries: Sequence[Entry],
        now_ms: int,
        *,
        poison: frozenset[tuple[str, str]] = frozenset(),
        stopwatch: Stopwatch = nullcontext,
    ) -> Result:
        """One batch of input entries. `now_ms` judges lateness and bars from the future, never values."""
        vectors = self.features.process(entries, now_ms, poison=poison, stopwatch=stopwatch)
        result = self._decide(*self.agents.process(vectors, stopwatch), stopwatch)
        with stopwatch("pack"):
            state, drops = self.changes(vectors.accepted.rows)
        return replace(result, state=state, drops=drops)

    def begin(
        self,
        entries: Sequence[Entry],
        now_ms: int,
        *,
        poison: frozenset[tuple[str, str]] = frozenset(),
        stopwatch: Stopwatch = nullcontext,
    ) -> Underway:
        """The first half of `process`: the models compute on the other cores, and the caller goes on to other work.

        The next batch may begin before this one is finished where nothing that its end decides matters to
        it: `is_steady`.
        """
        vectors = self.features.process(entries, now_ms, poison=poison, stopwatch=stopwatch)
        return Underway(vectors, self.agents.voting.ask(vectors, stopwatch))

    def finish(self, underway: Underway, stopwatch: Stopwatch = nullcontext) -> Result:
        """The second half of `process`, in the order in which batches began. The result has no state: see `changes`."""
        ballots = self.agents.voting.ballots(underway.asked)
        return self._decide(*self.agents.judge(underway.vectors, ballots, stopwatch), stopwatch)

    @property
    def is_steady(self) -> bool:
        """Whether a batch changes no seat: a trial can end at any bar, and its feature set with it."""
        return all(record.trial is None for record in self.records.values())

    def _decide(self, vectors: Vectors, ballots: list[Ballot], verdicts: list[Event], stopwatch: Stopwatch) -> Result:
        with stopwatch("consensus"):
            counted, muted = self._without_late(vectors, ballots)
            signals, concerns = self.consensus.process(vectors, counted, self.agents.thresholds)
            events = [*vectors.accepted.events, *bar_by_bar(vectors, [*verdicts, *muted, *concerns])]
        return Result(vectors.accepted, vectors, ballots, signals, state={}, events=events, decided_on=counted)

    def _without_late(self, vectors: Vectors, ballots: list[Ballot]) -> tuple[list[Ballot], list[Event]]:
        if self.lateness is None:
            return ballots, []
        missed = [self.missed.get(bar.bar_id, ()) for bar in vectors.bars]
        missing = {a: np.array([a in late for late in missed], np.bool_) for a in self.lateness.agents}
        return self.lateness.fill(vectors, ballots, missing)

    # ------------------------------------------------------------------ state

    def changes(self, rows: NDArray[np.int64] = NO_ROWS) -> tuple[dict[str, Fields], list[str]]:
        """What to commit since the last call, state and drops, after bars of these series in their order."""
        state, drops = self.agents.changes(rows)
        late = {} if self.lateness is None else self.lateness.changes()
        return {**self.features.changes(rows), **state, **self.consensus.changes(), **late}, drops

    def restore(self, state: State) -> None:
        """Take up committed state. Raises `StateCorruptError` where it is not what was written."""
        self.features.restore(state)
        self.agents.restore(state)
        self.consensus.restore(state)
        if self.lateness is not None:
            self.lateness.restore(state)

    def unused(self, state: State) -> list[str]:
        """Stored parts that nothing keeps up to date any more: to be dropped, or they would come back stale."""
        return self.agents.unused(state)

    # ------------------------------------------------------------------ the parts of the stages

    @property
    def intake(self) -> Intake:
        return self.features.intake

    @property
    def voting(self) -> VotingStage:
        return self.agents.voting

    @property
    def records(self) -> dict[str, Record]:
        return self.agents.records

    @property
    def safeguard(self) -> Safeguard:
        return self.agents.safeguard

    @property
    def ensemble(self) -> EnsembleWatch:
        return self.consensus.ensemble

    @property
    def scoreboard(self) -> Scoreboard:
        return self.consensus.scoreboard

    def reports(self) -> list[AgentReport]:
        """What every agent is between two batches, and why."""
        return self.agents.reports()

    def install(self, agent: str, model: Model, *, pinned: bool) -> None:
        """Swap one agent's model between two batches."""
        self.agents.install(agent, model, pinned=pinned)

    def begin_trial(self, agent: str, model: Model, kind: AgentState) -> None:
        """Put a version beside the running one, as `<agent>_canary`; `kind` is `canary` or `shadow`."""
        self.agents.begin_trial(agent, model, kind)


def bar_by_bar(vectors: Vectors, events: Sequence[Event]) -> list[Event]:
    """The events of a batch in the order of its bars, as batches of one would give them."""
    if not events:
        return []
    rows = {bar.bar_id: row for row, bar in enumerate(vectors.accepted.bars)}
    return sorted(events, key=lambda event: rows[event.bar_id])
