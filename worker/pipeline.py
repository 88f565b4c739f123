"""The way of a bar, on one page: entries in, one commit's worth of outputs and state out.

Every stage is a plain object: a batch in, a batch out, no I/O and no clock. Redis, Kafka and replay
drive this same pipeline. `docs/life-of-a-bar.md` follows a bar through it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from agents.agent import Model
from streams.codec import StateCorruptError
from streams.contracts import FEATURE_SETS, V3, FeatureSet
from streams.formats import FormatReader
from streams.messages import CANARY, AgentState, Bar, Entry, Event, Reason, Reject
from streams.validation import Limits
from worker import consensus, trials
from worker.batches import Ballot, Signals, Vectors
from worker.ensemble import EnsembleWatch
from worker.features.bank import FeatureBank
from worker.intake import Accepted, Intake
from worker.qsc import Safeguard
from worker.quality import EnsembleLimits, QualityLimits
from worker.roster import Artifact, Record, Trial, records_of
from worker.scoreboard import Scoreboard, threshold_of
from worker.voting import AgentStage, Seat, Stopwatch, VotingStage

State = Mapping[str, Mapping[bytes, bytes]]
"""Stored state: part of the pipeline, of `PARTS`, to its fields."""

CANARY_PERIOD_MS = 6 * 3_600_000
"""How long, by the bars' clock, any violation rolls a canary back."""

WAITING = "newer files wait for `quartet models reload {}`"
"""What follows for whoever trains: a promotion or a rollback pins what serves."""

PARTS = (
    "series",
    "features",
    "agents",
    "quality",
    "ensemble",
    "pending",
    "scores",
    *(f"windows:{name}" for name in FEATURE_SETS),
)


