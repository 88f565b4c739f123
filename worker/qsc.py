"""The quality safeguard: a degenerate model stops voting, and everybody can see why.

Each agent's last 500 attempts to vote are kept, in the order of the bars and as part of the commit.
Counts, quantiles and the deviation over them are exact: they are kept or recomputed at each vote, at
a cost that the window bounds. A violation mutes the agent on the bar of that vote; it is re-admitted
after a fresh full window without one, at most three times a day of the bars' clock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from streams.messages import AGENTS, Action, AgentState, Event, Reason
from worker.batches import STATE_CODE, Ballot, Vectors
from worker.features.kernel import compiled
from worker.features.packing import SeriesStore

DAY_MS = 86_400_000
WINDOW = 500
READMISSIONS = 3
CONSTANT = 1e-9
CANARY = "_canary"

CRITERIA = (
    Reason.ACTION_COLLAPSE,
    Reason.DEAD_ZONE,
    Reason.FLAT_CONFIDENCE,
    Reason.NARROW_RANGE,
    Reason.CONSTANT_OUTPUT,
    Reason.NON_FINITE_OUTPUT,
    Reason.ERROR_RATE,
    Reason.DEADLINE_MISSED,
    Reason.STALE,
)
"""What an agent can be muted for, in the order in which the first that applies is the reason."""

_ATTEMPTS = (Action.SELL, Action.HOLD, Action.BUY, *CRITERIA[5:])
"""What one attempt came to, by code: a vote, or the failure that made it an abstention."""
_FAILURE_CODE = {str(reason): code for code, reason in enumerate(_ATTEMPTS) if isinstance(reason, Reason)}
_KINDS = len(_ATTEMPTS)


@dataclass(frozen=True, slots=True)
class QualityLimits:
    """When votes are degenerate. Shares are of the window, `minimum` is the least that is judged.

    `non_finite_run` is in attempts in a row and needs no minimum: each of them abstained already.
    `shadow_probation`: under the minimum an agent is recorded but has no weight.
    """

    minimum: int = 200
    action_share: float = 0.70
    hold_share: float = 0.85
    confidence_stddev: float = 0.05
    confidence_range: float = 0.12
    non_finite_run: int = 20
    error_share: float = 0.05
    deadline_share: float = 0.05
    stale_share: float = 0.05
    shadow_probation: bool = False

    def array(self) -> NDArray[np.float64]:
        return np.array(
            [
                *(self.minimum, self.action_share, self.hold_share, self.confidence_stddev, self.confidence_range),
                *(self.non_finite_run, self.error_share, self.deadline_share, self.stale_share),
            ],
            np.float64,
        )


@dataclass(frozen=True, slots=True)
class Quality:
    """What an agent's window says. Ratios 0..1, NaN without a vote; `violations` as of its last vote."""

    attempts: int
    votes: int
    top_action_ratio: float
    hold_ratio: float
    confidence_stddev: float
    confidence_p10_p90_range: float
    violations: tuple[Reason, ...]
    sufficient: bool

    def evidence(self) -> dict[str, Any]:
        """The figures for an event or a report."""
        return {
            "attempts": self.attempts,
            "votes": self.votes,
            "top_action_ratio": self.top_action_ratio,
            "hold_ratio": self.hold_ratio,
            "confidence_stddev": self.confidence_stddev,
            "confidence_p10_p90_range": self.confidence_p10_p90_range,
            "violations": [str(v) for v in self.violations],
        }


# Places in the integers of an agent's state.
HELD, COUNTS, NON_FINITE_RUN, CONSTANT_RUN, FINGERPRINT, STATUS, REASON, FRESH, LOCKED, READMITTED = (
    *(0, 1, 1 + _KINDS, 2 + _KINDS, 3 + _KINDS, 4 + _KINDS, 5 + _KINDS, 6 + _KINDS, 7 + _KINDS, 8 + _KINDS),
)
_INTEGERS = READMITTED + READMISSIONS
_OUTPUTS = 12
CLEAR, MUTED, OPERATOR = 0, 1, 2
MUTE, READMIT, LOCK = 1, 2, 3
"""Transitions: muted now, re-admitted now, would be re-admitted but only an operator may now."""

