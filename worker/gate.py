"""The quality gate: whether votes would have been muted, and for what.

It judges any stretch of one agent's votes, recorded or live, with the safeguard's own code and
limits: PASS where no vote of the stretch would have muted the agent, FAIL with the criteria where
one would have, INSUFFICIENT where too few votes are there to say.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from streams.messages import CANARY, HORIZON, Action, AgentState, Reason, bar_id
from streams.validation import interval_ms, missing_bars
from worker.batches import STATE_CODE
from worker.qsc import FAILURES, Safeguard, Watched, kind_of
from worker.quality import CRITERIA, QualityLimits
from worker.scoreboard import Scores, is_right, scores_of
from worker.stretch import Close, Stretch

Outcome = Literal["PASS", "FAIL", "INSUFFICIENT"]

_BELOW = (Reason.FLAT_CONFIDENCE, Reason.NARROW_RANGE)
"""The criteria that are violated below their limit; the others are above it or have reached it."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One criterion over a stretch: its worst value where it was judged, and the first bar that violated it.

    `value` is None where nothing could be measured, `bar_id` empty where nothing was violated.
    """

    criterion: str
    value: float | None
    limit: float
    violated: bool
    bar_id: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a stretch of one agent's votes comes to. `muted_at` is the bar on which it would have been muted."""

    agent: str
    verdict: Outcome
    attempts: int
    votes: int
    minimum: int
    muted_at: str
    findings: tuple[Finding, ...]

    def as_json(self) -> dict[str, Any]:
        findings = [{name: getattr(f, name) for name in Finding.__slots__} for f in self.findings]
        return {name: getattr(self, name) for name in self.__slots__ if name != "findings"} | {"criteria": findings}


def judge(
    agent: str,
    votes: Iterable[Mapping[str, Any]],
    limits: QualityLimits | None = None,
    fingerprints: Mapping[str, int] | None = None,
) -> Verdict:
    """Judge vote messages in the order of their stream.

    `fingerprints` tell by `bar_id` which bars had the same inputs; without them each bar's differ.
    """
    limits = limits or QualityLimits()
    stretch = list(votes)
    seen, kinds = observe(agent, stretch, limits, fingerprints)
    found = int(np.bitwise_or.reduce(seen.found)) if stretch else 0
    muting = np.flatnonzero(seen.found)
    outcome: Outcome = "PASS" if seen.votes.max(initial=0) >= limits.minimum else "INSUFFICIENT"
    return Verdict(
        agent=agent,
        verdict="FAIL" if found else outcome,
        attempts=int((kinds >= 0).sum()),
        votes=int(((kinds >= 0) & (kinds < len(Action) - 1)).sum()),
        minimum=limits.minimum,
        muted_at=str(stretch[muting[0]]["bar_id"]) if len(muting) else "",
        findings=tuple(_finding(place, stretch, seen, limits) for place in range(len(CRITERIA))),
    )


def observe(
    agent: str,
    stretch: list[Mapping[str, Any]],
    limits: QualityLimits,
    fingerprints: Mapping[str, int] | None = None,
) -> tuple[Watched, NDArray[np.int64]]:
    """What a fresh safeguard sees in the votes, and what each of them was (`worker.qsc.kind_of`)."""
    base = agent.removesuffix(CANARY)
    known = fingerprints or {}
    kinds = np.array([_kind(vote) for vote in stretch], np.int64)
    width = max((len(vote["outputs"]) for vote in stretch if vote["outputs"] is not None), default=1)
    outputs = np.zeros((len(stretch), width))
    for row, vote in enumerate(stretch):
        if vote["outputs"] is not None:
            outputs[row, : len(vote["outputs"])] = vote["outputs"]
    seen = Safeguard({base: limits}).observe(
        base,
        kinds,
        np.array([vote["confidence"] for vote in stretch], np.float64),
        outputs,
        np.array([known.get(vote["bar_id"], row) for row, vote in enumerate(stretch)], np.int64),
        np.array([vote["ts"] for vote in stretch], np.int64),
    )
    return seen, kinds


def _kind(vote: Mapping[str, Any]) -> int:
    return kind_of(Action[vote["action"]], STATE_CODE[AgentState(vote["state"])], vote["reason"])


def _finding(place: int, stretch: list[Mapping[str, Any]], seen: Watched, limits: QualityLimits) -> Finding:
    criterion = CRITERIA[place]
    violating = np.flatnonzero(seen.found & (1 << place))
    values, limit = seen.figures[:, place], limits.of(criterion)
    if criterion is Reason.NON_FINITE_OUTPUT and len(violating) and not (values >= limit).any():
        # Scattered ones: the share of them is what was violated, not the run.
        values, limit = seen.figures[violating, -1], limits.non_finite_share
    judged = values[seen.votes >= limits.minimum] if criterion not in FAILURES else values
    measured = judged[np.isfinite(judged)]
    worst = math.nan
    if len(measured):
        worst = float(measured.min() if criterion in _BELOW else measured.max())
    elif len(values):
        worst = float(values[-1])
    return Finding(
        criterion=str(criterion),
        value=None if math.isnan(worst) else worst,
        limit=limit,
        violated=len(violating) > 0,
        bar_id=str(stretch[violating[0]]["bar_id"]) if len(violating) else "",
    )


def score(stretch: Stretch, threshold: float) -> Scores:
    """The scoreboard of a stretch, by the rules of `worker.scoreboard`; `threshold` is a fraction of the price."""
    returns = _returns(stretch.bars)
    scored = [
        (Action[vote["action"]], vote["confidence"], returns[vote["bar_id"]])
        for vote in stretch.votes
        if vote["action"] != Action.ABSTAIN.name and vote["bar_id"] in returns
    ]
    action = np.array([a for a, _, _ in scored], np.int8)
    confidence = np.array([c for _, c, _ in scored], np.float64)
    moved = np.array([r for _, _, r in scored], np.float64)
    return scores_of(action, confidence, moved, is_right(action, moved, threshold))


def _returns(bars: Mapping[tuple[str, str], list[Close]]) -> dict[str, float]:
    """By `bar_id` the return over the twelve bars after it, where none of them is missing."""
    found: dict[str, float] = {}
    for (symbol, interval), seen in bars.items():
        step, run = interval_ms(interval), 0
        for place in range(1, len(seen)):
            run = 0 if missing_bars(seen[place - 1].ts, seen[place].ts, step) else run + 1
            if run >= HORIZON:
                then = seen[place - HORIZON]
                found[bar_id(symbol, interval, then.ts)] = seen[place].close / then.close - 1.0
    return found
