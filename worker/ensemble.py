"""The ensemble as a whole: how often it agrees. Outside its bounds is a ticket for a person, never a mute.

Over the last 500 signals on which at least two agents voted: with one there is nobody to agree with.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from streams.codec import seal, unseal
from streams.messages import Action, AgentState, Bar, Event
from worker.batches import STATE_CODE, Ballot, Signals
from worker.quality import WINDOW, EnsembleLimits

_TWELFTHS = 12
"""Agreement among at most four is a whole number of twelfths, so that its sum is exact."""
_HARD = 16
_FIELD = b"window"

_ACTIVE = STATE_CODE[AgentState.ACTIVE]
_OPPOSED = (1 << Action.BUY) | (1 << Action.SELL)
_NONE: frozenset[str] = frozenset()
_CONCERNS = {
    "agreement_low": "agents agree too rarely: they may see different inputs, or one of them noise",
    "agreement_high": "agents agree too often: four that say the same are no more than one",
    "hard_disagreement": "BUY and SELL in one bar too often",
}


class EnsembleWatch:
    """Agreement and hard disagreement over a sliding window; part of the commit."""

    def __init__(self, limits: EnsembleLimits | None = None, *, window: int = WINDOW) -> None:
        self.limits = limits or EnsembleLimits()
        self._recent: deque[int] = deque(maxlen=window)
        self._agreement = self._hard = 0
        self._outside: frozenset[str] = frozenset()

    @property
    def signals(self) -> int:
        """Signals in the window."""
        return len(self._recent)

    @property
    def agreement_ratio(self) -> float | None:
        """Mean of agreeing / voting; None before the first signal."""
        return self._agreement / (_TWELFTHS * len(self._recent)) if self._recent else None

    @property
    def hard_disagreement_ratio(self) -> float | None:
        """Share of the signals with both a BUY and a SELL among the voting."""
        return self._hard / len(self._recent) if self._recent else None

    def watch(self, bars: Sequence[Bar], ballots: Sequence[Ballot], signals: Signals) -> list[Event]:
        """Count R signals; an event on each bar on which a concern begins or ends."""
        hard = _hard_disagreement(ballots, len(bars))
        events: list[Event] = []
        rows = zip(bars, signals.agreeing.tolist(), signals.voting.tolist(), hard.tolist(), strict=True)
        for bar, agreeing, voting, opposed in rows:
            if voting >= 2:
                self._count(agreeing * _TWELFTHS // voting + _HARD * opposed)
                events += self._judge(bar)
        return events

    def _count(self, item: int) -> None:
        if len(self._recent) == self._recent.maxlen:
            self._agreement -= self._recent[0] % _HARD
            self._hard -= self._recent[0] // _HARD
        self._recent.append(item)
        self._agreement += item % _HARD
        self._hard += item // _HARD

    def _judge(self, bar: Bar) -> list[Event]:
        outside, before = self._concerns(), self._outside
        if outside == before:
            return []
        self._outside = outside
        begun = [self._event("ensemble_outside", name, bar, _CONCERNS[name]) for name in sorted(outside - before)]
        ended = [self._event("ensemble_inside", name, bar, "within its bounds again") for name in before - outside]
        return begun + sorted(ended, key=lambda event: event.reason)

    def _concerns(self) -> frozenset[str]:
        agreement, hard, limits = self.agreement_ratio, self.hard_disagreement_ratio, self.limits
        if len(self._recent) < limits.minimum or agreement is None or hard is None:
            return _NONE
        if limits.agreement_low <= agreement <= limits.agreement_high and hard <= limits.hard_disagreement:
            return _NONE
        found = {
            "agreement_low": agreement < limits.agreement_low,
            "agreement_high": agreement > limits.agreement_high,
            "hard_disagreement": hard > limits.hard_disagreement,
        }
        return frozenset(name for name, holds in found.items() if holds)

    def _event(self, kind: str, reason: str, bar: Bar, detail: str) -> Event:
        evidence = {
            "signals": len(self._recent),
            "agreement": self.agreement_ratio,
            "hard_disagreement": self.hard_disagreement_ratio,
        }
        return Event(kind, bar.ts, bar.bar_id, "", bar.symbol, bar.interval, reason, f"{reason}: {detail}", evidence)

    def changes(self) -> list[tuple[bytes, bytes]]:
        """The state field to store."""
        return [(_FIELD, seal([bytes(self._recent), sorted(self._outside)]))]

    def restore(self, fields: Mapping[bytes, bytes]) -> None:
        """Take up what `changes` wrote. Raises `StateCorruptError`."""
        recent, outside = unseal("ensemble", fields[_FIELD]) if _FIELD in fields else (b"", [])
        self._recent.clear()
        self._agreement = self._hard = 0
        for item in recent:
            self._count(item)
        self._outside = frozenset(outside)


def _hard_disagreement(ballots: Sequence[Ballot], rows: int) -> NDArray[np.bool_]:
    said = np.zeros(rows, np.int64)
    for ballot in ballots:
        said |= np.where(ballot.state == _ACTIVE, 1 << ballot.action.astype(np.int64), 0)
    return np.asarray((said & _OPPOSED) == _OPPOSED)
