"""The agent stages: feature vectors in, one ballot an agent out, models side by side.

An agent without a loaded, matched and probed model abstains with its reason; there is no other way
to a vote than through `agents.agent.Model`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import structlog
from numpy.typing import NDArray

from agents.agent import Model, Refusal
from streams.contracts import FEATURE_SETS, FeatureSet
from streams.messages import AGENTS, CANARY, Action, AgentState, Reason
from worker.batches import STATE_CODE, Ballot, Vectors
from worker.features.windows import SequenceWindows
from worker.lanes import Lanes

log = structlog.get_logger()

Stopwatch = Callable[[str], AbstractContextManager[Any]]
"""Given a stage's name, measures what runs inside; the stages themselves have no clock."""

Windows = tuple[NDArray[np.float64], NDArray[np.bool_]]
"""The windows `[R, L, C]` that end at the voted rows, and which of them are full `[R]`."""


@dataclass(frozen=True)
class Seat:
    """One configured agent: its weight, and either its model or why it has none.

    `role` is the state in which its votes count: `active`, or `canary` and `shadow` for the version
    beside the running one, which is the agent `<agent>_canary`.
    """

    agent: str
    weight: float
    model: Model | None = None
    refusal: Refusal | None = None
    role: AgentState = AgentState.ACTIVE

    @property
    def sha256(self) -> str | None:
        """The hash of the artifact in use."""
        return None if self.model is None else self.model.sha256

    @property
    def version(self) -> str | None:
        return None if self.model is None else self.model.version

    @property
    def file(self) -> str:
        """The name of the model file: that serves, or that was refused; empty where there is none."""
        return self.model.file.name if self.model else self.refusal.file if self.refusal else ""


