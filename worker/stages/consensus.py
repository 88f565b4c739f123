"""The consensus stage: ballots become signals, and both are looked back on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from streams.messages import Event
from worker import consensus
from worker.batches import Ballot, Fields, Signals, State, Vectors
from worker.ensemble import EnsembleWatch
from worker.quality import EnsembleLimits
from worker.scoreboard import Scoreboard

PARTS = ("ensemble", "pending", "scores")


class ConsensusStage:
    """Decides, watches the ensemble as a whole, and scores the votes of twelve bars ago."""

    def __init__(
        self,
        configured: int,
        *,
        quorum: int = 3,
        canary_share: float = consensus.CANARY_SHARE,
        ensemble: EnsembleLimits | None = None,
    ) -> None:
        self.configured = configured
        self.quorum = quorum
        self.canary_share = canary_share
        self.ensemble = EnsembleWatch(ensemble)
        self.scoreboard = Scoreboard()

    def process(
        self, vectors: Vectors, ballots: Sequence[Ballot], thresholds: Mapping[str, float]
    ) -> tuple[Signals, list[Event]]:
        """One signal for each voted row, and what the ensemble's watch says. `thresholds` by agent, for the scores."""
        signals = consensus.decide(
            ballots,
            configured=self.configured,
            quorum=self.quorum,
            withheld=vectors.accepted.withheld[vectors.index],
            stale=vectors.accepted.stale[vectors.index],
            canary_share=self.canary_share,
        )
        self.scoreboard.score(vectors, ballots, signals, thresholds)
        return signals, self.ensemble.watch(vectors.bars, ballots, signals)

    def changes(self) -> dict[str, Fields]:
        """The state fields to store, by part."""
        return {"ensemble": self.ensemble.changes(), **self.scoreboard.changes()}

    def restore(self, state: State) -> None:
        """Take up committed state. Raises `StateCorruptError`."""
        self.ensemble.restore(state.get("ensemble", {}))
        self.scoreboard.restore(state)
