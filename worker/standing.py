"""Who votes, over all series, and when bars arrived: what readiness, metrics and `top` judge a worker by.

The last signal says little of a worker with many series: a symbol that was listed a minute ago has agents without
history. So the last vote of each series is kept, and one of them stands for the worker: of the series whose last bar
arrived within 3 of its intervals before the newest bar, those of the shortest interval; of these the one on which most
agents voted; of equal ones the newest. Votes of agents that are not active any more do not count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from streams.messages import Action, AgentState
from streams.validation import interval_ms
from worker.batches import STATE_CODE, Ballot
from worker.intake import Accepted
from worker.pipeline import Result

FRESH_INTERVALS = 3

_ACTIVE = STATE_CODE[AgentState.ACTIVE]
_SERIES = np.dtype([("arrived_ms", "i8"), ("step_ms", "i8"), ("voters", "i8"), ("agreeing", "i8")])


@dataclass(frozen=True, slots=True)
class Vote:
    """The vote that stands for the worker. `effective` are the weights that counted, by agent and canary."""

    voting: int
    agreeing: int
    effective: Mapping[str, float] = field(default_factory=dict)


class Standing:
    """The last vote of each series, and the newest arrival of each interval."""

    def __init__(self, agents: Sequence[str]) -> None:
        self.arrivals: dict[str, int] = {}
        self._bits = {agent: 1 << place for place, agent in enumerate(agents)}
        self._places: dict[tuple[str, str], int] = {}
        self._series = np.zeros(64, _SERIES)
        self._effective: list[Mapping[str, float]] = []

    def arrive(self, accepted: Accepted, now_ms: int) -> list[int]:
        """Note when bars arrived, ms: when their entries' IDs say, but never after `now_ms`."""
        arrived = [min(ms, now_ms) for ms in accepted.arrived_ms]
        for bar, ms in zip(accepted.bars, arrived, strict=True):
            self.arrivals[bar.interval] = max(ms, self.arrivals.get(bar.interval, 0))
        return arrived

    def note(self, result: Result, now_ms: int) -> None:
        """Take in a committed batch."""
        accepted, rows = result.accepted, result.vectors.index.tolist()
        arrived = self.arrive(accepted, now_ms)
        names = [ballot.agent for ballot in result.counted]
        voters = self._voters(result.counted, len(rows))
        weights = result.signals.effective.tolist() if rows else []
        for row, i in enumerate(rows):
            place = self._place(accepted.bars[i].symbol, accepted.bars[i].interval)
            step_ms = self._series["step_ms"][place]
            self._series[place] = (arrived[i], step_ms, voters[row], result.signals.agreeing[row])
            self._effective[place] = dict(zip(names, weights[row], strict=True))

    def _voters(self, ballots: Sequence[Ballot], rows: int) -> NDArray[np.int64]:
        """Bits of the agents that voted on each row `[R]`; canaries have none."""
        voters = np.zeros(rows, np.int64)
        for ballot in ballots:
            voted = (ballot.action != Action.ABSTAIN) & (ballot.state == _ACTIVE)
            voters |= np.where(voted, self._bits.get(ballot.agent, 0), 0)
        return voters

    def _place(self, symbol: str, interval: str) -> int:
        place = self._places.setdefault((symbol, interval), len(self._places))
        if place == len(self._series):
            self._series = np.concatenate((self._series, np.zeros_like(self._series)))
        if place == len(self._effective):
            self._effective.append({})
            self._series["step_ms"][place] = interval_ms(interval)
        return place

    def vote(self, active: Iterable[str]) -> Vote | None:
        """The vote that stands for the worker, of the agents that are `active` now; None before the first."""
        if not self._places:
            return None
        active = set(active)
        series = self._series[: len(self._places)]
        arrived, step_ms = series["arrived_ms"], series["step_ms"]
        fresh = arrived >= arrived.max() - FRESH_INTERVALS * step_ms
        judged = np.flatnonzero(fresh & (step_ms == step_ms[fresh].min()))
        eligible = sum(self._bits[agent] for agent in active if agent in self._bits)
        voting = np.bitwise_count(series["voters"][judged] & eligible)
        place = judged[np.lexsort((arrived[judged], voting))[-1]]
        most = int(voting.max())
        off = self._bits.keys() - active
        effective = {agent: 0.0 if agent in off else w for agent, w in self._effective[place].items()}
        return Vote(most, min(most, int(series["agreeing"][place])), effective)

    def shortest(self) -> tuple[str, int] | None:
        """The shortest interval that was seen, and when its newest bar arrived (ms); None before the first bar."""
        if not self.arrivals:
            return None
        interval = min(self.arrivals, key=interval_ms)
        return interval, self.arrivals[interval]