_STATE_RECORD = np.dtype(
    [("life", "<i8"), ("count", "<i8"), ("ints", "<i8", (_INTEGERS,)), ("run", "<f8", (_OUTPUTS,))]
)
_ITEM = np.dtype([("kind", "<i8"), ("confidence", "<f8")])


@compiled
def _insert(ordered: NDArray[np.float64], n: int, value: float) -> None:
    """Insert into the first `n`, which ascend."""
    place = n
    while place > 0 and ordered[place - 1] > value:
        ordered[place] = ordered[place - 1]
        place -= 1
    ordered[place] = value


@compiled
def _remove(ordered: NDArray[np.float64], n: int, value: float) -> None:
    """Remove one `value` from the first `n`, which ascend."""
    place = np.searchsorted(ordered[:n], value)
    for i in range(place, n - 1):
        ordered[i] = ordered[i + 1]


@compiled
def _quantile(ordered: NDArray[np.float64], n: int, q: float) -> float:
    """Linear between the two nearest of the first `n`, as numpy's default."""
    at = q * (n - 1)
    low = int(at)
    high = min(low + 1, n - 1)
    return float(ordered[low] + (ordered[high] - ordered[low]) * (at - low))


@compiled
def _measure(ints: NDArray[np.int64], ordered: NDArray[np.float64], figures: NDArray[np.float64]) -> int:
    """Votes in the window; their shares, deviation (n - 1) and range into `figures`."""
    votes = ints[COUNTS] + ints[COUNTS + 1] + ints[COUNTS + 2]
    figures[:] = np.nan
    if votes == 0:
        return 0
    figures[0] = max(ints[COUNTS], ints[COUNTS + 2]) / votes
    figures[1] = ints[COUNTS + 1] / votes
    mean = 0.0
    for i in range(votes):
        mean += ordered[i]
    mean /= votes
    total = 0.0
    for i in range(votes):
        total += (ordered[i] - mean) ** 2
    figures[2] = np.sqrt(total / (votes - 1)) if votes > 1 else 0.0
    figures[3] = _quantile(ordered, votes, 0.9) - _quantile(ordered, votes, 0.1)
    return int(votes)


@compiled
def _violations(ints: NDArray[np.int64], votes: int, figures: NDArray[np.float64], limits: NDArray[np.float64]) -> int:
    """Which criteria are violated, as bits in the order of `CRITERIA`."""
    found = 0
    minimum = limits[0]
    if votes >= minimum:
        if figures[0] > limits[1]:
            found |= 1
        if figures[1] > limits[2]:
            found |= 2
        if figures[2] < limits[3]:
            found |= 4
        if figures[3] < limits[4]:
            found |= 8
        if ints[CONSTANT_RUN] >= minimum:
            found |= 16
    if ints[NON_FINITE_RUN] >= limits[5]:
        found |= 32
    if ints[HELD] >= minimum:
        for place in range(3):
            if ints[COUNTS + 4 + place] > limits[6 + place] * ints[HELD]:
                found |= 64 << place
    return found


@compiled
def _first(found: int) -> int:
    for place in range(9):
        if found & (1 << place):
            return place
    return -1


@compiled
def _clear(ints: NDArray[np.int64]) -> None:
    """Start a fresh window; what was decided stays."""
    for place in range(CONSTANT_RUN + 1):
        ints[place] = 0
    ints[FRESH] = 0


@compiled
def _count_constant(
    ints: NDArray[np.int64], run: NDArray[np.float64], outputs: NDArray[np.float64], changed: bool
) -> None:
    """How many votes in a row, on inputs that vary, had the outputs of the first of them within 1e-9."""
    same = ints[CONSTANT_RUN] > 0
    for k in range(outputs.size):
        if abs(outputs[k] - run[k]) > CONSTANT:
            same = False
    if not same:
        ints[CONSTANT_RUN] = 1
        run[: outputs.size] = outputs
    elif changed:
        ints[CONSTANT_RUN] += 1


