"""What the worker knows of itself, for `/healthz` and `/readyz`: written by its loop, read by anybody."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from streams.messages import CANARY, AgentState
from streams.validation import interval_ms
from worker.http import Condition, Readiness
from worker.intake import Accepted
from worker.pipeline import Result
from worker.roster import Record
from worker.stages.agents import AgentGroup, AgentReport
from worker.standing import FRESH_INTERVALS, Standing, Vote

CHAIN_NEEDS = ("warm_up", "fresh_bar", "quorum", "feed")
FEATURES_NEED = ("fresh_bar", "feed")
AGENT_NEEDS = ("agent",)
"""What readiness needs besides the server and the ownership, by what a process does."""

_NOT_SERVING = (str(AgentState.LOADING), str(AgentState.REFUSED), str(AgentState.WARMING_UP))


def wall_clock_ms() -> int:
    """Unix time, as the server's entry IDs have it."""
    return time.time_ns() // 1_000_000


class Status:
    """One process's health. Each attribute is replaced as a whole, so that readers need no lock.

    `vote` is the one that stands for the worker (`worker.standing`), None before the first; `last_arrival` is
    the shortest interval seen and when its newest bar arrived, ms. `now_ms` is the clock that entry IDs go by.
    """

    def __init__(
        self,
        agents: tuple[str, ...],
        quorum: int,
        now_ms: Callable[[], int] = wall_clock_ms,
        *,
        needs: Sequence[str] = CHAIN_NEEDS,
    ) -> None:
        self._needs = needs
        self._now_ms = now_ms
        self.quorum = quorum
        self._standing = Standing(agents)
        self._feed_healthy = True
        self._agents = {agent: {"state": "loading", "reason": ""} for agent in agents}
        self.vote: Vote | None = None
        self.last_arrival: tuple[str, int] | None = None
        self.heartbeat = time.monotonic()
        self.server = Condition(ok=False, detail="not connected yet")
        self.owner = Condition(ok=False, detail="does not own the namespace yet")

    def beat(self) -> None:
        """The loop turns."""
        self.heartbeat = time.monotonic()

    def feed(self, *, healthy: bool) -> None:
        """Whether the share of rejects is within its limit."""
        self._feed_healthy = healthy

    def arrived(self, accepted: Accepted) -> None:
        """The bars of a committed batch, where nothing else is known of them."""
        self._standing.arrive(accepted, self._now_ms())
        self.last_arrival = self._standing.shortest()

    def batch(self, result: Result, *, healthy: bool) -> None:
        """What a committed batch says about freshness and quorum."""
        self.feed(healthy=healthy)
        self._standing.note(result, self._now_ms())
        self.last_arrival = self._standing.shortest()
        self._judge()

    def _judge(self) -> None:
        self.vote = self._standing.vote(a for a, facts in self._agents.items() if facts["state"] == AgentState.ACTIVE)

    def agents(self, group: AgentGroup) -> None:
        """The state of every agent, with what a person needs to mend it; `pinned`: newer files wait for an order."""
        self.told(group.reports(), group.records)

    def told(self, reports: Sequence[AgentReport], records: Mapping[str, Record]) -> None:
        """The same of reports that say more than the group does."""
        pinned = {agent for agent, record in records.items() if record.pinned}
        self._agents = {
            report.agent: {
                "state": str(report.state),
                "reason": report.reason or "",
                "version": report.seat.model.version if report.seat.model else "",
                "file": report.seat.file,
                "pinned": "yes" if report.agent in pinned else "no",
                "detail": report.detail,
            }
            for report in reports
        }
        self._judge()

    def heard(self, facts: Mapping[str, Mapping[str, str]]) -> None:
        """The agents as their votes have them: what another process knows of them."""
        self._agents = {agent: dict(told) for agent, told in facts.items()}
        self._judge()

    def readiness(self) -> Readiness:
        """Ready only with the server reachable, warm-up done, a fresh bar, and a voting quorum."""
        judges = {
            "warm_up": self._warm_up,
            "fresh_bar": self._fresh_bar,
            "quorum": self._quorate,
            "feed": self._feed,
            "agent": self._serving,
        }
        return Readiness(
            conditions={
                "redis": self.server,
                "owner": self.owner,
                **{name: judges[name]() for name in self._needs},
            },
            agents=self._agents,
            counts=self.counts(),
        )

    def counts(self) -> dict[str, int]:
        """As the states stand now; voting and agreeing by the vote that stands for the worker."""
        states = [facts["state"] for agent, facts in self._agents.items() if not agent.endswith(CANARY)]
        return {
            "configured": len(states),
            "loaded": sum(state not in (AgentState.LOADING, AgentState.REFUSED) for state in states),
            "eligible": states.count(AgentState.ACTIVE),
            "voting": self.vote.voting if self.vote else 0,
            "agreeing": self.vote.agreeing if self.vote else 0,
        }

    def _feed(self) -> Condition:
        return Condition(ok=self._feed_healthy, detail="" if self._feed_healthy else "over 5 % rejects")

    def _serving(self) -> Condition:
        """Every agent of this process votes, muted or not."""
        wanting = [
            f"{agent} is {facts['state']} {facts['reason']}".strip()
            for agent, facts in self._agents.items()
            if facts["state"] in _NOT_SERVING and not agent.endswith(CANARY)
        ]
        return Condition(ok=not wanting, detail="; ".join(wanting))

    def _warm_up(self) -> Condition:
        if self.vote is None:
            return Condition(ok=False, detail="no symbol has its warm-up behind it in this process yet")
        return Condition(ok=True)

    def _fresh_bar(self) -> Condition:
        """Bars of the shortest interval must arrive: a daily bar is no sign of life of a feed of minutes."""
        if self.last_arrival is None:
            return Condition(ok=False, detail="no bar arrived yet")
        interval, arrived_ms = self.last_arrival
        age_s, limit_s = (self._now_ms() - arrived_ms) / 1000, FRESH_INTERVALS * interval_ms(interval) / 1000
        detail = f"the last bar of {interval} arrived {age_s:.0f} s ago, the limit is {limit_s:g} s"
        return Condition(ok=age_s <= limit_s, detail=detail)

    def _quorate(self) -> Condition:
        voting = self.vote.voting if self.vote else 0
        return Condition(ok=voting >= self.quorum, detail=f"{voting} voting, quorum {self.quorum}")