@dataclass(frozen=True)
class Result:
    """What a batch came to. The rows of `ballots` and `signals` are those of `vectors.index`."""

    accepted: Accepted
    vectors: Vectors
    ballots: Sequence[Ballot]
    signals: Signals
    state: Mapping[str, Sequence[tuple[bytes, bytes]]]
    events: Sequence[Event] = field(default_factory=list)
    drops: Sequence[str] = ()

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
    """One agent as it stands: its state, the reason (None where all is well), its model or refusal.

    `detail` says for a person what mends it, where there is something to say.
    """

    agent: str
    state: AgentState
    reason: str | None
    seat: Seat
    detail: str = ""


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
        ensemble: EnsembleLimits | None = None,
        reader: FormatReader | None = None,
        several_keys: bool = False,
        canary_share: float = consensus.CANARY_SHARE,
        canary_period_ms: int = CANARY_PERIOD_MS,
    ) -> None:
        self.quorum = quorum
        self.canary_share = canary_share
        self.canary_period_ms = canary_period_ms
        self.intake = Intake(limits or Limits(), reader=reader, several_keys=several_keys)
        self.voting = VotingStage(seats, capacity=window_capacity)
        self.features = FeatureBank(self._sets_in_use(), warmup_bars)
        self.safeguard = Safeguard(quality)
        self.ensemble = EnsembleWatch(ensemble)
        self.scoreboard = Scoreboard()
        self.records = {s.agent: _record(s) for s in seats if s.role is AgentState.ACTIVE}
        self._stored_windows = set(self.voting.window_sets)

    def process(
        self,
        entries: Sequence[Entry],
        now_ms: int,
        *,
        poison: frozenset[tuple[str, str]] = frozenset(),
        stopwatch: Stopwatch = nullcontext,
        keep: bool = True,
    ) -> Result:
        """One batch of input entries. `now_ms` judges lateness and bars from the future, never values.

        Without `keep` the result has no state: for a caller who will never restore one.
        """
        with stopwatch("intake"):
            accepted = self.intake.accept(entries, now_ms, poison)
        with stopwatch("features"):
            vectors = self._compute(accepted)
        with stopwatch("agents"):
            ballots = self.voting.vote(vectors, stopwatch)
        with stopwatch("safeguard"):
            ballots, verdicts = self.safeguard.watch(vectors, ballots)
            vectors, ballots, verdicts = self._judge_trials(vectors, ballots, verdicts)
        with stopwatch("consensus"):
            signals = self._decide(vectors, ballots)
            verdicts = _bar_by_bar(vectors, [*verdicts, *self._look_back(vectors, ballots, signals)])
        with stopwatch("pack"):
            state, drops = self._changes(accepted.rows) if keep else ({}, [])
        return Result(accepted, vectors, ballots, signals, state, [*accepted.events, *verdicts], drops)

    def _compute(self, accepted: Accepted) -> Vectors:
        values, ready = self.features.update(accepted.rows, accepted.ohlcv, accepted.restart)
        by_set = {s.name: ready[:, place] for place, s in enumerate(self.features.sets)}
        return Vectors(accepted, self.features.names, values, by_set, np.flatnonzero(by_set[V3.name]))

    def _decide(self, vectors: Vectors, ballots: Sequence[Ballot]) -> Signals:
        return consensus.decide(
            ballots,
            configured=len(self.records),
            quorum=self.quorum,
            withheld=vectors.accepted.withheld[vectors.index],
            stale=vectors.accepted.stale[vectors.index],
            canary_share=self.canary_share,
        )

    def _look_back(self, vectors: Vectors, ballots: Sequence[Ballot], signals: Signals) -> list[Event]:
        """The ensemble as a whole, and the votes of twelve bars ago."""
        models = {stage.seat.agent: stage.seat.model for stage in self.voting.stages}
        thresholds = {agent: threshold_of(model) for agent, model in models.items() if model is not None}
        self.scoreboard.score(vectors, ballots, signals, thresholds)
        return self.ensemble.watch([vectors.accepted.bars[i] for i in vectors.index], ballots, signals)

    def _sets_in_use(self) -> tuple[FeatureSet, ...]:
        return tuple(dict.fromkeys((V3, *self.voting.feature_sets)))

    def _judge_trials(
        self, vectors: Vectors, ballots: list[Ballot], verdicts: list[Event]
    ) -> tuple[Vectors, list[Ballot], list[Event]]:
        """Canaries and shadows after this batch; a violation ends one on its very row."""
        bars = [vectors.accepted.bars[i] for i in vectors.index]
        ended: list[tuple[int, str]] = []
        for place, ballot in enumerate(ballots):
            agent = ballot.agent.removesuffix(CANARY)
            trial = self.records[agent].trial
            if trial is None or agent == ballot.agent:
                continue
            own = [verdict for verdict in verdicts if verdict.agent == ballot.agent]
            minimum = self.safeguard.limits(agent).minimum
            period = trials.Period(self.canary_period_ms, self.safeguard.votes_after(ballot), minimum)
            judged = trials.judge(trial, ballot, bars, own, period, self._serving(agent))
            ballots = [*ballots[:place], judged.ballot, *ballots[place + 1 :]]
            verdicts = [*(v for v in verdicts if v.agent != ballot.agent), *judged.events]
            self.records[agent] = replace(self.records[agent], trial=judged.trial)
            if judged.ended is not None:
                ended.append((judged.ended, agent))
        leaves: dict[str, int] = {}
        for row, agent in sorted(ended):
            before = {s.name for s in self._sets_in_use()}
            self.end_trial(agent)
            gone = before - {s.name for s in self._sets_in_use()}
            leaves |= dict.fromkeys(gone, int(vectors.index[row]))
        return (replace(vectors, leaves=leaves) if leaves else vectors), ballots, verdicts

    def _serving(self, agent: str) -> str:
        artifact = self.records[agent].artifact
        serves = f"{agent} serves on with {artifact.version}" if artifact else f"{agent} has no model"
        return f"{serves}; {WAITING.format(agent)}"

    # ------------------------------------------------------------------ between two batches

    def install(self, agent: str, model: Model, *, pinned: bool) -> None:
        """Swap one agent's model. Another artifact starts with an empty window of the safeguard."""
        record, artifact = self.records[agent], Artifact.of(model)
        changed = not artifact.is_same(record.artifact)
        before = record.artifact if changed else record.before
        self.records[agent] = replace(record, artifact=artifact, before=before, pinned=pinned)
        self._seat(replace(self._stage(agent).seat, model=model, refusal=None))
        if changed:
            self._forget_votes(agent)

    def _forget_votes(self, agent: str) -> None:
        """The votes of another model say nothing of this one; an operator's mute does."""
        muted = self._is_muted_by_operator(agent)
        self.safeguard.forget(agent)
        if muted:
            self.safeguard.mute(agent)

    def _is_muted_by_operator(self, agent: str) -> bool:
        return self.safeguard.status(agent, AgentState.ACTIVE)[1] == Reason.OPERATOR

    def begin_trial(self, agent: str, model: Model, kind: AgentState) -> None:
        """Put a version beside the running one, as `<agent>_canary`; `kind` is `canary` or `shadow`."""
        self.records[agent] = replace(self.records[agent], trial=Trial(kind, Artifact.of(model)))
        self.safeguard.forget(agent + CANARY)
        self._seat(trial_seat(agent, model, kind, self.canary_share))

    def end_trial(self, agent: str) -> None:
        """Take the version beside the running one away; no newer file replaces the running one by itself."""
        self.records[agent] = replace(self.records[agent], trial=None, pinned=True)
        self.safeguard.forget(agent + CANARY)
        self.voting.remove(agent + CANARY)
        self.features.set_sets(self._sets_in_use())

    def promote(self, agent: str) -> None:
        """The version beside the running one takes its seat."""
        beside = self._stage(agent + CANARY)
        model = beside.seat.model
        assert model is not None  # noqa: S101 - a trial has a model
        muted = self._is_muted_by_operator(agent)
        # The model has its new seat before it loses the old one: its windows stay, and its votes.
        self.install(agent, model, pinned=True)
        self.safeguard.inherit(agent)
        if muted:
            self.safeguard.mute(agent)
        running = self._stage(agent)
        running.active = running.active or beside.active
        self.end_trial(agent)

    def _stage(self, agent: str) -> AgentStage:
        stage = self.voting.stage(agent)
        if stage is None:
            raise KeyError(f"{agent} has no seat; seated are {', '.join(s.seat.agent for s in self.voting.stages)}")
        return stage

    def _seat(self, seat: Seat) -> None:
        self.voting.reseat(seat)
        self.features.set_sets(self._sets_in_use())
        stage = self._stage(seat.agent)
        stage.active = stage.active or self._is_warm(seat)

    def _is_warm(self, seat: Seat) -> bool:
        """Whether the model of a seat can vote on any series as things stand."""
        if seat.model is None:
            return False
        if seat.model.window > 1:
            return self.voting.holds_window(seat.model)
        return self.features.is_warm(seat.model.feature_set)

    def settle(self) -> tuple[dict[str, list[tuple[bytes, bytes]]], list[str]]:
        """What to commit, state and drops, after changes between two batches that no batch follows."""
        return self._changes(np.zeros(0, np.int64))

    def _changes(self, rows: NDArray[np.int64]) -> tuple[dict[str, list[tuple[bytes, bytes]]], list[str]]:
        windows = self.voting.changes(rows)
        state = {
            "series": self.intake.changes(),
            "features": self.features.changes(rows),
            **{f"windows:{name}": fields for name, fields in windows.items()},
            "quality": self.safeguard.changes(),
            "ensemble": self.ensemble.changes(),
            **self.scoreboard.changes(),
            "agents": self.agent_changes(),
        }
        # Windows that come or go: what is stored under their name is of another time.
        moved = self._stored_windows ^ set(windows)
        self._stored_windows = set(windows)
        return state, [f"windows:{name}" for name in sorted(moved)]

    def reports(self) -> list[AgentReport]:
        """What every agent is between two batches, and why."""
        reports = []
        for stage in self.voting.stages:
            state, why = self.safeguard.status(stage.seat.agent, stage.state)
            detail = self._remedy(stage.seat, state)
            reports.append(AgentReport(stage.seat.agent, state, why or stage.reason, stage.seat, detail))
        return reports

    def _remedy(self, seat: Seat, state: AgentState) -> str:
        if seat.refusal is not None:
            return seat.refusal.detail
        if state is not AgentState.MUTED or not self.safeguard.is_locked(seat.agent):
            return ""
        base = seat.agent.removesuffix(CANARY)
        if base != seat.agent:
            return f"only `quartet models rollback {base}` takes it away"
        return f"only `quartet models unmute {base}` brings it back"

    def agent_changes(self) -> list[tuple[bytes, bytes]]:
        """Each agent's record, so that a restart serves the same."""
        for agent, record in self.records.items():
            beside = self.voting.stage(agent + CANARY)
            trial = replace(record.trial, active=beside.active) if record.trial and beside else record.trial
            self.records[agent] = replace(record, active=self._stage(agent).active, trial=trial)
        return [(agent.encode(), record.pack()) for agent, record in self.records.items()]

    def restore(self, state: State) -> None:
        """Take up committed state. Raises `StateCorruptError` where it is not what was written.

        The seats decide what serves; the stored records add what they say of it beside that.
        """
        _check_series(state)
        self.intake.restore(state.get("series", {}))
        self.features.restore(state.get("features", {}))
        for name in FEATURE_SETS:
            self.voting.restore(name, state.get(f"windows:{name}", {}))
        self.safeguard.restore(state.get("quality", {}))
        self.ensemble.restore(state.get("ensemble", {}))
        self.scoreboard.restore(state)
        for agent, stored in records_of(state.get("agents", {})).items():
            if agent in self.records:
                self._restore_record(agent, stored)

    def _restore_record(self, agent: str, stored: Record) -> None:
        stage, beside = self._stage(agent), self.voting.stage(agent + CANARY)
        now = self.records[agent].artifact or stored.artifact
        changed = stored.artifact is not None and not stored.artifact.is_same(now)
        before = stored.artifact if changed else stored.before
        self.records[agent] = replace(stored, artifact=now, before=before)
        stays = stored.active and not changed and stage.seat.model is not None
        stage.active = stays or self._is_warm(stage.seat)
        if changed:
            self._forget_votes(agent)
        if beside is not None and stored.trial is not None:
            beside.active = stored.trial.active
        elif stored.trial is not None:
            self.end_trial(agent)

    def unused(self, state: State) -> list[str]:
        """Stored parts that nothing keeps up to date any more: to be dropped, or they would come back stale."""
        kept = {f"windows:{name}" for name in self.voting.window_sets}
        return [part for part in state if part.startswith("windows:") and state[part] and part not in kept]