@compiled
def _watch(
    kinds: NDArray[np.int64],
    confidence: NDArray[np.float64],
    outputs: NDArray[np.float64],
    fingerprints: NDArray[np.int64],
    ts: NDArray[np.int64],
    limits: NDArray[np.float64],
    counter: NDArray[np.int64],
    ring_kinds: NDArray[np.int64],
    ring_confidence: NDArray[np.float64],
    ordered: NDArray[np.float64],
    ints: NDArray[np.int64],
    run: NDArray[np.float64],
    status: NDArray[np.int64],
    reason: NDArray[np.int64],
    transition: NDArray[np.int64],
    found: NDArray[np.int64],
    counted: NDArray[np.int64],
    figures: NDArray[np.float64],
) -> None:
    """One agent's attempts in order; a kind of -1 is no attempt."""
    window = ring_kinds.size
    for i in range(kinds.size):
        transition[i] = 0
        if kinds[i] >= 0:
            votes = ints[COUNTS] + ints[COUNTS + 1] + ints[COUNTS + 2]
            slot = counter[0] % window
            if ints[HELD] == window:
                old = ring_kinds[slot]
                ints[COUNTS + old] -= 1
                if old < 3:
                    _remove(ordered, votes, ring_confidence[slot])
                    votes -= 1
            else:
                ints[HELD] += 1
            ring_kinds[slot] = kinds[i]
            ring_confidence[slot] = confidence[i]
            counter[0] += 1
            ints[COUNTS + kinds[i]] += 1
            if kinds[i] < 3:
                _insert(ordered, votes, confidence[i])
                _count_constant(ints, run, outputs[i], fingerprints[i] != ints[FINGERPRINT])
            ints[NON_FINITE_RUN] = ints[NON_FINITE_RUN] + 1 if kinds[i] == 3 else 0
            ints[FINGERPRINT] = fingerprints[i]
            ints[FRESH] += 1
            _judge(i, ts[i], window, ints, ordered, limits, transition, found, figures)
        status[i] = ints[STATUS]
        reason[i] = ints[REASON]
        counted[i] = ints[COUNTS] + ints[COUNTS + 1] + ints[COUNTS + 2]


@compiled
def _judge(
    i: int,
    ts: int,
    window: int,
    ints: NDArray[np.int64],
    ordered: NDArray[np.float64],
    limits: NDArray[np.float64],
    transition: NDArray[np.int64],
    found: NDArray[np.int64],
    figures: NDArray[np.float64],
) -> None:
    votes = _measure(ints, ordered, figures[i])
    found[i] = _violations(ints, votes, figures[i], limits)
    if ints[STATUS] == CLEAR and found[i]:
        ints[STATUS] = MUTED
        ints[REASON] = _first(found[i])
        transition[i] = MUTE
        _clear(ints)
    elif ints[STATUS] == MUTED and ints[FRESH] >= window and not found[i] and not ints[LOCKED]:
        oldest = READMITTED
        for place in range(READMITTED, READMITTED + READMISSIONS):
            if ints[place] < ints[oldest]:
                oldest = place
        if ints[oldest] == 0 or ts - ints[oldest] >= DAY_MS:
            ints[oldest] = ts
            ints[STATUS] = CLEAR
            transition[i] = READMIT
        else:
            ints[LOCKED] = 1
            transition[i] = LOCK


