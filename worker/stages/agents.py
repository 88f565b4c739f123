"""The agent stage: any of the agents, side by side: their models, safeguard, trials and records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from agents.agent import Model
from streams.contracts import FEATURE_SETS, FeatureSet
from streams.messages import CANARY, AgentState, Event, Reason
from worker import consensus, trials
from worker.batches import Ballot, Fields, State, Vectors
from worker.qsc import Safeguard
from worker.quality import QualityLimits
from worker.roster import Artifact, Record, Trial, records_of
from worker.scoreboard import threshold_of
from worker.stages.features import check_series
from worker.voting import AgentStage, Seat, Stopwatch, VotingStage

CANARY_PERIOD_MS = 6 * 3_600_000
"""How long, by the bars' clock, any violation rolls a canary back."""

WAITING = "newer files wait for `quartet models reload {}`"
"""What follows for whoever trains: a promotion or a rollback pins what serves."""

WINDOWS = tuple(f"windows:{name}" for name in FEATURE_SETS)
PARTS = ("agents", "quality", *WINDOWS)


class FeatureSource(Protocol):
    """Where the vectors come from, as far as the agents have a say in it."""

    def read_by(self, sets: Iterable[FeatureSet]) -> None:
        """The feature sets that the agents read from now on."""
        ...

    def is_warm(self, name: str) -> bool:
        """Whether a feature set is ready for any series."""
        ...


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


class AgentGroup:
    """Some or all of the agents, and the versions beside them. `features` is where their vectors come from."""

    def __init__(
        self,
        seats: Sequence[Seat],
        features: FeatureSource,
        *,
        window_capacity: int = 64,
        quality: Mapping[str, QualityLimits] | None = None,
        canary_share: float = consensus.CANARY_SHARE,
        canary_period_ms: int = CANARY_PERIOD_MS,
    ) -> None:
        self.canary_share = canary_share
        self.canary_period_ms = canary_period_ms
        self.voting = VotingStage(seats, capacity=window_capacity)
        self.safeguard = Safeguard(quality)
        self.records = {s.agent: _record(s) for s in seats if s.role is AgentState.ACTIVE}
        self._features = features
        self._features.read_by(self.voting.feature_sets)
        self._stored_windows = set(self.voting.window_sets)

    def process(
        self, vectors: Vectors, stopwatch: Stopwatch = nullcontext
    ) -> tuple[Vectors, list[Ballot], list[Event]]:
        """The ballots on one batch of vectors, and what was decided about agents on the way.

        The vectors are the same, but for `leaves`: a trial that ended may have been the last to read a set.
        """
        with stopwatch("agents"):
            ballots = self.voting.vote(vectors, stopwatch)
        return self.judge(vectors, ballots, stopwatch)

    def judge(
        self, vectors: Vectors, ballots: Sequence[Ballot], stopwatch: Stopwatch = nullcontext
    ) -> tuple[Vectors, list[Ballot], list[Event]]:
        """As `process`, of ballots that are cast."""
        with stopwatch("safeguard"):
            ballots, verdicts = self.safeguard.watch(vectors, ballots)
            return self._judge_trials(vectors, ballots, verdicts)

    def _judge_trials(
        self, vectors: Vectors, ballots: list[Ballot], verdicts: list[Event]
    ) -> tuple[Vectors, list[Ballot], list[Event]]:
        """Canaries and shadows after this batch; a violation ends one on its very row."""
        ended: list[tuple[int, str]] = []
        for place, ballot in enumerate(ballots):
            agent = ballot.agent.removesuffix(CANARY)
            trial = self.records[agent].trial
            if trial is None or agent == ballot.agent:
                continue
            own = [verdict for verdict in verdicts if verdict.agent == ballot.agent]
            minimum = self.safeguard.limits(agent).minimum
            period = trials.Period(self.canary_period_ms, self.safeguard.votes_after(ballot), minimum)
            judged = trials.judge(trial, ballot, vectors.bars, own, period, self._serving(agent))
            ballots = [*ballots[:place], judged.ballot, *ballots[place + 1 :]]
            verdicts = [*(v for v in verdicts if v.agent != ballot.agent), *judged.events]
            self.records[agent] = replace(self.records[agent], trial=judged.trial)
            if judged.ended is not None:
                ended.append((judged.ended, agent))
        leaves: dict[str, int] = {}
        for row, agent in sorted(ended):
            before = {s.name for s in self.voting.feature_sets}
            self.end_trial(agent)
            gone = (before - {s.name for s in self.voting.feature_sets}) & vectors.ready.keys()
            leaves |= dict.fromkeys(gone, int(vectors.index[row]))
        return (replace(vectors, leaves=leaves) if leaves else vectors), ballots, verdicts

    def _serving(self, agent: str) -> str:
        artifact = self.records[agent].artifact
        serves = f"{agent} serves on with {artifact.version}" if artifact else f"{agent} has no model"
        return f"{serves}; {WAITING.format(agent)}"

    @property
    def thresholds(self) -> dict[str, float]:
        """By agent and canary the return, a fraction of the price, within which its HOLD is right."""
        models = {stage.seat.agent: stage.seat.model for stage in self.voting.stages}
        return {agent: threshold_of(model) for agent, model in models.items() if model is not None}

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
        self._features.read_by(self.voting.feature_sets)

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
        self._features.read_by(self.voting.feature_sets)
        stage = self._stage(seat.agent)
        stage.active = stage.active or self._is_warm(seat)

    def _is_warm(self, seat: Seat) -> bool:
        """Whether the model of a seat can vote on any series as things stand."""
        if seat.model is None:
            return False
        if seat.model.window > 1:
            return self.voting.holds_window(seat.model)
        return self._features.is_warm(seat.model.feature_set)

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

    # ------------------------------------------------------------------ storage

    def changes(self, rows: NDArray[np.int64]) -> tuple[dict[str, Fields], list[str]]:
        """The state fields to store, by part, after a batch of these series, and the parts to drop before."""
        windows = {f"windows:{name}": fields for name, fields in self.voting.changes(rows).items()}
        state = {**windows, "quality": self.safeguard.changes(), "agents": self.record_changes()}
        # Windows that come or go: what is stored under their name is of another time.
        kept = set(self.voting.window_sets)
        moved = self._stored_windows ^ kept
        self._stored_windows = kept
        return state, [f"windows:{name}" for name in sorted(moved)]

    def record_changes(self) -> Fields:
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
        check_series(state, (), WINDOWS)
        for name in FEATURE_SETS:
            self.voting.restore(name, state.get(f"windows:{name}", {}))
        self.safeguard.restore(state.get("quality", {}))
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
        return [part for part in state if part in WINDOWS and state[part] and part not in kept]


def _record(seat: Seat) -> Record:
    return Record(None if seat.model is None else Artifact.of(seat.model))


def trial_seat(agent: str, model: Model, kind: AgentState, canary_share: float) -> Seat:
    """The seat of a canary, or of a shadow, whose weight is 0."""
    return Seat(agent + CANARY, canary_share if kind is AgentState.CANARY else 0.0, model, role=kind)