def _check_series(state: State) -> None:
    """Every accepted bar wrote both the place and the features of its series; windows may have begun later.

    Raises `StateCorruptError` where one part knows of a series that the other does not.
    """
    series = {name for name in state.get("series", {}) if name.isdigit()}
    for part in ("features", *(f"windows:{name}" for name in FEATURE_SETS)):
        held = {name for name in state.get(part, {}) if b":" not in name}
        if held - series or (part == "features" and held != series):
            alone = b", ".join(sorted(held ^ series)[:3]).decode()
            problem = f"it holds {len(held)} series, the part 'series' {len(series)}; only one of them has {alone}"
            raise StateCorruptError(part, problem)


def _record(seat: Seat) -> Record:
    return Record(None if seat.model is None else Artifact.of(seat.model))


def _bar_by_bar(vectors: Vectors, events: Sequence[Event]) -> list[Event]:
    """The events of a batch in the order of its bars, as batches of one would give them."""
    rows = {bar.bar_id: row for row, bar in enumerate(vectors.accepted.bars)}
    return sorted(events, key=lambda event: rows[event.bar_id])


def trial_seat(agent: str, model: Model, kind: AgentState, canary_share: float) -> Seat:
    """The seat of a canary, or of a shadow, whose weight is 0."""
    return Seat(agent + CANARY, canary_share if kind is AgentState.CANARY else 0.0, model, role=kind)
