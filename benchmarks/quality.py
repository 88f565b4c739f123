"""What watching costs: microseconds a vote in the safeguard, a bar in the scoreboard and the ensemble's watch.

    python -m benchmarks.quality [--seconds 0.5]

Windows are full; four agents vote on every bar of 50 series. The last line is what refreshing the
metrics over windows costs, which is done every two seconds and not every batch.
"""

from __future__ import annotations

import argparse

import numpy as np

from benchmarks.machine import line, microseconds
from streams.messages import AGENTS, Action, AgentState, Bar
from worker import consensus
from worker.batches import STATE_CODE, Ballot, Signals, Vectors
from worker.ensemble import EnsembleWatch
from worker.intake import Accepted
from worker.qsc import Safeguard
from worker.scoreboard import CONSENSUS, Scoreboard

BATCHES = (1, 64, 256)
SERIES, FEATURES = 50, 23
MINUTE_MS, START_MS = 60_000, 1_767_225_600_000
THRESHOLDS = dict.fromkeys(AGENTS, 0.001)


def batch(rows: int, first: int, rng: np.random.Generator) -> tuple[Vectors, list[Ballot], Signals]:
    """`rows` bars from the `first` on, in the turn of the series."""
    number = np.arange(first, first + rows)
    series, minute = number % SERIES, number // SERIES
    closes = 100 * np.exp(0.001 * rng.standard_normal(rows))
    bars = [
        Bar(f"S{s}", START_MS + int(m) * MINUTE_MS, "1m", c, c, c, c, 1.0)
        for s, m, c in zip(series, minute, closes.tolist(), strict=True)
    ]
    no = np.zeros(rows, np.bool_)
    accepted = Accepted(
        *([f"{START_MS + n}-0" for n in number], [START_MS] * rows, bars, series.astype(np.int64)),
        *(np.array([bar.ohlcv for bar in bars]), no, no, no),
    )
    vectors = Vectors(accepted, ("x",) * FEATURES, rng.standard_normal((rows, FEATURES)), {"v3": ~no}, np.arange(rows))
    ballots = [
        Ballot(
            *(agent, "1", 0.25, rng.integers(0, 3, rows).astype(np.int8), rng.uniform(0.4, 0.9, rows)),
            *(rng.standard_normal((rows, 1)), ~no, np.full(rows, STATE_CODE[AgentState.ACTIVE], np.int8)),
            (None,) * rows,
        )
        for agent in AGENTS
    ]
    return vectors, ballots, consensus.decide(ballots, configured=4, quorum=3, withheld=no, stale=no)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=0.5, help="of measuring, for each figure")
    seconds = parser.parse_args().seconds
    print(line())
    rng = np.random.default_rng(0)
    safeguard, scoreboard, ensemble = Safeguard(), Scoreboard(), EnsembleWatch()
    at = 0
    for _ in range(20):
        seen = batch(256, at, rng)
        safeguard.watch(*seen[:2])
        scoreboard.score(*seen, THRESHOLDS)
        at += 256
    print(f"{'batch':>5}  {'safeguard us/vote':>17}  {'scoreboard us/bar':>17}  {'ensemble us/bar':>15}")
    for rows in BATCHES:
        vectors, ballots, signals = batch(rows, at, rng)
        bars = vectors.accepted.bars
        votes = microseconds(lambda v=vectors, b=ballots: (safeguard.watch(v, b), safeguard.changes()), seconds)
        scores = microseconds(
            lambda v=vectors, b=ballots, s=signals: (scoreboard.score(v, b, s, THRESHOLDS), scoreboard.changes()),
            seconds,
        )
        agreed = microseconds(
            lambda n=bars, b=ballots, s=signals: (ensemble.watch(n, b, s), ensemble.changes()), seconds
        )
        print(f"{rows:>5}  {votes / rows / len(AGENTS):>17.2f}  {scores / rows:>17.2f}  {agreed / rows:>15.2f}")
    asked = [*AGENTS, CONSENSUS]
    figures = microseconds(
        lambda: ([safeguard.quality(a) for a in AGENTS], [scoreboard.scores(a) for a in asked]), seconds
    )
    print(f"figures of four agents and the consensus: {figures:.0f} us")
    assert Action.ABSTAIN not in ballots[0].action


if __name__ == "__main__":
    main()