class Safeguard:
    """Watches every agent's ballot, row by row, and says what state each vote is in.

    `limits` by agent; a canary is watched as its own agent, with the limits of the one it may replace.
    """

    def __init__(self, limits: Mapping[str, QualityLimits] | None = None, *, window: int = WINDOW) -> None:
        self._limits = dict(limits or {})
        self._window = window
        self._store = SeriesStore(_STATE_RECORD, _ITEM, window)
        self._ordered = np.zeros((0, window))
        self._found: dict[str, int] = {}
        self._touched: dict[int, int] = {}

    def limits(self, agent: str) -> QualityLimits:
        return self._limits.get(agent.removesuffix(CANARY), QualityLimits())

    def watch(self, vectors: Vectors, ballots: Sequence[Ballot]) -> tuple[list[Ballot], list[Event]]:
        """The ballots with the state and reason of every row, and what was decided on the way."""
        fingerprints = np.array([crc32(row.tobytes()) for row in vectors.values[vectors.index]], np.int64)
        bars = [vectors.accepted.bars[i] for i in vectors.index]
        ts = np.array([bar.ts for bar in bars], np.int64)
        judged, events = [], []
        for ballot in ballots:
            after, transitions = self._watch(ballot, fingerprints, ts)
            judged.append(after)
            for row, kind, evidence in transitions:
                bar = bars[row]
                events.append(_event(ballot, kind, evidence, bar.ts, bar.bar_id, bar.symbol, bar.interval))
        return judged, events

    def _watch(
        self, ballot: Ballot, fingerprints: NDArray[np.int64], ts: NDArray[np.int64]
    ) -> tuple[Ballot, list[tuple[int, int, dict[str, Any]]]]:
        row = row_of(ballot.agent)
        self._reserve(row + 1)
        n = len(ts)
        kinds = _kinds(ballot)
        record = self._store.state[row]
        status, reason, transition, found, counted = (np.zeros(n, np.int64) for _ in range(5))
        figures = np.full((n, 4), np.nan)
        outputs = np.zeros((n, 1)) if ballot.outputs is None else np.nan_to_num(ballot.outputs)
        counter = np.array([record["count"]])
        limits = self.limits(ballot.agent)
        _watch(
            kinds,
            ballot.confidence,
            outputs,
            fingerprints,
            ts,
            limits.array(),
            counter,
            self._store.ring["kind"][row],
            self._store.ring["confidence"][row],
            self._ordered[row],
            record["ints"],
            record["run"],
            status,
            reason,
            transition,
            found,
            counted,
            figures,
        )
        new = int(counter[0] - record["count"])
        self._store.state["count"][row] = counter[0]
        self._touched[row] = self._touched.get(row, 0) + new
        attempted = np.flatnonzero(kinds >= 0)
        if len(attempted):
            self._found[ballot.agent] = int(found[attempted[-1]])
        transitions = [
            (int(i), int(transition[i]), _evidence(int(found[i]), int(reason[i]), figures[i]))
            for i in np.flatnonzero(transition)
        ]
        probation = limits.shadow_probation & (counted < limits.minimum)
        return _with_states(ballot, status, reason, probation), transitions

    def status(self, agent: str, state: AgentState) -> tuple[AgentState, str | None]:
        """What becomes of an agent in `state`, and why: muted, in the shadow on probation, or as it was."""
        row = row_of(agent)
        self._reserve(row + 1)
        ints = self._store.state["ints"][row]
        if state not in (AgentState.ACTIVE, AgentState.CANARY):
            return state, None
        if ints[STATUS] != CLEAR:
            return AgentState.MUTED, str(Reason.OPERATOR if ints[STATUS] == OPERATOR else CRITERIA[ints[REASON]])
        limits = self.limits(agent)
        if limits.shadow_probation and ints[COUNTS : COUNTS + 3].sum() < limits.minimum:
            return AgentState.SHADOW, None
        return state, None

    def quality(self, agent: str) -> Quality:
        """The figures of the agent's window as it stands."""
        row = row_of(agent)
        self._reserve(row + 1)
        ints, figures = self._store.state["ints"][row], np.full(4, np.nan)
        votes = _measure(ints, self._ordered[row], figures)
        found = _violations(ints, votes, figures, self.limits(agent).array())
        return Quality(
            attempts=int(ints[HELD]),
            votes=votes,
            top_action_ratio=float(figures[0]),
            hold_ratio=float(figures[1]),
            confidence_stddev=float(figures[2]),
            confidence_p10_p90_range=float(figures[3]),
            violations=tuple(c for place, c in enumerate(CRITERIA) if found & (1 << place)),
            sufficient=votes >= self.limits(agent).minimum,
        )

    # ------------------------------------------------------------------ what an operator may do

    def mute(self, agent: str) -> None:
        """Mute until an operator says otherwise."""
        ints = self._ints(agent)
        ints[STATUS] = OPERATOR

    def unmute(self, agent: str) -> None:
        """Let the agent vote again, from a fresh window, with its re-admissions given back."""
        ints = self._ints(agent)
        ints[STATUS], ints[LOCKED], ints[READMITTED:] = CLEAR, 0, 0
        _clear(ints)

    def forget(self, agent: str) -> None:
        """Start anew with this agent: another model serves under its name."""
        row = row_of(agent)
        self._reserve(row + 1)
        self._store.state["ints"][row] = 0
        self._touched.setdefault(row, 0)

    def _ints(self, agent: str) -> NDArray[np.int64]:
        row = row_of(agent)
        self._reserve(row + 1)
        self._touched.setdefault(row, 0)
        ints: NDArray[np.int64] = self._store.state["ints"][row]
        return ints

    # ------------------------------------------------------------------ storage

    def changes(self) -> list[tuple[bytes, bytes]]:
        """The state fields to store for everything since the last call: a blob an agent, one a vote."""
        rows = np.array(sorted(self._touched), np.int64)
        new = np.array([min(self._touched[row], self._window) for row in rows.tolist()], np.int64)
        self._touched.clear()
        return self._store.pack_series(rows) + self._store.pack_items(rows, new)

    def restore(self, fields: Mapping[bytes, bytes]) -> None:
        """Take up what `changes` wrote. Raises `StateCorruptError`."""
        self._store.restore(fields, lambda state: state["ints"][:, HELD])
        self._ordered = np.zeros((len(self._store.state), self._window))
        for row in range(len(self._store.state)):
            held, count = int(self._store.state["ints"][row, HELD]), int(self._store.state["count"][row])
            slots = np.arange(count - held, count) % self._window
            votes = self._store.ring[row, slots]
            ascending = np.sort(votes["confidence"][votes["kind"] < 3])
            self._ordered[row, : len(ascending)] = ascending

    def _reserve(self, rows: int) -> None:
        self._store.reserve(rows)
        missing = len(self._store.state) - len(self._ordered)
        if missing > 0:
            self._ordered = np.concatenate([self._ordered, np.zeros((missing, self._window))])


