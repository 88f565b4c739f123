"""The scoreboard: twelve bars later each vote is scored by what the market did.

A vote waits in the ring of its series until the twelfth bar after it. A missing bar or a restart of
the series drops what waits there: such a return would be over another time than the model forecast,
and training leaves the same bars out. Everything is part of the commit.

Of a vote on a bar that closed at C, with C' the close twelve bars later, the return is r = C'/C - 1. BUY is
right where r > 0, SELL where r < 0, HOLD where |r| is within the threshold. The Brier score is the mean of
(confidence - right)^2, after Brier (1950): 0 is best, 0.25 is what a confidence of 0.5 always gets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agents.agent import Model
from agents.sidecars import DEFAULT_THRESHOLD
from streams.messages import AGENTS, CANARY, HORIZON, Action, Status
from streams.validation import interval_ms, missing_bars
from worker.batches import Ballot, Signals, Vectors
from worker.features.kernel import compiled
from worker.features.packing import SeriesStore
from worker.intake import Accepted

WINDOW = 500
CONSENSUS = "consensus"
SLOTS = (*AGENTS, *(agent + CANARY for agent in AGENTS), CONSENSUS)
"""Who is scored, by column."""

_SELL, _HOLD, _BUY, _ABSTAIN = map(int, Action)
_DECIDED = (str(Status.OK), str(Status.HOLD))

_VOTES = [("action", "i1", (len(SLOTS),)), ("confidence", "<f8", (len(SLOTS),))]
_PENDING_STATE = np.dtype([("life", "<i8"), ("count", "<i8"), ("last_ts", "<i8")])
_PENDING = np.dtype([("close", "<f8"), *_VOTES])
_SCORED_STATE = np.dtype([("life", "<i8"), ("count", "<i8")])
_SCORED = np.dtype([("return", "<f8"), *_VOTES, ("right", "i1", (len(SLOTS),))])


@dataclass(frozen=True, slots=True)
class Scores:
    """Of the last 500 scored bars: `scored` votes, `acted` of them BUY or SELL.

    `hit_ratio` (0..1) and `signed_return_mean` (r after BUY, -r after SELL; a fraction of the price) are
    over the acted, `brier_score` over all; None where there are none.
    """

    scored: int
    acted: int
    hit_ratio: float | None
    signed_return_mean: float | None
    brier_score: float | None


class Scoreboard:
    """Scores every agent, every canary and the consensus."""

    def __init__(self, *, window: int = WINDOW) -> None:
        self._window = window
        self._pending = SeriesStore(_PENDING_STATE, _PENDING, HORIZON + 1)
        self._scored = SeriesStore(_SCORED_STATE, _SCORED, window)
        self._scored.reserve(1)
        self._bars: dict[int, int] = {}
        self._new = 0
        # Compile, or load from the cache, now rather than at the first bar.
        self._advance(np.zeros(0, np.int64), np.zeros(0, np.bool_), np.zeros(0), np.zeros(0, _PENDING))

    def score(
        self, vectors: Vectors, ballots: Sequence[Ballot], signals: Signals, thresholds: Mapping[str, float]
    ) -> None:
        """Take a batch: its votes wait, and those whose twelfth bar it brings are scored.

        `thresholds` by agent, fractions of the price; the consensus has the mean of them.
        """
        accepted = vectors.accepted
        rows = accepted.rows
        if not len(rows):
            return
        self._pending.reserve(int(rows.max()) + 1)
        votes = np.zeros(len(rows), _PENDING)
        votes["action"] = _ABSTAIN
        _enter(votes, vectors.index, ballots, signals)
        returns, then = self._advance(rows, self._breaks(accepted), np.ascontiguousarray(accepted.ohlcv[:, 3]), votes)
        for row, bars in zip(*(x.tolist() for x in np.unique(rows, return_counts=True)), strict=True):
            self._bars[row] = self._bars.get(row, 0) + bars
        if len(returns):
            self._append(returns, then, _by_slot(thresholds))

    def _breaks(self, accepted: Accepted) -> NDArray[np.bool_]:
        """Before which bars of the batch their series was interrupted; notes the last times."""
        last = self._pending.state["last_ts"]
        order = np.argsort(accepted.rows, kind="stable")
        rows = accepted.rows[order]
        ts = np.array([bar.ts for bar in accepted.bars], np.int64)[order]
        begins = np.append(True, rows[1:] != rows[:-1])
        before = np.where(begins, last[rows], np.append(0, ts[:-1]))
        ends = np.append(begins[1:], True)
        last[rows[ends]] = ts[ends]
        broken = accepted.restart.copy()
        steps = np.array([interval_ms(bar.interval) for bar in accepted.bars], np.int64)[order]
        for place in np.flatnonzero((before > 0) & (ts - before != steps)).tolist():
            missing = missing_bars(int(before[place]), int(ts[place]), int(steps[place]))
            broken[order[place]] |= missing > 0
        return broken

    def _advance(
        self, rows: NDArray[np.int64], broken: NDArray[np.bool_], closes: NDArray[np.float64], votes: NDArray[np.void]
    ) -> tuple[NDArray[np.float64], NDArray[np.void]]:
        """Let N bars pass: the returns `[M]` of the votes `[M]` whose horizon they end."""
        returns, then = np.zeros(len(rows)), np.zeros(len(rows), _PENDING)
        state, ring = self._pending.state, self._pending.ring
        n = _let_pass(
            *(rows, broken, closes, votes["action"], votes["confidence"]),
            *(state["life"], state["count"], ring["close"], ring["action"], ring["confidence"]),
            *(returns, then["action"], then["confidence"]),
        )
        return returns[:n], then[:n]

    def _append(self, returns: NDArray[np.float64], then: NDArray[np.void], thresholds: NDArray[np.float64]) -> None:
        """Score what `then` said by the `returns` that came, in order."""
        items = np.zeros(len(returns), _SCORED)
        items["return"], items["action"], items["confidence"] = returns, then["action"], then["confidence"]
        items["right"] = is_right(then["action"], returns[:, None], thresholds)
        count = int(self._scored.state["count"][0])
        kept = items[-self._window :]
        places = np.arange(count + len(items) - len(kept), count + len(items)) % self._window
        self._scored.ring[0, places] = kept
        self._scored.state["count"][0] += len(items)
        self._new += len(items)

    def scores(self, agent: str) -> Scores:
        """The scores of one of `SLOTS` over the window."""
        held = min(int(self._scored.state["count"][0]), self._window)
        items, slot = self._scored.ring[0, :held], SLOTS.index(agent)
        votes = items["action"][:, slot], items["confidence"][:, slot]
        return scores_of(*votes, items["return"], items["right"][:, slot])

    # ------------------------------------------------------------------ storage

    def changes(self) -> dict[str, list[tuple[bytes, bytes]]]:
        """By part, the state fields to store for everything since the last call."""
        rows = np.array(sorted(self._bars), np.int64)
        bars = np.array([self._bars[row] for row in rows.tolist()], np.int64)
        new = np.minimum(bars, _held(self._pending.state[rows]))
        one, scored = np.zeros(min(self._new, 1), np.int64), np.array([min(self._new, self._window)], np.int64)
        self._bars.clear()
        self._new = 0
        return {
            "pending": self._pending.pack_series(rows) + self._pending.pack_items(rows, new),
            "scores": self._scored.pack_series(one) + self._scored.pack_items(one, scored[: len(one)]),
        }

    def restore(self, state: Mapping[str, Mapping[bytes, bytes]]) -> None:
        """Take up what `changes` wrote, by part. Raises `StateCorruptError`."""
        self._pending.restore(state.get("pending", {}), _held)
        self._scored.restore(state.get("scores", {}), lambda s: np.minimum(s["count"], self._window))
        self._scored.reserve(1)
        self._bars.clear()
        self._new = 0


def is_right(
    action: NDArray[np.int8], returns: NDArray[np.float64], thresholds: NDArray[np.float64] | float
) -> NDArray[np.bool_]:
    """Whether each action was what the market then did; an abstention never is."""
    held = (action == _HOLD) & (np.abs(returns) <= thresholds)
    return np.asarray(held | ((action == _BUY) & (returns > 0)) | ((action == _SELL) & (returns < 0)))


def scores_of(
    action: NDArray[np.int8],
    confidence: NDArray[np.float64],
    returns: NDArray[np.float64],
    right: NDArray[np.bool_] | NDArray[np.int8],
) -> Scores:
    """The scores of N votes and abstentions, `[N]` each."""
    named = action != _ABSTAIN
    acted = named & (action != _HOLD)
    signed = np.where(action == _BUY, returns, -returns)[acted]
    misses = (confidence - right)[named]
    return Scores(
        scored=int(named.sum()),
        acted=int(acted.sum()),
        hit_ratio=float(right[acted].mean()) if acted.any() else None,
        signed_return_mean=float(signed.mean()) if acted.any() else None,
        brier_score=float((misses**2).mean()) if named.any() else None,
    )


def threshold_of(model: Model) -> float:
    """The return, a fraction of the price, within which this model's HOLD is right."""
    given = getattr(model.head, "threshold", model.facts.get("threshold"))
    return float(given) if isinstance(given, float | int) else DEFAULT_THRESHOLD


