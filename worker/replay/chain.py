"""The pipeline of a recording: what decided then, decides again.

A start of the worker is a start of the pipeline over the state as it was committed; what operators
and reloads changed is done again between the same two bars. An agent whose model is not at hand
gives its recorded votes, with the state and the reason that they had.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from agents.agent import Refusal
from streams.keys import CONSENSUS
from streams.messages import CANARY, AgentState, Entry, Event, Reason
from streams.store import id_tuple
from streams.validation import LATEST_TS_MS
from worker.assembly import load_options, pipeline_factory
from worker.batches import Ballot, Vectors
from worker.decoding import ballot_of
from worker.errors import CheckFailed
from worker.pipeline import NO_ROWS, Pipeline, Result, Underway
from worker.qsc import Safeguard
from worker.replay.outline import VOTES, Outline, Step, artifact_of, steps_in_order
from worker.replay.shelf import Shelf
from worker.replay.source import Source
from worker.roster import Artifact
from worker.settings import Settings
from worker.stages.lateness import Lateness
from worker.voting import AgentStage, Seat, Stopwatch, Windows

State = dict[str, dict[bytes, bytes]]
_AS_RECORDED = "as recorded"

AHEAD = 2
"""How many batches the models have at most: with one waiting, none of them waits for another at the end of a batch."""


class RecordedStage(AgentStage):
    """An agent that says what it said then."""

    def __init__(self, seat: Seat, source: Source) -> None:
        super().__init__(seat, active=True)
        self._source = source

    def vote(self, vectors: Vectors, windows: Mapping[str, Windows], stopwatch: Stopwatch = nullcontext) -> Ballot:
        """The recorded ballot over the voted rows of `vectors`; rows without a vote are absent."""
        del windows, stopwatch
        return ballot_of(self.seat.agent, [self._vote(bar.bar_id) for bar in vectors.bars], self.seat.weight)

    def _vote(self, bar_id: str) -> Mapping[str, Any] | None:
        found = self._source.peek(VOTES + self.seat.agent)
        vote = None if found is None else orjson.loads(found.fields[b"data"])
        if vote is None or vote["bar_id"] != bar_id:
            return None
        self._source.take(VOTES + self.seat.agent, 1)
        return vote  # type: ignore[no-any-return]


class _Watch(Safeguard):
    """The safeguard, which leaves recorded ballots as they are: their states are recorded too."""

    recorded: frozenset[str] = frozenset()

    def watch(self, vectors: Vectors, ballots: Sequence[Ballot]) -> tuple[list[Ballot], list[Event]]:
        judged, events = super().watch(vectors, [b for b in ballots if b.agent not in self.recorded])
        by_agent = {ballot.agent: ballot for ballot in judged}
        return [by_agent.get(ballot.agent, ballot) for ballot in ballots], events


@dataclass
class Chain:
    """Computes a recording again, in any batches. `restart_every` starts anew after that many batches, for tests."""

    settings: Settings
    outline: Outline
    source: Source
    restart_every: int | None = None
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        start = self.outline.first_start
        if start is None:
            self.notes.append("the recording has no start of a worker: verified with the settings of this machine")
        self._applied = self._settings(start)
        self._sets = self._computed(start)
        self.shelf = Shelf(self.settings.models, load_options(self._applied))
        self._wanted: dict[str, Artifact] = {}
        self._steps = steps_in_order(self.outline)
        self._gaps = {key: list(gaps) for key, gaps in self.outline.gaps.items()}
        self._left_out = frozenset(self.outline.left_out)
        self._state: State = defaultdict(dict)
        self._unkept: list[NDArray[np.int64]] = []
        self._batches = 0
        self.pipeline = self._make(self._first_seats(start))

    @property
    def recorded(self) -> frozenset[str]:
        """The agents whose votes are taken over at present."""
        return frozenset(s.seat.agent for s in self.pipeline.voting.stages if isinstance(s, RecordedStage))

    @property
    def _restarts_ahead(self) -> bool:
        """Whether the state will be restored once more: packing it for nobody would take time."""
        return self.restart_every is not None or any(step.kind == "started" for step in self._steps)

    def run(self, batch_size: int, stopwatch: Stopwatch = nullcontext) -> Iterator[tuple[Result, frozenset[str]]]:
        """Every batch and the agents that were taken over in it. Cuts where something changed in between.

        Where nothing changes, the models compute the next batch while the caller looks at one.
        """
        underway: deque[Underway] = deque()
        held: list[Entry] = []
        while held := held or self._entries(batch_size):
            restarts = self._restart_is_due()
            changing = restarts or self._is_due(held[0]) or not self.pipeline.is_steady
            yield from self._finish(underway, 0 if changing else AHEAD - 1, stopwatch)
            if restarts:
                self._restart()
            while self._is_due(held[0]):
                self._apply(self._steps.pop(0))
            cut = self._next_cut(held)
            entries, held = held[:cut], held[cut:]
            underway.append(self.pipeline.begin(entries, LATEST_TS_MS, poison=self._left_out, stopwatch=stopwatch))
            self._batches += 1
            if self._restarts_ahead:
                self._unkept.append(underway[-1].vectors.accepted.rows)
        yield from self._finish(underway, 0, stopwatch)

    def _finish(
        self, underway: deque[Underway], most: int, stopwatch: Stopwatch
    ) -> Iterator[tuple[Result, frozenset[str]]]:
        """The oldest batches under way, until `most` are left."""
        while len(underway) > most:
            yield self.pipeline.finish(underway.popleft(), stopwatch), self.recorded

    def _entries(self, count: int) -> list[Entry]:
        """The next entries that the worker took in, at most `count`; none at the end."""
        while entries := self.source.entries(count):
            if kept := [entry for entry in entries if not self._was_lost(entry)] if self._gaps else entries:
                return kept
        return []

    def _was_lost(self, entry: Entry) -> bool:
        """Whether the worker went on without this entry, which was trimmed when the recorder had read it."""
        gaps = self._gaps.get(entry.key)
        if not gaps or id_tuple(entry.id) <= gaps[0][0]:
            return False
        after, left = gaps.pop(0)
        if left > 1:
            gaps.insert(0, (after, left - 1))
        return True

    def close(self) -> None:
        self.pipeline.voting.close()

    def _restart_is_due(self) -> bool:
        return bool(self.restart_every and self._batches and self._batches % self.restart_every == 0)

    def _is_due(self, entry: Entry) -> bool:
        """Whether the next step comes before this entry."""
        return bool(self._steps) and self._steps[0].is_due(entry)

    def _next_cut(self, entries: Sequence[Entry]) -> int:
        if not self._steps:
            return len(entries)
        return next((i for i, entry in enumerate(entries) if self._is_due(entry)), len(entries))

    # ------------------------------------------------------------------ starting

    def _settings(self, start: Step | None) -> Settings:
        """The settings of a start; what only this machine knows stays, and lateness is not judged again."""
        if start is None:
            return self.settings
        known = {k: v for k, v in start.evidence["settings"].items() if k in Settings.model_fields}
        unknown = sorted(set(start.evidence["settings"]) - set(known))
        if unknown:
            self.notes.append(f"settings that this program does not have are left out: {', '.join(unknown)}")
        values = {name: getattr(self.settings, name) for name in ("models", "state_dir")}
        namespace = {"namespace": self.source.namespace}
        return Settings(**{**known, **values, **namespace})

    def _first_seats(self, start: Step | None) -> list[Seat]:
        if start is not None:
            return self._seats(start)
        named = {agent: self.outline.versions.get(agent, (None, "")) for agent in self._applied.agents}
        return [
            self._seat(agent, None if version is None else self.outline.artifact(agent, version), reason)
            for agent, (version, reason) in named.items()
        ]

    def _seats(self, start: Step, before: Mapping[str, Seat] | None = None) -> list[Seat]:
        """The seats of a start; one of a single stage leaves what was `before` it of the agents of others."""
        agents = {agent: named or {} for agent, named in start.evidence["agents"].items()}
        kept = before if before is not None and start.stage else {}
        named = {agent: agents.get(agent, {}) for agent in self._applied.agents}
        return [
            kept[agent]
            if agent in kept and agent not in agents
            else self._seat(agent, artifact_of(one) if one.get("version") else None, one.get("refused", ""))
            for agent, one in named.items()
        ]

    def _computed(self, start: Step | None) -> Sequence[str] | None:
        """The feature sets that a feature stage said it computes; None where they follow from the models."""
        return None if start is None else start.evidence.get("feature_sets")

    def _seat(self, agent: str, wanted: Artifact | None, reason: str) -> Seat:
        weight = self._applied.weights[agent]
        self._wanted.pop(agent, None)
        if wanted is not None:
            self._wanted[agent] = wanted
            loading = self.shelf.find(agent, wanted)
            return Seat(agent, weight, loading.model, loading.refusal)
        refused = Reason(reason) if reason in tuple(Reason) else Reason.NO_ARTIFACT
        return Seat(agent, weight, refusal=Refusal(refused, _AS_RECORDED))

    def _make(self, seats: Sequence[Seat]) -> Pipeline:
        """A fresh pipeline; a seat whose model is not at hand is taken over."""
        self.pipeline = pipeline_factory(self._applied, self._sets)(seats)
        if self.outline.split:
            self.pipeline.lateness = Lateness(self._applied.agents, self._applied.quality)
            self.pipeline.missed = self.outline.missed
        self.pipeline.agents.safeguard = _Watch(self._applied.quality)
        self.pipeline.intake.stale_bars = self.outline.stale
        for seat in seats:
            if seat.refusal is not None and seat.refusal.detail != _AS_RECORDED:
                self._take_over(seat.agent)
        return self.pipeline

    def _take_over(self, agent: str) -> None:
        """Let the recorded votes stand for a model that is not at hand."""
        voting = self.pipeline.voting
        old = voting.stage(agent)
        seat = Seat(agent, self._applied.canary_share) if old is None else replace(old.seat, model=None, refusal=None)
        voting.reseat(replace(seat, refusal=Refusal(Reason.NO_ARTIFACT, "not at hand")))
        place = next(i for i, stage in enumerate(voting.stages) if stage.seat.agent == agent)
        voting.stages[place] = RecordedStage(voting.stages[place].seat, self.source)
        self._mind()

    def _mind(self) -> None:
        assert isinstance(self.pipeline.safeguard, _Watch)  # noqa: S101 - made so
        self.pipeline.safeguard.recorded = self.recorded

    def _restart(self, start: Step | None = None) -> None:
        """A pipeline of its own over the committed state, as after a restart of the worker."""
        old = self.pipeline
        seats = [stage.seat for stage in old.voting.stages]
        if start is not None:
            self._applied = self._settings(start)
            self._sets = self._computed(start) or self._sets
            trials = [seat for seat in seats if seat.agent.endswith(CANARY)]
            seats = [*self._seats(start, {seat.agent: seat for seat in seats}), *trials]
        self._keep()
        pipeline = self._make(seats)
        pipeline.restore(self._state)
        for part in pipeline.unused(self._state):
            self._state.pop(part)
        old.voting.close()
        self._mind()

    def _keep(self) -> None:
        """Bring the state up to date, as if it had been committed after every batch."""
        state, drops = self.pipeline.changes(np.concatenate([NO_ROWS, *self._unkept]))
        self._unkept.clear()
        for part in drops:
            self._state.pop(part, None)
        for part, fields in state.items():
            self._state[part].update(fields)

    # ------------------------------------------------------------------ what changed between two bars

    def _apply(self, step: Step) -> None:
        if step.kind == "started":
            self._restart(step)
            return
        if self._restarts_ahead:  # or what left by itself and comes back now would seem to have stayed
            self._keep()
        self._change(step)
        if self._restarts_ahead:
            self._keep()
        self._mind()

    def _change(self, step: Step) -> None:
        agent = step.agent.removesuffix(CANARY)
        beside = agent != step.agent
        named = artifact_of(step.evidence) if step.evidence.get("version") else None
        if step.kind == "gap" and isinstance(step.after, tuple):
            self.notes.append(f"vectors or votes were lost behind {step.evidence.get('after')}: the rest may differ")
        elif step.kind == "gap":
            self.pipeline.intake.rewarm_all()
        elif step.evidence.get("stage") == CONSENSUS and self.pipeline.lateness is not None:
            self.pipeline.lateness.safeguard.unmute(agent)
        elif step.kind == "agent_muted" and step.reason == "operator":
            self.pipeline.safeguard.mute(agent)
        elif step.kind == "agent_readmitted" and step.reason == "operator":
            self.pipeline.safeguard.unmute(agent)
        elif step.kind == "rolled_back" and beside:
            self._end_trial(agent)
        elif named is None:
            return
        elif step.kind in ("canary_started", "shadow_started"):
            self._begin_trial(agent, named, AgentState(step.kind.removesuffix("_started")))
        elif step.kind == "promoted":
            self._promote(agent, named)
        elif step.kind in ("rolled_back", "reload"):
            self._install(agent, named, pinned=step.kind == "rolled_back")
        elif step.kind == "version" and not beside and named.version != self._version(agent):
            self._install(agent, self.outline.artifact(agent, named.version), pinned=False)

    def _version(self, agent: str) -> str | None:
        """The version that serves under an agent's name, whether or not it is at hand."""
        return self._wanted[agent].version if agent in self._wanted else None

    def _begin_trial(self, agent: str, wanted: Artifact, kind: AgentState) -> None:
        loading = self.shelf.find(agent, wanted)
        if loading.model is None:
            self._take_over(agent + CANARY)
        else:
            self.pipeline.agents.begin_trial(agent, loading.model, kind)

    def _end_trial(self, agent: str) -> None:
        if self.pipeline.records[agent].trial is not None:
            self.pipeline.agents.end_trial(agent)
        elif self.pipeline.voting.stage(agent + CANARY) is not None:
            self.pipeline.voting.remove(agent + CANARY)

    def _promote(self, agent: str, wanted: Artifact) -> None:
        if self.pipeline.records[agent].trial is not None:
            self.pipeline.agents.promote(agent)
            self._wanted[agent] = wanted
            return
        self._end_trial(agent)
        self._install(agent, wanted, pinned=True)

    def _install(self, agent: str, wanted: Artifact, *, pinned: bool) -> None:
        """Seat a model, unless it sits there already."""
        before = self._wanted.get(agent)
        if self.pipeline.voting.stage(agent) is None or wanted.is_same(before):
            return
        self._wanted[agent] = wanted
        loading = self.shelf.find(agent, wanted)
        if loading.model is None:
            self._take_over(agent)
        else:
            self.pipeline.agents.install(agent, loading.model, pinned=pinned)


def check_beginning(header: Mapping[str, Any], outline: Outline) -> None:
    """Raise `CheckFailed` where a recording lacks bars that its features remember."""
    inputs = set(header["inputs"])
    before = sum(added for key, (_, added) in header["positions"].items() if key in inputs)
    if before:
        raise CheckFailed(
            f"the recording begins {before} bars after the start of its input, and features remember every bar: it can "
            "be replayed, but not verified; record from the start of a namespace, without --from-now"
        )
    if outline.lost["bars"]:
        raise CheckFailed(
            f"{outline.lost['bars']} bars were trimmed before they were recorded, and features remember every bar: the "
            "recording can be replayed, but not verified; record a stream that keeps more"
        )
