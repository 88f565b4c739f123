"""Canaries and shadows: judged bar by bar, rolled back on the very bar that shows a violation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from streams.messages import CANARY, Action, Bar, Event
from worker.batches import Ballot
from worker.roster import Trial


@dataclass(frozen=True)
class Period:
    """How long a violation ends a trial: `ms` of the bars' clock since its first vote, and until it can be judged.

    `votes` `[R]` are those in the trial's window after each row, `minimum` as many as a verdict needs.
    """

    ms: int
    votes: NDArray[np.int64]
    minimum: int


@dataclass(frozen=True)
class Judged:
    """What became of a trial in one batch. `ended` is the row that rolled it back; `trial` is then as it was.

    `events` are those of the trial, in place of the safeguard's.
    """

    ballot: Ballot
    trial: Trial
    events: Sequence[Event] = field(default_factory=list)
    ended: int | None = None


def judge(
    trial: Trial, ballot: Ballot, bars: Sequence[Bar], verdicts: Sequence[Event], period: Period, serving: str
) -> Judged:
    """Judge one trial over R rows, given the safeguard's verdicts on it; a pure function, row by row.

    Until its period is over a violation ends it: the rows after that one carry no ballot of it.
    `serving` says who goes on, for a person.
    """
    if trial.since is None and ballot.answered.any():
        trial = replace(trial, since=bars[int(np.argmax(ballot.answered))].ts)
    over = None if trial.passed else _last_of_period(trial, bars, period)
    rows = {bar.bar_id: row for row, bar in enumerate(bars)}
    for place, verdict in enumerate(verdicts):
        row = rows[verdict.bar_id]
        if verdict.kind == "agent_muted" and not trial.passed and (over is None or row <= over):
            ended = _rolled_back(trial, verdict, serving)
            return Judged(_cut(ballot, row), trial, [*verdicts[:place], ended], row)
    if over is None:
        return Judged(ballot, trial, verdicts)
    passed = _passed(trial, ballot.agent, bars[over], period, int(period.votes[over]))
    events = sorted([*verdicts, passed], key=lambda event: rows[event.bar_id])
    return Judged(ballot, replace(trial, passed=True), events)


def _last_of_period(trial: Trial, bars: Sequence[Bar], period: Period) -> int | None:
    """The row on which the time is over and there are votes enough to say that it was without a violation."""
    if trial.since is None:
        return None
    until = trial.since + period.ms
    over = (row for row, bar in enumerate(bars) if bar.ts >= until and period.votes[row] >= period.minimum)
    return next(over, None)


def _cut(ballot: Ballot, last: int) -> Ballot:
    """The ballot with nothing after row `last`."""
    present = np.arange(len(ballot.action)) <= last
    action = np.where(present, ballot.action, Action.ABSTAIN).astype(np.int8)
    return replace(ballot, action=action, answered=ballot.answered & present, present=present)


def _rolled_back(trial: Trial, verdict: Event, serving: str) -> Event:
    evidence = {**verdict.evidence, **trial.artifact.evidence(), "since": trial.since, "kind": str(trial.kind)}
    detail = f"{verdict.reason}: the {trial.kind} {trial.artifact.version} is rolled back; {serving}"
    return replace(verdict, kind="rolled_back", detail=detail, evidence=evidence)


def _passed(trial: Trial, agent: str, bar: Bar, period: Period, votes: int) -> Event:
    base = agent.removesuffix(CANARY)
    detail = (
        f"{period.ms / 3_600_000:g} hours of bars without a violation, judged by its last {votes} votes; "
        f"it stays a {trial.kind} until "
        f"`quartet models promote {base}` or `quartet models rollback {base}`"
    )
    evidence = {**trial.artifact.evidence(), "since": trial.since, "period_ms": period.ms, "votes": votes}
    return Event(f"{trial.kind}_passed", bar.ts, bar.bar_id, agent, bar.symbol, bar.interval, "", detail, evidence)
