"""What the worker knows of itself, for `/healthz` and `/readyz`: written by its loop, read by anybody."""

from __future__ import annotations

import time
from collections.abc import Callable

from streams.messages import CANARY, AgentState
from streams.validation import interval_ms
from worker.http import Condition, Readiness
from worker.pipeline import Pipeline, Result

FRESH_INTERVALS = 3


class Status:
    """One worker's health. Each attribute is replaced as a whole, so that readers need no lock."""

    def __init__(self, agents: tuple[str, ...], quorum: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._quorum = quorum
        self._last_arrival: tuple[float, str] | None = None
        self._voting: int | None = None
        self._agreeing = 0
        self._feed_healthy = True
        self._agents = {agent: {"state": "loading", "reason": ""} for agent in agents}
        self.heartbeat = clock()
        self.server = Condition(ok=False, detail="not connected yet")
        self.owner = Condition(ok=False, detail="does not own the namespace yet")

    def beat(self) -> None:
        """The loop turns."""
        self.heartbeat = self._clock()

    def feed(self, *, healthy: bool) -> None:
        """Whether the share of rejects is within its limit."""
        self._feed_healthy = healthy

    def batch(self, result: Result, *, healthy: bool) -> None:
        """What a committed batch says about freshness and quorum."""
        self.feed(healthy=healthy)
        if result.accepted.bars:
            self._last_arrival = self._clock(), result.accepted.bars[-1].interval
        if len(result.vectors.index):
            self._voting = int(result.signals.voting[-1])
            self._agreeing = int(result.signals.agreeing[-1])

    def agents(self, pipeline: Pipeline) -> None:
        """The state of every agent, with what a person needs to mend it."""
        self._agents = {
            report.agent: {
                "state": str(report.state),
                "reason": report.reason or "",
                "version": report.seat.model.version if report.seat.model else "",
                "detail": report.seat.refusal.detail if report.seat.refusal else "",
            }
            for report in pipeline.reports()
        }

    def readiness(self) -> Readiness:
        """Ready only with the server reachable, warm-up done, a fresh bar, and a voting quorum."""
        return Readiness(
            conditions={
                "redis": self.server,
                "owner": self.owner,
                "warm_up": self._warm_up(),
                "fresh_bar": self._fresh_bar(),
                "quorum": self._quorate(),
                "feed": Condition(ok=self._feed_healthy, detail="" if self._feed_healthy else "over 5 % rejects"),
            },
            agents=self._agents,
            counts=self._counts(),
        )

    def _counts(self) -> dict[str, int]:
        """As the states stand now; voting and agreeing as of the last signal."""
        states = [facts["state"] for agent, facts in self._agents.items() if not agent.endswith(CANARY)]
        return {
            "configured": len(states),
            "loaded": sum(state not in (AgentState.LOADING, AgentState.REFUSED) for state in states),
            "eligible": states.count(AgentState.ACTIVE),
            "voting": self._voting or 0,
            "agreeing": self._agreeing,
        }

    def _warm_up(self) -> Condition:
        if self._voting is None:
            return Condition(ok=False, detail="no symbol has its warm-up behind it in this process yet")
        return Condition(ok=True)

    def _fresh_bar(self) -> Condition:
        if self._last_arrival is None:
            return Condition(ok=False, detail="no bar arrived yet")
        arrived, interval = self._last_arrival
        age_s, limit_s = self._clock() - arrived, FRESH_INTERVALS * interval_ms(interval) / 1000
        return Condition(
            ok=age_s <= limit_s, detail=f"the last bar arrived {age_s:.0f} s ago, the limit is {limit_s:g} s"
        )

    def _quorate(self) -> Condition:
        voting = self._voting or 0
        return Condition(ok=voting >= self._quorum, detail=f"{voting} voting, quorum {self._quorum}")