def row_of(agent: str) -> int:
    """The number of an agent's state: its own, or that of its canary."""
    name = agent.removesuffix(CANARY)
    return AGENTS.index(name) + (len(AGENTS) if agent.endswith(CANARY) else 0)


def _kinds(ballot: Ballot) -> NDArray[np.int64]:
    """What each row came to: a vote's action, the failure behind an abstention, or -1 for no attempt."""
    kinds = np.where(ballot.action == Action.ABSTAIN, -1, ballot.action).astype(np.int64)
    for row in np.flatnonzero(kinds < 0):
        kinds[row] = _FAILURE_CODE.get(ballot.reason[row] or "", -1)
    return kinds


def _with_states(
    ballot: Ballot, status: NDArray[np.int64], reason: NDArray[np.int64], probation: NDArray[np.bool_]
) -> Ballot:
    """Muted rows are muted; an agent on probation is in the shadow until it can be judged."""
    active = np.isin(ballot.state, (STATE_CODE[AgentState.ACTIVE], STATE_CODE[AgentState.CANARY]))
    muted = active & (status != CLEAR)
    state = np.where(muted, STATE_CODE[AgentState.MUTED], ballot.state)
    state = np.where(active & ~muted & probation, STATE_CODE[AgentState.SHADOW], state)
    reasons = list(ballot.reason)
    for row in np.flatnonzero(muted & (ballot.action != Action.ABSTAIN)):
        reasons[row] = str(Reason.OPERATOR if status[row] == OPERATOR else CRITERIA[reason[row]])
    return replace(ballot, state=state.astype(np.int8), reason=tuple(reasons))


def _evidence(found: int, reason: int, figures: NDArray[np.float64]) -> dict[str, Any]:
    names = ("top_action_ratio", "hold_ratio", "confidence_stddev", "confidence_p10_p90_range")
    return {
        "reason": str(CRITERIA[reason]),
        "violations": [str(c) for place, c in enumerate(CRITERIA) if found & (1 << place)],
        **{name: float(value) for name, value in zip(names, figures, strict=True)},
    }


_KIND_OF_EVENT = {
    MUTE: ("agent_muted", "it goes on computing; its votes have no weight until a full window is clean again"),
    READMIT: ("agent_readmitted", "a full window was clean; it votes again"),
    LOCK: ("agent_locked", "its re-admissions of the day are used up: `quartet models unmute` lets it vote again"),
}


def _event(
    ballot: Ballot, kind: int, evidence: dict[str, Any], ts: int, bar_id: str, symbol: str, interval: str
) -> Event:
    name, then = _KIND_OF_EVENT[kind]
    reason = evidence.pop("reason")
    return Event(name, ts, bar_id, ballot.agent, symbol, interval, reason, f"{reason}: {then}", evidence)
