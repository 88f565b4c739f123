"""Writes the recordings of this folder: for each rule votes that just trip it, and votes that just do not.

    python tests/replay/quality/make.py

Each is a stretch of one agent's votes stream, a message a line, in which all but the rule in question
is far from its limit. The names say which; `EXPECTED` says on which line the agent is muted.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
START_MS = 1_767_225_600_000
MINUTE_MS = 60_000

Vote = tuple[str, float, float, str | None]
"""Action, confidence, output and reason."""

EXPECTED = {
    # Judged from the 200th vote on: 141 of 200 are 70.5 %, 171 of 200 are 85.5 %.
    "action_collapse": 199,
    "dead_zone": 199,
    "flat_confidence": 199,
    "narrow_range": 199,
    # 300 that vary, then the 200th in a row of the same output.
    "constant_output": 499,
    # 400 votes, then the 20th failure in a row: 4.8 % of the attempts.
    "non_finite_output": 419,
    # 11 failures among 200 attempts are 5.5 %, the last of them is the 200th; never two in a row.
    "non_finite_share": 199,
    "error_rate": 199,
    "deadline_missed": 199,
    "stale": 199,
}
"""The index of the vote that mutes in `<rule>_trips.jsonl`; in `<rule>_holds.jsonl` none does."""


def recordings() -> Iterator[tuple[str, list[Vote]]]:
    for trips, suffix in ((True, "trips"), (False, "holds")):
        yield f"action_collapse_{suffix}", _spread(["BUY"] * (140 + trips) + ["SELL"] * 30 + ["HOLD"] * (30 - trips))
        yield f"dead_zone_{suffix}", _spread(["HOLD"] * (170 + trips) + ["SELL"] * 15 + ["BUY"] * (15 - trips))
        yield f"flat_confidence_{suffix}", _confident(_flat(0.105 if trips else 0.108))
        yield f"narrow_range_{suffix}", _confident(_narrow(0.0595 if trips else 0.0605))
        yield f"constant_output_{suffix}", _constant(200 if trips else 199)
        yield f"non_finite_output_{suffix}", _failing("non_finite_output", 20 if trips else 19)
        yield f"non_finite_share_{suffix}", _failures_among("non_finite_output", 11 if trips else 10)
        for rule in ("error_rate", "deadline_missed", "stale"):
            yield f"{rule}_{suffix}", _failures_among(rule, 11 if trips else 10)


def _healthy(n: int, seed: int) -> list[Vote]:
    """Votes of a model in order: every action, confidences from 0.4 to 0.9, outputs that vary."""
    return _spread([("SELL", "HOLD", "BUY")[i % 3] for i in range(n)], seed)


def _spread(actions: list[str], seed: int = 1) -> list[Vote]:
    random_ = random.Random(seed)
    random_.shuffle(actions)
    return [(action, 0.4 + 0.5 * random_.random(), random_.gauss(0, 0.01), None) for action in actions]


def _confident(confidences: list[float]) -> list[Vote]:
    random.Random(2).shuffle(confidences)
    votes = _healthy(len(confidences), 3)
    return [(action, c, output, None) for (action, _, output, _), c in zip(votes, confidences, strict=True)]


def _flat(step: float) -> list[float]:
    """22 of each side at +-step: a deviation of 0.47 steps, a range of two."""
    return [0.6] * 156 + [0.6 - step] * 22 + [0.6 + step] * 22


def _narrow(half: float) -> list[float]:
    """18 of each side far out, so that the deviation is large, and a range of two halves."""
    return [0.5 - half] * 82 + [0.5 + half] * 82 + [0.2] * 18 + [0.8] * 18


def _constant(run: int) -> list[Vote]:
    votes = _healthy(300, 4) + [("BUY", 0.65, 0.004, None)] * run
    return votes if run == 200 else [*votes, ("BUY", 0.66, 0.005, None), *[("BUY", 0.65, 0.004, None)] * 30]


def _failing(reason: str, run: int) -> list[Vote]:
    return [*_healthy(400, 5), *[("ABSTAIN", 0.0, 0.0, reason)] * run, *_healthy(20 - run, 6), *_healthy(100, 7)]


def _failures_among(reason: str, failures: int) -> list[Vote]:
    """Spread over 199 attempts, but for the last, which is the 200th."""
    votes = _healthy(200 - failures, 8)
    for place in range(failures - 1):
        votes.insert(17 * place, ("ABSTAIN", 0.0, 0.0, reason))
    return [*votes, ("ABSTAIN", 0.0, 0.0, reason)]


def message(i: int, vote: Vote) -> dict[str, object]:
    action, confidence, output, reason = vote
    ts = START_MS + i * MINUTE_MS
    return {
        "symbol": "BTC",
        "ts": ts,
        "interval": "1m",
        "bar_id": f"BTC|1m|{ts}",
        "agent": "xgboost",
        "version": "20260101_000000",
        "action": action,
        "confidence": confidence,
        "outputs": None if action == "ABSTAIN" else [output],
        "weight": 0.3,
        "state": "active",
        "reason": reason,
    }


def lines(votes: list[Vote]) -> str:
    return "".join(json.dumps(message(i, vote), separators=(",", ":")) + "\n" for i, vote in enumerate(votes))


if __name__ == "__main__":
    for name, votes in recordings():
        (HERE / f"{name}.jsonl").write_text(lines(votes))