class AgentStage:
    """One agent. `active` once any series has had its full window; until then it is warming up."""

    def __init__(self, seat: Seat, *, active: bool = False) -> None:
        self.seat = seat
        self.active = active

    @property
    def state(self) -> AgentState:
        """What the agent is now, between two batches."""
        if self.seat.model is None:
            return AgentState.REFUSED
        return self.seat.role if self.active else AgentState.WARMING_UP

    @property
    def reason(self) -> str | None:
        if self.seat.refusal is not None:
            return str(self.seat.refusal.reason)
        return None if self.active else str(Reason.INSUFFICIENT_HISTORY)

    def vote(self, vectors: Vectors, windows: Mapping[str, Windows], stopwatch: Stopwatch = nullcontext) -> Ballot:
        """The agent's ballot over the voted rows of `vectors`."""
        model = self.seat.model
        if model is None:
            return self._abstain_all(len(vectors.index))
        x, full = self._inputs(model, vectors, windows)
        with stopwatch(f"agent:{self.seat.agent}"):
            return self._ballot(model, x, full)

    def _inputs(
        self, model: Model, vectors: Vectors, windows: Mapping[str, Windows]
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        if model.window == 1:
            ready = vectors.ready_of(model.feature_set)[vectors.index]
            return vectors.columns(model.features)[vectors.index], ready
        sequences, full = windows[f"{model.feature_set}/{model.window}"]
        features = FEATURE_SETS[model.feature_set].features
        if model.features == features:
            return sequences, full
        return sequences[:, :, [features.index(name) for name in model.features]], full

    def _abstain_all(self, rows: int) -> Ballot:
        assert self.seat.refusal is not None  # noqa: S101 - a seat has a model or a refusal
        return Ballot(
            agent=self.seat.agent,
            version=None,
            weight=self.seat.weight,
            action=np.full(rows, Action.ABSTAIN, dtype=np.int8),
            confidence=np.zeros(rows),
            outputs=None,
            answered=np.zeros(rows, dtype=np.bool_),
            state=np.full(rows, STATE_CODE[AgentState.REFUSED], dtype=np.int8),
            reason=(str(self.seat.refusal.reason),) * rows,
        )

    def _ballot(self, model: Model, x: NDArray[np.float64], full: NDArray[np.bool_]) -> Ballot:
        rows = len(full)
        outputs = np.full((rows, model.outputs), np.nan)
        action = np.full(rows, Action.ABSTAIN, dtype=np.int8)
        confidence = np.zeros(rows)
        reason: list[str | None] = [None if ok else str(Reason.INSUFFICIENT_HISTORY) for ok in full]

        finite = full & np.isfinite(x).reshape(rows, -1).all(axis=1) if rows else full
        failed = self._predict(model, x, finite, outputs)
        answered = finite & np.isfinite(outputs).all(axis=1)
        if answered.any():
            action[answered], confidence[answered] = model.head.decide(outputs[answered])
        for row in np.flatnonzero(full & ~answered):
            reason[row] = str(Reason.ERROR_RATE if row in failed else Reason.NON_FINITE_OUTPUT)
        return Ballot(
            agent=self.seat.agent,
            version=model.version,
            weight=self.seat.weight,
            action=action,
            confidence=confidence,
            outputs=outputs,
            answered=answered,
            state=self._states(full),
            reason=tuple(reason),
            features=model.features,
        )

    def _predict(
        self, model: Model, x: NDArray[np.float64], rows: NDArray[np.bool_], outputs: NDArray[np.float64]
    ) -> set[int]:
        """Fill `outputs` for `rows`; a row that raises is tried alone, so that it fails alone."""
        if not rows.any():
            return set()
        try:
            outputs[rows] = model.predict(x[rows])
        except Exception as error:  # noqa: BLE001 - whatever a model raises is an abstention, never the end of the worker
            log.warning("prediction failed", agent=self.seat.agent, reason=str(Reason.ERROR_RATE), detail=repr(error))
            return self._predict_alone(model, x, rows, outputs)
        return set()

    def _predict_alone(
        self, model: Model, x: NDArray[np.float64], rows: NDArray[np.bool_], outputs: NDArray[np.float64]
    ) -> set[int]:
        failed: set[int] = set()
        for row in np.flatnonzero(rows).tolist():
            try:
                outputs[row] = model.predict(x[row : row + 1])[0]
            except Exception:  # noqa: BLE001 - logged once for the batch, counted by reason for the row
                failed.add(row)
        return failed

    def _states(self, full: NDArray[np.bool_]) -> NDArray[np.int8]:
        """Warming up until the first row with a full window, active from that row on."""
        reached = np.logical_or.accumulate(full) | self.active if len(full) else full
        self.active = bool(self.active or full.any())
        return np.where(reached, STATE_CODE[self.seat.role], STATE_CODE[AgentState.WARMING_UP]).astype(np.int8)


def compute_alone() -> None:
    """One torch thread inside this thread.

    The number that the main thread set reaches another thread only after its first matrix product,
    which would run on all cores and give other last bits.
    """
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)


def _vote_alone(stage: AgentStage, vectors: Vectors, windows: Mapping[str, Windows], stopwatch: Stopwatch) -> Ballot:
    compute_alone()
    return stage.vote(vectors, windows, stopwatch)


def _reads(seat: Seat) -> tuple[str, int] | None:
    """The set and the window that a seat's model reads."""
    return None if seat.model is None else (seat.model.feature_set, seat.model.window)


def _place(stage: AgentStage) -> tuple[bool, int]:
    """Canaries after all agents, each in the one order of agents, however they came."""
    agent = stage.seat.agent.removesuffix(CANARY)
    return stage.seat.agent != agent, AGENTS.index(agent)


