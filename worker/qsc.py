"""The quality safeguard: a degenerate model stops voting, and everybody can see why.

Each agent's last 500 attempts to vote are kept, in the order of the bars and as part of the commit. A
violation mutes the agent on the bar of that vote; it is re-admitted after a fresh full window without
one, at most three times a day of the bars' clock. `docs/quality.md` says what each criterion means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from streams.messages import AGENTS, CANARY, Action, AgentState, Bar, Event, Reason
from worker import qsc_kernel as kernel
from worker.batches import STATE_CODE, STATES, Ballot, Vectors
from worker.features.packing import SeriesStore
from worker.quality import CRITERIA, WINDOW, QualityLimits

FAILURES = CRITERIA[5:]
"""The reasons of abstentions that are attempts; `insufficient_history` is none."""
_FAILURE_KIND = {str(reason): 3 + place for place, reason in enumerate(FAILURES)}
_JUDGED = [STATE_CODE[s] for s in (AgentState.ACTIVE, AgentState.CANARY, AgentState.SHADOW, AgentState.MUTED)]
_IS_JUDGED = np.isin(np.arange(len(STATES)), _JUDGED)
_WEIGHTED = np.array([state in (AgentState.ACTIVE, AgentState.CANARY) for state in STATES])
"""By code of a state, whether its votes have weight."""
_ABSTAIN = int(Action.ABSTAIN)


@dataclass(frozen=True, slots=True)
class Quality:
    """What an agent's window says. `figures` by criterion, NaN where there is nothing to take it from."""

    attempts: int
    votes: int
    figures: Mapping[Reason, float]
    violations: tuple[Reason, ...]
    sufficient: bool


@dataclass(frozen=True)
class Watched:
    """What became of N rows: `[N]` each, `figures` `[N, 10]` (NaN on rows that were no attempt).

    The figures are those of the criteria, and last the share of attempts without a finite output.
    `status` and `reason` as they stand after the row, `transition` what happened on it, `found` the
    violations as bits in the order of `CRITERIA`, `votes` how many the window holds.
    """

    status: NDArray[np.int64]
    reason: NDArray[np.int64]
    transition: NDArray[np.int64]
    found: NDArray[np.int64]
    votes: NDArray[np.int64]
    figures: NDArray[np.float64]


_STATE_RECORD = np.dtype(
    [
        *(("life", "<i8"), ("count", "<i8"), ("attempts", "<i8")),
        *(("ints", "<i8", (kernel.INTEGERS,)), ("first", "<f8", (kernel.OUTPUTS,))),
    ]
)
_CHUNK = np.dtype([("kind", "i1", (kernel.CHUNK,)), ("confidence", "<f8", (kernel.CHUNK,))])
"""The items of the ring; `count` is how many of them were begun."""