def _held(state: NDArray[np.void]) -> NDArray[np.int64]:
    held: NDArray[np.int64] = np.minimum(state["count"], HORIZON + 1)
    return held


def _enter(votes: NDArray[np.void], index: NDArray[np.int64], ballots: Sequence[Ballot], signals: Signals) -> None:
    """Write the votes and decisions of the voted rows into their columns; a HOLD for want of votes is none."""
    for ballot in ballots:
        slot = SLOTS.index(ballot.agent)
        votes["action"][index, slot] = ballot.action
        votes["confidence"][index, slot] = ballot.confidence
    decided = np.array([status in _DECIDED for status in signals.status], np.bool_)
    votes["action"][index, -1] = np.where(decided, signals.action, _ABSTAIN)
    votes["confidence"][index, -1] = signals.confidence


def _by_slot(thresholds: Mapping[str, float]) -> NDArray[np.float64]:
    own = [value for agent, value in thresholds.items() if not agent.endswith(CANARY)]
    mean = sum(own) / len(own) if own else 0.0
    return np.array([thresholds.get(slot, mean) for slot in SLOTS])


@compiled
def _let_pass(
    rows: NDArray[np.int64],
    broken: NDArray[np.bool_],
    closes: NDArray[np.float64],
    action: NDArray[np.int8],
    confidence: NDArray[np.float64],
    life: NDArray[np.int64],
    count: NDArray[np.int64],
    ring_close: NDArray[np.float64],
    ring_action: NDArray[np.int8],
    ring_confidence: NDArray[np.float64],
    returns: NDArray[np.float64],
    then_action: NDArray[np.int8],
    then_confidence: NDArray[np.float64],
) -> int:
    capacity = ring_close.shape[1]
    scored = 0
    for i in range(rows.size):
        row = rows[i]
        if broken[i]:
            life[row] += 1
            count[row] = 0
        if count[row] >= capacity - 1:
            slot = (count[row] + 1) % capacity
            if ring_action[row, slot].min() < 3:
                returns[scored] = closes[i] / ring_close[row, slot] - 1.0
                then_action[scored] = ring_action[row, slot]
                then_confidence[scored] = ring_confidence[row, slot]
                scored += 1
        slot = count[row] % capacity
        ring_close[row, slot] = closes[i]
        ring_action[row, slot] = action[i]
        ring_confidence[row, slot] = confidence[i]
        count[row] += 1
    return scored