class VotingStage:
    """All agent stages and the sequence windows they share, one ring a feature set."""

    def __init__(self, seats: Sequence[Seat], *, capacity: int = 64) -> None:
        self.stages = sorted((AgentStage(seat) for seat in seats), key=_place)
        self._capacity = capacity
        self._windows: dict[str, SequenceWindows] = {}
        self._lanes: Lanes[Ballot] = Lanes("agent")
        self._open_windows()

    @property
    def feature_sets(self) -> tuple[FeatureSet, ...]:
        """The sets that the loaded models read."""
        return tuple(dict.fromkeys(FEATURE_SETS[m.feature_set] for m in self._models()))

    @property
    def window_sets(self) -> tuple[str, ...]:
        """The feature sets whose windows are kept."""
        return tuple(self._windows)

    def _models(self) -> list[Model]:
        return [stage.seat.model for stage in self.stages if stage.seat.model is not None]

    def _lengths(self, name: str) -> list[int]:
        return sorted({m.window for m in self._models() if m.window > 1 and m.feature_set == name})

    def _open_windows(self) -> None:
        """A ring for each set that a sequence model reads, long enough for the longest window of them."""
        for feature_set in self.feature_sets:
            if lengths := self._lengths(feature_set.name):
                capacity = max(self._capacity, *lengths)
                ring = self._windows.setdefault(feature_set.name, SequenceWindows(len(feature_set), capacity))
                ring.widen(capacity)

    def stage(self, agent: str) -> AgentStage | None:
        """The stage of an agent, or of its canary."""
        return next((stage for stage in self.stages if stage.seat.agent == agent), None)

    def serves(self, agent: str) -> bool:
        """Whether the agent has a model."""
        stage = self.stage(agent)
        return stage is not None and stage.seat.model is not None

    def reseat(self, seat: Seat) -> None:
        """Swap one agent's model between two batches, or add one; its place stays.

        Its warm-up stays too where the new model reads the same set over the same window; else the
        agent is warming up until a series has the window that it needs.
        """
        for place, stage in enumerate(self.stages):
            if stage.seat.agent == seat.agent:
                active = stage.active and _reads(stage.seat) == _reads(seat)
                self.stages[place] = AgentStage(seat, active=active)
                break
        else:
            self.stages.append(AgentStage(seat))
            self.stages.sort(key=_place)
        self._tidy_windows()

    def holds_window(self, model: Model) -> bool:
        """Whether any series has the whole window of vectors that a sequence model reads."""
        ring = self._windows.get(model.feature_set)
        return ring is not None and int(ring.counts.max(initial=0)) >= model.window

    def remove(self, agent: str) -> None:
        """Take the seat of a canary away."""
        self.stages = [stage for stage in self.stages if stage.seat.agent != agent]
        self._tidy_windows()

    def _tidy_windows(self) -> None:
        """Windows that no model reads any more are forgotten: kept without new vectors they would lie."""
        for name in [name for name in self._windows if not self._lengths(name)]:
            del self._windows[name]
        self._open_windows()

    def vote(self, vectors: Vectors, stopwatch: Stopwatch = nullcontext) -> list[Ballot]:
        """One ballot an agent, in the order of the seats; the models run side by side."""
        return self.ballots(self.ask(vectors, stopwatch))

    def ask(self, vectors: Vectors, stopwatch: Stopwatch = nullcontext) -> list[Future[Ballot]]:
        """As `vote`, without waiting for the ballots; an agent that is asked again answers in order.

        No more of these models compute at once than there are cores; the last seats, the networks, which take longest,
        begin first.
        """
        windows = self._push(vectors)
        asked = [
            self._lanes.submit(stage.seat.agent, partial(_vote_alone, stage, vectors, windows, stopwatch))
            for stage in reversed(self.stages)
        ]
        return asked[::-1]

    def ballots(self, asked: Sequence[Future[Ballot]]) -> list[Ballot]:
        """What was asked for. Until all of it is there, this thread computes among the others."""
        return [self._lanes.result(ballot) for ballot in asked]

    def _push(self, vectors: Vectors) -> dict[str, Windows]:
        """Append the ready vectors to their rings and cut out the windows that the models read."""
        cut: dict[str, Windows] = {}
        accepted = vectors.accepted
        for name, ring in self._windows.items():
            lengths = self._lengths(name)
            windows, held = ring.push(
                accepted.rows,
                vectors.columns(FEATURE_SETS[name].features),
                lengths[-1],
                accepted.restart,
                vectors.ready_of(name),
            )
            windows, held = windows[vectors.index], held[vectors.index]
            for length in lengths:
                cut[f"{name}/{length}"] = windows[:, lengths[-1] - length :, :], held >= length
        return cut

    def changes(self, rows: NDArray[np.int64]) -> dict[str, list[tuple[bytes, bytes]]]:
        """The window fields to store, by feature set, after a batch with these series `rows`."""
        return {name: ring.changes(rows) for name, ring in self._windows.items()}

    def restore(self, name: str, fields: Mapping[bytes, bytes]) -> None:
        """Take up the windows of a feature set, where a loaded model reads them."""
        if name in self._windows:
            self._windows[name].restore(fields)

    def close(self) -> None:
        self._lanes.close()