class Safeguard:
    """Watches every agent's ballot, row by row, and says what state each vote is in.

    `limits` by agent; a canary is watched as its own agent, with the limits of the one it may replace.
    """

    def __init__(self, limits: Mapping[str, QualityLimits] | None = None, *, window: int = WINDOW) -> None:
        self._limits = dict(limits or {})
        self._window = window
        self._store = SeriesStore(_STATE_RECORD, _CHUNK, -(-window // kernel.CHUNK) + 1)
        self._ordered = np.zeros((0, window))
        self._touched: dict[int, int] = {}
        self._votes: dict[str, NDArray[np.int64]] = {}
        # Compile, or load from the cache, now rather than at the first vote.
        none = np.zeros(0, np.int64)
        self.observe(AGENTS[0], none, np.zeros(0), np.zeros((0, 1)), none, none)
        self._touched.clear()

    def limits(self, agent: str) -> QualityLimits:
        return self._limits.get(agent.removesuffix(CANARY), QualityLimits())

    def watch(self, vectors: Vectors, ballots: Sequence[Ballot]) -> tuple[list[Ballot], list[Event]]:
        """The ballots with the state and reason of every row, and what was decided on the way, bar by bar."""
        inputs = {features: _fingerprints(vectors, features) for features in {ballot.features for ballot in ballots}}
        bars = vectors.bars
        ts = np.array([bar.ts for bar in bars], np.int64)
        judged: list[Ballot] = []
        self._votes.clear()
        events: list[tuple[int, Event]] = []
        for ballot in ballots:
            outputs = np.zeros((len(bars), 1)) if ballot.outputs is None else ballot.outputs
            seen = self.observe(ballot.agent, _kinds(ballot), ballot.confidence, outputs, inputs[ballot.features], ts)
            judged.append(self._with_states(ballot, seen))
            self._votes[ballot.agent] = seen.votes
            rows = np.flatnonzero(seen.transition).tolist()
            events += [(row, _event(ballot.agent, bars[row], seen, row)) for row in rows]
        events.sort(key=lambda pair: pair[0])
        return judged, [event for _, event in events]

    def votes_after(self, ballot: Ballot) -> NDArray[np.int64]:
        """Votes in the window of a ballot's agent after each row of the last batch `[R]`; 0 of one not watched."""
        return self._votes.get(ballot.agent, np.zeros(len(ballot.action), np.int64))

    def observe(
        self,
        agent: str,
        kinds: NDArray[np.int64],
        confidence: NDArray[np.float64],
        outputs: NDArray[np.float64],
        fingerprints: NDArray[np.int64],
        ts: NDArray[np.int64],
    ) -> Watched:
        """Take N attempts of one agent, in order.

        `kinds` `[N]` are codes of `Action`, 3 and up the place in `FAILURES`, -1 no attempt; `outputs`
        `[N, K]` are finite where there is a vote; `fingerprints` tell inputs apart; `ts` in ms is the clock.
        """
        row = self._row(agent)
        record = self._store.state[row : row + 1]
        limits, n = self.limits(agent), len(kinds)
        verdicts, figures = np.zeros((n, 5), np.int64), np.full((n, kernel.FIGURES), np.nan)
        done = int(record["attempts"][0]) // kernel.CHUNK
        kernel.watch(
            *(kinds, np.ascontiguousarray(confidence), np.ascontiguousarray(outputs), fingerprints, ts),
            *(_limits(limits), limits.minimum, self._window),
            *(record["attempts"], self._store.ring["kind"][row], self._store.ring["confidence"][row]),
            *(self._ordered[row], record["ints"][0], record["first"][0]),
            *(verdicts, figures),
        )
        record["count"][0] = _chunks(record["attempts"])[0]
        if (kinds >= 0).any():
            self._touched[row] = min(self._touched.get(row, done), done)
        status, reason, transition, found, votes = verdicts.T
        return Watched(status, reason, transition, found, votes, figures)

    def _with_states(self, ballot: Ballot, seen: Watched) -> Ballot:
        """Muted rows are muted; an agent on probation is in the shadow until it can be judged."""
        limits = self.limits(ballot.agent)
        weighted = _WEIGHTED[ballot.state]
        muted = weighted & (seen.status != kernel.CLEAR)
        if limits.probation == "vote" and not muted.any():
            return ballot
        probation = weighted & ~muted & (limits.probation == "shadow") & (seen.votes < limits.minimum)
        state = np.where(muted, STATE_CODE[AgentState.MUTED], ballot.state)
        state = np.where(probation, STATE_CODE[AgentState.SHADOW], state)
        reasons = list(ballot.reason)
        status, reason = seen.status.tolist(), seen.reason.tolist()
        for row in np.flatnonzero(muted & (ballot.action != _ABSTAIN)).tolist():
            reasons[row] = _why(status[row], reason[row])
        return replace(ballot, state=state.astype(np.int8), reason=tuple(reasons))

    def status(self, agent: str, state: AgentState) -> tuple[AgentState, str | None]:
        """What becomes of an agent in `state`, and why: muted, in the shadow on probation, or as it was."""
        row = self._row(agent)
        ints = self._store.state["ints"][row]
        if state not in (AgentState.ACTIVE, AgentState.CANARY):
            return state, None
        if ints[kernel.STATUS] != kernel.CLEAR:
            return AgentState.MUTED, _why(ints[kernel.STATUS], ints[kernel.REASON])
        limits = self.limits(agent)
        if limits.probation == "shadow" and kernel.votes_in(ints) < limits.minimum:
            return AgentState.SHADOW, None
        return state, None

    def is_locked(self, agent: str) -> bool:
        """Whether a muted agent stays so until an operator unmutes it."""
        ints = self._store.state["ints"][self._row(agent)]
        return bool(
            ints[kernel.STATUS] == kernel.OPERATOR or (ints[kernel.STATUS] == kernel.MUTED and ints[kernel.LOCKED])
        )

    def quality(self, agent: str) -> Quality:
        """The figures of the agent's window as it stands."""
        row, limits = self._row(agent), self.limits(agent)
        ints, figures = self._store.state["ints"][row], np.full(kernel.FIGURES, np.nan)
        kernel.measure(ints, self._ordered[row], figures)
        votes = int(kernel.votes_in(ints))
        return Quality(
            attempts=int(ints[kernel.HELD]),
            votes=votes,
            figures=dict(zip(CRITERIA, figures[: len(CRITERIA)].tolist(), strict=True)),
            violations=criteria_of(kernel.violations(ints, figures, _limits(limits), limits.minimum)),
            sufficient=votes >= limits.minimum,
        )

    # ------------------------------------------------------------------ what an operator may do

    def mute(self, agent: str) -> None:
        """Mute until an operator says otherwise."""
        self._ints(agent)[kernel.STATUS] = kernel.OPERATOR

    def unmute(self, agent: str) -> None:
        """Let the agent vote again, from an empty window, with its re-admissions given back."""
        ints = self._ints(agent)
        ints[kernel.STATUS], ints[kernel.LOCKED], ints[kernel.READMITTED :] = kernel.CLEAR, 0, 0
        kernel.clear(ints)

    def forget(self, agent: str) -> None:
        """Start anew with this agent: another model serves under its name."""
        self._ints(agent)[:] = 0

    def inherit(self, agent: str) -> None:
        """Give an agent the window and the decisions of its canary: that model serves under its name now."""
        row, beside = self._row(agent), self._row(agent + CANARY)
        self._store.state[row] = self._store.state[beside]
        self._store.ring[row] = self._store.ring[beside]
        self._ordered[row] = self._ordered[beside]
        # All that the window holds is stored anew, under the agent's own fields.
        self._touched[row] = 0

    def _ints(self, agent: str) -> NDArray[np.int64]:
        row = self._row(agent)
        self._touched.setdefault(row, int(self._store.state["count"][row]))
        ints: NDArray[np.int64] = self._store.state["ints"][row]
        return ints

    def _row(self, agent: str) -> int:
        row = row_of(agent)
        self._store.reserve(row + 1)
        missing = len(self._store.state) - len(self._ordered)
        if missing > 0:
            self._ordered = np.concatenate([self._ordered, np.zeros((missing, self._window))])
        return row

    # ------------------------------------------------------------------ storage

    def changes(self) -> list[tuple[bytes, bytes]]:
        """The state fields to store for everything since the last call: a blob an agent, one for 25 attempts."""
        rows = np.array(sorted(self._touched), np.int64)
        first = np.array([self._touched[row] for row in rows.tolist()], np.int64)
        state = self._store.state[rows]
        new = np.minimum(state["count"] - first, _held(state))
        self._touched.clear()
        return self._store.pack_series(rows) + self._store.pack_items(rows, new)

    def restore(self, fields: Mapping[bytes, bytes]) -> None:
        """Take up what `changes` wrote. Raises `StateCorruptError`."""
        self._store.restore(fields, _held)
        self._touched.clear()
        self._ordered = np.zeros((len(self._store.state), self._window))
        for row, record in enumerate(self._store.state):
            held, attempts = int(record["ints"][kernel.HELD]), int(record["attempts"])
            kinds, confidence = (self._store.ring[row][name].reshape(-1) for name in ("kind", "confidence"))
            slots = np.arange(attempts - held, attempts) % len(kinds)
            ascending = np.sort(confidence[slots][kinds[slots] < 3])
            self._ordered[row, : len(ascending)] = ascending


def _limits(limits: QualityLimits) -> NDArray[np.float64]:
    return np.array([*limits.by_criterion(), limits.non_finite_share])


def _chunks(attempts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Chunks that so many attempts have begun."""
    return -(-attempts // kernel.CHUNK)


def _held(state: NDArray[Any]) -> NDArray[np.int64]:
    """Chunks that the window reaches into."""
    oldest = state["attempts"] - state["ints"][:, kernel.HELD]
    held: NDArray[np.int64] = state["count"] - oldest // kernel.CHUNK
    return held


def row_of(agent: str) -> int:
    """The number of an agent's state: its own, or that of its canary."""
    name = agent.removesuffix(CANARY)
    return AGENTS.index(name) + (len(AGENTS) if agent.endswith(CANARY) else 0)


def fingerprint(values: NDArray[np.float64]) -> int:
    """Tells one vector of inputs from another."""
    return crc32(values.tobytes())


def _fingerprints(vectors: Vectors, features: tuple[str, ...]) -> NDArray[np.int64]:
    """Of each voted row the fingerprint of what a model reads; of all values where it names none."""
    read = vectors.columns(features or vectors.names)[vectors.index]
    return np.array([fingerprint(row) for row in read], np.int64)


def criteria_of(found: int) -> tuple[Reason, ...]:
    """The criteria whose bits are set."""
    return tuple(criterion for place, criterion in enumerate(CRITERIA) if found & (1 << place))


def kind_of(action: int, state: int, reason: str | None) -> int:
    """What a vote came to: its action, 3 and up the failure behind an abstention, -1 for no attempt."""
    if state not in _JUDGED:
        return -1
    return action if action != _ABSTAIN else _FAILURE_KIND.get(reason or "", -1)


def _kinds(ballot: Ballot) -> NDArray[np.int64]:
    kinds = ballot.action.astype(np.int64)
    for row in np.flatnonzero((kinds == _ABSTAIN) | ~_IS_JUDGED[ballot.state]).tolist():
        kinds[row] = kind_of(int(kinds[row]), int(ballot.state[row]), ballot.reason[row])
    return kinds


def _why(status: int, reason: int) -> str:
    return str(Reason.OPERATOR if status == kernel.OPERATOR else CRITERIA[reason])


_KIND_OF_EVENT = {
    kernel.MUTE: ("agent_muted", "it goes on computing; its votes have no weight until a full window is clean again"),
    kernel.READMIT: ("agent_readmitted", "a full window was clean; it votes again"),
    kernel.LOCK: (
        "agent_locked",
        "a full window was clean, but its re-admissions of the day are used up: `quartet models unmute` lets it vote",
    ),
}


def _event(agent: str, bar: Bar, seen: Watched, row: int) -> Event:
    name, then = _KIND_OF_EVENT[int(seen.transition[row])]
    reason = str(CRITERIA[seen.reason[row]])
    names = (*CRITERIA, "non_finite_share")
    figures = zip(names, seen.figures[row].tolist(), strict=True)
    evidence = {
        "violations": [str(criterion) for criterion in criteria_of(int(seen.found[row]))],
        "votes": int(seen.votes[row]),
        **{str(criterion): figure for criterion, figure in figures},
    }
    return Event(name, bar.ts, bar.bar_id, agent, bar.symbol, bar.interval, reason, f"{reason}: {then}", evidence)
